"""The clock, on a chain that can be followed with a pencil."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_pass.planner.clock import Times, clock
from ckpt_pass.planner.link import InvalidLinkError, Link
from ckpt_pass.planner.moves import Movable, Move
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import evaluate, step_time, without_recompute
from tests.planner.offload_steps import chain
from tests.planner.test_exact import steps


def told(moves: list[Move], link: Link) -> Times:
    """The times of the chain of four with everything saved: 4 s forward, 8 s backward."""
    times = evaluate(chain(), range(4), moves=moves, link=link).times
    assert times is not None
    return times


def test_without_moves_it_is_the_sum_of_the_ops() -> None:
    times = told([], Link(1.0, 1.0))
    assert times.step_time_s == times.compute_s == step_time(chain()) == 12.0
    assert (times.stall_s, times.busy_s, times.hidden_share, times.host_peak_bytes) == (0, 0, 1, 0)
    assert times.starts_s == (0, 1, 2, 3, 4, 4, 6, 8, 10)
    assert evaluate(chain(), range(4), moves=[Move(0, 1, 3)]).times is None


def test_copies_that_hide_cost_nothing() -> None:
    times = told([Move(0, 3, 1)], Link(5.0, 10.0))
    (only,) = times.transfers
    assert times.step_time_s == 12.0
    assert (only.out_start_s, only.out_end_s, only.released_s) == (1.0, 3.0, 4.0)
    assert (only.fetched_s, only.in_start_s, only.in_end_s, only.used_s) == (6.0, 6.0, 7.0, 10.0)
    assert (times.out_busy_s, times.in_busy_s, times.hidden_share) == (2.0, 1.0, 1.0)
    assert times.host_peak_bytes == 10


def test_compute_waits_where_a_copy_is_late() -> None:
    """Release right after f1 (2 s) of a copy that takes from 1 s to 5 s; fetch just before use."""
    times = told([Move(0, 1, 3)], Link(2.5, 10.0, latency_s=0.5))
    (only,) = times.transfers
    assert (only.out_start_s, only.out_end_s, only.released_s) == (1.0, 5.5, 5.5)
    assert times.out_stall_s == 3.5
    assert (only.fetched_s, only.in_start_s, only.in_end_s) == (13.5, 13.5, 15.0)
    assert (only.used_s, times.in_stall_s, times.step_time_s) == (15.0, 1.5, 17.0)
    assert times.starts_s == (0, 1, 5.5, 6.5, 7.5, 7.5, 9.5, 11.5, 15.0)
    assert times.hidden_share == pytest.approx(1 - 5.0 / 6.0)


def test_copies_of_one_direction_queue_up() -> None:
    """Both are made a second apart, and each takes two."""
    times = told([Move(0, 4, 0), Move(1, 4, 0)], Link(5.0, 5.0))
    first, second = times.transfers
    assert (first.out_end_s, second.out_start_s, second.out_end_s) == (3.0, 3.0, 5.0)
    assert (times.out_stall_s, first.released_s, second.released_s) == (1.0, 4.0, 5.0)
    # What is issued at one place comes in the order of first use: storage 1 is read before 0.
    assert (second.in_start_s, second.in_end_s, first.in_start_s) == (5.0, 7.0, 7.0)
    assert times.in_stall_s == 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"out_bytes_per_s": 0}, "out_bytes_per_s=0, expected a positive, finite"),
        ({"in_bytes_per_s": float("inf")}, "in_bytes_per_s=inf, expected"),
        ({"in_bytes_per_s": float("nan")}, "in_bytes_per_s=nan, expected"),
        ({"out_bytes_per_s": "1e9"}, "out_bytes_per_s='1e9', expected"),
        ({"latency_s": -1.0}, "latency_s=-1.0, expected"),
        ({"engines": 3}, "engines=3, expected 1 or 2"),
        ({"engines": True}, "engines=True, expected 1 or 2"),
        ({"host_bytes": -1}, "host_bytes=-1, expected"),
        ({"host_bytes": 1.5}, "host_bytes=1.5, expected"),
    ],
)
def test_a_link_is_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidLinkError, match=message):
        Link(**{"out_bytes_per_s": 1e9, "in_bytes_per_s": 1e9, **wrong})


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=steps(), rate=st.sampled_from([0.25, 1.0, 8.0]), seed=st.randoms())
def test_what_holds_of_every_clock(problem: Problem, rate: float, seed: Any) -> None:
    """Copies and ops in order, no shorter than they are; faster links are never slower."""
    plan = without_recompute(problem)
    known = Movable.of(problem, plan.steps)
    last_place = len(plan.steps.forward) - 1
    moves = [
        Move(storage, plan.steps.forward[seed.randint(last, last_place)], seed.randint(0, first))
        for storage, last, first in zip(
            known.storage.tolist(), known.last.tolist(), known.first.tolist(), strict=True
        )
        if seed.random() < 0.7
    ]
    link = Link(rate, 2 * rate, 0.125)
    times = clock(problem, plan.steps, moves, link)
    assert times.step_time_s == pytest.approx(times.compute_s + times.stall_s)
    assert 0 <= times.stall_s <= times.busy_s + 1e-9
    assert list(times.starts_s) == sorted(times.starts_s)
    outs = sorted((t.out_start_s, t.out_end_s) for t in times.transfers)
    ins = sorted((t.in_start_s, t.in_end_s) for t in times.transfers)
    for copies in (outs, ins):
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(copies))
    for t in times.transfers:
        assert t.out_start_s < t.out_end_s <= t.released_s + 1e-9
        assert t.released_s <= times.forward_s + 1e-9
        assert times.forward_s <= t.fetched_s + 1e-9
        assert t.fetched_s <= t.in_start_s + 1e-9
        assert t.in_start_s < t.in_end_s <= t.used_s + 1e-9
    assert times.host_peak_bytes == sum(t.nbytes for t in times.transfers)
    faster = clock(problem, plan.steps, moves, Link(4 * rate, 3 * rate, 0.125))
    assert faster.step_time_s <= times.step_time_s + 1e-9
    shared = clock(problem, plan.steps, moves, Link(rate, 2 * rate, 0.125, engines=1))
    assert shared == times
