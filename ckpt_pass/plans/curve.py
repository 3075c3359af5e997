"""A trade-off curve for a plan's page: measured points, or plans for other budgets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ckpt_pass._errors import CkptPassError
from ckpt_pass.plans.record import Predicted
from ckpt_pass.plans.wording import format_bytes

_OF_FLOPS = "recomputed flops, as a share of the step's"
_OF_TIME = "modelled time of recomputation and waiting, as a share of the step's"


class Point(Protocol):
    """A measured point (:class:`ckpt_pass.report.sweeps.SweepRow` is one)."""

    @property
    def family(self) -> str:
        """What made it."""

    @property
    def setting(self) -> str:
        """Of that family, in words."""

    @property
    def peak_bytes(self) -> int | None:
        """Measured; ``None`` where it failed."""

    @property
    def recompute_share(self) -> float | None:
        """Recomputed flops as a share of the step's."""


@runtime_checkable
class Curve(Protocol):
    """What :func:`ckpt_pass.sweep` returns."""

    @property
    def rows(self) -> Sequence[Point]:
        """The points."""


@runtime_checkable
class Planned(Protocol):
    """A plan, of one graph or of several (which has ``parts``)."""

    @property
    def peak_bytes(self) -> int:
        """The predicted peak."""

    @property
    def budget_bytes(self) -> int | None:
        """What it was made for, if anything."""

    @property
    def policy(self) -> str:
        """The policy, in words."""


#: A measured curve, or plans of the same step for other budgets.
CurveLike: TypeAlias = Curve | Iterable[Planned]


class InvalidCurveError(CkptPassError):
    """What was given as a trade-off curve is none."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"report got curve={got!r:.80}, expected what ckpt_pass.sweep returns, or plans of the "
            "same step for other budgets. Leave it out to have the page without a curve."
        )


def curve_data(plan: Planned, plain_bytes: int | None, curve: CurveLike | None) -> dict[str, Any]:
    """The points of the trade-off, this plan's among them.

    Args:
        plan: the plan whose page it is.
        plain_bytes: the peak of its step with nothing recomputed, if known.
        curve: further points, if any.

    Raises:
        InvalidCurveError: it is none.
    """
    measured = isinstance(curve, Curve)
    points = [_planned("this plan", plan, measured)]
    if plain_bytes is not None:
        points.append(_point("planned", "nothing recomputed", plain_bytes, 0.0))
    if isinstance(curve, Curve):
        rows = ((r.family, r.setting, r.peak_bytes, r.recompute_share) for r in curve.rows)
        points += [_point(f, s, p, share) for f, s, p, share in rows if p and share is not None]
    elif curve is not None:
        points += _others(curve)
    return {"cost": _OF_FLOPS if measured else _OF_TIME, "points": points}


def _others(curve: Iterable[Planned]) -> Iterator[list[Any]]:
    if not isinstance(curve, Iterable) or isinstance(curve, str):
        raise InvalidCurveError(curve)
    for other in curve:
        if not isinstance(other, Planned):
            raise InvalidCurveError(other)
        yield _planned("planned", other, flops=False)


def _planned(family: str, plan: Planned, flops: bool) -> list[Any]:
    budget = plan.budget_bytes
    words = plan.policy if budget is None else f"budget {format_bytes(budget)}"
    return _point(family, words, plan.peak_bytes, recompute_share(plan, flops))


def _point(family: str, setting: str, peak_bytes: int, share: float) -> list[Any]:
    return [family, setting, peak_bytes, round(share, 6)]


def recompute_share(plan: Planned, flops: bool = False) -> float:
    """What is recomputed, by what the step itself is; of several graphs together.

    Args:
        plan: of a step.
        flops: whether flops count; else modelled seconds, with waiting for copies.
    """
    parts: Sequence[Any] = getattr(plan, "parts", (plan,))
    found: list[Predicted] = [part.predicted for part in parts]
    if flops:
        part: float = sum(one.recompute_flops for one in found)
        whole: float = sum(one.step_flops for one in found)
    else:
        part, whole = sum(one.overhead_s for one in found), sum(one.step_time_s for one in found)
    return part / whole if whole else 0.0
