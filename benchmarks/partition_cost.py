"""What splitting a joint graph costs at compile time, against torch's own partitioner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing

from benchmarks.common import Bar, Result, Variant, interleave, torch_threads
from ckpt_pass import CkptPassError, Plan, as_policy
from ckpt_pass.compile.engine import Partitioner
from tests.zoo import Built, hf

ROUNDS = 15
WARMUP = 1
FACTOR = 1.5  # the bar: ours may take this much of torch's time

TORCH = "torch's min-cut"
OURS = "save-matmul-attention, with plan"
OURS_BARE = "save-matmul-attention"
OURS_NOTHING = "save-nothing, with plan"


class NoJointGraphError(CkptPassError):
    """The step compiled into no joint graph, or into several."""


@dataclass(frozen=True)
class Joint:
    """A joint graph as AOTAutograd hands it to a partition function."""

    module: fx.GraphModule
    inputs: Sequence[object]
    options: dict[str, Any]
    context: TracingContext

    def copied(self) -> Joint:
        """A copy of the graph; its fake tensors stay shared, nobody writes to them."""
        module = fx.GraphModule(self.module, copy.deepcopy(self.module.graph))
        return Joint(module, self.inputs, self.options, self.context)

    def split_by(self, partition: Callable[..., Any]) -> object:
        """Call a partition function as AOTAutograd does."""
        with tracing(self.context):  # it knows the fake mode, which random ops ask for
            return partition(self.module, self.inputs, **self.options)


def capture(make: Callable[[], Built]) -> Joint:
    """Compile one step and keep the joint graph that reaches the partition function.

    Raises:
        NoJointGraphError: not exactly one graph reached it.
    """
    found: list[Joint] = []

    def partition(module: fx.GraphModule, inputs: Sequence[object], **options: Any) -> object:
        found.append(Joint(module, inputs, options, TracingContext.get()).copied())
        return min_cut_rematerialization_partition(module, inputs, **options)

    backend = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    torch._dynamo.reset()
    step, args = make()
    torch.compile(step, backend=backend, fullgraph=True)(*args)
    torch._dynamo.reset()
    if len(found) != 1:
        raise NoJointGraphError(
            f"Compiling {type(step).__name__} made {len(found)} joint graphs, expected 1. "
            "Give a step whose output needs a gradient and that compiles as a whole."
        )
    return found[0]


def partitioners() -> dict[str, Callable[..., Any]]:
    """The partition functions to compare."""
    plans: list[Plan] = []
    policy = as_policy("save-matmul-attention")
    return {
        TORCH: min_cut_rematerialization_partition,
        OURS: Partitioner(policy, on_plan=plans.append),
        OURS_BARE: Partitioner(policy),
        OURS_NOTHING: Partitioner(as_policy("save-nothing"), on_plan=plans.append),
    }


def _variant(name: str, joint: Joint, partition: Callable[..., Any]) -> Variant:
    return Variant(name, lambda copied: copied.split_by(partition), joint.copied)


def run(
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    make: Callable[[], Built] = hf.llama_16l,
    name: str = "llama-16L",
) -> Result:
    """Time each partition function on copies of the same joint graph, on one thread.

    Raises:
        NoJointGraphError: the step does not compile into one graph.
    """
    with torch_threads(1):
        joint = capture(make)
        variants = [_variant(label, joint, part) for label, part in partitioners().items()]
        rows = interleave(variants, rounds=rounds, warmup=warmup, references=(TORCH,))
    nodes = len(joint.module.graph.nodes)
    ours = next(row for row in rows if row.variant == OURS)
    bar = Bar(f"{OURS} / {TORCH}", ours.ratios[TORCH], FACTOR)
    title = f"Partition: joint graph of {name}, {nodes} nodes"
    return Result("partition", title, rows, (bar,), {"nodes": nodes})
