"""How long planning takes where values may move too, beside planning without a link.

Modelled times, links of known rates; nothing is run. CPU seconds, one thread: each graph is
described anew and solved without a link and with each link, in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

from benchmarks.chains import Traced, llama_chain, traced
from benchmarks.common import Bar, PlanningRow, Result, torch_threads
from benchmarks.planning import BATCH, DEEPEST, LENGTH, REFERENCE, REFERENCE_LAYERS
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import step_time, without_recompute
from ckpt_pass.planner.solvers import run_solver
from tests.zoo import Built, hf

ROUNDS = 3
#: Of the peak with nothing recomputed.
PARTS = (0.5, 0.25)
#: Of the rate that carries all that is saved in a third of the step, which is about its forward.
RATES = (0.3, 1.0)
LATENCY_S = 1e-5
MOST = 2.0
DEEPEST_LIMIT_S = 30.0
ALONE = "no link"


def run(
    layers: Sequence[int] = (),
    rounds: int = ROUNDS,
    reference: bool = True,
    parts: Sequence[float] = PARTS,
) -> Result:
    """Time planning of the reference model and of chains, with links and without.

    Args:
        layers: of each chain, which is planned at the first budget alone.
        rounds: timings of each; of the chains one.
        reference: whether to time the reference model, too.
        parts: budgets, as shares of the peak with nothing recomputed.
    """
    rows: list[PlanningRow] = []
    with torch_threads(1):
        if reference:
            rows += _rows(REFERENCE, REFERENCE_LAYERS, hf.llama_16l(), parts, rounds)
        for count in layers:
            chain = llama_chain(count, BATCH, LENGTH)
            rows += _rows("narrow Llama", count, chain, parts[:1], rounds=1)
    title = "planning where values may move, one thread"
    return Result("offload-planning", title, tuple(rows), bars(rows))


def bars(rows: Sequence[PlanningRow]) -> tuple[Bar, ...]:
    """Each link beside none at the same budget, and seconds of the deepest chain."""
    alone: dict[tuple[int, str], float] = {}
    ratios, deepest = [], []
    for row in rows:
        budget, _, way = row.model.rpartition(", ")
        if way == ALONE:
            alone[row.layers, budget] = row.planning_s
            continue
        if row.layers == REFERENCE_LAYERS:
            ratios.append(row.planning_s / alone[row.layers, budget])
        if row.layers == DEEPEST:
            deepest.append(row.planning_s)
    found = []
    if ratios:
        found.append(Bar(f"{REFERENCE}, with a link / without, worst", max(ratios), MOST))
    if deepest:
        found.append(Bar(f"{DEEPEST} layers with a link, s, worst", max(deepest), DEEPEST_LIMIT_S))
    return tuple(found)


def _rows(
    model: str, layers: int, built: Built, parts: Sequence[float], rounds: int
) -> Iterator[PlanningRow]:
    with traced(*built) as graph:
        problem, _ = graph.described()
        links = {ALONE: None, **{f"link of {rate:g}": _link(problem, rate) for rate in RATES}}
        for part in parts:
            budget = int(part * without_recompute(problem).peak_bytes)
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in links}
            for _ in range(rounds):
                for way, link in links.items():
                    times[way].append(_timed(graph, budget, link))
            for way, found in times.items():
                described, solved = (
                    statistics.median(column) for column in zip(*found, strict=True)
                )
                yield PlanningRow(
                    model=f"{model}, {part:g} of its peak, {way}",
                    layers=layers,
                    nodes=len(problem.ops),
                    capture_s=graph.capture_s,
                    problem_s=described,
                    solve_s=solved,
                    rounds=rounds,
                )


def _timed(graph: Traced, budget_bytes: int, link: Link | None) -> tuple[float, float]:
    """CPU seconds of describing the graph, and of solving it."""
    start = time.process_time()
    problem, borders = graph.described()  # anew: a problem keeps what was derived from it
    middle = time.process_time()
    run_solver("auto", problem, budget_bytes, borders, None, link)
    return middle - start, time.process_time() - middle


def _link(problem: Problem, rate: float) -> Link:
    plain = without_recompute(problem)
    saved_bytes = sum(
        problem.storage_bytes[storage]
        for index in plain.saved
        for storage in problem.ops[index].holds
    )
    bytes_per_s = rate * saved_bytes / (step_time(problem) / 3)
    return Link(bytes_per_s, bytes_per_s, LATENCY_S)
