"""Segments of layers that are recomputed together: their arithmetic, and placements of them.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174): with n layers in s
segments the forward keeps s boundary values, and the backward of a segment holds the activations of
its n/s layers; equal costs are least at s = sqrt(n). What a layer holds is often many times its
boundary value (17 times in a GPT-2 block), and the best number is larger then.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ckpt_pass.modules.choice import Choice, ModuleChoice, PlacementError, Segment
from ckpt_pass.modules.layers.find import Layers, find_layers


class SegmentCountError(PlacementError):
    """A number of segments that the layers cannot be cut into."""


def segment_boundaries(layers: int, segments: int) -> tuple[tuple[int, int], ...]:
    """Cut layers into segments of even length; the first ones are longer by one where needed.

    Args:
        layers: how many there are.
        segments: how many segments.

    Returns:
        The first layer of each segment and the one after its last.

    Raises:
        SegmentCountError: fewer than one segment, or more segments than layers.
    """
    if not 1 <= segments <= layers:
        raise SegmentCountError(
            f"Got {segments} segments for {layers} layers, expected from 1 to {layers}: each "
            "segment needs a layer of its own."
        )
    length, longer = divmod(layers, segments)
    starts = [number * length + min(number, longer) for number in range(segments + 1)]
    return tuple(itertools.pairwise(starts))


def segments_of_length(layers: int, length: int) -> tuple[tuple[int, int], ...]:
    """Cut layers into segments of ``length``; the last one is shorter where they do not go up.

    Raises:
        SegmentCountError: ``length`` is less than 1 or more than there are layers.
    """
    if not 1 <= length <= layers:
        raise SegmentCountError(
            f"Got segments of {length} layers for {layers} layers, expected from 1 to {layers}."
        )
    return tuple((start, min(start + length, layers)) for start in range(0, layers, length))


def optimal_segment_count(
    layers: int, activation_bytes: float = 1.0, output_bytes: float = 1.0
) -> int:
    """The number of even segments with the least peak, where all layers are alike.

    The peak is a boundary value for each segment and for each layer of the longest segment, and the
    activations of the longest segment: ``segments * output + longest * (activation + output)``.
    Of equal ones the larger number is taken: it holds less at once where a layer's activations are
    more than its output, and recomputes no more. So two layers make two segments, and no layers
    that are alike make one, which would hold all of them at once.

    Args:
        layers: how many there are.
        activation_bytes: what one layer holds besides its output.
        output_bytes: its output. Only the ratio of the two counts; with ``activation_bytes=0`` the
            result is the square root of ``layers``.

    Raises:
        SegmentCountError: there is no layer.
    """
    if layers < 1:
        raise SegmentCountError(f"Got {layers} layers, expected 1 or more.")

    def peak(segments: int) -> float:
        longest = -(-layers // segments)
        return segments * output_bytes + longest * (activation_bytes + output_bytes)

    return min(range(layers, 0, -1), key=peak)


def by_segments(
    placement: str,
    layers: Layers,
    spans: tuple[tuple[int, int], ...],
    nested: bool = False,
    why: str = "",
    note: str = "",
) -> Choice:
    """Choose segments of layers.

    Args:
        placement: as it prints.
        layers: those of the model.
        spans: the first layer of each segment and the one after its last; layers in none are out.
        nested: see :class:`~ckpt_pass.modules.choice.Segment`.
        why: the reason of layers that are out.
        note: what is said besides of those that are in.
    """
    place = {n: k for k, (start, stop) in enumerate(spans) for n in range(start, stop)}
    found = []
    for number, (name, kind) in enumerate(zip(layers.names, layers.kinds, strict=True)):
        inside = number in place
        start, stop = spans[place[number]] if inside else (0, 0)
        reason = f"segment {place[number]}: layers {start} to {stop - 1}{note}" if inside else why
        found.append(ModuleChoice(name, kind, inside, reason))
    segments = tuple(Segment(layers.names[start:stop], nested) for start, stop in spans)
    return Choice(placement, tuple(found), segments)


def by_units(placement: str, layers: Layers, nested: bool = False) -> Choice:
    """Choose regions where some layers are bare ones, that are steps of an ``nn.Sequential``.

    A region keeps its input, and a bare layer (``nn.Linear``, ``nn.ReLU``) saves no more than
    that, or its output, which the next one keeps: alone it frees nothing and costs a second run.
    So bare layers in a row are cut into about the square root of their number of segments, each
    from a layer with weights on; of two alike the smaller number, as such layers hold little
    besides what lies between them. Other layers are regions of their own.
    """
    spans: list[tuple[int, int]] = []
    runs = [list(run) for _, run in itertools.groupby(layers.units, lambda unit: unit.bare)]
    for run in runs:
        if not run[0].bare:
            spans += [(unit.start, unit.stop) for unit in run]
        elif len(run) > 1 or len(runs) == 1:
            count = min(range(1, len(run) + 1), key=lambda n: n - (-len(run) // n))
            cut = segment_boundaries(len(run), count)
            spans += [(run[first].start, run[last - 1].stop) for first, last in cut]
    alone = "a bare layer: a region would keep as much as it frees"
    note = "; bare layers free something together only" if any(u.bare for u in layers.units) else ""
    return by_segments(placement, layers, tuple(spans), nested, alone, note)


@dataclass(frozen=True)
class Segments:
    """All layers in ``count`` segments of even length, each recomputed as a whole.

    Attributes:
        count: how many.
        nested: recompute one layer of a segment at a time, at the price of a third forward.
    """

    count: int
    nested: bool = False

    name: ClassVar[str] = "segments"
    says: ClassVar[str] = "all layers in n segments (segments-4)"

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            SegmentCountError: more segments than layers.
        """
        layers = find_layers(model)
        spans = segment_boundaries(len(layers.names), self.count)
        return by_segments(f"{self.name}-{self.count}", layers, spans, self.nested)


@dataclass(frozen=True)
class SqrtSegments:
    """All layers in about the square root of their number of segments (Chen et al. 2016).

    Attributes:
        nested: as for :class:`Segments`.
    """

    nested: bool = False

    name: ClassVar[str] = "sqrt-segments"
    says: ClassVar[str] = "all layers in the square root of their number of segments"

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`)."""
        layers = find_layers(model)
        if layers.has_bare:
            return by_units(self.name, layers, self.nested)
        count = optimal_segment_count(len(layers.names), activation_bytes=0)
        spans = segment_boundaries(len(layers.names), count)
        return by_segments(self.name, layers, spans, self.nested)
