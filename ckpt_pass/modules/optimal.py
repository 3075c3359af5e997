"""The fastest way to recompute a chain of layers within a number of bytes.

The model. Layers 1..n run in a row, and their backward in reverse. The chain is cut into pieces:

- one layer that is *kept*: what its autograd saves stays, nothing runs again;
- a segment recomputed *once*: it keeps what enters it; when its backward begins all its layers run
  again, and their activations are there together;
- a segment recomputed *nested*: when its backward begins its layers run again and leave only the
  values between them; then each layer runs once more by itself, just before its own backward.

The peak is the largest, over the pieces, of: what the pieces before keep (inputs of all of them,
activations of kept layers), what the piece itself holds in its backward, the largest working set
of one of its layers, and the gradients of its parameters and of all layers after it. The time is
that of the forwards that run again. What lies outside of the chain (embedding, head, loss) is in
neither: take it off the budget.

For a piece only the *sum* of what the pieces before it keep counts. So ``best[j][m]``, the least
time for layers 1..j where they keep m bytes, goes forward over j. A segment that ends at j may
begin from some layer on that m alone determines; its best beginning is a minimum over that range
(``chain_program.py``).

Sources: Chen et al., arXiv:1604.06174 (segments); Griewank and Walther, "Revolve" (ACM TOMS 26,
2000) (recursive checkpoints); Beaumont et al., "Optimal checkpointing for heterogeneous chains"
(rotor, arXiv:1911.13214), whose general schedules recompute more often than nested segments do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ckpt_pass.modules.chain_program import Chain, Program, least_peak, smallest
from ckpt_pass.modules.choice import Choice, ModuleChoice, PlacementError, Segment
from ckpt_pass.modules.layers.layer_profile import LayerProfile
from ckpt_pass.planner.solution import InfeasibleBudgetError


class LayerProfileError(PlacementError):
    """Layer profiles that are no chain of layers."""


@dataclass(frozen=True)
class SegmentPlan:
    """How a chain is recomputed.

    Attributes:
        segments: what is recomputed, by layer names; layers in none are kept.
        kept: the names of kept layers.
        peak_bytes: of the model above.
        recompute_s: forwards that run again.
        exact: whether no chain of pieces is faster; ``False`` where bytes were rounded.
    """

    segments: tuple[Segment, ...]
    kept: tuple[str, ...]
    peak_bytes: int
    recompute_s: float
    exact: bool


def plan_segments(
    layers: Sequence[LayerProfile], budget_bytes: int, nested: bool = True
) -> SegmentPlan:
    """The fastest way to recompute a chain within a budget; optimal for the model above.

    1,000 layers take about half a second.

    Args:
        layers: the chain, in order; measured, or made by hand.
        budget_bytes: for what the chain holds.
        nested: whether segments may be recomputed nested (their layers must keep nothing).

    Raises:
        LayerProfileError: there is no layer, or one has a negative size or time.
        InfeasibleBudgetError: nothing fits; it names the least that does.
    """
    _check(layers)
    chain = Chain(layers)
    program = Program(chain, max(budget_bytes, 1), nested)
    # Rounded bytes may miss the last few budgets that something fits.
    pieces = program.pieces() or smallest(chain, budget_bytes, nested)
    if pieces is None or budget_bytes <= 0:
        raise InfeasibleBudgetError(budget_bytes, least_peak(chain, nested))
    peak_bytes, recompute_s = chain.evaluate(pieces)
    names = [profile.name for profile in layers]
    segments = tuple(
        Segment(tuple(names[piece.start : piece.stop]), piece.kind == "nested")
        for piece in pieces
        if piece.kind != "kept"
    )
    kept = tuple(names[piece.start] for piece in pieces if piece.kind == "kept")
    return SegmentPlan(segments, kept, peak_bytes, recompute_s, program.exact)


def _check(layers: Sequence[LayerProfile]) -> None:
    if not layers:
        raise LayerProfileError("Got no layer profiles, expected one for each layer of the chain.")
    for profile in layers:
        numbers = (
            profile.activation_bytes,
            profile.output_bytes,
            profile.input_bytes,
            profile.gradient_bytes,
            profile.working_bytes,
            profile.forward_s,
        )
        if min(numbers) < 0:
            raise LayerProfileError(
                f"The profile of layer {profile.name!r} has a negative size or time: {profile}. "
                "Expected zero or more."
            )


@dataclass(frozen=True)
class OptimalSegments:
    """The fastest way to recompute the model's layers within a budget, from their profiles.

    Attributes:
        budget_bytes: for what the chain of layers holds (:func:`plan_segments`).
        profiles: of the model's layers, by name; measured from ``example_inputs`` by
            :func:`ckpt_pass.apply` where empty.
        nested: whether segments may be recomputed nested; they cannot where regions have a policy.
    """

    budget_bytes: int
    profiles: tuple[LayerProfile, ...] = ()
    nested: bool = True

    name: ClassVar[str] = "optimal-segments"
    says: ClassVar[str] = "the fastest segments within a number of bytes, from layer profiles"

    def with_profiles(self, profiles: tuple[LayerProfile, ...]) -> OptimalSegments:
        """The same with profiles."""
        return replace(self, profiles=profiles)

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            LayerProfileError: profiles are missing, or name other modules than the model has.
            InfeasibleBudgetError: nothing fits.
        """
        modules = check_profiles(self.profiles, model, self.name)
        plan = plan_segments(self.profiles, self.budget_bytes, self.nested)
        reasons = {name: "kept: it fits" for name in plan.kept}
        for number, segment in enumerate(plan.segments):
            how = "nested" if segment.nested else "once"
            why = f"segment {number} of {len(segment.names)} layers, recomputed {how}"
            reasons |= dict.fromkeys(segment.names, why)
        found = tuple(
            ModuleChoice(p.name, type(modules[p.name]).__name__, p.name not in plan.kept,
                         reasons[p.name])
            for p in self.profiles
        )  # fmt: skip
        peak = f"{plan.peak_bytes:,} of {self.budget_bytes:,} bytes"
        return Choice(f"{self.name}({peak})", found, plan.segments)


def check_profiles(
    profiles: tuple[LayerProfile, ...], model: nn.Module, placement: str
) -> dict[str, nn.Module]:
    """The model's modules by FQN, if the profiles are of them.

    Raises:
        LayerProfileError: profiles are missing, or name other modules than the model has.
    """
    modules = dict(model.named_modules())
    if not profiles:
        raise LayerProfileError(
            f"The placement {placement} decides from measured layers and has none. Expected "
            "profiles=ckpt_pass.profile_layers(model, *inputs), or apply(..., example_inputs=...)."
        )
    unknown = [profile.name for profile in profiles if profile.name not in modules]
    if unknown:
        raise LayerProfileError(
            f"The profile of {unknown[0]!r} is of no module of {type(model).__name__}. Expected "
            "profiles of this model's layers, as profile_layers gives them."
        )
    return modules
