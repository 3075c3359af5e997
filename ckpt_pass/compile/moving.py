"""Carry out moves: write into the two halves of a step when a value goes away and comes back.

In the forward a value is put into a store as soon as it is made, and let go of where the plan says;
what crosses to the backward instead is a ticket, a tensor of one number. The backward begins to
fetch the value where the plan says, and takes it before its first use. The four ops are
:mod:`ckpt_pass.offloading.graph_ops`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ckpt_pass._torch import functorch
from ckpt_pass.graph.joint import is_multi_output_access
from ckpt_pass.graph.problem import GraphProblem
from ckpt_pass.offloading import graph_ops
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.planner.ground import Ground
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.moves import Move
from ckpt_pass.planner.schedule import Schedule
from ckpt_pass.planner.solution import Solution


@dataclass(frozen=True)
class MovedNode:
    """A saved value that leaves the device, by nodes of the joint graph.

    Attributes:
        value: what is saved.
        released_after: the node of the forward after which its memory is free.
        fetched_before: the node of the backward before which it is asked for ...
        run: ... where that runs for this time, from 0.
    """

    value: fx.Node
    released_after: fx.Node
    fetched_before: fx.Node
    run: int = 0


def moved_nodes(
    described: GraphProblem, steps: Schedule, moves: Sequence[Move]
) -> tuple[MovedNode, ...]:
    """Moves of a problem, as nodes: these outlive that the problem is described anew."""
    ops, nodes = described.problem.ops, described.nodes
    saver = {storage: index for index in steps.saved for storage in ops[index].holds}
    found = []
    for move in moves:
        index = steps.backward[move.fetched_before]
        run = steps.backward[: move.fetched_before].count(index)
        value = nodes[saver[move.storage]]
        found.append(MovedNode(value, nodes[move.released_after], nodes[index], run))
    return tuple(found)


def moves_of(
    described: GraphProblem, steps: Schedule, moved: Collection[MovedNode]
) -> tuple[Move, ...]:
    """The same moves in a problem of the same graph."""
    number, ops = described.index, described.problem.ops
    places: dict[tuple[int, int], int] = {}
    runs: Counter[int] = Counter()
    for place, index in enumerate(steps.backward):
        places[index, runs[index]] = place
        runs[index] += 1
    return tuple(
        Move(
            storage=ops[number[m.value]].holds[0],
            released_after=number[m.released_after],
            fetched_before=places[number[m.fetched_before], m.run],
        )
        for m in moved
    )


def with_immovable(described: GraphProblem, offload: OffloadLike) -> GraphProblem:
    """A described graph where what no store takes stays on the device.

    These are values that a tag says to save, small ones, those whose size was left symbolic, and
    those that lie in one storage with another value that could be saved.
    """
    problem = described.problem
    least = offload.min_bytes if isinstance(offload, Offload) else 0
    savers = Counter(s for op in problem.ops if op.savable for s in op.holds)
    bound = {s for op in problem.ops if op.must_save for s in op.holds} - set(problem.must_move)
    sizes = enumerate(described.storage_sizes)
    stay = {s for s, n in sizes if not isinstance(n, int) or n < least or savers[s] != 1}
    return replace(described, problem=replace(problem, immovable=tuple(sorted(stay | bound))))


def sent_away(
    described: GraphProblem, found: Solution, offload: OffloadLike, link: Link
) -> Solution:
    """A solution where what tags say to offload is moved, each as long as the least peak asks."""
    movable = with_immovable(described, offload).problem
    ground = Ground(movable, found, link)
    mask = ground.mask_of(movable.must_move)
    if not mask.any():
        return found
    forward, backward = ground.left(mask, 0)
    least_bytes = int(max(forward.max(initial=0), backward.max(initial=0)))
    return ground.solution(mask, least_bytes, found.solver)


def write_moves(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    forward_order: Sequence[fx.Node],
    at: Mapping[int, fx.Node],
    moves: Sequence[tuple[MovedNode, int]],
    where: str,
    reuses_memory: bool = False,
) -> None:
    """Write moves into the halves of a step, in place.

    Args:
        forward, backward: the halves, in their final order.
        forward_order: the joint graph's forward, in order.
        at: what stands in ``backward`` at the places of its order.
        moves: what leaves, each an output of ``forward`` and an input of ``backward``, and the
            place in the backward's order before which it is asked for.
        where: the store, in words (:data:`ckpt_pass.offloading.graph_ops.words_of`).
        reuses_memory: whether what runs the halves gives memory to other values at once after
            the last op that is given it; a copy is still being read then.
    """
    named = {node.name: node for node in forward.graph.nodes}
    given = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    place_of = {node: place for place, node in enumerate(forward_order)}
    last = max(at)
    for move, fetched_before in moves:
        after = forward_order[place_of[move.released_after] + 1 :]
        next_one = next((named[n.name] for n in after if n.name in named and _stays(n)), None)
        value = named[move.value.name]
        before = next_one or forward.graph.output_node()
        _leaves(forward.graph, value, before, where, reuses_memory)
        places = range(fetched_before, last + 1)
        next_one = next(at[place] for place in places if place in at and _stays(at[place]))
        _comes_back(backward.graph, given[move.value.name], next_one)
    for half in (forward, backward):
        half.graph.lint()
        half.recompile()


def _stays(node: fx.Node) -> bool:
    """Whether a node stands where its order says: torch moves ``getitem`` up to what it reads."""
    return not is_multi_output_access(node)


def _leaves(
    graph: fx.Graph, value: fx.Node, released_before: fx.Node, where: str, held: bool
) -> None:
    source, fake = value, value.meta["val"]
    with graph.inserting_after(value):
        if held:
            source = graph.call_function(graph_ops.HOLD, (value,))
            source.meta["val"] = fake
    with graph.inserting_after(source):
        ticket = graph.call_function(graph_ops.PUT, (source, where))
    ticket.meta["val"] = functorch.fake_like(graph_ops.fake_ticket, fake)
    with graph.inserting_before(released_before):
        released = graph.call_function(graph_ops.RELEASE, (ticket, source))
    for node in (source, ticket, released) if held else ():
        functorch.keep_layouts(node)
    graph.output_node().replace_input_with(value, ticket)


def _comes_back(graph: fx.Graph, ticket: fx.Node, fetched_before: fx.Node) -> None:
    value, users = ticket.meta["val"], set(ticket.users)
    first = next(node for node in graph.nodes if node in users)
    with graph.inserting_before(fetched_before):
        graph.call_function(graph_ops.FETCH, (ticket,))
    with graph.inserting_before(first):
        taken = graph.call_function(graph_ops.TAKE, (ticket, *graph_ops.look_of(value)))
    taken.meta["val"] = value
    ticket.meta["val"] = functorch.fake_like(graph_ops.fake_ticket, value)
    for user in users:
        user.replace_input_with(ticket, taken)
