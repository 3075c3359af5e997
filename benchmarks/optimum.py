"""How far the layered solver is from the optimum: single blocks of real models, solved exactly.

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
from ckpt_pass.modules.find import find_layers
from ckpt_pass.planner.contract import UnsupportedProblemError
from ckpt_pass.planner.exact import solve_exact
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import InfeasibleBudgetError, Solution, step_time, without_recompute
from ckpt_pass.planner.solve import solve

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
    # The share of the step that the optimum saves, as gaps of plans are given too.
    excess = [row.excess for row in closed] or [float("inf")]
    relative = [row.relative for row in closed] or [float("inf")]
    return Result(
        name="optimum",
        title=f"single blocks: the layered solver beside the optimum ({len(closed)} closed of "
        f"{len(rows)})",
        rows=rows,
        bars=(
            Bar("time of the step above the optimum's, mean", statistics.mean(excess), 0.01),
            Bar("time of the step above the optimum's, worst", max(excess), 0.05),
            Bar("recompute time above the optimum's, mean", statistics.mean(relative), 0.01),
            Bar("recompute time above the optimum's, worst", max(relative), 0.05),
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
