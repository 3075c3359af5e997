"""Plan an eager training step: record it, choose regions and keeps, write the plan down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.eager.alike import Alike, alike_in, check_same_step
from ckpt_pass.eager.candidates import left_out
from ckpt_pass.eager.compiled_parts import warn_of_compiled_parts
from ckpt_pass.eager.describe import eager_problem
from ckpt_pass.eager.in_step import in_step
from ckpt_pass.eager.step_record import EagerTrace
from ckpt_pass.eager.trace import Surroundings, trace_step
from ckpt_pass.eager.writing import Writer, step_words
from ckpt_pass.graph.capture import raise_for, refuse_scripted
from ckpt_pass.graph.device_rates import with_device_times
from ckpt_pass.graph.kernels import (
    WORKSPACE,
    WORKSPACE_AND_TIME,
    Kernels,
    warn_of_unmeasured,
)
from ckpt_pass.graph.link import device_of, link_for
from ckpt_pass.graph.paper import kernels_for
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.planner.eager_parts import EagerPlan, Microbatches
from ckpt_pass.planner.eager_problem import EagerProblem, EagerProfile
from ckpt_pass.planner.eager_solve import EagerSolution, solve_eager
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.budget import resolve_budget
from ckpt_pass.plans.goal import CostLike, Goal, InFlight
from ckpt_pass.plans.parts import Signature
from ckpt_pass.plans.record import Asked
from ckpt_pass.plans.signature import eager_signature
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.rules import Policy
from ckpt_pass.policy.sites import output_tensors

#: Modules named in a refusal; the rest are counted.
_NAMED = 3


def plan_eager(
    model: nn.Module,
    args: tuple[Any, ...],
    policy: Policy,
    goal: Goal,
    loss_fn: Callable[[Any], torch.Tensor] | None,
    kwargs: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a step of ``loss_fn(model(*args, **kwargs))`` in eager mode.

    Args:
        model: the module; its forward runs once, on fake tensors.
        args, kwargs: its arguments.
        policy: recorded in the plan; every safe recomputation is open.
        goal: the budget; its solver is not used, the eager one is. Where it names a place,
            modules may move what autograd saves in them instead of running again.
        loss_fn: applied to the model's output, where that is no loss.

    Raises:
        NotTraceableError: the model's forward or backward fails on fake tensors.
        NothingToDifferentiateError: there is no backward.
        InfeasibleBudgetError: no plan fits the budget.
        InvalidBudgetError: the budget is no amount of memory.
        InvalidOffloadError: values of the step's device cannot be moved.
        StoreFolderError, StoreFullError: nothing can be kept where values are to go.
    """
    step = describe_step(model, args, policy, goal, loss_fn, kwargs)
    return step.planned(step.budget_bytes)


@dataclass(frozen=True)
class EagerStep:
    """A recorded step with what is asked of it, of which plans can be made.

    Attributes:
        trace, problem: the record, and what is made of it.
        plain: the step with nothing recomputed.
        budget_bytes: the budget as bytes of this step.
        policy, goal, signature: what is asked, and what the step takes.
    """

    trace: EagerTrace
    problem: EagerProblem
    plain: EagerProfile
    budget_bytes: int
    policy: Policy
    goal: Goal
    signature: Signature

    def planned(self, budget_bytes: int) -> Plan:
        """The plan within a budget.

        Raises:
            InfeasibleBudgetError: no plan fits it.
        """
        try:
            solution = self._solved(budget_bytes)
        except InfeasibleBudgetError as error:
            raise InfeasibleBudgetError(
                budget_bytes, error.least_feasible_bytes, _left_out_words(self.trace)
            ) from None
        asked = Asked("open to the solver", self.policy, None, self.goal, budget_bytes)
        return Writer(self.trace, self.problem, solution).plan(asked, self.signature, self.plain)

    def _solved(self, budget_bytes: int) -> EagerSolution:
        plain_bytes, sharding = self.plain.peak_bytes, self.goal.shard_over
        if sharding is None:
            return _solved(self.problem, plain_bytes, budget_bytes)
        return in_step(
            sharding, budget_bytes, lambda least: _solved(self.problem, plain_bytes, least)
        )


def describe_step(
    model: nn.Module,
    args: tuple[Any, ...],
    policy: Policy,
    goal: Goal,
    loss_fn: Callable[[Any], torch.Tensor] | None,
    kwargs: Mapping[str, Any] | None = None,
) -> EagerStep:
    """Record a step, measure what has to be, and make the problem of it; as :func:`plan_eager`."""
    warn_of_compiled_parts(model)
    kernels = kernels_for(goal.cost)
    how = Surroundings(again=goal.gradients != "new", staged=goal.in_flight is not None)
    alike, words = None, ""
    try:
        trace = traced(model, args, loss_fn, kwargs, kernels, how)
        words = step_words(trace) if goal.shard_over is not None else ""
    finally:
        if goal.shard_over is not None:  # others wait for a word from a rank that fails, too
            check_same_step(goal.shard_over, words)
    if goal.shard_over is not None:
        alike = alike_in(model, args, dict(kwargs or {}), loss_fn, goal.shard_over)
    timed = goal.cost == "measured"
    problem = replace(
        described(trace, timed, kernels, goal.offload, goal.cost, alike),
        microbatches=_beside(trace, goal),
    )
    warn_of_unmeasured(kernels)
    plain = problem.simulate(EagerPlan())
    budget_bytes = resolve_budget(goal.budget, plain.peak_bytes)
    signature = eager_signature(model, args, kwargs)
    return EagerStep(trace, problem, plain, budget_bytes, policy, goal, signature)


def _beside(trace: EagerTrace, goal: Goal) -> Microbatches | None:
    """What lies in memory beside a step that is one of several."""
    adds_up = goal.gradients == "accumulated"
    if goal.in_flight is None and not adds_up:
        return None
    many = goal.in_flight or InFlight(1, 1)
    if not adds_up:
        return Microbatches(0, max(many.first, many.later), passed_bytes=trace.passed_bytes)
    return Microbatches(many.first, many.later, trace.found_bytes, trace.passed_bytes)


def described(
    trace: EagerTrace,
    times: bool = False,
    kernels: Kernels | None = None,
    offload: OffloadLike | None = None,
    cost: CostLike = "roofline",
    alike: Alike | None = None,
) -> EagerProblem:
    """A recorded step as a problem; kernels that may have a workspace are run once, alone.

    Args:
        trace: the record.
        times: whether kernels are timed as well.
        kernels: what measures them.
        offload: where values may be moved to, if they may; its rates are measured once.
        cost: a device on paper has rates of its own.
        alike: what ranks hold alike, if they may share it out.
    """
    what = WORKSPACE_AND_TIME if times else WORKSPACE
    kernels = kernels or Kernels()
    calls = list(dict.fromkeys(op.call for op in trace.ops))
    found = {f.ops: kernels.formula_bytes(f.call, f.needs) for f in trace.formulas}
    formulas = {ops: nbytes for ops, nbytes in found.items() if nbytes is not None}
    facts = kernels.facts(calls, what)
    if offload is None:
        return eager_problem(trace, facts, formulas, alike=alike)
    least = offload.min_bytes if isinstance(offload, Offload) else 0
    facts = with_device_times(facts, calls, kernels)
    made = (t for op in trace.ops for t in output_tensors(op.call.meta.get("val")))
    link = link_for(cost, offload, device_of(made))
    return eager_problem(trace, facts, formulas, link, least)


def traced(
    model: nn.Module,
    args: tuple[Any, ...],
    loss_fn: Callable[[Any], torch.Tensor] | None,
    kwargs: Mapping[str, Any] | None = None,
    kernels: Kernels | None = None,
    how: Surroundings | None = None,
) -> EagerTrace:
    """The record of a step (:func:`ckpt_pass.eager.trace.trace_step`).

    Raises:
        NotTraceableError: the model's forward or backward fails on fake tensors.
        NothingToDifferentiateError: there is no backward.
    """
    refuse_scripted(model)
    try:
        return trace_step(model, args, loss_fn, kwargs, kernels, how)
    except CkptPassError:
        raise
    except Exception as error:  # whatever the model's own code raises, with the place
        raise_for(model, error)


def _left_out_words(trace: EagerTrace) -> str:
    """Which modules no plan makes regions of, and why; empty where there are none."""
    found = left_out(trace)
    if not found:
        return ""
    named = [f"{name} ({why})" for name, why in [*found.items()][:_NAMED]]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"Left out, since they cannot be regions: {', '.join(named)}{more}."


def _solved(problem: EagerProblem, plain_bytes: int, budget_bytes: int) -> EagerSolution:
    if plain_bytes <= budget_bytes:
        return EagerSolution(EagerPlan(), problem.simulate(EagerPlan()), 1)
    return solve_eager(problem, budget_bytes)
