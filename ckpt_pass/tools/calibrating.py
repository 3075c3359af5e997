"""Which candidate to measure next, and what the measured ones tell of the others.

Modelled times rank steps; how fast the machine is, and what every step takes besides its kernels,
only the machine tells. A line through the candidates that were measured gives both, and is trusted
less the farther away a candidate is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: What a prediction may be too slow by: beside what was measured (times of a machine with others on
#: it differ by so much), and more for each doubling away from that.
NOISE, DOUBT = 0.1, 0.05
#: Doublings beyond which it is trusted no less.
_FARTHEST = 2.0


@dataclass(frozen=True)
class Candidate:
    """A way to run a global batch, as far as its time is concerned.

    Attributes:
        way: candidates of one way differ in their microbatches alone, and in what is recomputed.
        microbatch, accumulate: samples of a forward and backward, and how many of these.
        modelled_s: of one forward and backward.
        measured_s: the same, measured.
    """

    way: str
    microbatch: int
    accumulate: int
    modelled_s: float
    measured_s: float | None = None

    @property
    def doublings(self) -> float:
        """The logarithm of the microbatch."""
        return math.log2(self.microbatch)


def predicted_pass_s(candidate: Candidate, known: Iterable[Candidate]) -> float:
    """Seconds of a candidate's forward and backward, by what others took.

    Args:
        candidate: itself does not count, where it was measured.
        known: any candidates. Those of the same way count. Where only one of them was measured, it
            says how far the seconds of another way are off; where none was, these are taken.
    """
    points: dict[str, dict[float, float]] = {}
    for one in known:
        if one.measured_s is not None and one != candidate:
            points.setdefault(one.way, {})[one.modelled_s] = one.measured_s
    own = points.pop(candidate.way, {})
    other = max(points.values(), key=len, default={})
    if len(own) > 1 or not other:
        return _seconds_at(candidate.modelled_s, own)
    found = _seconds_at(candidate.modelled_s, other)
    for modelled_s, measured_s in own.items():
        found *= measured_s / _seconds_at(modelled_s, other)
    return found


def _seconds_at(modelled_s: float, measured: Mapping[float, float]) -> float:
    """Measured seconds at modelled ones: between two of the known, and beyond, a straight line.

    It has a rate, and what every step takes besides. Where that would be nothing or less, and
    where there is but one point, seconds are in proportion to those of the nearest.
    """
    points = sorted(measured.items())
    if not points:
        return modelled_s
    if len(points) > 1:
        inner = [x for x, _ in points[1:-1]]
        number = sum(modelled_s > x for x in inner)
        (x0, y0), (x1, y1) = points[number : number + 2]
        rate = (y1 - y0) / (x1 - x0)
        besides = y0 - rate * x0
        if rate > 0 and (besides >= 0 or modelled_s >= x0):
            return besides + rate * modelled_s
    x, y = min(points, key=lambda point: abs(point[0] - modelled_s))
    return modelled_s * y / x


def step_s(candidate: Candidate, pass_s: float, update_s: float) -> float:
    """Seconds of a global batch: its forwards and backwards, and the optimizer's step."""
    return candidate.accumulate * pass_s + update_s


def best_of(candidates: Sequence[Candidate], update_s: float) -> int:
    """The place of the fastest: of those that were measured where any was, else as modelled.

    Of equal ones the first.
    """
    found = [n for n, one in enumerate(candidates) if one.measured_s is not None]

    def seconds(number: int) -> float:
        one = candidates[number]
        return step_s(one, one.modelled_s if one.measured_s is None else one.measured_s, update_s)

    return min(found or range(len(candidates)), key=seconds)


def next_to_measure(candidates: Sequence[Candidate], update_s: float) -> int | None:
    """The place of the candidate that may be the fastest; ``None`` where none may be.

    A prediction is taken to be too slow by :data:`NOISE`, and by :data:`DOUBT` for each doubling of
    the microbatch between it and what was measured of the same way.
    """
    open_ = [n for n, one in enumerate(candidates) if one.measured_s is None]
    known = [one for one in candidates if one.measured_s is not None]
    if not open_:
        return None

    def least_s(number: int) -> float:
        one = candidates[number]
        far = [abs(one.doublings - other.doublings) for other in known if other.way == one.way]
        doubt = NOISE + DOUBT * min([*far, _FARTHEST]) if known else 0.0
        return step_s(one, predicted_pass_s(one, known) / (1 + doubt), update_s)

    found = min(open_, key=least_s)
    if not known:
        return found
    best_s = min(step_s(one, one.measured_s or 0.0, update_s) for one in known)
    return found if least_s(found) < best_s else None
