"""What is recorded of an eager training step: its ops, storages, saved values and module calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ckpt_pass.policy.sites import CallSite

#: Stands before the name of an op that another one comes to on a rank's own part of a DTensor.
LOCAL = "local "
#: The moment of what never happens.
NEVER = 1 << 60


@dataclass
class StorageRecord:
    """A storage that an op of the step allocated, or autograd for its graph (``of_graph``).

    One that is ``resized`` has its memory taken and given back by Python, whoever refers to it.
    """

    nbytes: int
    born: int
    dies: int = NEVER
    of_graph: bool = False
    resized: bool = False


@dataclass
class SavedRecord:
    """A value that autograd saved at a moment; ``storage`` is -1 for what existed before.

    It is ``plain`` where a store takes such a tensor. ``node`` tells whether the same node saved
    another one. One that has no history ``waits``: its op may fill it yet.
    """

    storage: int
    saved_at: int
    released: int = NEVER
    plain: bool = False
    node: int = 0
    waits: bool = False


@dataclass
class OpRecord:
    """One op that ran.

    Attributes:
        site: its call site; of the backward ``None``.
        call: one node that stands for all equal calls: op, arguments, results without data.
        makes: the storages that it allocated.
        uses: the storages of the step among its arguments.
        changes: those of them that it overwrites; -1 for what existed before.
        draws: whether it draws random numbers.
        effects: whether it must not run twice.
        casts_weight: whether it is a cast that regions make again in any case.
        cached: whether autocast then hands out what it made to all that use the weight.
        buffers: those among its arguments, running statistics apart, by their storages.
        moves: those of them that it overwrites, and their bytes.
    """

    site: CallSite | None
    call: fx.Node
    makes: tuple[int, ...]
    uses: tuple[int, ...]
    changes: tuple[int, ...]
    draws: bool
    effects: bool
    casts_weight: bool = False
    cached: bool = False
    buffers: frozenset[int] = frozenset()
    moves: tuple[tuple[int, int], ...] = ()


@dataclass
class CallRecord:
    """One call of a module.

    Attributes:
        ops, values: the ops and saved values inside, as ranges.
        trains: whether all of it is in training mode.
        outputs: the storages that it returned.
        given: those among its arguments, of which a region holds all, used or not.
        tensors: those of the tensors among its arguments, in order, and whether each has a history
            and can be moved.
        held: those that objects among its arguments hold when the forward ends.
        dropped: those that it made and put into objects of which a region lets go at its end.
        buffers: those that it is given, likewise.
        differentiable: whether gradients are enabled where it begins; it is no region if not.
    """

    name: str
    parent: int
    ops: tuple[int, int]
    values: tuple[int, int]
    trains: bool
    outputs: tuple[int, ...] = ()
    given: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    tensors: tuple[tuple[int, bool], ...] = ()
    buffers: frozenset[int] = frozenset()
    differentiable: bool = True


@dataclass
class FormulaRecord:
    """The backward of an op, whose formula goes another way on real tensors.

    Attributes:
        call: of the op.
        needs: which of its tensors require a gradient.
        ops: what it ran on fake ones, as a range.
    """

    call: fx.Node
    needs: tuple[bool, ...]
    ops: tuple[int, int]


@dataclass
class EagerTrace:
    """A recorded step; moments count the ops that had begun."""

    ops: list[OpRecord] = field(default_factory=list)
    storages: list[StorageRecord] = field(default_factory=list)
    saved: list[SavedRecord] = field(default_factory=list)
    asked: dict[int, int] = field(default_factory=dict)
    #: The saved values that were asked for more than once, and the moment of the last time but one.
    asked_again: dict[int, int] = field(default_factory=dict)
    calls: list[CallRecord] = field(default_factory=list)
    formulas: list[FormulaRecord] = field(default_factory=list)
    forward_length: int = 0
    #: What the step returns, and its caller holds.
    output_bytes: int = 0
    #: What an earlier step has left that this one finds: gradients.
    found_bytes: int = 0
    #: What parameters' gradients keep besides themselves, being parts of something larger.
    beside_gradients_bytes: int = 0
    #: What it hands to other stages of a pipeline: its outputs, and the gradients of its inputs.
    passed_bytes: int = 0
    #: The storages that are resized.
    resized: list[StorageRecord] = field(default_factory=list)

    def leave_out_resized(self) -> None:
        """Nobody holds the memory of a resized storage: as if its values had existed before."""
        away = {number for number, storage in enumerate(self.storages) if storage.resized}
        self.resized = [self.storages[number] for number in sorted(away)]
        if not away:
            return

        def others(numbers: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(number for number in numbers if number not in away)

        for op in self.ops:
            op.uses = others(op.uses)
        for saved in self.saved:
            saved.storage = -1 if saved.storage in away else saved.storage
        for call in self.calls:
            call.outputs, call.given = others(call.outputs), others(call.given)
            call.held, call.dropped = others(call.held), others(call.dropped)
            call.tensors = tuple((-1 if s in away else s, goes) for s, goes in call.tensors)
