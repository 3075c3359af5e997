"""How long planning takes: describing the joint graph, and solving, against the graph's size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.chains import llama_chain, traced
from benchmarks.common import Bar, PlanningRow, Result, torch_threads
from ckpt_pass.drawing.figures import COLOURS, GREY, figure_of, open_frame, write
from ckpt_pass.planner.solution import without_recompute
from ckpt_pass.planner.solve import solve
from tests.zoo import Built, hf

ROUNDS = 3
#: Layers of the chains; tracing the longer ones takes minutes.
LAYERS = (8, 16, 32)
ALL_LAYERS = (*LAYERS, 64, 128, 160)
BATCH, LENGTH = 2, 64
#: Of the peak with nothing recomputed: low enough for the solver to have to work, and feasible for
#: short chains.
BUDGET = 0.5
REFERENCE, REFERENCE_LAYERS = "llama-16L", 16
LIMIT_S = 2.0
DEEPEST, DEEPEST_LIMIT_S = 160, 20.0


def run(layers: Sequence[int] = LAYERS, rounds: int = ROUNDS, reference: bool = True) -> Result:
    """Time planning of the reference model and of chains.

    Args:
        layers: of each chain.
        rounds: timings of each.
        reference: whether to time the reference model, too.
    """
    with torch_threads(1):
        rows = tuple(_rows(layers, rounds, reference))
    return Result(
        name="planning",
        title=f"planning for a budget of {BUDGET:g}, one thread",
        rows=rows,
        bars=bars(rows),
    )


def bars(rows: Sequence[PlanningRow]) -> tuple[Bar, ...]:
    """The bars of what was timed."""
    found = []
    for row in rows:
        if row.model == REFERENCE:
            found.append(Bar(f"{REFERENCE}, describe and solve, s", row.planning_s, LIMIT_S))
        elif row.layers == DEEPEST:
            what = f"{DEEPEST} layers, describe and solve, s"
            found.append(Bar(what, row.planning_s, DEEPEST_LIMIT_S))
    return tuple(found)


def _rows(layers: Sequence[int], rounds: int, reference: bool) -> Iterator[PlanningRow]:
    if reference:
        yield _row(REFERENCE, REFERENCE_LAYERS, hf.llama_16l(), rounds)
    for count in layers:
        yield _row("narrow Llama", count, llama_chain(count, BATCH, LENGTH), rounds)


def _row(model: str, layers: int, built: Built, rounds: int) -> PlanningRow:
    described, solved = [], []
    with traced(*built) as graph:
        for _ in range(rounds):
            start = time.process_time()
            problem, borders = graph.described()  # anew: a problem keeps what was derived from it
            middle = time.process_time()
            solve(problem, int(BUDGET * without_recompute(problem).peak_bytes), borders)
            described.append(middle - start)
            solved.append(time.process_time() - middle)
    return PlanningRow(
        model=model,
        layers=layers,
        nodes=len(problem.ops),
        capture_s=graph.capture_s,
        problem_s=statistics.median(described),
        solve_s=statistics.median(solved),
        rounds=rounds,
    )


def plot(result: Result, path: Path) -> Path:
    """Draw seconds against nodes as a PNG, both logarithmic; return its path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = [row for row in result.rows if isinstance(row, PlanningRow)]
    chains = sorted((r for r in rows if r.model != REFERENCE), key=lambda r: r.nodes)
    figure = figure_of(width=7.0, height=4.5)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    parts = {
        "describe and solve": [r.planning_s for r in chains],
        "solve": [r.solve_s for r in chains],
        "describe": [r.problem_s for r in chains],
    }
    nodes = [r.nodes for r in chains]
    for (name, seconds), colour in zip(parts.items(), COLOURS, strict=False):
        axes.plot(nodes, seconds, "o-", color=colour, label=f"chains: {name}")
    for row in rows:
        if row.model == REFERENCE:
            axes.plot([row.nodes], [row.planning_s], "D", color=COLOURS[4], label=row.model)
    named = _apart(chains)
    axes.set_xticks([r.nodes for r in named], [f"{r.nodes:,}\n{r.layers} layers" for r in named])
    low, high = axes.get_ylim()
    steps = [step * 10.0**power for power in range(-4, 4) for step in (1, 2, 5)]
    ticks = [step for step in steps if low <= step <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("ops of the joint graph")
    axes.set_ylabel("CPU seconds, one thread")
    axes.set_title(result.title)
    axes.grid(color=GREY, alpha=0.2)
    axes.legend(frameon=False)
    open_frame(axes)
    return write(figure, path)


def _apart(rows: Sequence[PlanningRow]) -> list[PlanningRow]:
    """Rows, the largest first, whose names below a logarithmic axis do not run into each other."""
    named: list[PlanningRow] = []
    for row in reversed(rows):
        if not named or named[-1].nodes > 1.5 * row.nodes:
            named.append(row)
    return named
