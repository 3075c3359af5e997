"""What a plan consists of: decisions, saved activations, and how to make or carry it out again."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.policy.sites import Bytes, CallSite


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one op execution's output.

    Attributes:
        site: which execution.
        op_class: its class in the taxonomy.
        nbytes: bytes of its outputs' own storages; 0 for views.
        decision: the tag that the partitioner acted on.
        rule: the rule that made it, in words.
        fate: ``saved`` (held from forward to backward), ``offloaded`` (saved, and kept somewhere
            else in between), ``recomputed`` (runs again in the backward), or ``unused`` (the
            backward needs none of these).
        region: the layer or checkpoint region, if any.
        times: how often the backward runs it: more than once where its value was dropped again.
        time_s: modelled seconds of running it once.
    """

    site: CallSite
    op_class: str
    nbytes: Bytes
    decision: CheckpointPolicy
    rule: str
    fate: str
    region: str | None
    times: int = 0
    time_s: float = 0.0

    @property
    def is_view(self) -> bool:
        """Whether the op only looks at memory that another one made."""
        return self.op_class in ("view", "metadata")

    def __str__(self) -> str:
        return (
            f"{self.site!s:58} {self.op_class:14} {format_bytes(self.nbytes):>10} "
            f"{self.fate:10} {self.decision.name:17} {self.rule}"
        )


@dataclass(frozen=True, slots=True)
class SavedActivation:
    """One value that the backward gets from the forward.

    Attributes:
        kind: ``activation`` (made by the forward and held for the backward), ``output`` (an
            activation that the forward also returns), ``offloaded`` (an activation that is kept
            somewhere else in between), ``random state`` (kept so that a
            recomputed random op draws the same numbers), ``input`` (an argument) or ``parameter``
            (a parameter or buffer); the last two exist anyway.
        site: where it was made; ``None`` for inputs.
        shape, dtype: of the saved tensor.
        nbytes: bytes of its storage that are held on top of what existed before the step; where it
            is offloaded, those that it leaves free.
        provenance: where it comes from, in words.
        reason: the rule that saved it, in words.
    """

    kind: str
    site: CallSite | None
    shape: tuple[object, ...]
    dtype: str
    nbytes: Bytes
    provenance: str
    reason: str

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in self.shape) or "scalar"
        return (
            f"{self.kind:12} {format_bytes(self.nbytes):>10}  {self.dtype}[{shape}]  "
            f"{self.provenance}" + (f"  ({self.reason})" if self.reason else "")
        )


class SavedActivations(tuple[SavedActivation, ...]):
    """All values that the backward gets from the forward, in the order they are made."""

    __slots__ = ()

    @property
    def saved_bytes(self) -> Bytes:
        """Bytes held between forward and backward on top of inputs, parameters and outputs."""
        return _total(item.nbytes for item in self if item.kind in ("activation", "random state"))

    def of_kind(self, kind: str) -> SavedActivations:
        """Only the values of one kind."""
        return SavedActivations(item for item in self if item.kind == kind)

    def __str__(self) -> str:
        lines = [str(item) for item in self]
        return "\n".join([*lines, f"saved: {format_bytes(self.saved_bytes)}"])


def _total(items: object) -> Bytes:
    total: Bytes = sum(items)  # type: ignore[call-overload]
    return total


@dataclass(frozen=True)
class Signature:
    """What a plan's step takes.

    Attributes:
        torch_version: the torch that the plan was made with.
        arguments, parameters: dtypes and shapes, in alphabetical order; of an eager step
            parameters with their names.
        library_version: the version of this library that made it.
    """

    torch_version: str
    arguments: tuple[str, ...]
    parameters: tuple[str, ...]
    library_version: str = ""


@dataclass(frozen=True)
class Replay:
    """What was decided for a joint graph, by the labels of its nodes.

    Attributes:
        saved: the values that cross to the backward.
        drops: pairs: once the first has run, the second's values are not kept any longer.
        merged: pairs of equal values: the first is the second.
        moves: of the saved values that leave the device: the value, what runs before its memory is
            free, what runs right after it is asked for, and which run of that it is.
    """

    saved: tuple[str, ...]
    drops: tuple[tuple[str, str], ...]
    merged: tuple[tuple[str, str], ...]
    moves: tuple[tuple[str, str, str, int], ...] = ()
