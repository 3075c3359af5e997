"""The joint graph, read: roles, call sites, storages, layers.

The joint graph is AOTAutograd's graph of forward and backward together. Reading it decides
nothing; it answers what a policy and the partitioner ask.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ckpt_pass._torch import functorch
from ckpt_pass.graph.gradients import lay_out_gradients
from ckpt_pass.graph.regions import RegionFinder
from ckpt_pass.graph.sparse_rows import tell_rows
from ckpt_pass.ops.taxonomy import classify, draws_random, is_expensive, never_recompute
from ckpt_pass.policy.sites import (
    CallNumbers,
    ModulePath,
    SiteContext,
    SiteCounter,
    module_path,
    output_tensors,
)

StorageKey = int


def storage_keys(value: Any) -> tuple[StorageKey, ...]:
    """The storages of a node's value: views of one tensor share a key."""
    return tuple(
        tensor.untyped_storage()._cdata
        for tensor in output_tensors(value)
        if tensor.layout is torch.strided
    )


def is_multi_output_access(node: fx.Node) -> bool:
    """A ``getitem`` that takes one output of a multi-output op."""
    return node.op == "call_function" and node.target is operator.getitem


@dataclass
class JointGraph:
    """A joint graph with the roles of its nodes.

    Attributes:
        module: the graph module; it is read here, and changed only by ``compile``.
        num_fwd_outputs: how many of its outputs belong to the forward.
        input_names: what each primal is, in the user's words (``parameter fc.weight``).
        static_inputs: primals that live on between steps: parameters and buffers.
        in_place: whether the backward may write over values of its own
            (:mod:`ckpt_pass.graph.reinplace`). Inductor wants functional graphs; it does so itself.
        fused: names of forward ops that run again at no cost, inside of kernels that run anyway.
        inlines: whether what runs the halves computes elementwise results where they are read.
        graph_break: where dynamo cut the step that the graph is a part of; empty for a whole one.
    """

    module: fx.GraphModule
    num_fwd_outputs: int
    input_names: dict[str, str] = field(default_factory=dict)
    static_inputs: tuple[fx.Node, ...] = ()
    regions_pattern: tuple[str, ...] | None = None
    in_place: bool = True
    graph_break: str = ""
    fused: frozenset[str] = frozenset()
    inlines: bool = False

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Read the graph again after it changed."""
        self.nodes: list[fx.Node] = list(self.module.graph.nodes)
        forward_outputs, backward_outputs, _ = functorch.joint_outputs(
            self.module, self.num_fwd_outputs
        )
        self.forward_outputs = [n for n in forward_outputs if isinstance(n, fx.Node)]
        self.backward_outputs = [n for n in backward_outputs if isinstance(n, fx.Node)]
        self.primals = [n for n in self.nodes if n.op == "placeholder" and functorch.is_primal(n)]
        self.needs_tangents = _dependents_of_tangents(self.nodes)
        self.forward = _forward_nodes(self.nodes, self.forward_outputs, self.needs_tangents)
        self.forward_set = frozenset(self.forward)
        self._numbers = CallNumbers()
        self.paths: dict[fx.Node, ModulePath] = {
            node: self._numbers.numbered(module_path(node.meta.get("nn_module_stack")))
            for node in self.forward
        }
        self._finder = finder = RegionFinder.over(self.paths.values(), self.regions_pattern)
        self.regions: dict[fx.Node, str | None] = {
            node: _checkpoint_region(node) or finder.region(path)
            for node, path in self.paths.items()
        }
        for node in self.forward:
            if is_multi_output_access(node):
                producer = node.args[0]
                assert isinstance(producer, fx.Node)
                self.regions[node] = self.regions.get(producer)
        self._owners = _storage_owners(self.nodes)
        #: What the backward runs though no gradient needs it: it has an effect of its own.
        self.backward_effects = [
            node
            for node in self.nodes
            if node not in self.forward_set
            and node.op == "call_function"
            and node.is_impure(impure_random=False)
            and (functorch.must_be_in_backward(node) or not is_epilogue(node))
        ]
        copies = [node for node in self.backward_effects if is_epilogue(node)]
        #: What the backward writes into inputs at its end.
        self.written_in_backward = [n for copy in copies for n in copy.all_input_nodes[1:]]
        #: What the caller holds from the end of the forward on: the bases of its outputs.
        self.returned = frozenset(self.owner(node) for node in self.forward_outputs)

    def owner(self, node: fx.Node) -> fx.Node:
        """The first node that has this node's storage: itself, or the base of a view."""
        keys = storage_keys(node.meta.get("val"))
        return self._owners.get(keys[0], node) if len(keys) == 1 else node

    def region_of_backward(self, node: fx.Node) -> str | None:
        """The region whose forward an op of the backward differentiates, where torch says so."""
        stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack")
        return self._finder.region(self._numbers.numbered(module_path(stack)))

    def sites(self) -> Iterator[tuple[fx.Node, SiteContext]]:
        """The forward's op executions in order, each with what a policy sees of it."""
        counter = SiteCounter()
        for node in self.forward:
            if is_multi_output_access(node) or is_epilogue(node):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            yield (
                node,
                counter.visit(
                    node.target,
                    self.paths[node],
                    self.regions[node],
                    node.meta.get("val"),
                    args,
                    kwargs,
                ),
            )

    def crosses_border(self, node: fx.Node) -> bool:
        """Whether a value made in one region is read by the forward of another.

        Not so what is cheap to make from the inputs: an attention mask costs less to make again
        for each layer than to hold.
        """
        region = self.regions.get(node)
        if self._is_cheap_preamble(node):
            return False
        return any(
            user in self.forward_set and self.regions[user] != region
            for user in self._readers(node)
        )

    def _is_cheap_preamble(self, node: fx.Node) -> bool:
        """Whether a value comes from the inputs alone, through cheap ops."""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current.op != "call_function":
                continue
            if not _is_cheap(current):
                return False
            sources = [source for source in current.all_input_nodes if source not in seen]
            seen.update(sources)
            stack.extend(sources)
        return True

    def _readers(self, node: fx.Node) -> Iterable[fx.Node]:
        """The users of a value, those of its views and outputs included."""
        stack, seen = [node], {node}
        while stack:
            for user in stack.pop().users:
                if user not in seen:
                    seen.add(user)
                    yield user
                    if is_multi_output_access(user) or self.owner(user) is self.owner(node):
                        stack.append(user)


def _is_cheap(node: fx.Node) -> bool:
    """Whether an op may run twice, draws nothing and is none of the expensive ones."""
    if is_multi_output_access(node) or not callable(node.target):
        return True
    return not (
        is_expensive(classify(node.target))
        or never_recompute(node.target, node.args, node.kwargs)
        or draws_random(node.target, node.args, node.kwargs)
    )


def read_joint(
    module: fx.GraphModule,
    num_fwd_outputs: int,
    static_indices: Sequence[int],
    regions: tuple[str, ...] | None,
    input_names: Sequence[str],
    leaves: Collection[int] = (),
) -> JointGraph:
    """Read a joint graph as AOTAutograd hands it over.

    Args:
        module, num_fwd_outputs, static_indices: what a partition function is given.
        regions: FQN patterns of the layers.
        input_names: what each placeholder of dynamo's graph is, in order.
        leaves: which of these are leaves, whose gradients are kept
            (:mod:`ckpt_pass.graph.gradients`).
    """
    lay_out_gradients(module, num_fwd_outputs, leaves)
    tell_rows(module.graph)
    primals = [n for n in module.graph.find_nodes(op="placeholder") if functorch.is_primal(n)]
    names = {node.name: input_name(node, input_names) for node in primals}
    static = tuple(primals[index] for index in static_indices if index < len(primals))
    return JointGraph(module, num_fwd_outputs, names, static, regions)


def input_name(node: fx.Node, dynamo_names: Sequence[str]) -> str:
    """What a primal is, in the user's words: ``parameter fc.weight`` or ``argument 0``."""
    desc = node.meta.get("desc")
    kind = {"ParamAOTInput": "parameter", "BufferAOTInput": "buffer"}.get(type(desc).__name__)
    if kind is not None:
        return f"{kind} {getattr(desc, 'target', '')}"
    index = getattr(desc, "idx", None)
    if index is None:
        return node.name
    name = dynamo_names[index] if index < len(dynamo_names) else ""
    return name or f"argument {index}"


def is_epilogue(node: fx.Node) -> bool:
    """A ``copy_`` into an input: functionalisation's, not the program's."""
    target = node.args[0] if node.args else None
    return (
        node.target is torch.ops.aten.copy_.default
        and isinstance(target, fx.Node)
        and target.op == "placeholder"
    )


def _checkpoint_region(node: fx.Node) -> str | None:
    """The user's own checkpoint region, if torch has marked the node with one."""
    graph_id = node.meta.get("ac_graph_id")
    return None if graph_id is None else f"checkpoint#{graph_id}"


def _dependents_of_tangents(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that cannot run before the backward begins."""
    found: set[fx.Node] = set()
    for node in nodes:
        late = functorch.is_backward_input(node) or functorch.must_be_in_backward(node)
        if node.op != "output" and (late or any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def _forward_nodes(
    nodes: list[fx.Node], forward_outputs: list[fx.Node], late: set[fx.Node]
) -> list[fx.Node]:
    """Calls that the forward makes: those its outputs need, and those traced in it.

    AOTAutograd marks the latter (``partitioner_tag``). A node that needs no tangent but was
    traced in the backward, such as the transpose of a weight, is left to the backward. Nodes
    that inductor's own passes made carry no mark; they count as forward when they stand before
    the first node that needs a tangent.
    """
    required: set[fx.Node] = set()
    stack = list(forward_outputs)
    while stack:
        node = stack.pop()
        if node not in required:
            required.add(node)
            stack.extend(node.all_input_nodes)
    calls = [node for node in nodes if node.op == "call_function"]
    first_late = next((i for i, node in enumerate(calls) if node in late), len(calls))
    forward = []
    for index, node in enumerate(calls):
        tag = str(node.meta.get("partitioner_tag") or "")
        in_forward = tag.endswith("forward") or (not tag and index < first_late)
        if node not in late and (node in required or in_forward):
            forward.append(node)
    return forward


def _storage_owners(nodes: list[fx.Node]) -> dict[StorageKey, fx.Node]:
    owners: dict[StorageKey, fx.Node] = {}
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for key in storage_keys(value):
                owners.setdefault(key, node)
    return owners
