"""From a joint graph to the torch-free problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._torch import functorch
from ckpt_pass.graph.cost import (
    allocated_bytes,
    as_bytes,
    at_traced_shape,
    device_type,
    draws_from_a_saved_tensor,
    modelled_time_s,
    node_flops,
    random_state_bytes,
    shared_by_flops,
    storage_sizes,
    workspace_size,
)
from ckpt_pass.graph.inlined import inlined_ops
from ckpt_pass.graph.joint import JointGraph, StorageKey, is_epilogue, is_multi_output_access
from ckpt_pass.graph.kernel_cache import KernelFacts
from ckpt_pass.graph.reinplace import makes_anew, note_uncertain_layouts, overwritable_inputs
from ckpt_pass.ops.taxonomy import draws_random, never_recompute
from ckpt_pass.planner.inlined import with_inlined
from ckpt_pass.planner.problem import Op, Problem
from ckpt_pass.policy.sites import Bytes, output_tensors

_SENT = CheckpointPolicy.MUST_CPU_OFFLOAD
_BINDS = (CheckpointPolicy.MUST_SAVE, _SENT)
NOT_MEASURED = KernelFacts(None, None)
EMPTY: Mapping[fx.Node, KernelFacts] = MappingProxyType({})


@dataclass(frozen=True)
class GraphProblem:
    """A joint graph as the planner sees it.

    Attributes:
        problem: the step at the traced shape.
        index: the number of each node among the problem's ops.
        nodes: the node of each op.
        storage_sizes: bytes of each storage, an expression where a size is symbolic.
        workspace_sizes: the same of each op's workspace.
        written: the step where every value is written to memory, whatever fused kernels do.
    """

    problem: Problem
    index: dict[fx.Node, int]
    nodes: tuple[fx.Node, ...]
    storage_sizes: tuple[Bytes, ...]
    workspace_sizes: tuple[Bytes, ...]
    written: Problem


class _Storages:
    """Numbers the storages of a graph and knows their bytes."""

    def __init__(self) -> None:
        self._ids: dict[StorageKey, int] = {}
        self.sizes: list[Bytes] = []
        self.nbytes: list[int] = []
        self.made: set[int] = set()

    def of(self, value: Any) -> tuple[int, ...]:
        """The storages behind a node's value."""
        found = []
        for key, size in storage_sizes(value).items():
            if key not in self._ids:
                self._ids[key] = len(self.nbytes)
                nbytes = at_traced_shape(size)
                handed_out = allocated_bytes(nbytes, _device_type(value))
                self.nbytes.append(handed_out)
                self.sizes.append(as_bytes(size) + handed_out - nbytes)
            found.append(self._ids[key])
        return tuple(found)

    def was_there(self, storage: int) -> None:
        """Note that a storage existed before the step."""
        self.sizes[storage] = self.nbytes[storage] = 0
        self.made.add(storage)


def _device_type(value: Any) -> str:
    return next((tensor.device.type for tensor in output_tensors(value)), "cpu")


def borders_of(joint: JointGraph, described: GraphProblem) -> tuple[int, ...]:
    """The ops of a problem whose results cross from one layer to the next."""
    ops = described.problem.ops
    return tuple(
        number
        for node, number in described.index.items()
        if ops[number].savable and joint.crosses_border(node)
    )


def check_sizes(joint: JointGraph) -> None:
    """Look at every size of a graph.

    Raises:
        SymbolicBytesError: one depends on data.
    """
    for node in joint.nodes:
        for tensor in output_tensors(node.meta.get("val")):
            for size in tensor.shape:
                at_traced_shape(size)


def build_problem(
    joint: JointGraph, kernels: Mapping[fx.Node, KernelFacts] = EMPTY
) -> GraphProblem:
    """Describe a joint graph to the planner.

    Tags on the graph (``meta["recompute"]``) bind where they are MUST_*.

    Args:
        joint: the graph.
        kernels: what was measured of its kernels; the rest is taken to need no workspace, and has
            a modelled time.

    Raises:
        SymbolicBytesError: a size depends on data.
    """
    if joint.in_place:
        note_uncertain_layouts(joint.nodes)
    table = _Storages()
    for node in joint.primals:
        for storage in table.of(node.meta.get("val")):
            table.was_there(storage)
    given = [
        storage
        for node in joint.nodes
        if functorch.is_backward_input(node)
        for storage in table.of(node.meta.get("val"))
    ]
    table.made.update(given)
    regions = _Regions(joint)
    index: dict[fx.Node, int] = {}
    ops: list[Op] = []
    for node in joint.nodes:
        if node.op == "call_function":
            index[node] = len(ops)
            facts = kernels.get(node, NOT_MEASURED)
            ops.append(_op(joint, node, index, table, regions.of(node), facts))
    gradients = [node for node in joint.backward_outputs if node in index]
    effects = [node for node in joint.backward_effects if node in index]
    returned = [node for node in joint.forward_outputs if node in index]
    # What writes into inputs, a buffer's copy_ say, runs whether or not an output needs it.
    impure = [n for n in joint.forward if n in index and n.is_impure(impure_random=False)]
    problem = Problem(
        ops=_with_shared_times(ops, list(index), kernels),
        storage_bytes=tuple(table.nbytes),
        forward_outputs=_union(table, returned),
        forward_roots=tuple(index[node] for node in dict.fromkeys([*returned, *impure])),
        backward_outputs=tuple(index[node] for node in dict.fromkeys([*gradients, *effects])),
        output_storages=_union(table, gradients),
        given=tuple(given),
        must_move=_union(table, [n for n in index if n.meta.get("recompute") is _SENT]),
    )
    workspaces = tuple(
        as_bytes(_workspace(node, kernels.get(node, NOT_MEASURED))) for node in index
    )
    written = problem
    if joint.inlines:
        ops_left = with_inlined(written.ops, table.nbytes, inlined_ops(joint, index))
        problem = replace(written, ops=ops_left)
    return GraphProblem(problem, index, tuple(index), tuple(table.sizes), workspaces, written)


def _with_shared_times(
    ops: list[Op], nodes: list[fx.Node], kernels: Mapping[fx.Node, KernelFacts]
) -> tuple[Op, ...]:
    """Ops with their modelled times, part of them by flops; measured times are left alone."""
    if not nodes or any(kernels.get(n, NOT_MEASURED).time_s is not None for n in nodes):
        return tuple(ops)
    device = device_type(nodes[-1])
    times = shared_by_flops([op.time_s for op in ops], [op.flops for op in ops], device)
    return tuple(replace(op, time_s=time_s) for op, time_s in zip(ops, times, strict=True))


def _workspace(node: fx.Node, facts: KernelFacts) -> int | torch.SymInt:
    """What was measured is a number: of symbolic sizes the rule is better, where there is one."""
    rule = workspace_size(node)
    if facts.workspace_bytes is None or isinstance(rule, torch.SymInt):
        return rule
    return facts.workspace_bytes


class _Regions:
    """Numbers the links of the chain: layers, and what lies between two layers.

    An op of the backward belongs to the layer whose forward it differentiates; where torch does
    not say, to the layer of the last op before it.
    """

    def __init__(self, joint: JointGraph) -> None:
        self._joint = joint
        self._numbers: dict[object, int] = {}
        self._layers = 0
        self._last = -1

    def of(self, node: fx.Node) -> int:
        """The link of one op; to be asked in joint order."""
        if node in self._joint.forward_set:
            region = self._joint.regions.get(node)
            if region is not None and region not in self._numbers:
                self._layers += 1
            key: object = region if region is not None else ("between", self._layers)
            self._last = self._numbers.setdefault(key, len(self._numbers))
        else:
            region = self._joint.region_of_backward(node)
            self._last = self._numbers.get(region, self._last)
        return self._last


def _overwrites(joint: JointGraph, node: fx.Node, table: _Storages) -> tuple[int, ...]:
    inputs = [n for n in overwritable_inputs(node) if makes_anew(joint.owner(n))]
    return tuple(s for n in inputs for s in table.of(n.meta["val"]))


def _union(table: _Storages, nodes: list[fx.Node]) -> tuple[int, ...]:
    found = [storage for node in nodes for storage in table.of(node.meta.get("val"))]
    return tuple(dict.fromkeys(found))


def _op(
    joint: JointGraph,
    node: fx.Node,
    index: dict[fx.Node, int],
    table: _Storages,
    region: int,
    facts: KernelFacts,
) -> Op:
    value, target = node.meta.get("val"), node.target
    assert callable(target)
    holds = table.of(value)
    makes = tuple(storage for storage in holds if storage not in table.made)
    table.made.update(makes)
    # Taking one output out of several touches that one alone: it is taken at once. A size is known
    # without the tensor that has it: under torch.compile sizes are arguments.
    is_size = functorch.is_sym_node(node)
    sources = () if is_size or is_multi_output_access(node) else node.all_input_nodes
    reads = [s for source in sources for s in table.of(source.meta.get("val"))]
    touches = tuple(dict.fromkeys((*holds, *reads)))
    forward = node in joint.forward_set
    random = draws_random(target, node.args, node.kwargs)
    flops = node_flops(node)
    time_s = facts.time_s
    if time_s is None:
        time_s = modelled_time_s(node, flops)
    tag = node.meta.get("recompute")
    savable = forward and isinstance(value, torch.Tensor) and joint.owner(node) is node
    # What the caller holds anyway is saved for nothing.
    returned = savable and node in joint.returned and tag is not CheckpointPolicy.MUST_RECOMPUTE
    needed = node.all_input_nodes
    if is_epilogue(node) and not forward:  # nothing else may read what it overwrites
        needed = [*needed, *joint.backward_outputs, *joint.written_in_backward]
    return Op(
        name=node.name,
        inputs=tuple(index[s] for s in dict.fromkeys(needed) if s in index and not is_size),
        makes=makes,
        holds=holds,
        touches=touches,
        forward=forward,
        late=node in joint.needs_tangents,
        workspace_bytes=at_traced_shape(_workspace(node, facts)),
        random_state_bytes=random_state_bytes(node) if forward and random else 0,
        time_s=time_s if makes and node.name not in joint.fused else 0.0,
        flops=flops,
        savable=savable,
        must_save=forward and (tag in _BINDS or returned),
        must_recompute=forward and tag is CheckpointPolicy.MUST_RECOMPUTE,
        region=region,
        once=random and not draws_from_a_saved_tensor(node),
        overwrites=_overwrites(joint, node, table) if joint.in_place else (),
        ordered=not forward and (never_recompute(target, node.args, node.kwargs) or random),
    )
