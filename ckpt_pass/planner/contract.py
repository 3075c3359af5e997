"""A problem made small for the exact solver, without losing a plan.

Views cost neither time nor bytes and follow their base, so they are contracted into what they
read: what is left are the ops that allocate (*makers*), the storages that they make (*values*),
and the anchors that read such values (*stages*). Anchors that read none change nothing about what
is kept; all that is left of them are the bytes that they need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ckpt_pass._errors import CkptPassError
from ckpt_pass.planner.problem import Op, Problem, needed_by
from ckpt_pass.planner.schedule import anchor_order


class UnsupportedProblemError(CkptPassError):
    """The exact solver cannot describe an op of the problem; other solvers can."""


@dataclass(frozen=True)
class Maker:
    """An op that allocates and that the backward may have to run.

    Attributes:
        index: of the op.
        makes, reads: values; what it reads through views is among the latter.
        overwrites: values among ``reads`` whose memory its result may take.
        runs: whether the backward may run it.
        once: whether it may run there only once.
    """

    index: int
    makes: tuple[int, ...]
    reads: tuple[int, ...]
    overwrites: tuple[int, ...]
    runs: bool
    once: bool


@dataclass(frozen=True)
class Value:
    """A storage that a maker makes.

    Attributes:
        maker: the op that allocates it.
        saver: the op whose result is saved to keep it; ``None`` if it cannot be saved.
        bound: whether the backward must not make it (its ``saver`` must be saved).
        returned: whether it is an output of the forward, which the caller holds: made again, it is
            there twice.
        gradient: whether it is an output of the backward.
    """

    maker: int
    saver: int | None
    bound: bool
    returned: bool
    gradient: bool


@dataclass(frozen=True)
class Stage:
    """An anchor that reads values, and the anchors after it that read none.

    Attributes:
        anchor: the op.
        late: whether it runs in any case; the last stages only ask for gradients that are ready.
        reads: values that must be there.
        makers: what may have to run before the anchor, in order.
        overwrites: values among ``reads`` whose memory the anchor's result may take.
        before_bytes: bytes of the backward's own that are there before the anchor runs.
        rows: (bytes of the backward's own, whether ``reads`` are there) while anchors run.
    """

    anchor: int
    late: bool
    reads: frozenset[int]
    makers: tuple[int, ...]
    overwrites: tuple[int, ...]
    before_bytes: int
    rows: tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class Contracted:
    """What is left of a problem.

    Attributes:
        problem: the problem.
        makers: in joint order.
        values: by storage.
        stages: in order.
        constant_bytes: what the caller holds through the backward.
        forward_roots: ops that the forward runs in any case.
    """

    problem: Problem
    makers: dict[int, Maker]
    values: dict[int, Value]
    stages: tuple[Stage, ...]
    constant_bytes: int
    forward_roots: frozenset[int]

    @property
    def size(self) -> int:
        """Makers times stages: how many decisions to recompute there are."""
        return sum(len(stage.makers) for stage in self.stages)

    @classmethod
    def of(cls, problem: Problem) -> Contracted:
        """Contract a problem; made once.

        Raises:
            UnsupportedProblemError: an op mixes storages of its own with those of others, reads
                several outputs of an op as one, or is a view that takes time.
        """
        return problem.derived("contracted", _contract)


def _contract(problem: Problem) -> Contracted:
    anchors = anchor_order(problem)
    ends = [index for index in problem.backward_outputs if not problem.ops[index].late]
    needed = sorted(needed_by(problem.ops, (*anchors, *ends), frozenset()))
    early = [index for index in needed if not problem.ops[index].late]
    values_of = _Reads(problem, needed)
    makers = {i: values_of.maker(i) for i in early if problem.ops[i].makes}
    values = {s: _value(problem, early, s, i) for i, maker in makers.items() for s in maker.makes}
    stages = _stages(problem, values_of, makers, values, (*anchors, *ends))
    constant = sum(problem.storage_bytes[s] for s in problem.held)
    always = frozenset(needed_by(problem.ops, problem.forward_roots, frozenset()))
    return Contracted(problem, makers, values, stages, constant, always)


class _Reads:
    """For each op that the backward needs: the values without tangents behind its result.

    Those that make something from tangents are left out: nothing is behind their results.
    """

    def __init__(self, problem: Problem, needed: Sequence[int]) -> None:
        self._problem = problem
        self._behind: dict[int, frozenset[int]] = {}
        self._made = {s for op in problem.ops if not op.late for s in op.makes}
        for index in needed:
            op = problem.ops[index]
            if not op.late:
                self._behind[index] = self._value_of(index, op)
            elif not op.makes:
                self._behind[index] = frozenset(self._made.intersection(op.holds))

    def behind(self, index: int) -> frozenset[int]:
        """The values of one op's result."""
        return self._behind[index]

    def _value_of(self, index: int, op: Op) -> frozenset[int]:
        held = self._made.intersection(op.holds)
        if op.makes:
            if held != set(op.makes):
                raise self._unsupported(index, "holds storages that others made besides its own")
            return frozenset(held)
        if op.time_s or op.workspace_bytes or op.random_state_bytes:
            raise self._unsupported(index, "makes nothing but takes time or memory")
        if not self._made.intersection(op.touches) <= held:
            raise self._unsupported(index, "is a view that reads other values too")
        return frozenset(held)

    def of(self, index: int) -> frozenset[int]:
        """The values that an op reads."""
        op = self._problem.ops[index]
        sources = [i for i in op.inputs if i in self._behind]
        found = frozenset(s for i in sources for s in self._behind[i])
        touched = self._made.intersection(op.touches) - set(op.makes)
        if found != touched or any(len(self._problem.ops[i].makes) > 1 for i in sources):
            raise self._unsupported(index, "touches other values than those of its inputs")
        return found

    def maker(self, index: int) -> Maker:
        """An op that allocates."""
        problem, op = self._problem, self._problem.ops[index]
        reads = tuple(sorted(self.of(index)))
        runs = not op.forward or not (op.ordered or op.must_save)
        over = tuple(s for s in op.overwrites if s in reads)
        return Maker(index, op.makes, reads, over, runs, not problem.may_repeat(index))

    def _unsupported(self, index: int, why: str) -> UnsupportedProblemError:
        name = self._problem.ops[index].name
        return UnsupportedProblemError(
            f"Op {index} ({name}) {why}, which the exact solver cannot describe; expected ops that "
            "allocate their results, views of one value, and one op for each of several outputs. "
            "Use solver='layers' or solver='auto' for this step."
        )


def _value(problem: Problem, early: Iterable[int], storage: int, maker: int) -> Value:
    """What holds a storage, and which of it can be saved."""
    ops = problem.ops
    holders = [index for index in early if storage in ops[index].holds]
    savers = [i for i in holders if ops[i].savable and ops[i].holds == (storage,)]
    saver = min(savers, default=None)
    if saver is not None:
        beside = [i for i in holders if i not in (saver, maker) and not _through(ops, i, saver)]
        if beside:
            raise UnsupportedProblemError(
                f"Op {beside[0]} ({ops[beside[0]].name}) views what op {maker} ({ops[maker].name}) "
                f"made, but not through op {saver} ({ops[saver].name}), which is what is saved. "
                "Use solver='layers' or solver='auto' for this step."
            )
    bound = saver is not None and ops[saver].must_save
    if saver is not None and ops[saver].must_recompute:
        saver = None
    returned, gradient = storage in problem.forward_outputs, storage in problem.output_storages
    return Value(maker, saver, bound, returned, gradient)


def _through(ops: tuple[Op, ...], index: int, saver: int) -> bool:
    """Whether a view is taken of the result of ``saver``."""
    stack = [index]
    while stack:
        current = stack.pop()
        if current == saver:
            return True
        if not ops[current].makes:
            stack.extend(ops[current].inputs)
    return False


def _stages(
    problem: Problem,
    values_of: _Reads,
    makers: dict[int, Maker],
    values: dict[int, Value],
    anchors: tuple[int, ...],
) -> tuple[Stage, ...]:
    before, during, taken = _own_bytes(problem, anchors)
    above: dict[int, frozenset[int]] = {}
    for index, maker in makers.items():
        sources = {values[s].maker for s in maker.reads}
        above[index] = frozenset({index}).union(*(above[i] for i in sources))
    found: list[Stage] = []
    rows: list[tuple[int, bool]] = []
    for place, anchor in enumerate(anchors):
        late = problem.ops[anchor].late
        reads = values_of.of(anchor) if late else values_of.behind(anchor)
        if not found or reads:
            rows = []
            sources = {values[s].maker for s in reads}
            candidates = frozenset[int]().union(*(above[i] for i in sources))
            runs = tuple(sorted(i for i in candidates if makers[i].runs))
            over = () if place in taken else problem.ops[anchor].overwrites
            over = tuple(s for s in over if late and s in reads)
            found.append(Stage(anchor, late, reads, runs, over, before[place], ()))
        if late:
            rows.append((during[place] + problem.ops[anchor].workspace_bytes, bool(reads)))
        found[-1] = _with_rows(found[-1], rows)
    return tuple(found)


def _with_rows(stage: Stage, rows: list[tuple[int, bool]]) -> Stage:
    """The rows that matter: of the anchors that read nothing, the one that needs the most."""
    highest = [max((r for r in rows if r[1] is there), default=None) for there in (True, False)]
    kept = tuple(row for row in highest if row is not None)
    if len(kept) == 2 and kept[1][0] <= kept[0][0]:
        kept = kept[:1]
    return replace(stage, rows=kept)


def _own_bytes(problem: Problem, anchors: tuple[int, ...]) -> tuple[list[int], list[int], set[int]]:
    """Bytes of what late ops made, before and while each anchor runs, and who overwrites such."""
    ops, last = problem.ops, len(anchors) - 1
    stay = set(problem.output_storages)
    first: dict[int, int] = {}
    final: dict[int, int] = defaultdict(int)
    for place, index in enumerate(anchors):
        if not ops[index].late:
            continue
        first.update((s, place) for s in ops[index].makes)
        final.update((s, place) for s in ops[index].touches if s in first)
    final.update((s, last) for s in problem.output_storages if s in first)
    before, during = [0] * len(anchors), [0] * len(anchors)
    for storage, begin in first.items():
        nbytes = problem.storage_bytes[storage]
        for place in range(begin, final[storage] + 1):
            during[place] += nbytes
            before[place] += nbytes if place > begin else 0
    taken = set()
    for place, index in enumerate(anchors):
        op = ops[index]
        if op.late and any(final.get(s) == place and s not in stay for s in op.overwrites):
            taken.add(place)
            during[place] -= problem.storage_bytes[op.makes[0]]
    return before, during, taken
