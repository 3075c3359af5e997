"""The tables of the benchmarks, one for each kind of row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from benchmarks.common import (
    BudgetRow,
    ClaimRow,
    ClockRow,
    Cost,
    DeepRow,
    EagerRow,
    GpuRow,
    InductorRow,
    OptimumRow,
    PeakRow,
    PlanningRow,
    PublishedRow,
    Ran,
    Result,
    SacRow,
    StrategyOf,
    TimingRow,
    TuningRow,
    WayRow,
)
from ckpt_pass.report.strategy_table import HEADS, cells


def table_of(result: Result) -> Table:
    """The table of a result, all of whose rows are of one kind."""
    rows: Any = result.rows
    return _TABLES[type(rows[0])](result.title, rows)


def _timings(title: str, rows: Sequence[TimingRow]) -> Table:
    references = tuple(rows[0].ratios)
    table = Table(title=f"{title}; {rows[0].rounds} rounds")
    table.add_column("variant")
    for column in ("median CPU ms", "quartiles", "least", *(f"/ {r}" for r in references)):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.variant,
            f"{row.median_s * 1e3:.2f}",
            f"{row.lower_quartile_s * 1e3:.2f} .. {row.upper_quartile_s * 1e3:.2f}",
            f"{row.least_s * 1e3:.2f}",
            *(f"{row.ratios[name]:.2f}" for name in references),
        )
    return table


def _peaks(title: str, rows: Sequence[PeakRow]) -> Table:
    table = Table(title=title)
    table.add_column("model")
    table.add_column("variant")
    for column in ("peak bytes", "saved bytes", "Gflop"):
        table.add_column(column, justify="right")
    for row in rows:
        flops = f"{row.flops / 1e9:.2f}"
        table.add_row(row.model, row.variant, f"{row.peak_bytes:,}", f"{row.saved_bytes:,}", flops)
    return table


def _budgets(title: str, rows: Sequence[BudgetRow]) -> Table:
    table = Table(
        title=f"{title}; * on torch's front, ! torch's gradients are wrong; recomputed "
        "time and flops in % of the step"
    )
    table.add_column("model")
    for column in ("budget", "torch MB", "time", "flops"):
        table.add_column(column, justify="right")
    for column in ("our MB", "time", "flops", "time /", "flops /", "bound", "gap %"):
        table.add_column(column, justify="right")
    for row in rows:
        mark = ("*" * row.on_front + "!" * (not row.torch_right)).ljust(2)
        table.add_row(row.label, f"{row.torch_budget:g}{mark}", *_budget_cells(row))
    return table


def _budget_cells(row: BudgetRow) -> list[str]:
    if row.torch is None:
        return ["torch fails"]
    if row.ours is None:
        return [*_cost_cells(row, row.torch), row.failure]
    return [
        *_cost_cells(row, row.torch),
        *_cost_cells(row, row.ours),
        f"{row.time_ratio:.2f}",
        f"{row.flops_ratio:.2f}",
        f"{100 * row.lower_bound_s / row.step_time_s:.1f}",
        f"{100 * row.gap:.1f}",
    ]


def _cost_cells(row: BudgetRow, cost: Cost) -> list[str]:
    return [
        f"{cost.peak_bytes / 1e6:.1f}"
        if cost.peak_bytes >= 1e7
        else f"{cost.peak_bytes / 1e6:.3f}",
        f"{100 * cost.recompute_time_s / row.step_time_s:.1f}",
        f"{100 * cost.recompute_flops / row.step_flops:.1f}",
    ]


def _inductor(title: str, rows: Sequence[InductorRow]) -> Table:
    table = Table(title=title)
    table.add_column("model")
    for column in ("budget at", "budget", "predicted", "measured", "above grads", "rounds", "s"):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = (row.budget_bytes, row.predicted_bytes, row.measured_bytes, row.above_gradients)
        at = "stock's least" if row.part is None else f"{row.part:g}"
        cells = (*(f"{size:,}" for size in sizes), f"{row.rounds}", f"{row.compile_s:.1f}")
        table.add_row(row.label, at, *cells)
    return table


def _gpu(title: str, rows: Sequence[GpuRow]) -> Table:
    table = Table(title=title)
    table.add_column("way")
    for column in ("budget", "predicted", "measured", "first s", "step ms", "ratio", "grads off"):
        table.add_column(column, justify="right")
    for row in rows:
        budget = "" if row.budget_bytes is None else f"{row.budget_bytes:,}"
        sizes = budget, f"{row.predicted_bytes:,}" if budget else "", f"{row.measured_bytes:,}"
        times = f"{row.first_s:.1f}", f"{row.step_s * 1e3:.2f}", f"{row.time_ratio:.3f}"
        table.add_row(row.way, *sizes, *times, f"{row.gradient_off:.1e}")
    return table


def _planning(title: str, rows: Sequence[PlanningRow]) -> Table:
    table = Table(title=f"{title}; medians of {rows[0].rounds}, CPU seconds")
    table.add_column("model")
    for column in ("layers", "nodes", "describe s", "solve s", "both s", "(trace s)"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds = (row.problem_s, row.solve_s, row.planning_s)
        cells = (f"{row.layers}", f"{row.nodes:,}", *(f"{s:.2f}" for s in seconds))
        table.add_row(row.model, *cells, f"({row.capture_s:.1f})")
    return table


def _depths(title: str, rows: Sequence[DeepRow]) -> Table:
    table = Table(title=title)
    table.add_column("what is recomputed")
    for column in ("peak MB", "recompute", "saved", "repeated", "most runs"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.way,
            f"{row.peak_bytes / 1e6:.2f}",
            f"{100 * row.recompute_share:.1f} %",
            f"{row.saved}",
            f"{row.repeated}",
            f"{row.most_runs}",
        )
    return table


def _eager(title: str, rows: Sequence[EagerRow]) -> Table:
    table = Table(title=f"{title}; recomputed in % of the step")
    table.add_column("model")
    table.add_column("way")
    for column in ("peak bytes", "predicted", "flops", "time"):
        table.add_column(column, justify="right")
    for row in rows:
        predicted = "" if row.predicted_bytes is None else f"{row.predicted_bytes:,}"
        shares = (f"{100 * share:.1f}" for share in (row.flops_share, row.time_share))
        table.add_row(row.model, row.way, f"{row.peak_bytes:,}", predicted, *shares)
    return table


def _optimum(title: str, rows: Sequence[OptimumRow]) -> Table:
    table = Table(title=f"{title}; recompute time in % of the step")
    table.add_column("model")
    for column in ("budget", "bytes", "layers", "auto", "optimum", "exact took s"):
        table.add_column(column, justify="right")
    for row in rows:
        best = "not proven" if row.optimum_s is None else f"{row.optimum_s / row.step_time_s:.2%}"
        table.add_row(
            row.model,
            f"{row.part:.2f}",
            f"{row.budget_bytes:,}",
            f"{row.layered_s / row.step_time_s:.2%}",
            f"{row.auto_s / row.step_time_s:.2%}",
            best,
            f"{row.exact_took_s:.1f}",
        )
    return table


def _claims(title: str, rows: Sequence[ClaimRow]) -> Table:
    table = Table(title=title)
    for column in ("claim", "model", "strategy"):
        table.add_column(column)
    for column in ("peak less", "saved less", "flops more", "time more"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (row.saving, row.saved_share, row.recompute_share, row.overhead)
        shown = (f"{share:.1%}" for share in figures)
        table.add_row(row.claim, row.model, row.strategy, *shown)
    return table


def _strategies(title: str, rows: Sequence[StrategyOf]) -> Table:
    table = Table(title=title)
    for column, head in enumerate(HEADS):
        table.add_column(head, justify="right" if 0 < column < 9 else "left")
    for line in cells([row.row for row in rows]):
        table.add_row(*line)
    return table


def _ways(title: str, rows: Sequence[WayRow]) -> Table:
    table = Table(title=title)
    table.add_column("way")
    for head in ("link", "budget", "peak", "moved", "recompute", "waiting", "measured"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row.way,
            f"{row.rate / 1e6:,.0f} MB/s",
            f"{row.budget_bytes / 1e6:.1f} MB",
            f"{row.measured_bytes / 1e6:.1f} MB",
            f"{row.moved_bytes / 1e6:.1f} MB",
            f"{row.recompute_s * 1e3:.1f} ms",
            f"{row.stall_s * 1e3:.1f} ms",
            f"{row.measured_s * 1e3:.1f} ms",
        )
    return table


def _clock(title: str, rows: Sequence[ClockRow]) -> Table:
    table = Table(title=title)
    heads = (
        "link",
        "budget",
        "moved",
        "recompute",
        "waiting",
        "clock",
        "measured",
        "ratio",
        "peak",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            f"{row.rate / 1e6:,.0f} MB/s",
            f"{row.budget_bytes / 1e6:.1f} MB",
            f"{row.moved_bytes / 1e6:.1f} MB",
            f"{row.recompute_s * 1e3:.1f} ms",
            f"{row.stall_s * 1e3:.1f} ms",
            f"{row.simulated_s * 1e3:.1f} ms",
            f"{row.measured_s * 1e3:.1f} ms",
            f"{row.measured_s / row.simulated_s:.3f}",
            f"{row.measured_bytes - row.predicted_bytes:+d} B",
        )
    return table


def _published(title: str, rows: Sequence[PublishedRow]) -> Table:
    table = Table("step", "device", title=title)
    for head in ("published", "planned", "planned time / published"):
        table.add_column(head, justify="right")
    for row in rows:
        speeds = row.published_tokens_per_s, row.planned_tokens_per_s
        words = (f"{speed:,.0f}" for speed in speeds)
        table.add_row(row.what, row.device, *words, f"{speeds[0] / speeds[1]:.2f}")
    return table


def _sac(title: str, rows: Sequence[SacRow]) -> Table:
    table = Table(title=f"{title}, in % of the step's flops")
    for head in ("budget", "sac_milp says", "takes", "again", "plan says", "takes", "again"):
        table.add_column(head, justify="right")
    for row in rows:
        torchs = ("no plan", "", "") if row.torch is None else _ran(row.torch, row.budget_bytes)
        table.add_row(f"{row.budget_bytes:,}", *torchs, *_ran(row.ours, row.budget_bytes))
    return table


def _ran(plan: Ran, budget: int) -> tuple[str, str, str]:
    over = "!" * (plan.peak_bytes > budget)
    again = f"{100 * plan.flops_share:.1f}"
    return f"{plan.claimed_bytes:,}", f"{over}{plan.peak_bytes:,}", again


def _tunings(title: str, rows: Sequence[TuningRow]) -> Table:
    table = Table(title=title)
    table.add_column("model")
    table.add_column("way")
    heads = ("microbatch", "peak MB", "of", "recomputed", "predicted", "measured", "sweep")
    for head in heads:
        table.add_column(head, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            row.model,
            row.way,
            f"{row.accumulate} x {row.microbatch}",
            f"{row.peak_bytes / 1e6:.1f}",
            f"{row.total_bytes / 1e6:.1f}",
            f"{100 * row.recompute_share:.1f} %",
            f"{row.predicted_per_s:.4g}",
            "" if row.measured_per_s is None else f"{row.measured_per_s:.4g}",
            f"{row.swept_per_s:.4g}",
            "chosen" if row.chosen else "",
        )
    return table


_TABLES: dict[type, Callable[[str, Any], Table]] = {
    TimingRow: _timings,
    PeakRow: _peaks,
    BudgetRow: _budgets,
    PlanningRow: _planning,
    DeepRow: _depths,
    EagerRow: _eager,
    GpuRow: _gpu,
    InductorRow: _inductor,
    OptimumRow: _optimum,
    ClaimRow: _claims,
    ClockRow: _clock,
    WayRow: _ways,
    PublishedRow: _published,
    SacRow: _sac,
    StrategyOf: _strategies,
    TuningRow: _tunings,
}
