"""How far plans are from the optimum: single blocks of real models, solved exactly.

Whole models are too large for the exact solver. A model with one of its layers is not, and has the
same ops. Budgets are spread from the least feasible peak to that without recomputation; a problem
that is not closed within the time limit is left out, and counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

from torch import nn

from benchmarks.budgets import MODELS, SMALL, Models
from benchmarks.chains import traced
from benchmarks.common import Bar, OptimumRow, Result, torch_threads
from ckpt_pass.modules.layers.find import find_layers
from ckpt_pass.planner.contract import UnsupportedProblemError
from ckpt_pass.planner.exact import solve_exact
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import InfeasibleBudgetError, Solution, step_time, without_recompute
from ckpt_pass.planner.solve import solve
from ckpt_pass.planner.solvers import run_solver

#: Between the least feasible peak and that without recomputation.
PARTS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85)
LIMIT_S = 60.0
SMALL_MODELS: Models = {name: make for name, make in MODELS.items() if name in SMALL}


def run(
    models: Models = MODELS, parts: Sequence[float] = PARTS, limit_s: float = LIMIT_S
) -> Result:
    """Solve every block at every budget, both ways."""
    with torch_threads(1):
        rows = tuple(row for name in models for row in _rows(name, models, parts, limit_s))
    closed = [row for row in rows if row.closed]
    # As a share of the step: so the gaps of plans are given, too.
    auto = [row.excess(row.auto_s) for row in closed] or [float("inf")]
    layered = [row.excess(row.layered_s) for row in closed] or [float("inf")]
    return Result(
        name="optimum",
        title=f"single blocks: plans beside the optimum ({len(closed)} of {len(rows)} closed)",
        rows=rows,
        bars=(
            Bar("auto: time of the step above the optimum's, mean", statistics.mean(auto), 0.01),
            Bar("auto: time of the step above the optimum's, worst", max(auto), 0.05),
            Bar("layers: the same, mean", statistics.mean(layered), 0.01),
            Bar("layers: the same, worst", max(layered), 0.05),
        ),
    )


def one_block(model: nn.Module) -> nn.Module:
    """A model with the first of its layers only, in place; others of a row are left out."""
    rows: dict[str, list[str]] = {}
    for name in find_layers(model).names:
        parent, _, child = name.rpartition(".")
        rows.setdefault(parent, []).append(child)
    for parent, children in rows.items():
        holder = model.get_submodule(parent)
        if isinstance(holder, (nn.ModuleList, nn.Sequential)):
            del holder[1 : len(children)]
    return model


def _rows(
    name: str, models: Models, parts: Sequence[float], limit_s: float
) -> Iterator[OptimumRow]:
    model, inputs = models[name]()
    with traced(one_block(model), inputs) as graph:
        problem, borders = graph.described()
    plain = without_recompute(problem).peak_bytes
    try:
        solve(problem, 0, borders)
    except InfeasibleBudgetError as error:
        least = error.least_feasible_bytes
    else:
        least = 0
    for part in parts:
        budget_bytes = int(least + part * (plain - least))
        layered = solve(problem, budget_bytes, borders)
        start = time.perf_counter()
        found = _exact(problem, budget_bytes, limit_s, layered)
        seconds = time.perf_counter() - start
        yield OptimumRow(
            model=f"{name}, one block",
            part=part,
            budget_bytes=budget_bytes,
            layered_s=layered.recompute_time_s,
            auto_s=run_solver("auto", problem, budget_bytes, borders).recompute_time_s,
            optimum_s=found.recompute_time_s if found else None,
            step_time_s=step_time(problem),
            exact_took_s=seconds,
        )


def _exact(problem: Problem, budget_bytes: int, limit_s: float, known: Solution) -> Solution | None:
    """The optimum; ``None`` where it was not proven in time, or the step cannot be described."""
    try:
        found = solve_exact(problem, budget_bytes, limit_s, known=known)
    except UnsupportedProblemError:
        return None
    return found if found.status == "optimal" else None
