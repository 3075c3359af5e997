"""Half of a step's saved activations moved off the GPU, beside the usual ways to do without them.

The Llama of ``benchmarks/gpu.py`` on a batch of long sequences, in bf16 around Inductor. The budget
is stock Inductor's peak less half of what it saves between forward and backward. Beside ours, with
a link to pinned host memory and without one: per-block checkpoint, ``save_on_cpu``, and torch's own
offloading of all that it may move (``torch._functorch.config.enable_activation_offloading``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.autograd.graph import save_on_cpu

from benchmarks.common import Bar, Result
from benchmarks.gpu import Size, Ways, say, the_device
from ckpt_pass import InfeasibleBudgetError, Offload, Plan

ROUNDS = 9
#: 0.94 billion parameters; what is saved of 16,384 tokens is far more than the loss takes for
#: itself (three times the logits in fp32, 6.3 GB) and the gradients (1.9 GB).
LARGE = Size(layers=8, width=2816, inner=7552, heads=22, batch=4)
#: For a machine without a GPU: what is saved is most of the peak there, too.
TINY = Size(4, 64, 128, 4, 128, 64, batch=16, dtype=torch.float32)
STOCK, MOVED, KEPT = "stock, 1", "ours, offload", "ours, no link"
BLOCKS = "checkpoint on each block"


def run(size: Size | None = None, device: str | None = None, rounds: int = ROUNDS) -> Result:
    """Measure every way; on the CPU a tiny model unless a size is given."""
    place = the_device(device)
    ways = Ways(size or (LARGE if place.type == "cuda" else TINY), place, rounds)
    with torch._dynamo.config.patch(recompile_limit=64):
        ways.stock((1.0,))
        budget = ways.rows[0].measured_bytes - ways.saved_bytes[STOCK] // 2
        plan = added(ways, MOVED, budget, offload=Offload("host"))
        for line in _told(ways, plan):
            say(line)
        added(ways, KEPT, budget)
        # The CPU has no pinned memory. What comes back may have other strides: compiled code fails.
        ways.add("save_on_cpu", "eager", around=partial(save_on_cpu, place.type == "cuda"))
        if place.type == "cuda" and hasattr(functorch_config, "enable_activation_offloading"):
            with _torch_offloads():
                ways.add("torch's offloading", "inductor")
    return ways.result("gpu-offload", _bars(ways, plan, budget))


def added(ways: Ways, way: str, budget: int, **options: Any) -> Plan:
    """One of ours at a budget, or at the least that its refusal names."""
    try:
        return ways.add_ours(way, budget, **options)
    except RuntimeError as error:  # dynamo wraps a backend's errors
        why = getattr(error, "inner_exception", error)
        if not isinstance(why, InfeasibleBudgetError):
            raise
        say(f"{way}: {why}")
        return ways.add_ours(way, why.least_feasible_bytes, **options)


@contextmanager
def _torch_offloads() -> Iterator[None]:
    """Torch moves what is marked, where it can, on a stream of its own."""

    def mark(graph: fx.Graph) -> None:
        for node in graph.nodes:
            node.meta["should_offload"] = True

    options = {"enable_activation_offloading": True, "activation_offload_separate_stream": True}
    with (
        functorch_config.patch({k: v for k, v in options.items() if hasattr(functorch_config, k)}),
        inductor_config.patch(joint_custom_pre_pass=mark),
    ):
        yield


def _told(ways: Ways, plan: Plan) -> Iterator[str]:
    saved, moved = ways.saved_bytes, plan.predicted.offloaded
    yield f"saved between forward and backward: {saved}"
    if moved is not None:
        yield (
            f"moved {moved.moved_bytes:,} bytes; stall {moved.stall_s * 1e3:.2f} ms, recomputed "
            f"{plan.predicted.recompute_time_s * 1e3:.2f} ms by the clock"
        )


def _bars(ways: Ways, plan: Plan, half: int) -> tuple[Bar, ...]:
    rows = {row.way: row for row in ways.rows}
    stock, moved = rows[STOCK], rows[MOVED]
    assert moved.budget_bytes is not None and plan.predicted.offloaded is not None
    adds_s = plan.predicted.recompute_time_s + plan.predicted.offloaded.stall_s
    return (
        Bar("stock's peak less half of what it saves", moved.measured_bytes, half, "bytes"),
        Bar("measured peak over the budget", moved.measured_bytes - moved.budget_bytes, 0, "bytes"),
        Bar(
            "prediction away from the measured peak",
            abs(moved.measured_bytes / moved.predicted_bytes - 1),
            0.01,
        ),
        Bar("step time, ours / stock without a budget", moved.time_ratio, 1.02),
        Bar(
            "predicted away from the measured step time",
            abs((stock.step_s + adds_s) / moved.step_s - 1),
            0.1,
        ),
        Bar("step time, ours / checkpoint on each block", moved.step_s / rows[BLOCKS].step_s, 1.0),
        Bar("gradients away from stock's", moved.gradient_off, 0.1),
    )
