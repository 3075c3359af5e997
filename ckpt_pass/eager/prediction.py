"""The peak of an eager step with given regions, by the planner's exact simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ckpt_pass.eager.describe import region_of
from ckpt_pass.eager.planning import described, traced
from ckpt_pass.eager.step_record import CallRecord, EagerTrace, OpRecord
from ckpt_pass.planner.eager_parts import EagerPlan, EagerRegion
from ckpt_pass.planner.eager_problem import EagerProblem, EagerProfile
from ckpt_pass.policy.named import as_policy
from ckpt_pass.policy.opinion import settled
from ckpt_pass.policy.rules import Policy, PolicyLike
from ckpt_pass.policy.sites import SiteCounter
from ckpt_pass.regions.actions import IGNORED, is_free

#: Modules that are recomputed together, by FQN in their order.
Segment = Sequence[str]


@dataclass(frozen=True)
class Predictor:
    """A recorded step, of which any regions can be simulated; made by :func:`predictor`."""

    trace: EagerTrace
    problem: EagerProblem

    def predict(self, segments: Sequence[tuple[Segment, PolicyLike | None]]) -> EagerProfile | None:
        """Simulate the step with regions.

        Args:
            segments: the regions, of most one module each, and what each keeps; nothing where
                that is ``None``.

        Returns:
            The simulated step; ``None`` where the simulation does not know the case: modules of
            one region that are called more than once, a module that calls itself or saves nothing
            that a backward asks for, and a policy that does not decide by the op alone or that
            offloads. Copies of running statistics are not counted.
        """
        known: list[EagerRegion] = []
        kept: set[int] = set()
        for segment, policy in segments:
            for region in self._runs(segment):
                keeps = None if region is None else self._kept(region, policy)
                if region is None or keeps is None:
                    return None
                known.append(region)
                kept |= keeps
        problem = replace(self.problem, regions=tuple(known))
        return problem.simulate(EagerPlan(frozenset(range(len(known))), frozenset(kept)))

    def _runs(self, segment: Segment) -> list[EagerRegion | None]:
        """Each run of a region; ``None`` for what is not known."""
        calls = self._calls(segment[0]) if len(segment) == 1 else []
        if len(calls) < 2 or any(one.ops[0] < other.ops[1] for other, one in pairwise(calls)):
            return [self._region(segment)]
        return [region_of(self.trace, call) for call in calls]

    def _region(self, segment: Segment) -> EagerRegion | None:
        calls = {name: self._calls(name) for name in segment}
        if not segment or any(len(found) != 1 for found in calls.values()):
            return None
        first, last = calls[segment[0]][0], calls[segment[-1]][0]
        ops, values = (first.ops[0], last.ops[1]), (first.values[0], last.values[1])
        trains = all(found[0].trains for found in calls.values())
        held = tuple({storage for found in calls.values() for storage in found[0].held})
        dropped = tuple({storage for found in calls.values() for storage in found[0].dropped})
        call = CallRecord(segment[0], -1, ops, values, trains, (), first.given, held, dropped)
        return region_of(self.trace, call)

    def _calls(self, name: str) -> list[CallRecord]:
        return [call for call in self.trace.calls if call.name == name and call.differentiable]

    def _kept(self, region: EagerRegion, policy: PolicyLike | None) -> set[int] | None:
        if policy is None:
            return set()
        asked = as_policy(policy)
        answers = {index: _saves(asked, self.trace.ops[index]) for index in range(*region.ops)}
        if None in answers.values():
            return None
        return {index for index, saves in answers.items() if saves and self._makes(index)}

    def _makes(self, index: int) -> bool:
        return bool(self.problem.ops[index].makes)


def _saves(policy: Policy, op: OpRecord) -> bool | None:
    """Whether a region with this policy keeps an op's outputs; ``None`` if the op does not tell."""
    target = op.call.target
    if op.changes or op.casts_weight or target in IGNORED or is_free(target):
        return False
    found = settled(policy, SiteCounter().visit(op.call.target, ()))
    tells = found is not None and not found.offloads and found.sharding is None
    return found.saves if found is not None and tells else None


def predictor(
    model: nn.Module, args: tuple[Any, ...], loss_fn: Callable[[Any], Tensor] | None = None
) -> Predictor:
    """Record a step of ``loss_fn(model(*args))`` on fake tensors.

    Raises:
        NotTraceableError, NothingToDifferentiateError: see :func:`ckpt_pass.plan`.
    """
    trace = traced(model, args, loss_fn)
    return Predictor(trace, described(trace))
