"""Joint plans beside each decision alone and beside fixed rules, by the simulated clock.

``python -m benchmarks.offload_plans [MODEL ...]`` prints tables for the docs. A link's rate is told
by what would be needed to carry all activations during the forward: 1 is their bytes by the
forward's seconds. Nothing is run: all times are those of the clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.budgets import MODELS
from benchmarks.chains import traced
from benchmarks.common import torch_threads
from ckpt_pass.planner.ground import Ground
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.offload_rules import choices, largest_first, layers_but_the_last
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import (
    InfeasibleBudgetError,
    Solution,
    evaluate,
    step_time,
    without_recompute,
)
from ckpt_pass.planner.solve import Pool
from ckpt_pass.planner.solvers import run_solver

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
#: Between the least peak without moves and the peak with nothing recomputed.
PARTS = (0.0, 0.1, 0.3, 0.6)
LATENCY_S = 1e-5


@dataclass(frozen=True)
class Card:
    """An accelerator's figures: orders of magnitude of what is reached, not of data sheets."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float


CARDS = (Card("H100-like", 4e14, 2.5e12, 5e10), Card("consumer-like", 1e14, 8e11, 2.2e10))
#: The cards' models are as much wider than the one that was traced (d 256: as d 4096).
WIDER = 16


@dataclass(frozen=True)
class Row:
    """One budget and one link; times are of the step, above the one that recomputes nothing.

    Attributes:
        excess: for each way; ``None`` where it does not fit.
        bound: no plan is faster.
        joint: the joint plan.
    """

    budget_bytes: int
    link: Link
    rate: float
    excess: dict[str, float | None]
    bound: float
    joint: Solution


def rows(
    problem: Problem, borders: Sequence[int], links: Sequence[tuple[float, Link]]
) -> Iterator[Row]:
    """Every budget with every link."""
    plain, least = without_recompute(problem), Pool(problem, borders).least_bytes
    for part in PARTS:
        budget = int(least + part * (plain.peak_bytes - least))
        try:
            alone: Solution | None = run_solver("auto", problem, budget, borders)
        except InfeasibleBudgetError:
            alone = None
        for rate, link in links:
            yield _row(problem, borders, budget, rate, link, alone)


def _row(
    problem: Problem,
    borders: Sequence[int],
    budget: int,
    rate: float,
    link: Link,
    alone: Solution | None,
) -> Row:
    ground, plain_s = Ground(problem, without_recompute(problem), link), step_time(problem)

    def excess(masks: Sequence[NDArray[np.bool_] | None]) -> float | None:
        times = [ground.step_time_s(m, budget) for m in masks if m is not None]
        return min(times) / plain_s - 1 if times else None

    joint = run_solver("auto", problem, budget, borders, link=link)
    assert joint.times is not None
    found = {"joint": joint.times.step_time_s / plain_s - 1, "recompute only": None}
    if alone is not None:
        times = evaluate(problem, alone.saved, "", alone.drops, (), link).times
        assert times is not None
        found["recompute only"] = times.step_time_s / plain_s - 1
    found["offload only"] = excess(list(choices(ground, budget)))
    found["largest first"] = excess([largest_first(ground, budget)])
    found["all layers but the last"] = excess([layers_but_the_last(ground, budget)])
    return Row(budget, link, rate, found, joint.lower_bound_s / plain_s, joint)


def matched_rate(problem: Problem) -> float:
    """Bytes a second that carry all activations away during the forward."""
    ground = Ground(problem, without_recompute(problem), Link(1.0, 1.0))
    return float(ground.rows.nbytes.sum()) / ground.forward_s


def widened(problem: Problem, card: Card) -> Problem:
    """A problem as that of a model ``WIDER`` times as wide, in half precision, on a card.

    Bytes grow as the width and halve, flops (all of them, attention's too) as its square. An op
    takes what its arithmetic or the bytes that it touches take, without those of parameters.
    """
    sizes = [nbytes * WIDER // 2 for nbytes in problem.storage_bytes]

    def seconds(touches: Sequence[int], flops: int) -> float:
        moved = sum(sizes[s] for s in touches)
        return max(flops * WIDER**2 / card.flops_per_s, moved / card.bytes_per_s)

    ops = (
        replace(
            op,
            time_s=seconds(op.touches, op.flops) if op.makes else 0.0,
            workspace_bytes=op.workspace_bytes * WIDER // 2,
        )
        for op in problem.ops
    )
    return replace(problem, ops=tuple(ops), storage_bytes=tuple(sizes))


def table(title: str, found: Sequence[Row]) -> Iterator[str]:
    """Lines of a table for the docs."""
    ways = list(found[0].excess)
    yield f"\n{title}\n"
    yield f"| budget MB | link | {' | '.join(ways)} | bound | moved MB | hidden |"
    yield f"|{'---:|' * (len(ways) + 5)}"
    for row in found:
        times = row.joint.times
        assert times is not None
        cells = ["does not fit" if e is None else f"{e:+.2%}" for e in row.excess.values()]
        tail = f"{row.bound:.2%} | {times.host_peak_bytes / 1e6:.1f} | {times.hidden_share:.0%}"
        yield f"| {row.budget_bytes / 1e6:.1f} | {row.rate:g} | {' | '.join(cells)} | {tail} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the models named on the command line."""
    parser = argparse.ArgumentParser(description="Joint plans by the simulated clock.")
    parser.add_argument("models", nargs="*", default=["gpt2-12L", "llama-16L"])
    parser.add_argument("--cards", action="store_true", help="as wide models on two cards")
    options = parser.parse_args(arguments)
    for name in options.models:
        with torch_threads(1), traced(*MODELS[name]()) as graph:
            problem, borders = graph.described()
            rate = matched_rate(problem)
            links = [(r, Link(r * rate, r * rate, LATENCY_S)) for r in RATES]
            found = list(rows(problem, borders, links)) if not options.cards else []
            for line in table(name, found) if found else ():
                print(line)
            for card in CARDS if options.cards else ():
                wide = widened(problem, card)
                link = Link(card.link_bytes_per_s, card.link_bytes_per_s, LATENCY_S)
                share = card.link_bytes_per_s / matched_rate(wide)
                title = f"{name}, {WIDER} times as wide, {card.name}"
                for line in table(title, list(rows(wide, borders, [(round(share, 2), link)]))):
                    print(line)


if __name__ == "__main__":
    main()
