"""Families of models in six ways: right, or refused by an error of ours that names the cure."""

from __future__ import annotations

import pytest

import ckpt_pass
from tests.zoo.families import Family, ways
from tests.zoo.families.catalogue import FAMILIES, ODD
from tests.zoo.families.children import missing, tried
from tests.zoo.families.page import page

#: What may come of a way: where dynamo cuts a step, a warning says what the budget covers.
GOOD = frozenset({ways.RIGHT, ways.UNCOVERED, ways.REFUSED, ways.TORCH})


def _bad(outcomes: list[ways.Outcome]) -> list[str]:
    return [f"{o.way}: {o.verdict}, {o.detail}" for o in outcomes if o.verdict not in GOOD]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_six_ways(family: Family) -> None:
    if missing(family):
        pytest.skip(f"{family.library} is not installed: pip install -e '.[zoo]'")
    outcomes = tried(family)
    assert _bad(outcomes) == []
    assert {o.way for o in outcomes} == set(ways.WAYS)
    for outcome in outcomes:
        if outcome.verdict == ways.REFUSED:
            name, _, words = outcome.detail.partition(": ")
            assert hasattr(ckpt_pass, name)
            assert len(words) > 60  # a cause and a cure


#: In every run; the others with the slow tests.
QUICK = 5


@pytest.mark.parametrize(
    "family",
    [*ODD[:QUICK], *(pytest.param(family, marks=pytest.mark.slow) for family in ODD[QUICK:])],
    ids=str,
)
def test_the_oddest_in_eager_mode(family: Family) -> None:
    trial = ways.Trial(family)
    assert _bad([trial.run("eager"), trial.run("all")]) == []


def test_the_page_shows_what_failed() -> None:
    outcomes = [
        ways.Outcome("bert", "half", ways.RIGHT, "", 100, 90, 90, 200),
        ways.Outcome("bert", "ahead", ways.REFUSED, "NoLayersError: none in /a/b/c/d.py:1"),
        ways.Outcome("bert", "eager", ways.OVER, "+8 bytes", 100, 90, 108, 200),
    ]
    text = page(outcomes, FAMILIES.values(), "1.0")
    assert "| bert | text | 45 % |  | NoLayersError | **over** |  |  |" in text
    assert "| bert | ahead | NoLayersError: none in d.py:1 |" in text
    assert "| bert | eager | +8 bytes |" in text
