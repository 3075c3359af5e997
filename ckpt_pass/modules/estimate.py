"""What placements would save, on paper: from a number of layers and bytes, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ckpt_pass.drawing.figures import MEGABYTE
from ckpt_pass.modules.chain_program import Chain, Piece
from ckpt_pass.modules.choice import Choice, PlacementError
from ckpt_pass.modules.layers.layer_profile import LayerProfile
from ckpt_pass.modules.placement import PlacementLike, as_placement

#: What is estimated where nobody says.
ON_PAPER: tuple[PlacementLike, ...] = ("none", "all", "alternate", "every-3", "sqrt-segments")
#: A backward's work by the forward's: it makes two products where the forward makes one.
BACKWARD_BY_FORWARD = 2.0


class EstimateArgumentError(PlacementError):
    """Numbers that no estimate can be made of."""


@dataclass(frozen=True)
class EstimateRow:
    """One placement on paper.

    Attributes:
        placement: as it prints.
        regions: how many.
        saved_bytes: what the layers keep from forward to backward.
        peak_bytes: the most that they hold in their backward.
        saved_share, peak_share: what of each is saved against ``none``.
        forward_share: forward work that runs again, by all layers' forward work.
        step_share: the same by the step's, forward and backward.
    """

    placement: str
    regions: int
    saved_bytes: int
    peak_bytes: int
    saved_share: float
    peak_share: float
    forward_share: float
    step_share: float


@dataclass(frozen=True)
class Estimate:
    """What placements save on paper; prints itself as a table."""

    layers: int
    rows: tuple[EstimateRow, ...]

    def of(self, placement: str) -> EstimateRow:
        """The row of a placement.

        Raises:
            EstimateArgumentError: it is not among them.
        """
        for row in self.rows:
            if row.placement == placement:
                return row
        names = ", ".join(row.placement for row in self.rows)
        raise EstimateArgumentError(
            f"The estimate has no row {placement!r}; expected one of {names}."
        )

    def __str__(self) -> str:
        width = max(len(row.placement) for row in self.rows)
        head = f"{self.layers} layers, on paper"
        lines = [
            f"{head:{width}}",
            f"{'':{width}}  regions  saved MB   less  peak MB   less  forward again  of the step",
        ]
        lines += [
            f"{r.placement:{width}}  {r.regions:7}  {r.saved_bytes / MEGABYTE:8.2f}  "
            f"{r.saved_share:5.1%}  {r.peak_bytes / MEGABYTE:7.2f}  {r.peak_share:5.1%}  "
            f"{r.forward_share:13.1%}  {r.step_share:11.1%}"
            for r in self.rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def estimate_savings(
    layers: int | Sequence[LayerProfile],
    *,
    activation_bytes: int | None = None,
    output_bytes: int | None = None,
    placements: Sequence[PlacementLike] = ON_PAPER,
) -> Estimate:
    """What placements would save in a chain of layers, by arithmetic.

    A layer in no region keeps its input and its activations; a region keeps its input and, when its
    backward begins, holds the activations of all its layers (:mod:`ckpt_pass.modules.optimal` has
    the whole model). What lies outside of the layers (embedding, head, loss, gradients of
    parameters where profiles do not give them) is not in it: a measured peak is saved less.

    Args:
        layers: how many alike, or measured profiles (:func:`ckpt_pass.profile_layers`).
        activation_bytes, output_bytes: of each of so many alike: what autograd saves inside, and
            the value that is passed on. With 1 and 0 the bytes are counts of layers.
        placements: of whole layers, as for :func:`ckpt_pass.apply`.

    Raises:
        EstimateArgumentError: no layers, bytes below 0, missing, or given twice.
        PlacementError: a placement does not fit a chain of layers.
    """
    profiles = _profiles(layers, activation_bytes, output_bytes)
    paper = _Paper(len(profiles))
    chosen = [as_placement(placement).choose(paper) for placement in placements]
    chain = Chain(profiles)
    plain = _pieces(as_placement("none").choose(paper), len(profiles))
    rows = tuple(_row(choice, chain, profiles, plain) for choice in chosen)
    return Estimate(len(profiles), rows)


def _profiles(
    layers: int | Sequence[LayerProfile], activation: int | None, output: int | None
) -> list[LayerProfile]:
    if not isinstance(layers, int):
        if activation is not None or output is not None:
            raise EstimateArgumentError(
                "Got activation_bytes= or output_bytes= beside profiles, which have their own. "
                "Expected a number of layers with them, or profiles alone."
            )
        found = list(layers)
    else:
        if activation is None or output is None:
            raise EstimateArgumentError(
                f"Got {layers} layers without activation_bytes= and output_bytes=. Expected both, "
                "or profiles from ckpt_pass.profile_layers(model, *args)."
            )
        made = LayerProfile(
            "", activation, output, 1.0, BACKWARD_BY_FORWARD, input_bytes=output
        )  # time in forwards of one layer
        found = [made] * layers
    if not found or min(min(p.activation_bytes, p.output_bytes) for p in found) < 0:
        raise EstimateArgumentError(
            f"Got {len(found)} layers with bytes {activation} and {output}; expected at least one "
            "layer and no bytes below 0."
        )
    return found


class _Layer(nn.Module):
    """Stands for a layer: placements look at the tree of modules only."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Identity()


class _Paper(nn.Module):
    """A model with so many layers and nothing else."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(layers))


def _pieces(choice: Choice, layers: int) -> list[Piece]:
    """The layers in order, kept or in segments."""
    numbers = {f"layers.{number}": number for number in range(layers)}
    pieces: list[Piece] = []
    at = 0
    for segment in choice.segments:
        start, stop = numbers[segment.names[0]], numbers[segment.names[-1]] + 1
        pieces += [Piece(number, number + 1, "kept") for number in range(at, start)]
        pieces.append(Piece(start, stop, "nested" if segment.nested else "once"))
        at = stop
    return [*pieces, *(Piece(number, number + 1, "kept") for number in range(at, layers))]


def _row(
    choice: Choice, chain: Chain, profiles: Sequence[LayerProfile], plain: list[Piece]
) -> EstimateRow:
    pieces = _pieces(choice, len(profiles))
    saved, most = (sum(chain.kept_bytes(p) for p in these) for these in (pieces, plain))
    peak, again_s = chain.evaluate(pieces)
    plain_peak, _ = chain.evaluate(plain)
    forward_s = sum(p.forward_s for p in profiles)
    step_s = forward_s + sum(p.backward_s for p in profiles)
    return EstimateRow(
        placement=choice.placement,
        regions=len(choice.segments),
        saved_bytes=saved,
        peak_bytes=peak,
        saved_share=1 - saved / most if most else 0.0,
        peak_share=1 - peak / plain_peak if plain_peak else 0.0,
        forward_share=again_s / forward_s if forward_s else 0.0,
        step_share=again_s / step_s if step_s else 0.0,
    )
