"""The dynamic program behind ``optimal.py``: the fastest pieces of a chain within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt_pass.modules.layers.layer_profile import LayerProfile

# Kept bytes are exact up to a number of states: tensors of one step are multiples of large numbers.
# Above, they are rounded up to a state each, so that what fits by count fits in fact. States times
# layers are bounded by time: 1,000 layers take 0.5 s, and the table is 65 MB for each kind.
_CELLS = 8_192_000
_MOST_STATES = 1 << 20
# Rows whose minima are taken together; 8 and 32 take the same time within 20 % at 1,000 layers.
_BLOCK = 16

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Layers ``start`` to ``stop - 1``."""

    start: int
    stop: int
    kind: str  # kept, once, nested


class Chain:
    """The profiles as arrays; position i is before layer i."""

    def __init__(self, layers: Sequence[LayerProfile]) -> None:
        self.count = len(layers)
        self.inputs = np.array(
            [layers[0].input_bytes, *(p.output_bytes for p in layers[:-1])], dtype=np.int64
        )
        self.inner = np.array([p.activation_bytes for p in layers], dtype=np.int64)
        self.working = np.array([p.working_bytes for p in layers], dtype=np.int64)
        self.time = np.array([p.forward_s for p in layers])
        gradients = np.array([p.gradient_bytes for p in layers], dtype=np.int64)
        # Gradients that are there when the backward of layer i ends.
        self.gradients = np.cumsum(gradients[::-1])[::-1]

    def kept_bytes(self, piece: Piece) -> int:
        """What a piece keeps from forward to backward."""
        inner = int(self.inner[piece.start]) if piece.kind == "kept" else 0
        return int(self.inputs[piece.start]) + inner

    def held_bytes(self, piece: Piece) -> int:
        """What is there in its backward, besides what the pieces before keep."""
        start, stop = piece.start, piece.stop
        between = int(self.inputs[start:stop].sum() + self.gradients[start])
        if piece.kind == "nested":
            return between + int((self.inner + self.working)[start:stop].max())
        return between + int(self.inner[start:stop].sum() + self.working[start:stop].max())

    def again_s(self, piece: Piece) -> float:
        """The forwards of a piece that run again."""
        if piece.kind == "kept":
            return 0.0
        once = float(self.time[piece.start : piece.stop].sum())
        nested = float(self.time[piece.start : piece.stop - 1].sum())
        return once + (nested if piece.kind == "nested" else 0.0)

    def evaluate(self, pieces: Sequence[Piece]) -> tuple[int, float]:
        """Peak and time."""
        before, peak = 0, 0
        for piece in pieces:
            peak = max(peak, before + self.held_bytes(piece))
            before += self.kept_bytes(piece)
        return peak, math.fsum(self.again_s(piece) for piece in pieces)

    def held_from(self, stop: int) -> dict[str, Ints]:
        """`held_bytes` of the segments that end before ``stop``, by kind and start; not rising."""
        span = slice(0, stop)
        between = np.cumsum(self.inputs[span][::-1])[::-1] + self.gradients[span]
        inner = np.cumsum(self.inner[span][::-1])[::-1]
        working = np.maximum.accumulate(self.working[span][::-1])[::-1]
        largest = np.maximum.accumulate((self.inner + self.working)[span][::-1])[::-1]
        return {"once": between + inner + working, "nested": between + largest}


class RangeMinimum:
    """For each column the least of its rows from some row on to the newest one."""

    def __init__(self, rows: int, columns: int) -> None:
        self._columns = np.arange(columns)
        #: At row r: the least of rows r to the end of r's block.
        self._to_block_end = np.full((rows, columns), np.inf)
        #: At block b: the least of the complete blocks from b on.
        self._from_block = np.full((rows // _BLOCK + 2, columns), np.inf)
        self._rows = 0

    def append(self, row: Floats) -> None:
        """Add a row."""
        begin = self._rows - self._rows % _BLOCK
        ends = self._to_block_end[begin : self._rows + 1]
        np.minimum(ends, row, out=ends)
        self._rows += 1
        if self._rows % _BLOCK == 0:
            blocks = self._from_block[: begin // _BLOCK + 1]
            np.minimum(blocks, ends[0], out=blocks)

    def least(self, first: Ints) -> Floats:
        """The minimum of each column from row ``first`` on; infinite where there is no such row."""
        clipped = np.minimum(first, self._rows - 1)
        found = self._to_block_end[clipped, self._columns]
        newest = (self._rows - 1) // _BLOCK
        block = clipped // _BLOCK + 1
        later = np.minimum(found, self._from_block[block, self._columns])
        later = np.minimum(later, self._to_block_end[newest * _BLOCK])
        found = np.where(block <= newest, later, found)
        return np.where(first < self._rows, found, np.inf)


class Program:
    """The dynamic program for one chain and budget.

    Args:
        chain: the layers.
        budget_bytes: the most bytes.
        nested: whether segments may be recomputed nested.
    """

    def __init__(self, chain: Chain, budget_bytes: int, nested: bool) -> None:
        self._chain = chain
        self._budget = budget_bytes
        sizes = [int(n) for n in (*chain.inputs, *chain.inner) if n]
        unit = math.gcd(*sizes) if sizes else budget_bytes + 1
        #: Whether bytes were not rounded.
        states = max(min(_CELLS // chain.count, _MOST_STATES), 2)
        self.exact = budget_bytes // unit < states
        self._unit = unit if self.exact else -(-budget_bytes // (states - 1))
        self._states = budget_bytes // self._unit + 1
        self._kinds = ("once", "nested") if nested else ("once",)
        self._upto = np.concatenate([[0.0], np.cumsum(chain.time)])
        self._entry = np.array([self._units(int(n)) for n in chain.inputs])
        self._best = np.full((chain.count + 1, self._states), np.inf)

    def pieces(self) -> list[Piece] | None:
        """The fastest pieces; ``None`` where nothing fits."""
        chain = self._chain
        self._best[0, 0] = 0.0
        windows = {kind: RangeMinimum(chain.count, self._states) for kind in self._kinds}
        for stop in range(1, chain.count + 1):
            start = stop - 1
            entered = self._shifted(self._best[start], int(self._entry[start]))
            held = chain.held_from(stop)
            found = self._kept(start)
            for kind, window in windows.items():
                window.append(entered - self._before(kind, start))
                first = self._first(self._limits(held[kind]))
                found = np.minimum(found, window.least(first) + self._after(kind, stop))
            self._best[stop] = found
        return self._walked_back() if np.isfinite(self._best[-1]).any() else None

    def _units(self, nbytes: int) -> int:
        return -(-nbytes // self._unit)

    def _shifted(self, row: Floats, by: int) -> Floats:
        """Column m: the row at m less ``by``."""
        found = np.full(self._states, np.inf)
        if by < self._states:
            found[by:] = row[: self._states - by]
        return found

    def _before(self, kind: str, start: int | Ints) -> Floats:
        """What of the forwards up to ``stop`` a segment that begins here does not run again."""
        return np.asarray(self._upto[start] * (2 if kind == "nested" else 1))

    def _after(self, kind: str, stop: int) -> float:
        once = float(self._upto[stop])
        return once + float(self._upto[stop - 1]) if kind == "nested" else once

    def _limits(self, held: Ints) -> Ints:
        """The most that a segment and the pieces before it may keep, by its start; not falling."""
        besides = held - self._chain.inputs[: len(held)]
        return np.where(besides > self._budget, -1, (self._budget - besides) // self._unit)

    def _first(self, limits: Ints) -> Ints:
        """Column m: the first start whose limit is m or more."""
        below = np.bincount(np.minimum(limits, self._states - 1) + 1, minlength=self._states + 1)
        return np.cumsum(below)[: self._states]

    def _kept(self, start: int) -> Floats:
        piece = Piece(start, start + 1, "kept")
        kept = self._chain.kept_bytes(piece)
        besides = self._chain.held_bytes(piece) - kept
        found = self._shifted(self._best[start], self._units(kept))
        found[max((self._budget - besides) // self._unit + 1, 0) :] = np.inf
        return found

    def _walked_back(self) -> list[Piece]:
        """The choices that led to the least time, from the last to the first."""
        pieces: list[Piece] = []
        stop, state = self._chain.count, int(np.argmin(self._best[-1]))
        while stop:
            piece = self._last(stop, state)
            pieces.append(piece)
            kept = self._chain.kept_bytes(piece)
            stop, state = piece.start, state - self._units(kept)
        return pieces[::-1]

    def _last(self, stop: int, state: int) -> Piece:
        """The last piece of the best way to a state."""
        best, found = float(self._kept(stop - 1)[state]), Piece(stop - 1, stop, "kept")
        starts = np.arange(stop)
        before = state - self._entry[:stop]
        reached = np.where(before >= 0, self._best[starts, np.maximum(before, 0)], np.inf)
        held = self._chain.held_from(stop)
        for kind in self._kinds:
            times = reached - self._before(kind, starts) + self._after(kind, stop)
            times = np.where(self._limits(held[kind]) >= state, times, np.inf)
            start = int(np.argmin(times))
            if times[start] < best:
                best, found = float(times[start]), Piece(start, stop, kind)
        return found


def least_peak(chain: Chain, nested: bool) -> int:
    """The smallest budget in bytes that any pieces fit."""
    low, high = 0, chain.evaluate([Piece(n, n + 1, "kept") for n in range(chain.count)])[0]
    spans = [chain.held_from(stop) for stop in range(1, chain.count + 1)]
    while low < high:
        middle = (low + high) // 2
        fits = smallest(chain, middle, nested, spans) is not None
        low, high = (low, middle) if fits else (middle + 1, high)
    return low


def smallest(
    chain: Chain, budget_bytes: int, nested: bool, spans: list[dict[str, Ints]] | None = None
) -> list[Piece] | None:
    """Pieces within a budget that keep as little as possible, whatever their time; exact.

    Args:
        chain: the layers.
        budget_bytes: the most bytes.
        nested: whether segments may be recomputed nested.
        spans: ``chain.held_from`` of every stop, where it is known.
    """
    spans = spans or [chain.held_from(stop) for stop in range(1, chain.count + 1)]
    least = np.full(chain.count + 1, np.inf)
    least[0] = 0
    last: list[Piece] = []
    for stop in range(1, chain.count + 1):
        best = Piece(stop - 1, stop, "once")
        for kind in ("once", "nested") if nested else ("once",):
            fits = least[:stop] + spans[stop - 1][kind] <= budget_bytes
            kept = np.where(fits, least[:stop] + chain.inputs[:stop], np.inf)
            start = int(np.argmin(kept))
            if kept[start] < least[stop]:
                least[stop], best = float(kept[start]), Piece(start, stop, kind)
        last.append(best)
    if not np.isfinite(least[-1]):
        return None
    pieces: list[Piece] = []
    stop = chain.count
    while stop:
        pieces.append(last[stop - 1])
        stop = pieces[-1].start
    return pieces[::-1]
