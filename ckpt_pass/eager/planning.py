"""Plan an eager training step: record it, choose regions and keeps, write the plan down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.eager.describe import eager_problem, left_out
from ckpt_pass.eager.step_record import EagerTrace
from ckpt_pass.eager.trace import trace_step
from ckpt_pass.eager.writing import Writer
from ckpt_pass.graph.capture import raise_for
from ckpt_pass.graph.device_rates import with_device_times
from ckpt_pass.graph.kernels import (
    WORKSPACE,
    WORKSPACE_AND_TIME,
    Kernels,
    warn_of_unmeasured,
)
from ckpt_pass.graph.link import link_for
from ckpt_pass.graph.paper import kernels_for
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.planner.eager_parts import EagerPlan
from ckpt_pass.planner.eager_problem import EagerProblem
from ckpt_pass.planner.eager_solve import EagerSolution, solve_eager
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.budget import resolve_budget
from ckpt_pass.plans.goal import CostLike, Goal
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
    keeps_gradients: bool = False,
) -> Plan:
    """Plan a step of ``loss_fn(model(*args, **kwargs))`` in eager mode.

    Args:
        model: the module; its forward runs once, on fake tensors.
        args, kwargs: its arguments.
        policy: recorded in the plan; every safe recomputation is open.
        goal: the budget; its solver is not used, the eager one is. Where it names a place,
            modules may move what autograd saves in them instead of running again.
        loss_fn: applied to the model's output, where that is no loss.
        keeps_gradients: whether gradients stand there before the step, which it adds to.

    Raises:
        NotTraceableError: the model's forward or backward fails on fake tensors.
        NothingToDifferentiateError: there is no backward.
        InfeasibleBudgetError: no plan fits the budget.
        InvalidBudgetError: the budget is no amount of memory.
        InvalidOffloadError: values of the step's device cannot be moved.
        StoreFolderError, StoreFullError: nothing can be kept where values are to go.
    """
    kernels = kernels_for(goal.cost)
    trace = traced(model, args, loss_fn, kwargs, kernels, keeps_gradients)
    timed = goal.cost == "measured"
    problem = described(trace, timed, kernels, goal.offload, goal.cost)
    warn_of_unmeasured(kernels)
    plain = problem.simulate(EagerPlan())
    budget_bytes = resolve_budget(goal.budget, plain.peak_bytes)
    try:
        solution = _solved(problem, plain.peak_bytes, budget_bytes)
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(
            budget_bytes, error.least_feasible_bytes, _left_out_words(trace)
        ) from None
    asked = Asked("open to the solver", policy, None, goal, budget_bytes)
    signature = eager_signature(model, args, kwargs)
    return Writer(trace, problem, solution).plan(asked, signature, plain)


def described(
    trace: EagerTrace,
    times: bool = False,
    kernels: Kernels | None = None,
    offload: OffloadLike | None = None,
    cost: CostLike = "roofline",
) -> EagerProblem:
    """A recorded step as a problem; kernels that may have a workspace are run once, alone.

    Args:
        trace: the record.
        times: whether kernels are timed as well.
        kernels: what measures them.
        offload: where values may be moved to, if they may; its rates are measured once.
        cost: a device on paper has rates of its own.
    """
    what = WORKSPACE_AND_TIME if times else WORKSPACE
    kernels = kernels or Kernels()
    calls = list(dict.fromkeys(op.call for op in trace.ops))
    found = {f.ops: kernels.formula_bytes(f.call, f.needs) for f in trace.formulas}
    formulas = {ops: nbytes for ops, nbytes in found.items() if nbytes is not None}
    facts = kernels.facts(calls, what)
    if offload is None:
        return eager_problem(trace, facts, formulas)
    least = offload.min_bytes if isinstance(offload, Offload) else 0
    facts = with_device_times(facts, calls, kernels)
    link = link_for(cost, offload, _device_of(trace))
    return eager_problem(trace, facts, formulas, link, least)


def _device_of(trace: EagerTrace) -> torch.device:
    """Where the values of a step are: the first device that is not the host, if there is one."""
    made = (t for op in trace.ops for t in output_tensors(op.call.meta.get("val")))
    devices = dict.fromkeys(tensor.device for tensor in made)
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def traced(
    model: nn.Module,
    args: tuple[Any, ...],
    loss_fn: Callable[[Any], torch.Tensor] | None,
    kwargs: Mapping[str, Any] | None = None,
    kernels: Kernels | None = None,
    keeps_gradients: bool = False,
) -> EagerTrace:
    """The record of a step (:func:`ckpt_pass.eager.trace.trace_step`).

    Raises:
        NotTraceableError: the model's forward or backward fails on fake tensors.
        NothingToDifferentiateError: there is no backward.
    """
    try:
        return trace_step(model, args, loss_fn, kwargs, kernels, keeps_gradients)
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
