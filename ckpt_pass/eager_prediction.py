"""The peak of an eager step with given regions, by the planner's exact simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ckpt_pass.eager.describe import region_of
from ckpt_pass.eager.sac import IGNORED
from ckpt_pass.eager.trace import CallRecord, EagerTrace, OpRecord
from ckpt_pass.eager_planning import described, traced
from ckpt_pass.opinion import settled
from ckpt_pass.planner.eager_problem import EagerPlan, EagerProblem, EagerProfile, EagerRegion
from ckpt_pass.policies import as_policy
from ckpt_pass.policy import Policy, PolicyLike
from ckpt_pass.sites import SiteCounter

#: Modules that are recomputed together, by FQN in their order.
Segment = Sequence[str]


@dataclass(frozen=True)
class Predictor:
    """A recorded step, of which any regions can be simulated; made by :func:`predictor`."""

    trace: EagerTrace
    problem: EagerProblem

    def predict(
        self, segments: Sequence[Segment], policy: PolicyLike | None = None
    ) -> EagerProfile | None:
        """Simulate the step with regions.

        Args:
            segments: the regions; of most, one module each.
            policy: what each keeps; nothing where ``None``.

        Returns:
            The simulated step; ``None`` where the simulation does not know the case: a module that
            is called more than once or saves nothing that a backward asks for, and a policy that
            does not decide by the op alone. Copies of running statistics are not counted.
        """
        regions = [self._region(segment) for segment in segments]
        known = [region for region in regions if region is not None]
        if len(known) < len(regions):
            return None
        kept = self._kept(known, None if policy is None else as_policy(policy))
        if kept is None:
            return None
        problem = replace(self.problem, regions=tuple(known))
        return problem.simulate(EagerPlan(frozenset(range(len(known))), frozenset(kept)))

    def _region(self, segment: Segment) -> EagerRegion | None:
        calls = {name: self._calls(name) for name in segment}
        if not segment or any(len(found) != 1 for found in calls.values()):
            return None
        first, last = calls[segment[0]][0], calls[segment[-1]][0]
        ops, values = (first.ops[0], last.ops[1]), (first.values[0], last.values[1])
        return region_of(self.trace, CallRecord(segment[0], -1, ops, values))

    def _calls(self, name: str) -> list[CallRecord]:
        return [call for call in self.trace.calls if call.name == name]

    def _kept(self, regions: Sequence[EagerRegion], policy: Policy | None) -> set[int] | None:
        kept: set[int] = set()
        for region in regions if policy is not None else ():
            assert policy is not None
            for index in range(*region.ops):
                saves = _saves(policy, self.trace.ops[index])
                if saves is None:
                    return None
                if saves and self.problem.ops[index].makes:
                    kept.add(index)
        return kept


def _saves(policy: Policy, op: OpRecord) -> bool | None:
    """Whether a region with this policy keeps an op's outputs; ``None`` if the op does not tell."""
    if op.changes or op.call.target in IGNORED:
        return False
    found = settled(policy, SiteCounter().visit(op.call.target, ()))
    return None if found is None else found.saves


def predictor(
    model: nn.Module, args: tuple[Any, ...], loss_fn: Callable[[Any], Tensor] | None = None
) -> Predictor:
    """Record a step of ``loss_fn(model(*args))`` on fake tensors.

    Raises:
        NotTraceableError, NothingToDifferentiateError: see :func:`ckpt_pass.plan`.
    """
    trace = traced(model, args, loss_fn)
    return Predictor(trace, described(trace))
