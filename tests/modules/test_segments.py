"""Segments: their arithmetic, the optimal ones against brute force, and what they hold in fact."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn

import ckpt_pass
from ckpt_pass.modules.layers.layer_profile import LayerProfile
from ckpt_pass.modules.optimal import LayerProfileError, plan_segments
from ckpt_pass.modules.segments import (
    SegmentCountError,
    optimal_segment_count,
    segment_boundaries,
    segments_of_length,
)
from ckpt_pass.planner.solution import InfeasibleBudgetError

Pieces = tuple[tuple[int, int, str], ...]


# --- arithmetic -----------------------------------------------------------------------------


def test_boundaries() -> None:
    assert segment_boundaries(7, 3) == ((0, 3), (3, 5), (5, 7))
    assert segment_boundaries(4, 4) == ((0, 1), (1, 2), (2, 3), (3, 4))
    assert segments_of_length(7, 3) == ((0, 3), (3, 6), (6, 7))
    for layers, count in itertools.combinations_with_replacement(range(1, 12), 2):
        spans = segment_boundaries(count, layers)
        assert [n for a, b in spans for n in range(a, b)] == list(range(count))
        assert max(b - a for a, b in spans) - min(b - a for a, b in spans) <= 1


@pytest.mark.parametrize("count", [0, 8, -1])
def test_more_segments_than_layers_are_refused(count: int) -> None:
    with pytest.raises(SegmentCountError, match="7 layers, expected from 1 to 7"):
        segment_boundaries(7, count)


def test_the_best_number_of_segments() -> None:
    assert [optimal_segment_count(n * n, activation_bytes=0) for n in (1, 2, 3, 6)] == [1, 2, 3, 6]
    # A layer that holds much more than its output: one segment each is best.
    assert optimal_segment_count(12, activation_bytes=100) == 12
    with pytest.raises(SegmentCountError):
        optimal_segment_count(0)


# --- optimal segments -----------------------------------------------------------------------


def simulated(layers: Sequence[LayerProfile], pieces: Pieces) -> tuple[int, float]:
    """Peak and recomputed seconds by acting the backward out, one value at a time."""
    inputs = [layers[0].input_bytes, *(p.output_bytes for p in layers[:-1])]
    held: dict[tuple[str, int], int] = {}
    for start, _, kind in pieces:
        held["input", start] = inputs[start]
        if kind == "kept":
            held["inner", start] = layers[start].activation_bytes
    peak, seconds = 0, 0.0
    gradients = 0
    for start, stop, kind in reversed(pieces):
        gradients += sum(layers[n].gradient_bytes for n in range(start, stop))
        held |= {("input", n): inputs[n] for n in range(start, stop)}
        if kind == "once":
            held |= {("inner", n): layers[n].activation_bytes for n in range(start, stop)}
        if kind != "kept":
            seconds += sum(layers[n].forward_s for n in range(start, stop))
        if kind == "nested":
            seconds += sum(layers[n].forward_s for n in range(start, stop - 1))
        now = sum(held.values()) + gradients
        own = range(start, stop)
        extra = (
            max(layers[n].activation_bytes + layers[n].working_bytes for n in own)
            if kind == "nested"
            else max(layers[n].working_bytes for n in own)
        )
        peak = max(peak, now + extra)
        for n in own:
            held.pop(("input", n))
            held.pop(("inner", n), None)
    return peak, seconds


def every_way(count: int, nested: bool) -> Iterator[Pieces]:
    """All ways to cut ``count`` layers into pieces."""
    kinds = ("once", "nested") if nested else ("once",)
    for cuts in itertools.product((False, True), repeat=count - 1):
        borders = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), count]
        spans = list(itertools.pairwise(borders))
        options = [(*kinds, "kept") if stop - start == 1 else kinds for start, stop in spans]
        for chosen in itertools.product(*options):
            yield tuple((a, b, kind) for (a, b), kind in zip(spans, chosen, strict=True))


def random_chain(rng: random.Random) -> list[LayerProfile]:
    extras = rng.random() < 0.5
    return [
        LayerProfile(
            f"layers.{n}",
            activation_bytes=rng.randrange(0, 40),
            output_bytes=rng.randrange(0, 12),
            forward_s=rng.randrange(1, 9) * 0.001,
            input_bytes=rng.randrange(0, 12),
            gradient_bytes=rng.randrange(0, 6) * extras,
            working_bytes=rng.randrange(0, 9) * extras,
        )
        for n in range(rng.randrange(1, 7))
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_optimal_segments_equal_brute_force_on_random_chains(nested: bool) -> None:
    rng = random.Random(20)
    infeasible = 0
    for _ in range(150):  # twice: 300 chains
        layers = random_chain(rng)
        found = [simulated(layers, pieces) for pieces in every_way(len(layers), nested)]
        least, most = min(peak for peak, _ in found), max(peak for peak, _ in found)
        budget = rng.randrange(max(least - 3, 0), most + 2)
        fitting = [seconds for peak, seconds in found if peak <= budget]
        if not fitting:
            infeasible += 1
            with pytest.raises(InfeasibleBudgetError) as caught:
                plan_segments(layers, budget, nested)
            assert caught.value.least_feasible_bytes == least
            continue
        plan = plan_segments(layers, budget, nested)
        assert plan.exact and plan.peak_bytes <= budget
        assert plan.recompute_s == pytest.approx(min(fitting))
        inside = [name for segment in plan.segments for name in segment.names]
        assert sorted([*inside, *plan.kept]) == [profile.name for profile in layers]
    assert 0 < infeasible < 75


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_a_thousand_layers_take_under_two_seconds(share: float) -> None:
    rng = random.Random(1)
    layers = [
        LayerProfile(f"{n}", rng.randrange(10**6, 10**8), rng.randrange(10**5, 10**6), rng.random())
        for n in range(1000)
    ]
    total = sum(p.activation_bytes + p.output_bytes for p in layers)
    begun = time.process_time()
    plan = plan_segments(layers, int(total * share))
    assert time.process_time() - begun < 2
    assert plan.peak_bytes <= total * share and not plan.exact
    assert plan.recompute_s < 2 * sum(p.forward_s for p in layers)


def test_rounded_bytes_find_the_least_peak_too() -> None:
    rng = random.Random(3)
    layers = [LayerProfile(f"{n}", rng.randrange(10**8), rng.randrange(10**7)) for n in range(40)]
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_segments(layers, 10**7)
    least = caught.value.least_feasible_bytes
    found = plan_segments(layers, least)
    assert found.peak_bytes == least and not found.exact
    with pytest.raises(InfeasibleBudgetError):
        plan_segments(layers, least - 1)


def test_bad_profiles() -> None:
    with pytest.raises(LayerProfileError, match="no layer profiles"):
        plan_segments([], 10)
    with pytest.raises(LayerProfileError, match="negative"):
        plan_segments([LayerProfile("a", -1, 1)], 10)
    with pytest.raises(InfeasibleBudgetError):
        plan_segments([LayerProfile("a", 5, 1)], 0)


# --- few layers, and bare ones --------------------------------------------------------------


def bare(depth: int, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(32, 32), activation())))


def peak_of(model: nn.Module, placement: str) -> int:
    x = torch.randn(512, 32)
    with ckpt_pass.applied(model, placement):
        step = ckpt_pass.measure_step(lambda: model(x).square().mean(), repeats=1)
    return step.peak_bytes


def test_few_layers_are_never_one_segment() -> None:
    counts = [optimal_segment_count(n, activation_bytes=0) for n in (2, 3, 4, 5, 6, 8, 12, 16)]
    assert counts == [2, 3, 2, 3, 3, 4, 4, 4]
    model = nn.Sequential(*(bare(2, nn.GELU) for _ in range(2)))
    assert peak_of(model, "sqrt-segments") < 0.75 * peak_of(model, "none")


@pytest.mark.parametrize(
    ("placement", "activation"), [("all", nn.ReLU), ("sqrt-segments", nn.GELU)]
)
def test_bare_layers_are_cut_together(activation: type[nn.Module], placement: str) -> None:
    model = bare(6, activation)
    assert peak_of(model, placement) <= 0.65 * peak_of(model, "none")
    choice = ckpt_pass.as_placement(placement).choose(model)
    assert [segment.names[0] for segment in choice.segments] == ["0", "6"]
    assert "bare layers" in str(choice)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("placement", ["alternate", "every-2", "every-3"])
def test_bare_layers_take_turns_in_segments(placement: str, activation: type[nn.Module]) -> None:
    for depth in (2, 6, 9):
        model = bare(depth, activation)
        assert peak_of(model, placement) < peak_of(model, "none")
    choice = ckpt_pass.as_placement(placement).choose(bare(9, activation))
    assert choice.placement == placement and not all(one.inside for one in choice.modules)
    assert "this one is not asked" in str(choice)


def test_blocks_among_bare_layers_are_regions_of_their_own() -> None:
    model = nn.Sequential(
        nn.Linear(8, 8),
        bare(1, nn.GELU),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
    )
    choice = ckpt_pass.AllLayers().choose(model)
    assert [segment.names for segment in choice.segments] == [("1",), ("2", "3", "4", "5")]
    assert not choice.modules[0].inside and "as much as it frees" in choice.modules[0].why
