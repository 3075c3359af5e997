"""The order in which a step runs its ops, given what it saves and what it drops.

The forward keeps its order. In the backward, ops that depend on a tangent (*anchors*) keep their
order too, but for weight gradients, which stand before the product that makes the gradient of the
same layer's input: they free what they read before that makes something new. Every other op stands
just before the first anchor that needs it. A value stays until its last use, unless it is
*dropped* after some anchor; what needs it later then computes it again, so that a value may be
recomputed more than once (nested checkpointing; Griewank and Walther, ACM TOMS 26(1), 2000).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ckpt_pass.planner.problem import Op, Problem, needed_by

#: (anchor, op): after ``anchor`` has run, what ``op`` allocated is not kept.
Drop = tuple[int, int]


@dataclass(frozen=True)
class Schedule:
    """A step as it runs.

    Attributes:
        saved: forward ops whose results the backward reads.
        forward, backward: op indices in order; the backward may repeat forward ops.
        transient: (place in the backward, storage) of outputs that an op makes although the step
            still has them, because another output of the same op is needed; they go at once.
    """

    saved: frozenset[int]
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    transient: frozenset[tuple[int, int]] = frozenset()


def schedule(problem: Problem, saved: Collection[int], drops: Collection[Drop] = ()) -> Schedule:
    """The order of a whole step.

    Args:
        problem: the step.
        saved: forward ops whose results the backward gets; what it does not read is left out.
        drops: what is not kept in the backward.
    """
    ops, keep, inputs = problem.ops, frozenset(saved), problem.inputs
    anchors = (*anchor_order(problem), *problem.backward_outputs)  # some have no tangent
    order, transient = unroll(problem, anchors, keep, drops)
    read = set().union(*map(inputs.__getitem__, set(order)), problem.backward_outputs)
    keep &= read
    whole, its_ops = problem.derived("forward", _forward)
    beside = needed_by(ops, keep, its_ops)  # what runs only to be saved
    forward = tuple(sorted(beside | its_ops)) if beside else whole
    return Schedule(keep, forward, tuple(order), frozenset(transient))


def _forward(problem: Problem) -> tuple[tuple[int, ...], frozenset[int]]:
    """What the forward runs whatever is saved, in order and as a set."""
    found = needed_by(problem.ops, problem.forward_roots, frozenset())
    return tuple(sorted(found)), frozenset(found)


def unroll(
    problem: Problem, anchors: Iterable[int], had: Collection[int], drops: Collection[Drop]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Put before each anchor what it lacks.

    Args:
        problem: the step.
        anchors: ops of the backward, in order.
        had: ops whose results are there at the beginning.
        drops: what is not kept; what was there at the beginning always is.

    Returns:
        The order, and the transient outputs in it (:class:`Schedule`).
    """
    inputs, several = problem.inputs, problem.several_outputs
    present, stays = set(had), frozenset(had)
    dropped: dict[int, list[int]] = defaultdict(list)
    for anchor, index in drops:
        dropped[anchor].append(index)
    order: list[int] = []
    transient: list[tuple[int, int]] = []
    for anchor in anchors:
        if anchor in present:
            continue
        if present.issuperset(inputs[anchor]):  # most often
            order.append(anchor)
            present.add(anchor)
        else:
            missing = _lacking(inputs, anchor, present)
            if several.isdisjoint(missing):
                order += missing
            else:
                for index in missing:
                    if index in several:
                        transient += _still_there(problem, index, present, len(order))
                    order.append(index)
            present.update(missing)
        if anchor in dropped:
            for index in dropped[anchor]:
                for storage in problem.ops[index].makes:
                    present.difference_update(problem.holders[storage] - stays)
    return order, transient


def _lacking(inputs: Sequence[Sequence[int]], anchor: int, present: Collection[int]) -> list[int]:
    """An op and what must run for it, in order; :func:`needed_by` in the innermost loop of all."""
    needed, stack = {anchor}, [anchor]
    while stack:
        for source in inputs[stack.pop()]:
            if source not in present and source not in needed:
                needed.add(source)
                stack.append(source)
    return sorted(needed)


def _still_there(
    problem: Problem, index: int, present: set[int], place: int
) -> list[tuple[int, int]]:
    return [
        (place, storage)
        for storage in problem.ops[index].makes
        if any(holder in present for holder in problem.holders[storage])
    ]


def anchor_order(problem: Problem) -> tuple[int, ...]:
    """The ops that depend on a tangent, in the order in which they run."""
    return problem.derived("anchors", _anchor_order)


def _anchor_order(problem: Problem) -> tuple[int, ...]:
    live = needed_by(problem.ops, problem.backward_outputs, frozenset())
    anchors = [index for index in sorted(live) if problem.ops[index].late]
    return _gradients_of_weights_first(problem, anchors)


def _gradients_of_weights_first(problem: Problem, anchors: Sequence[int]) -> tuple[int, ...]:
    """Move weight gradients before the nearest earlier op that reads the same gradient.

    Only those that read what the forward made, too, which may go then: a gradient of a bias reads
    nothing else, and would only be there earlier.
    """
    ops = problem.ops
    position = {index: place for place, index in enumerate(anchors)}
    leaves = _leaves(problem, anchors)
    late = {s for index in anchors for s in ops[index].makes} | set(problem.given)
    reader: dict[int, list[int]] = defaultdict(list)  # late storage -> ops that make from it
    before: dict[int, list[int]] = defaultdict(list)
    made_at: dict[int, int] = {}

    def frees(index: int) -> bool:
        others = set(ops[index].touches) - late - set(ops[index].makes)
        return any(problem.storage_bytes[storage] for storage in others)

    for place, index in enumerate(anchors):
        reads = [s for s in ops[index].touches if s in late and s not in ops[index].makes]
        for storage in ops[index].makes:
            made_at[storage] = place
        if index in leaves and frees(index):
            ready = max((made_at.get(s, -1) for s in reads), default=-1)
            earlier = [q for s in reads for q in reader[s] if position[q] > ready]
            if earlier:
                before[max(earlier, key=position.__getitem__)].append(index)
        elif ops[index].makes:
            for storage in reads:
                reader[storage].append(index)
    order: dict[int, None] = {}
    stop = set(range(len(ops))) - set(anchors)
    for index in anchors:
        for leaf in before.get(index, ()):
            order.update(dict.fromkeys(sorted(needed_by(ops, (leaf,), stop | order.keys()))))
        order.setdefault(index)
    return tuple(order)


def _leaves(problem: Problem, anchors: Sequence[int]) -> set[int]:
    """Anchors that make a gradient that nothing else reads: views of it may lie between."""
    ops = problem.ops
    ends: set[int] = set()  # ops whose late users are all views that end as outputs
    users: dict[int, list[int]] = defaultdict(list)
    for index in anchors:
        for source in ops[index].inputs:
            users[source].append(index)
    outputs = set(problem.backward_outputs)
    for index in reversed(anchors):
        readers = users[index]
        views = all(reader in ends and _is_view(ops[reader]) for reader in readers)
        if views and (readers or index in outputs):
            ends.add(index)
    return {index for index in ends if ops[index].makes and not ops[index].ordered}


def _is_view(op: Op) -> bool:
    return not op.makes
