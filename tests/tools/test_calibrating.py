"""What measured candidates tell of others, and which one is measured next: with given costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckpt_pass.tools.calibrating import (
    DOUBT,
    NOISE,
    Candidate,
    best_of,
    next_to_measure,
    predicted_pass_s,
    step_s,
)

GLOBAL = 16


def candidates(way: str = "eager", per_sample_s: float = 1.0) -> list[Candidate]:
    """Of a way whose modelled seconds grow with the microbatch."""
    return [Candidate(way, n, GLOBAL // n, per_sample_s * n) for n in (1, 2, 4, 8, 16)]


def measured(several: list[Candidate], seconds: dict[int, float]) -> list[Candidate]:
    return [replace(one, measured_s=seconds.get(one.microbatch)) for one in several]


def test_without_measurements_the_model_counts() -> None:
    several = candidates()
    assert [predicted_pass_s(one, several) for one in several] == [1, 2, 4, 8, 16]


def test_one_measurement_gives_the_rate() -> None:
    several = measured(candidates(), {4: 12.0})
    assert predicted_pass_s(several[4], several) == 48.0
    # Its own measurement does not count: it is what the prediction is compared with.
    assert predicted_pass_s(several[2], several) == 4.0


def test_two_give_what_every_step_takes_besides() -> None:
    several = measured(candidates(), {2: 5.0, 8: 11.0})  # 3 besides, 1 for each sample
    assert [predicted_pass_s(one, several) for one in several[::2]] == [4.0, 7.0, 19.0]


def test_between_and_beyond_three_the_nearest_two_count() -> None:
    several = measured(candidates(), {1: 2.0, 4: 5.0, 8: 21.0})
    assert predicted_pass_s(several[1], several) == 3.0
    assert predicted_pass_s(several[4], several) == 53.0


def test_what_grows_too_fast_for_a_line_takes_no_negative_time() -> None:
    several = measured(candidates(), {4: 4.0, 8: 16.0})
    assert predicted_pass_s(several[0], several) == 1.0
    assert predicted_pass_s(several[4], several) == 40.0


def test_another_way_has_the_same_shape() -> None:
    eager = measured(candidates(), {2: 5.0, 8: 11.0})
    compiled = candidates("compiled")
    assert predicted_pass_s(compiled[4], [*eager, *compiled]) == 19.0
    compiled = measured(compiled, {8: 22.0})
    assert predicted_pass_s(compiled[0], [*eager, *compiled]) == 8.0


def test_the_first_to_be_measured_is_the_fastest_by_the_model() -> None:
    several = [replace(one, modelled_s=one.modelled_s + 1) for one in candidates()]
    assert next_to_measure(several, 0.0) == 4
    slow = replace(several[4], modelled_s=40.0)  # it recomputes
    assert next_to_measure([*several[:4], slow], 0.0) == 3


def test_what_is_far_from_what_was_measured_is_trusted_less() -> None:
    several = measured(candidates(), {16: 16.0})
    # All are predicted to take the same; two doublings away and more the doubt is the largest.
    assert next_to_measure(several, 0.0) == 0
    nearer = [replace(one, modelled_s=one.modelled_s * 1.08) for one in several[:3]]
    assert 1 + NOISE + 2 * DOUBT < 1.08 * (1 + NOISE + DOUBT)
    assert next_to_measure([*nearer, *several[3:]], 0.0) == 3


def test_nothing_is_measured_that_cannot_be_faster() -> None:
    several = measured(candidates(), {16: 16.0})
    slow = [replace(one, modelled_s=one.modelled_s * 1.3) for one in several[:4]]
    assert next_to_measure([*slow, several[4]], 0.0) is None
    done = measured(candidates(), {n: float(n) for n in (1, 2, 4, 8, 16)})
    assert next_to_measure(done, 0.0) is None


def test_the_fastest_is_one_that_was_measured() -> None:
    several = measured(candidates(), {2: 2.5, 8: 9.0})
    assert best_of(several, 0.0) == 3
    assert best_of(candidates(), 0.0) == 0  # of equal ones the first


def test_an_optimizers_step_comes_once() -> None:
    one = Candidate("eager", 4, 4, 1.0)
    assert step_s(one, 2.0, 0.5) == pytest.approx(8.5)
