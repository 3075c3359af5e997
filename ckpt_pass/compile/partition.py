"""Split a tagged joint graph into forward and backward.

What the backward needs is found by walking from it into the forward: the walk stops at values that
are saved, and passes through those that are recomputed. Values are saved by storage: the base of a
view, never the view, so that nothing is held twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._torch import functorch
from ckpt_pass.compile.moving import MovedNode, write_moves
from ckpt_pass.compile.reinplace import overwrite_in_place
from ckpt_pass.compile.schedule import reorder
from ckpt_pass.graph.joint import JointGraph, is_epilogue
from ckpt_pass.graph.reinplace import note_uncertain_layouts
from ckpt_pass.ops.taxonomy import draws_random
from ckpt_pass.policy.rules import OFFLOADING, RECOMPUTING, SAVING

BORDER = "border of a region"
HOOKED = "output of a checkpoint region with a backward hook"


@dataclass
class SavedSet:
    """What crosses from the forward to the backward, and what the backward makes again.

    Attributes:
        values: saved forward values (bases, not views), each with the reason in words.
        inputs: primals that the backward reads; they exist anyway.
        handed: primals that the backward is handed although it does not read them as values: those
            that it writes into, and states of hooks (``BackwardState``).
        symbols, opaque: sizes and non-tensor objects that cross.
        recomputed: forward ops that run again in the backward, views among them.
    """

    values: dict[fx.Node, str] = field(default_factory=dict)
    inputs: dict[fx.Node, None] = field(default_factory=dict)
    handed: dict[fx.Node, None] = field(default_factory=dict)
    symbols: dict[fx.Node, None] = field(default_factory=dict)
    opaque: dict[fx.Node, None] = field(default_factory=dict)
    recomputed: dict[fx.Node, None] = field(default_factory=dict)


def choose_saved(joint: JointGraph, *, save_borders: bool = True) -> SavedSet:
    """Find what the backward of a tagged joint graph reads from its forward.

    Args:
        joint: the graph; its forward carries tags.
        save_borders: save what crosses from one region to another, whatever its tag.
    """
    found = SavedSet()
    written = [_as_node(node.args[0]) for node in joint.backward_effects if is_epilogue(node)]
    found.handed.update(dict.fromkeys(written))
    seen: set[fx.Node] = set()
    stack = _backward_reads(joint)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(_visit(joint, node, found, save_borders))
    return _in_graph_order(joint, found)


def _backward_reads(joint: JointGraph) -> list[fx.Node]:
    """Forward values and primals that a live node of the backward reads directly."""
    stack, seen, reads = [*joint.backward_outputs, *joint.backward_effects], set(), []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in joint.forward_set or (node.op == "placeholder" and functorch.is_primal(node)):
            reads.append(node)
        elif is_epilogue(node):
            stack.append(_as_node(node.args[1]))  # what it writes into it does not read
        else:
            stack.extend(node.all_input_nodes)
    return reads


def _as_node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _visit(
    joint: JointGraph, node: fx.Node, found: SavedSet, save_borders: bool
) -> Iterable[fx.Node]:
    """Record what becomes of ``node``; return what must be had to have it."""
    if node.op == "placeholder":
        if functorch.is_opaque(node):
            found.opaque[node] = None
        elif functorch.is_sym_node(node):
            found.symbols[node] = None
        elif functorch.is_backward_state(node):
            found.handed[node] = None
        else:
            found.inputs[node] = None
        return ()
    if node.op == "get_attr":
        return ()
    if functorch.is_sym_node(node):
        found.symbols[node] = None
        return ()
    if functorch.is_opaque(node):
        found.opaque[node] = None
        return ()
    base = joint.owner(node)
    reason = _reason_to_save(joint, node, base, save_borders)
    if reason is not None:
        found.values[base] = reason
        if node is base:
            return ()
    found.recomputed[node] = None
    return node.all_input_nodes


def _reason_to_save(
    joint: JointGraph, node: fx.Node, base: fx.Node, save_borders: bool
) -> str | None:
    if base not in joint.forward_set or not isinstance(base.meta.get("val"), torch.Tensor):
        return None  # a view of an input, or the tuple of a multi-output op
    if base.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE:
        return None  # also where a view of it is to be saved: that would hold the same memory
    for value in (base, node):
        if value.meta.get("recompute") in SAVING | OFFLOADING:
            return ""
    if _hooked_output(base):
        return HOOKED
    return BORDER if save_borders and joint.crosses_border(base) else None


def _hooked_output(node: fx.Node) -> bool:
    """A checkpoint region's output whose gradient hook the recomputation would wait for.

    torch saves it too (``cleanup_recompute_tags``): the hook runs on a gradient that needs it.
    """
    return bool(node.meta.get("has_backward_hook")) and not any(
        user.meta.get("recompute") in RECOMPUTING for user in node.users
    )


def _in_graph_order(joint: JointGraph, found: SavedSet) -> SavedSet:
    order = {node: index for index, node in enumerate(joint.nodes)}

    def by_order(nodes: Iterable[fx.Node]) -> dict[fx.Node, None]:
        return dict.fromkeys(sorted(nodes, key=order.__getitem__))

    return SavedSet(
        {node: found.values[node] for node in by_order(found.values)},
        by_order(found.inputs),
        by_order(found.handed),
        by_order(found.symbols),
        by_order(found.opaque),
        by_order(found.recomputed),
    )


def protect_mutated_inputs(joint: JointGraph, saved: SavedSet) -> bool:
    """Copy each input that the forward overwrites and the backward still reads as it was.

    Such an input (a running statistic of a batch normalisation, say) can be neither saved by
    reference nor read again by a recomputation. The forward takes a copy first, and the copy is
    saved. Returns whether the graph changed.
    """
    mutated = set(functorch.mutated_inputs(joint.module, joint.num_fwd_outputs))
    stale = [node for node in saved.inputs if node in mutated]
    if not stale:
        return False
    graph = joint.module.graph
    first = next(node for node in joint.nodes if node.op != "placeholder")
    for node in stale:
        readers = [user for user in node.users if not _writes_into(user, node)]
        with graph.inserting_before(first):
            copy = graph.call_function(torch.ops.aten.clone.default, (node,))
        copy.meta.update(
            val=functorch.fake_clone(node.meta["val"]),
            recompute=CheckpointPolicy.MUST_SAVE,
            partitioner_tag="is_forward",
        )
        for user in readers:
            user.replace_input_with(node, copy)
    joint.module.recompile()
    joint.refresh()
    return True


def _writes_into(user: fx.Node, target: fx.Node) -> bool:
    return user.op == "output" or (is_epilogue(user) and user.args[0] is target)


def random_recomputed(saved: SavedSet) -> list[fx.Node]:
    """Recomputed ops that draw random numbers: each needs its forward's random state."""
    return [
        node
        for node in saved.recomputed
        if callable(node.target) and draws_random(node.target, node.args, node.kwargs)
    ]


def _free_after_use(joint: JointGraph, saved: SavedSet) -> None:
    """Have all saved values let go of when the backward has read them, as a plan says.

    Inputs and outputs are others' as well, who may change them; the graph's own values nobody does,
    so that no version of theirs needs to be left unseen.
    """
    for node in saved.values:
        owner = joint.owner(node)
        if owner not in joint.returned and owner.op != "placeholder":
            functorch.save_like_any_other(node)


def split(
    joint: JointGraph,
    saved: SavedSet,
    order: Sequence[fx.Node],
    moves: Sequence[tuple[MovedNode, int]] = (),
    where: str = "",
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut the joint graph at the saved set, pair random states, order the backward.

    Args:
        joint: the tagged graph.
        saved: what crosses from its forward to its backward.
        order: nodes of the joint graph in the order in which the backward runs them; one that
            is listed twice runs twice.
        moves: saved values that leave the device in between, with the place in ``order`` before
            which each is asked for.
        where: the store that they go to (:mod:`ckpt_pass.offloading.graph_ops`).
    """
    _free_after_use(joint, saved)
    if joint.in_place:
        note_uncertain_layouts(joint.nodes)
    forward, backward, num_symbols = functorch.extract_forward_backward(
        joint.module,
        [
            *saved.inputs,
            *(node for node in saved.handed if node not in saved.inputs),
            *saved.values,
        ],
        [*saved.symbols],
        [*saved.opaque],
        joint.num_fwd_outputs,
        joint.static_inputs,
    )
    _remove_effects_of_forward(joint, saved, backward.graph)
    copies = {node.name: node for node in backward.graph.nodes}
    random = set(random_recomputed(saved))
    if random:
        tags = {node: node.meta.get("recompute") for node in joint.forward}
        for node in joint.forward:  # torch pairs every seeded op that says recompute
            node.meta["recompute"] = (
                CheckpointPolicy.PREFER_RECOMPUTE if node in random else CheckpointPolicy.MUST_SAVE
            )
        before = list(backward.graph.nodes)
        runs = Counter(order)
        once = all(runs[node] <= 1 for node in random)
        forward, backward = functorch.pair_random_state(
            joint.module, forward, backward, num_symbols, once
        )
        copies |= _replaced(before, list(backward.graph.nodes))
        for node, decision in tags.items():
            node.meta["recompute"] = decision
    there = [place for place, node in enumerate(order) if node.name in copies]
    written = reorder(backward.graph, [copies[order[place].name] for place in there])
    forward, backward = functorch.finish_partition(forward, backward)
    if joint.in_place:
        overwrite_in_place(backward)
    if moves:
        at = dict(zip(there, written, strict=True))
        write_moves(forward, backward, joint.forward, at, moves, where, not joint.in_place)
    return forward, backward


def _remove_effects_of_forward(joint: JointGraph, saved: SavedSet, backward: fx.Graph) -> None:
    """Take out of the backward what the forward has done, and no gradient needs.

    Torch leaves an assertion, say, in both halves if both have what it reads; in the backward it
    would stand last, and hold that until then.
    """
    forward = {node.name for node in joint.forward if node not in saved.recomputed}
    for node in reversed(backward.nodes):
        if node.op == "call_function" and not node.users and node.name in forward:
            backward.erase_node(node)
    backward.eliminate_dead_code()


def _replaced(before: list[fx.Node], after: list[fx.Node]) -> dict[str, fx.Node]:
    """What stands for each random op, by its name, now that it runs with a given state.

    torch puts one call where the op stood, so that both are found in the same order.
    """
    stayed, known = set(after), set(before)
    gone = [node for node in before if node not in stayed]
    new = [node for node in after if node not in known and node.op == "call_function"]
    return {old.name: node for old, node in zip(gone, new, strict=True)}
