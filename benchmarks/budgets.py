"""Our budgets beside torch's ``activation_memory_budget``: the same peak, how much recomputation.

For each peak that torch's own budget reaches, ours gets that peak as its budget. Peaks are measured
(allocation events), flops are counted on the ops that really run; both are exact. Where torch's
step has other gradients than the plain one, since it drew dropout anew, it is marked, and no worst
case: a right step keeps the random state, or the mask. Times are modelled, by one cost model for
both and on the graphs that really ran: for torch's, the forward ops found in the backward that its
partitioner made.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition

import ckpt_pass
from benchmarks.common import Bar, BudgetRow, Cost, Result, torch_threads
from ckpt_pass.graph.joint import read_joint
from ckpt_pass.graph.problem import build_problem
from tests.zoo import Built, hf

#: torch's knob, from "recompute only what is nearly free" to "recompute everything".
TORCH_BUDGETS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.0)
SMALL = ("gpt2", "llama", "mixtral", "bert", "vit", "resnet")

Models: TypeAlias = Mapping[str, Callable[[], Built]]
#: The models of the default run.
REFERENCES: Models = {"llama-16L": hf.llama_16l, "gpt2-12L": hf.gpt2_12l}
MODELS: Models = {**REFERENCES, **{c.name: c.make for c in hf.CASES if c.name in SMALL}}
RATIOS: Mapping[str, Callable[[BudgetRow], float]] = {
    "modelled recompute time": lambda row: row.time_ratio,
    "recomputed flops": lambda row: row.flops_ratio,
}
#: More than any step here needs: nothing is recomputed.
AMPLE = "1TB"


@dataclass
class WatchedPartition:
    """torch's own partitioner; it also looks at what the backward that it makes runs again.

    Attributes:
        time_s: modelled seconds of the forward ops in the backward.
    """

    time_s: float = 0.0

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split a joint graph; the signature is torch's."""
        gm.graph.eliminate_dead_code()  # torch's partitioner begins with that, too
        static = options.get("static_lifetime_input_indices") or ()
        joint = read_joint(gm, options["num_fwd_outputs"], static, None, ())
        described = build_problem(joint)  # before the split, which changes the graph
        ops = described.problem.ops
        times = {n.name: ops[i].time_s for n, i in described.index.items() if ops[i].forward}
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **options)
        names = [n.name for n in backward.graph.nodes if n.op == "call_function"]
        self.time_s = sum(times.get(name, 0.0) for name in names)
        return forward, backward

    def backend(self) -> Callable[..., Any]:
        """torch's ``aot_eager`` with this partition function."""
        compiler: Callable[..., Any] = aot_autograd(
            fw_compiler=boxed_nop,
            bw_compiler=boxed_nop,
            partition_fn=self,
            keep_inference_input_mutations=True,
        )
        return compiler


def made(make: Callable[[], Built], dtype: torch.dtype) -> Built:
    """A model with its inputs, both in a dtype."""
    module, inputs = make()
    return module.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def run(
    models: Models = REFERENCES,
    budgets: Sequence[float] = TORCH_BUDGETS,
    dtype: torch.dtype = torch.float32,
    solver: str = "dp",
) -> Result:
    """Measure every point, torch and ours in turn.

    Args:
        models: what makes each model.
        budgets: settings of torch's.
        dtype: of the models.
        solver: torch's own (``activation_memory_budget_solver``): ``dp`` or ``ilp``.
    """
    with torch_threads(1), functorch_config.patch(activation_memory_budget_solver=solver):
        rows = tuple(row for name in models for row in _rows(name, models[name], budgets, dtype))
    return Result(
        name="budgets",
        title="the same peak: torch's activation_memory_budget and ours (aot_eager, CPU)",
        rows=rows,
        bars=_bars([row for row in rows if row.torch is not None]),
    )


def _bars(rows: Sequence[BudgetRow]) -> tuple[Bar, ...]:
    if not rows:
        return ()
    over = max(row.over_bytes for row in rows)
    bars = [Bar("measured peak over the budget, worst", over, 0, "bytes")]
    right = [row for row in rows if row.torch_right]
    wrong = len(rows) - len(right)
    for what, ratio in RATIOS.items():
        every = statistics.median(map(ratio, rows))
        front = statistics.median(ratio(row) for row in rows if row.on_front)
        worst = max(map(ratio, right), default=0.0)
        bars += [
            Bar(f"{what}, ours / torch, median", every, 0.45),
            Bar(f"{what}, ours / torch, median on torch's front", front, 0.75),
            Bar(f"{what}, ours / torch, worst but for {wrong} wrong steps of torch's", worst, 1.0),
        ]
    return tuple(bars)


def _rows(
    name: str, make: Callable[[], Built], budgets: Sequence[float], dtype: torch.dtype
) -> list[BudgetRow]:
    found = list(_Model(name, make, dtype).rows(budgets))
    costs = [row.torch for row in found if row.torch is not None]
    return [
        replace(row, on_front=row.torch is not None and on_front(row.torch, costs)) for row in found
    ]


def on_front(cost: Cost, costs: Sequence[Cost]) -> bool:
    """Whether no other point has a peak as low and less modelled time."""
    return not any(
        other.peak_bytes <= cost.peak_bytes and other.recompute_time_s < cost.recompute_time_s
        for other in costs
    )


class _Model:
    """The points of one model; ours are measured once for each peak."""

    def __init__(self, name: str, make: Callable[[], Built], dtype: torch.dtype) -> None:
        self._name, self._dtype = name, str(dtype).removeprefix("torch.")
        self._module, self._inputs = made(make, dtype)
        plain = ckpt_pass.make_backend(budget=AMPLE, inner="aot_eager")
        measured, self._gradients = self._measured(plain)
        self._plain_flops = measured.flops
        self._step_time_s = plain.plans[-1].step_time_s
        self._ours: dict[int, tuple[Cost, ckpt_pass.Plan] | None] = {}

    def rows(self, budgets: Sequence[float]) -> Iterator[BudgetRow]:
        for budget in budgets:
            theirs, right, failure = self._theirs_at(budget)
            row = BudgetRow(
                model=self._name,
                dtype=self._dtype,
                torch_budget=budget,
                torch=theirs,
                ours=None,
                torch_right=right,
                step_flops=self._plain_flops,
                step_time_s=self._step_time_s,
                failure=failure,
            )
            yield self._beside(row, theirs) if theirs is not None else row

    def _beside(self, row: BudgetRow, theirs: Cost) -> BudgetRow:
        if theirs.peak_bytes not in self._ours:
            self._ours[theirs.peak_bytes] = self._ours_at(theirs.peak_bytes)
        found = self._ours[theirs.peak_bytes]
        if found is None:
            return replace(row, failure="no plan of ours fits")
        cost, plan = found
        return replace(
            row, ours=cost, lower_bound_s=plan.lower_bound_s, gap=plan.gap, solver=plan.solver
        )

    def _measured(self, backend: Any) -> tuple[ckpt_pass.Measurement, list[torch.Tensor]]:
        """What a step costs, and its gradients."""
        torch._dynamo.reset()
        compiled = torch.compile(self._module, backend=backend, fullgraph=True)
        # The first run compiles; those that are timed, and looked at for flops and bytes, do not.
        gradients = self._gradients_of(lambda: compiled(*self._inputs))
        measured = ckpt_pass.measure_step(
            lambda: compiled(*self._inputs),
            warmup=0,
            repeats=1,
            params=self._module.parameters(),
        )
        return measured, gradients

    def _gradients_of(self, step: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(0)  # the same dropout every time
        step().backward()
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        self._module.zero_grad(set_to_none=True)
        return gradients

    def _cost(self, measured: ckpt_pass.Measurement, time_s: float) -> Cost:
        return Cost(measured.peak_bytes, measured.flops - self._plain_flops, time_s)

    def _theirs_at(self, budget: float) -> tuple[Cost | None, bool, str]:
        watched = WatchedPartition()
        try:
            with functorch_config.patch(activation_memory_budget=budget):
                measured, gradients = self._measured(watched.backend())
        except RuntimeError as error:  # what kernels and autograd raise, and dynamo for the rest
            if isinstance(getattr(error, "inner_exception", None), ckpt_pass.CkptPassError):
                raise
            return None, True, str(error).strip().split("\n", 1)[0]
        right = all(map(torch.equal, gradients, self._gradients))
        return self._cost(measured, watched.time_s), right, ""

    def _ours_at(self, peak_bytes: int) -> tuple[Cost, ckpt_pass.Plan] | None:
        backend = ckpt_pass.make_backend(budget=peak_bytes, inner="aot_eager")
        try:
            measured, gradients = self._measured(backend)
        except RuntimeError as error:  # dynamo wraps a backend's errors
            why = getattr(error, "inner_exception", error)
            if not isinstance(why, ckpt_pass.InfeasibleBudgetError):
                raise
            return None
        assert all(map(torch.equal, gradients, self._gradients)), f"{self._name}: wrong gradients"
        plan = backend.plans[-1]
        return self._cost(measured, plan.recompute_time_s), plan
