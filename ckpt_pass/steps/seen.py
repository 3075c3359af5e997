"""A graph of a step, as AOTAutograd hands it over before anything is decided."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from ckpt_pass._torch import compilers, functorch
from ckpt_pass.compile.engine import Partitioner, decide
from ckpt_pass.compile.record import record_plan
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.plans.value import Plan
from ckpt_pass.steps.halves import Halves, LostValuesError, halves_of, layout_of


@dataclass(frozen=True)
class SeenGraph:
    """One of dynamo's graphs of a step, that has a backward.

    Attributes:
        module: its joint graph, before anything was decided.
        num_fwd_outputs, static_inputs: what AOTAutograd says of it.
        input_names: what goes in, in the user's words.
        graph_break: where dynamo cut the step after it, and why; empty where it did not.
        leaves: which inputs are leaves that require gradients.
    """

    module: fx.GraphModule
    num_fwd_outputs: int
    static_inputs: tuple[int, ...]
    input_names: tuple[str, ...]
    graph_break: str
    leaves: frozenset[int]

    @cached_property
    def looks(self) -> str:
        """A hash of its ops, edges, shapes and dtypes; names of modules do not matter."""
        nodes = list(self.module.graph.nodes)
        number = {node: index for index, node in enumerate(nodes)}
        digest = hashlib.sha256(
            f"{self.num_fwd_outputs}/{self.static_inputs}/{sorted(self.leaves)}".encode()
        )
        for node in nodes:
            args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
            target = op_name(node.target) if node.op == "call_function" else node.op
            value = node.meta.get("val")
            looks = (getattr(value, "dtype", ""), list(getattr(value, "shape", ())))
            digest.update(f"{target}{args}{looks}\n".encode())
        return digest.hexdigest()

    def plan(self, partitioner: Partitioner, careful: bool) -> Plan:
        """The plan that a partitioner makes of the graph.

        Args:
            partitioner: decides.
            careful: whether what compiles the halves, if anything does, is to fuse with care.

        Raises:
            InfeasibleBudgetError and others: as :func:`ckpt_pass.compile.engine.decide`.
        """
        return record_plan(
            decide(
                self.joint(partitioner),
                partitioner.policy,
                partitioner.goal,
                waiting_bytes=partitioner.waiting_bytes,
                offload=partitioner.offload,
            )
        )

    def halves(self, partitioner: Partitioner) -> Halves:
        """Forward and backward as a partitioner decides, ready to run where the graph does.

        Raises:
            LostValuesError: they cannot stand in for others.
        """
        forward, backward = self.partitioned(partitioner)
        layout = layout_of(forward, self.num_fwd_outputs)
        if layout is None:
            raise LostValuesError
        return halves_of(forward, backward, layout)

    def partitioned(self, partitioner: Partitioner) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward, of a copy, as AOTAutograd would have them made."""
        chosen = replace(partitioner, input_names=self.input_names, leaves=self.leaves)
        with functorch.as_compiling(self.module):
            return chosen(
                compilers.with_copied_graph(self.module),
                (),
                num_fwd_outputs=self.num_fwd_outputs,
                static_lifetime_input_indices=list(self.static_inputs),
            )

    def joint(self, partitioner: Partitioner) -> JointGraph:
        """The graph, read anew, as a partitioner does: what is decided for it changes a copy."""
        chosen = replace(partitioner, input_names=self.input_names, leaves=self.leaves)
        module = compilers.with_copied_graph(self.module)
        return chosen.joint(module, self.num_fwd_outputs, self.static_inputs)
