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

    return min(range(1, layers + 1), key=peak)


def by_segments(
    placement: str,
    layers: Layers,
    spans: tuple[tuple[int, int], ...],
    nested: bool = False,
    why: str = "",
) -> Choice:
    """Choose segments of layers.

    Args:
        placement: as it prints.
        layers: those of the model.
        spans: the first layer of each segment and the one after its last; layers in none are out.
        nested: see :class:`~ckpt_pass.modules.choice.Segment`.
        why: the reason of layers that are out.
    """
    place = {n: k for k, (start, stop) in enumerate(spans) for n in range(start, stop)}
    found = []
    for number, (name, kind) in enumerate(zip(layers.names, layers.kinds, strict=True)):
        inside = number in place
        start, stop = spans[place[number]] if inside else (0, 0)
        reason = f"segment {place[number]}: layers {start} to {stop - 1}" if inside else why
        found.append(ModuleChoice(name, kind, inside, reason))
    segments = tuple(Segment(layers.names[start:stop], nested) for start, stop in spans)
    return Choice(placement, tuple(found), segments)


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
        count = optimal_segment_count(len(layers.names), activation_bytes=0)
        spans = segment_boundaries(len(layers.names), count)
        return by_segments(self.name, layers, spans, self.nested)
