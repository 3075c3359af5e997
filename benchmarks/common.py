"""What every benchmark shares: rows, bars, timing in rounds, and torch's lists of ops."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from unittest import mock

import torch

from ckpt_pass.demo.training import torch_threads as torch_threads
from ckpt_pass.graph.kernel_cache import ENVIRONMENT_VARIABLE
from ckpt_pass.measure.timing import TimingRow as TimingRow
from ckpt_pass.measure.timing import Variant as Variant
from ckpt_pass.measure.timing import interleave as interleave
from ckpt_pass.report.strategy_rows import StrategyRow

_aten = torch.ops.aten

#: What ``save-matmul`` saves, for torch's ``create_selective_checkpoint_contexts``.
MATMUL_OPS: tuple[Any, ...] = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
)
#: What ``save-matmul-attention`` saves: these and the fused attentions of every device.
MATMUL_ATTENTION_OPS: tuple[Any, ...] = (
    *MATMUL_OPS,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
)


@contextmanager
def fresh_kernels() -> Iterator[None]:
    """Kernels are measured now: what is remembered may be of an hour in which others ran, too."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: folder}),
    ):
        yield


@dataclass(frozen=True)
class PeakRow:
    """The exact bytes and flops of one variant of one model's step (``measure_step``)."""

    model: str
    variant: str
    peak_bytes: int
    saved_bytes: int
    flops: int


@dataclass(frozen=True)
class Cost:
    """What one way to stay within a peak costs.

    Attributes:
        peak_bytes: measured.
        recompute_flops: counted on the ops that ran, above the step that recomputes nothing.
        recompute_time_s: modelled, of the forward ops that the backward runs again.
    """

    peak_bytes: int
    recompute_flops: int
    recompute_time_s: float


@dataclass(frozen=True)
class BudgetRow:
    """One setting of torch's budget, and ours with torch's peak as the budget.

    Attributes:
        torch: ``None`` where torch itself raises, and ``failure`` says what.
        ours: ``None`` where torch is, and where no plan of ours fits the peak.
        on_front: no other setting of torch's has no higher peak and less modelled time.
        torch_right: whether torch's step has the gradients of the plain step. Below a budget of 1
            its partitioner may draw dropout anew in the backward (pytorch#190758).
        step_flops, step_time_s: of the step that recomputes nothing.
        lower_bound_s: no plan within the peak recomputes less; 0 where nothing is known.
        gap: how much shorter the step of the fastest plan may be, as a share of our step.
        solver: what found our plan, in words.
    """

    model: str
    dtype: str
    torch_budget: float
    torch: Cost | None
    ours: Cost | None
    on_front: bool = False
    torch_right: bool = True
    step_flops: int = 0
    step_time_s: float = 0.0
    lower_bound_s: float = 0.0
    gap: float = 0.0
    solver: str = ""
    failure: str = ""

    @property
    def label(self) -> str:
        return self.model if self.dtype == "float32" else f"{self.model} {self.dtype}"

    @property
    def time_ratio(self) -> float:
        """Modelled recompute time, ours by torch's."""
        return self._ratio(lambda cost: cost.recompute_time_s)

    @property
    def flops_ratio(self) -> float:
        """Recomputed flops, ours by torch's."""
        return self._ratio(lambda cost: cost.recompute_flops)

    @property
    def over_bytes(self) -> float:
        """Our measured peak above the budget; negative below it."""
        assert self.torch is not None
        return self.ours.peak_bytes - self.torch.peak_bytes if self.ours else float("inf")

    def _ratio(self, amount: Callable[[Cost], float]) -> float:
        """0 where ours is 0, infinite where there is no plan of ours or torch's is 0."""
        if self.ours is None or self.torch is None:
            return float("inf")
        ours, theirs = amount(self.ours), amount(self.torch)
        if ours == 0:
            return 0.0
        return ours / theirs if theirs else float("inf")


@dataclass(frozen=True)
class PlanningRow:
    """How long planning one joint graph takes: medians of CPU seconds on one thread.

    Attributes:
        layers: of the chain.
        nodes: ops of the joint graph.
        capture_s: of the trace, once; no part of planning.
        problem_s: of describing the graph to the planner.
        solve_s: of finding the plan.
        rounds: timings of either.
    """

    model: str
    layers: int
    nodes: int
    capture_s: float
    problem_s: float
    solve_s: float
    rounds: int

    @property
    def planning_s(self) -> float:
        return self.problem_s + self.solve_s


@dataclass(frozen=True)
class DeepRow:
    """The least peak of one way to run a deep chain; simulated, which is exact for ``aot_eager``.

    Attributes:
        peak_bytes: above the start of the step.
        recompute_share: modelled recompute time by the step's time with nothing recomputed.
        saved: values that are saved.
        repeated: values that are computed more than once in the backward.
        most_runs: how often the backward computes one value at the most.
    """

    model: str
    way: str
    peak_bytes: int
    recompute_share: float
    saved: int
    repeated: int
    most_runs: int


@dataclass(frozen=True)
class EagerRow:
    """One way to run a model's eager step.

    Attributes:
        peak_bytes: measured.
        predicted_bytes: by the plan, where there is one.
        flops_share, time_share: recomputed, by the step's with nothing recomputed; time is
            modelled.
    """

    model: str
    way: str
    peak_bytes: int
    predicted_bytes: int | None
    flops_share: float
    time_share: float

    @property
    def costs(self) -> tuple[float, ...]:
        return self.peak_bytes, self.flops_share, self.time_share


@dataclass(frozen=True)
class Ran:
    """A plan that was run.

    Attributes:
        claimed_bytes: the peak that it says.
        peak_bytes: measured.
        flops_share: recomputed, by the step's with nothing recomputed.
    """

    claimed_bytes: int
    peak_bytes: int
    flops_share: float


@dataclass(frozen=True)
class SacRow:
    """Torch's ``sac_milp`` and a plan of ours at one budget, both run.

    Attributes:
        budget_bytes: of a rank, beside its parameters.
        torch: ``None`` where ``sac_milp`` finds no plan.
    """

    budget_bytes: int
    torch: Ran | None
    ours: Ran


@dataclass(frozen=True)
class OptimumRow:
    """A block at one budget: recompute time of the solvers ``layers`` and ``auto``, and the least.

    Attributes:
        part: where the budget lies between the least peak (0) and no recomputation (1).
        optimum_s: ``None`` where it was not proven within the limit.
        step_time_s: modelled, of the step that recomputes nothing.
        exact_took_s: how long the exact solver worked.
    """

    model: str
    part: float
    budget_bytes: int
    layered_s: float
    auto_s: float
    optimum_s: float | None
    step_time_s: float
    exact_took_s: float

    @property
    def closed(self) -> bool:
        return self.optimum_s is not None

    def excess(self, recompute_time_s: float) -> float:
        """Time of a step above the optimum's, as a share of that."""
        assert self.optimum_s is not None
        return (recompute_time_s - self.optimum_s) / (self.step_time_s + self.optimum_s)


@dataclass(frozen=True)
class ClaimRow:
    """A saving and a price that people quote, and what was measured.

    Attributes:
        claim: as it is quoted.
        model, strategy: what it was checked on.
        saving: of the plain step's peak.
        saved_share: of what the plain step holds between forward and backward.
        recompute_share: recomputed flops by the plain step's.
        overhead: time beyond the plain step's, as a share of it.
    """

    claim: str
    model: str
    strategy: str
    saving: float
    saved_share: float
    recompute_share: float
    overhead: float


@dataclass(frozen=True)
class StrategyOf:
    """A row of a comparison of strategies, with its model."""

    model: str
    row: StrategyRow


@dataclass(frozen=True)
class InductorRow:
    """A budget with Inductor as the inner compiler, or the least that stock Inductor reaches.

    Attributes:
        part: where the budget lies between our least peak (0) and Inductor's own with nothing
            recomputed (1); ``None`` for stock.
        predicted_bytes: by the plan.
        gradient_bytes: what every step ends with.
        rounds: schedules that were made until the plan was found; for stock, settings tried.
        compile_s: CPU seconds of the first step with cold caches, compilers' among them; 0 where
            caches were not cold.
    """

    model: str
    part: float | None
    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int
    gradient_bytes: int
    rounds: int
    compile_s: float
    dtype: str = "float32"

    @property
    def label(self) -> str:
        return self.model if self.dtype == "float32" else f"{self.model} {self.dtype}"

    @property
    def above_gradients(self) -> int:
        return self.measured_bytes - self.gradient_bytes


@dataclass(frozen=True)
class GpuRow:
    """One way through a step, on an accelerator.

    Attributes:
        budget_bytes: ``None`` where no budget of ours is given.
        predicted_bytes: by the plan; what was measured where there is none.
        first_s: seconds of the first step with cold caches.
        step_s: median of later ones.
        time_ratio: by the time of the way that it stands beside.
        gradient_off: the worst distance from the first way's gradients, as a share of the largest.
        beside: the way with whose peak as its budget it was planned; empty where with none.
    """

    way: str
    budget_bytes: int | None
    predicted_bytes: int
    measured_bytes: int
    first_s: float
    step_s: float
    time_ratio: float
    gradient_off: float
    beside: str = ""


@dataclass(frozen=True)
class ClockRow:
    """A plan that moves values over a link of a known rate.

    Attributes:
        rate: of the link, bytes per second.
        moved_bytes: what leaves the device, and comes back.
        recompute_s, stall_s: of the plan, by the clock: recomputation, and waiting for copies.
        simulated_s: of the step, by the clock.
        measured_s: median.
    """

    rate: float
    budget_bytes: int
    moved_bytes: int
    recompute_s: float
    stall_s: float
    simulated_s: float
    measured_s: float
    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True)
class WayRow:
    """A plan made in one way, on a link of a known rate.

    Attributes:
        way: what decides, and what may be decided.
        rate: of the link, bytes per second.
        moved_bytes, recompute_s, stall_s: of the plan, see :class:`ClockRow`.
        measured_s: median.
    """

    way: str
    rate: float
    budget_bytes: int
    moved_bytes: int
    recompute_s: float
    stall_s: float
    measured_s: float
    measured_bytes: int


@dataclass(frozen=True)
class PublishedRow:
    """A training speed that others published, and what a plan on paper says of that step."""

    what: str
    device: str
    source: str
    published_tokens_per_s: float
    planned_tokens_per_s: float

    @property
    def off(self) -> float:
        """How far the planned step time is from the published one, as a share of that."""
        return abs(self.published_tokens_per_s / self.planned_tokens_per_s - 1)


@dataclass(frozen=True)
class TuningRow:
    """A way to run a global batch within a total, weighed by ``tune`` and measured in a sweep.

    Attributes:
        peak_bytes: of the whole job, predicted.
        recompute_share: modelled recompute time by that of the step alone.
        predicted_per_s, measured_per_s: samples per second as ``tune`` has them; ``None`` where it
            did not measure.
        swept_per_s: as the sweep measured them.
        chosen: whether it is what ``tune`` chose.
    """

    model: str
    way: str
    microbatch: int
    accumulate: int
    peak_bytes: int
    total_bytes: int
    recompute_share: float
    predicted_per_s: float
    measured_per_s: float | None
    swept_per_s: float
    chosen: bool


OwnRow: TypeAlias = (
    PeakRow
    | BudgetRow
    | PlanningRow
    | DeepRow
    | EagerRow
    | OptimumRow
    | ClaimRow
    | InductorRow
    | GpuRow
    | ClockRow
    | WayRow
    | PublishedRow
    | SacRow
    | TuningRow
)
Row: TypeAlias = TimingRow | OwnRow | StrategyOf


@dataclass(frozen=True)
class Bar:
    """Something that must hold: ``value <= limit``."""

    what: str
    value: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Result:
    """What one benchmark found."""

    name: str
    title: str
    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    facts: Mapping[str, object] = field(default_factory=dict)
