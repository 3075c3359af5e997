"""What is in memory when: the lives that the simulator counts, each with what it is there for.

Nothing is simulated anew: at every place of the schedule the lives there add up to the simulator's
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ckpt_pass.planner.liveness import Lives, backward_lives, crossing, lives, random_states
from ckpt_pass.planner.moves import Move
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Schedule

#: What memory is there for.
OUTPUT = "output"
GRADIENT = "gradient"
SAVED = "saved"
MOVED = "offloaded"
RECOMPUTED = "recomputed"
PASSING = "passing"
BACKWARD = "backward"
WORKSPACE = "workspace"
STATE = "random state"
OTHERS = "others"
KINDS = (
    OUTPUT,
    GRADIENT,
    SAVED,
    MOVED,
    RECOMPUTED,
    PASSING,
    BACKWARD,
    WORKSPACE,
    STATE,
    OTHERS,
)


@dataclass(frozen=True, slots=True)
class Life:
    """Memory from the op that takes it to its last use.

    Attributes:
        maker: the op that makes it (its index in the problem); -1 for what no op makes.
        nbytes: how much.
        first, last: places in the schedule, forward then backward; both included.
        kind: ``output`` (the caller has it), ``gradient`` (stays to the end), ``saved``,
            ``offloaded`` (saved, and here before it goes or once it is back), ``recomputed``
            (made again in the backward; also while it is there in the forward), ``passing`` (of
            the forward, and not needed afterwards), ``backward`` (of the backward alone),
            ``workspace`` (of a kernel), ``random state``, or ``others`` (beside the step).
    """

    maker: int
    nbytes: int
    first: int
    last: int
    kind: str


def alive_in(problem: Problem, steps: Schedule, moves: Sequence[Move] = ()) -> tuple[Life, ...]:
    """The lives of a step, as :func:`ckpt_pass.planner.liveness.simulate` counts its bytes.

    Args:
        problem, steps, moves: as for it.

    Returns:
        In the order in which they begin.
    """
    found = [
        *_moved(_values(problem, steps), problem, steps, moves),
        *_transients(problem, steps),
        *_states(problem, steps),
        *_workspaces(problem, steps),
    ]
    there = (life for life in found if life.nbytes and life.first <= life.last)
    return tuple(sorted(there, key=lambda life: (life.first, life.maker, life.last)))


@dataclass(frozen=True, slots=True)
class _Value:
    """A storage's life; its kind is known once both halves are."""

    storage: int
    life: Life


def _values(problem: Problem, steps: Schedule) -> list[_Value]:
    outputs = set(problem.forward_outputs)
    held = crossing(problem, steps)
    forward = lives(problem, steps.forward, (), held | outputs, held=(), overwrite=False)
    backward = backward_lives(problem, steps)
    length, again = len(steps.forward), set(steps.backward)
    found = list(_of_backward(problem, backward, length))
    ends = {value.storage: value.life.last for value in found if value.life.first < length}
    found = [value for value in found if value.life.first >= length]
    for storage, begin, end in _spans(forward):
        maker = problem.makers[storage]
        crosses = storage in ends
        kind = RECOMPUTED if maker in again else PASSING
        kind = SAVED if crosses and storage in held else kind
        kind = OUTPUT if storage in outputs else kind
        last = ends.pop(storage) if crosses else end
        found.append(_Value(storage, _life(problem, storage, begin, last, kind)))
    given = ((s, last) for s, last in ends.items())  # the backward begins with these
    found += [_Value(s, _life(problem, s, length, last, BACKWARD)) for s, last in given]
    return found


def _life(problem: Problem, storage: int, first: int, last: int, kind: str) -> Life:
    maker = problem.makers.get(storage, -1)
    return Life(maker, problem.storage_bytes[storage], first, last, kind)


def _spans(found: Lives) -> Iterator[tuple[int, int, int]]:
    """Storage, first and last place of what is made along a schedule."""
    columns = (found.storage, found.begins, found.ends, found.made)
    for storage, begin, end, made in zip(*(c.tolist() for c in columns), strict=True):
        if made:
            yield storage, begin, end


def _of_backward(problem: Problem, found: Lives, length: int) -> Iterator[_Value]:
    """The lives in the backward; those of what is there when it begins do so before it.

    Args:
        problem: the step.
        found: the storages along the backward.
        length: of the forward.
    """
    whole = length + len(found.bytes_at)
    for storage in found.throughout.tolist():
        yield _Value(storage, _life(problem, storage, length - 1, whole - 1, SAVED))
    # Who writes over it has its memory from that place on.
    last_of = {int(found.last[i]): int(i) for i in found.overwritten}
    over = set(last_of.values())
    stays = set(problem.output_storages)
    columns = (found.storage, found.begins, found.ends, found.made, found.counted)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for number, (storage, begin, end, made, counted) in enumerate(rows):
        if not counted:
            continue
        maker = problem.makers.get(storage, -1)
        kind = BACKWARD
        if maker >= 0 and problem.ops[maker].forward:
            kind = RECOMPUTED
        elif storage in stays:
            kind = GRADIENT
        first = length + begin if made else length - 1
        last = length + end - (number in over)
        yield _Value(storage, _life(problem, storage, first, last, kind))


def _transients(problem: Problem, steps: Schedule) -> Iterator[Life]:
    """What is made although it is there, and goes at once."""
    length = len(steps.forward)
    for place, storage in steps.transient:
        yield _life(problem, storage, length + place, length + place, RECOMPUTED)


def _states(problem: Problem, steps: Schedule) -> Iterator[Life]:
    """Random states from where they are taken to where they are put back, and the present ones."""
    length = len(steps.forward)
    for index, nbytes in random_states(problem, steps).items():
        runs = [length + place for place, other in enumerate(steps.backward) if other == index]
        yield Life(index, nbytes, steps.forward.index(index), runs[-1], STATE)
        yield from (Life(index, nbytes, place, place, STATE) for place in runs)


def _workspaces(problem: Problem, steps: Schedule) -> Iterator[Life]:
    for place, index in enumerate((*steps.forward, *steps.backward)):
        yield Life(index, problem.ops[index].workspace_bytes, place, place, WORKSPACE)


def _moved(
    values: Sequence[_Value], problem: Problem, steps: Schedule, moves: Sequence[Move]
) -> Iterator[Life]:
    """The lives, those of what is moved in two parts."""
    length = len(steps.forward)
    place_of = {index: place for place, index in enumerate(steps.forward)} if moves else {}
    move_of = {move.storage: move for move in moves}
    for value in values:
        life, move = value.life, move_of.get(value.storage)
        if move is None or life.first >= length:
            yield life
            continue
        yield replace(life, last=place_of[move.released_after], kind=MOVED)
        yield replace(life, first=length + move.fetched_before, kind=MOVED)
