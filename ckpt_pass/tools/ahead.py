"""Plan a step ahead of time: compiled, by Inductor's code, or in eager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass._torch.autograd import is_distributed
from ckpt_pass.compile.engine import Partitioner, decide, policy_for
from ckpt_pass.compile.options import INNER, as_patterns
from ckpt_pass.compile.record import record_plan
from ckpt_pass.compile.replan import plan_within
from ckpt_pass.eager.planning import plan_eager
from ckpt_pass.graph.capture import Look, SeveralGraphsError, capture
from ckpt_pass.graph.gradients import leaves_among
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.job.buckets import replicas_in
from ckpt_pass.job.counting import Around
from ckpt_pass.job.jobs import JobLike
from ckpt_pass.job.totals import InfeasibleTotalError, JobAsked, TotalLike, asked_job
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.sharding import ShardLike, as_sharding
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.planner.device import Device, InvalidDeviceError
from ckpt_pass.planner.devices import DeviceLike
from ckpt_pass.planner.solvers import DEFAULT_SOLVER, SolverLike
from ckpt_pass.plans.budget import BudgetLike
from ckpt_pass.plans.goal import (
    CostLike,
    Goal,
    InFlight,
    as_goal,
    check_offload,
    cost_on,
    with_microbatches,
    with_sharding,
)
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.rules import Policy, PolicyLike
from ckpt_pass.steps.planning import plan_graphs
from ckpt_pass.steps.running import FakeStep
from ckpt_pass.tools.arguments import options_of, step_arguments
from ckpt_pass.tools.cures import changes_of

MODES = ("compiled", "eager")


class PlanModeError(CkptPassError):
    """A mode of planning that there is not, or that does not go with an argument."""


def plan(
    model: nn.Module,
    *args: Any,
    policy: PolicyLike | None = None,
    budget: BudgetLike | None = None,
    total: TotalLike | None = None,
    optimizer: JobLike | None = None,
    solver: SolverLike = DEFAULT_SOLVER,
    time_limit_s: float | None = None,
    cost: str = "roofline",
    device: DeviceLike | None = None,
    offload: OffloadLike | bool | None = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    regions: tuple[str, ...] | None = None,
    dynamic: bool = False,
    mode: str = "compiled",
    inner: str = "aot_eager",
    in_flight: int | InFlight | None = None,
    gradients: str | None = None,
    shard_over: ShardLike | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Plan | StepPlan:
    """What a policy or a budget decides for a training step of a model, ahead of time.

    The step is traced by dynamo with fake tensors. Nothing is computed, but that with a budget
    kernels that may have a workspace of their own are run once, alone, on made-up data. The
    decisions are those that ``torch.compile(model, backend=make_backend(policy))`` acts on. The
    model and its arguments are left as they were.

    Where dynamo cuts the step, its graphs are planned together, so that the whole step, with what
    runs between them, is within the budget (:mod:`ckpt_pass.steps`).

    Args:
        model: the module.
        args, named: its arguments; real, fake and ``meta`` tensors give the same plan (a ``meta``
            tensor stands for one on the device of the others, else on torch's default device).
        kwargs: further keyword arguments of the model, such as have the name of one of these.
        policy: as for :func:`ckpt_pass.make_backend`.
        budget, solver, time_limit_s, cost, offload: likewise.
        total: the memory of the whole training job, parameters, gradients and optimizer states
            with it: ``"24GiB"``, bytes, or ``"device"``. The step gets what is left.
        optimizer: what steps: an optimizer, several, or a :class:`ckpt_pass.Job` that says more
            (microbatches, clipping, a scaler). Copies of it step on fake tensors; the plan then has
            an ``account`` of the whole job, and ``budget="device"`` leaves room for what it has yet
            to allocate.
        device: plan for a device that is not here: a name such as ``"h100"``, or a
            :class:`ckpt_pass.Device`. Its rates stand for times, its memory for
            ``total="device"``; no kernel is run.
        loss_fn: applied to the model's output, where the model does not return a loss.
        regions: FQN patterns of the layers; found from the module names where ``None``.
        dynamic: leave sizes symbolic; bytes are expressions then.
        mode: ``compiled``, or ``eager`` for a step that is not compiled: the plan then chooses
            modules as checkpoint regions, and what each keeps (``plan.apply(model)``), and with
            ``offload`` modules that move what autograd saves in them instead. It needs a
            budget; ``policy``, ``solver``, ``regions`` and ``dynamic`` are for compiled plans.
        inner: what compiles the planned halves: ``aot_eager`` runs the ops of the graph one by one;
            of ``inductor`` the code is generated, and its peak is the plan's; that takes as long as
            a compilation without its kernels.
        in_flight: of a stage of a pipeline how many microbatches have run forward and not yet
            backward, at the most: what is saved counts once for each of them. A number, or what
            :func:`ckpt_pass.distributed.in_flight_of` reads from a schedule. Of eager plans.
        gradients: what the step finds: ``new``, none; ``kept``, those of an earlier step, which are
            not let go (``zero_grad(set_to_none=False)``) and do not count; ``accumulated``, those
            of an earlier microbatch, which count. ``accumulated`` with ``in_flight``. Of eager
            plans.
        shard_over: ranks that may keep a part each of what enters regions, where all of them hold
            it alike: a process group, a device mesh of one dimension, ``True`` for all ranks, or a
            :class:`ckpt_pass.Sharding`. All ranks of the group plan together, and get one plan. Of
            eager plans.

    Returns:
        The plan; of a step that dynamo cuts in several graphs a :class:`StepPlan`, which has one
        for each of them, and the peak of the whole step.

    Raises:
        PlanModeError: an unknown mode, or arguments that it does not take; an optimizer for a
            compiled plan of a model that is wrapped for many ranks.
        NotAModuleError, StepArgumentError: there is no model, or its forward does not take these
            arguments.
        SeveralGraphsError: dynamo cuts the step, and ``dynamic`` is set.
        DryRunError: of code of inductor's that needs data to be followed no peak is known.
        NotTraceableError, NothingToDifferentiateError: see
            :func:`ckpt_pass.graph.capture.capture`.
        UnknownPolicyError, PolicyReturnError, ContradictoryTagsError: see the policy's side.
        MicrobatchesError: there are no such microbatches or gradients.
        InvalidTotalError, InvalidJobError: a total or an optimizer that is none.
        UnknownDeviceError, InvalidDeviceError: a device that is none.
        ForeignOptimizerError: the optimizer steps parameters of another model.
        InfeasibleTotalError: the job does not fit the total.
    """
    check_offload(offload, budget if total is None else total, policy)
    costs = cost_on(cost, device)
    if isinstance(costs, Device) and budget == "device" and optimizer is None:
        raise InvalidDeviceError(
            f"Got budget='device' for {costs} without an optimizer, expected one: of a device on "
            "paper nothing is free until it is known what stands there. Give optimizer=, or bytes."
        )
    asked = asked_job(total, optimizer, budget, costs if isinstance(costs, Device) else None)
    known = None if asked is not None and asked.total is not None else budget

    def goal_for(limit: BudgetLike | None, place: OffloadLike | bool | None) -> Goal | None:
        goal = as_goal(limit, solver, time_limit_s, costs, place)
        goal = with_microbatches(goal, in_flight, gradients)
        goal = with_sharding(goal, as_sharding(shard_over))
        _check_microbatches(goal, mode)
        return goal

    goal = None if asked is not None and known is None else goal_for(known, offload)
    wanted = _Wanted(
        policy, goal, mode, dynamic, as_offload(offload), inner, costs, asked is not None
    )
    inputs = step_arguments(model, plan, args, kwargs, named)
    step = FakeStep(model, args, inputs, loss_fn, as_patterns(regions))
    if asked is None:
        return _planned(step, wanted)
    check_open_sizes(dynamic)
    check_ranks(model, mode)

    def tried(one: FakeStep, job: JobAsked, place: OffloadLike | bool | None) -> Plan | StepPlan:
        how = replace(wanted, offload=as_offload(place))

        def made(budget_bytes: int | None) -> Plan | StepPlan:
            found = goal_for(known if budget_bytes is None else budget_bytes, place)
            if found is not None and gradients is None and job.job.keeps_gradients:
                found = replace(found, gradients="kept")
            return _planned(one, replace(how, goal=found))

        return job.planned(Around.of_step(one.model, one.args, one.kwargs, one.loss_fn), made)

    try:
        return tried(step, asked, offload)
    except InfeasibleTotalError as error:
        raise error.with_tried(changes_of(error, step, asked, offload, tried)) from None


def _planned(step: FakeStep, wanted: _Wanted) -> Plan | StepPlan:
    if wanted.mode != "compiled" or wanted.dynamic:
        return _of_one_graph(step, wanted)
    if wanted.inner != "aot_eager":
        with contextlib.suppress(SeveralGraphsError):
            return _of_inductor(step, wanted)
        return plan_graphs(step, wanted.chosen, wanted.goal, wanted.inner)
    with contextlib.suppress(SeveralGraphsError), _captured(step, wanted) as joint:
        if not joint.graph_break:
            return _plan_of(joint, wanted)
    return plan_graphs(step, wanted.chosen, wanted.goal)


def check_open_sizes(dynamic: bool) -> None:
    """Refuse sizes that are left open beside an account.

    Raises:
        PlanModeError: they are.
    """
    if dynamic:
        raise PlanModeError(
            "Got dynamic=True together with an optimizer, expected sizes that are known: an "
            "account is in bytes. Leave dynamic out, or give budget= without an optimizer."
        )


def check_ranks(model: nn.Module, mode: str) -> None:
    """Refuse a compiled plan of a model that is trained on many ranks, beside an account.

    Raises:
        PlanModeError: the model shards its parameters or exchanges its gradients, and the plan is
            none for eager.
    """
    if mode == "eager":
        return
    sharded = next((n for n, p in model.named_parameters() if is_distributed(p)), None)
    exchanges = bool(replicas_in(model))
    if exchanges or sharded is not None:
        what = "exchanges its gradients" if exchanges else f"shards {sharded}"
        raise PlanModeError(
            f"Got mode={mode!r} with an optimizer for a {type(model).__name__}, which {what}: "
            "what ranks gather and exchange is in no account of a compiled plan. Expected "
            "mode='eager', or a model that is not wrapped."
        )


def plan_one(
    model: nn.Module, *args: Any, kwargs: Mapping[str, Any] | None = None, **named: Any
) -> Plan:
    """As :func:`plan`, of a step that is one graph; with the same options.

    Raises:
        SeveralGraphsError: dynamo cuts the step.
    """
    options = {key: named.pop(key) for key in options_of(plan) if key in named}
    if options.keys() & {"total", "optimizer"}:
        found = plan(model, *args, kwargs={**named, **(kwargs or {})}, **options)
        if isinstance(found, Plan):
            return found
        raise SeveralGraphsError(
            f"Dynamo cuts the step of {type(model).__name__} at {'; at '.join(found.breaks)}. "
            "Expected one graph: take the breaks out of the model, or plan the whole step."
        )
    asked = ("solver", "time_limit_s", "cost", "offload")
    how = {key: options.pop(key) for key in asked if key in options}
    how["cost"] = cost_on(how.get("cost", "roofline"), options.pop("device", None))
    costs, goal = how["cost"], as_goal(options.pop("budget", None), **how)
    goal = with_microbatches(goal, options.pop("in_flight", None), options.pop("gradients", None))
    goal = with_sharding(goal, as_sharding(options.pop("shard_over", None)))
    _check_microbatches(goal, options.get("mode", "compiled"))
    loss_fn, regions = options.pop("loss_fn", None), options.pop("regions", None)
    inputs = step_arguments(model, plan, args, kwargs, named)
    step = FakeStep(model, args, inputs, loss_fn, as_patterns(regions))
    return _of_one_graph(step, _Wanted(goal=goal, cost=costs, **options))


@dataclass(frozen=True)
class _Wanted:
    """What is asked of a plan, but for the step."""

    policy: PolicyLike | None = None
    goal: Goal | None = None
    mode: str = "compiled"
    dynamic: bool = False
    offload: OffloadLike | None = None
    inner: str = "aot_eager"
    cost: CostLike = "roofline"
    for_job: bool = False

    @property
    def chosen(self) -> Policy:
        """The policy that is meant."""
        return policy_for(self.policy, None if self.goal is None else self.goal.budget)


def _eager_plan(step: FakeStep, wanted: _Wanted) -> Plan:
    dynamic = wanted.dynamic or None
    taken = {
        "policy": wanted.policy,
        "regions": step.regions,
        "dynamic": dynamic,
        "inner": wanted.inner if wanted.inner != "aot_eager" else None,
    }
    goal = _eager_goal(wanted.mode, wanted.goal, taken)
    return plan_eager(step.model, step.args, wanted.chosen, goal, step.loss_fn, step.kwargs)


def _of_one_graph(step: FakeStep, wanted: _Wanted) -> Plan:
    """One plan, whatever becomes of the rest of a step that dynamo cuts."""
    if wanted.mode != "compiled":
        return _eager_plan(step, wanted)
    if wanted.inner != "aot_eager":
        return _of_inductor(step, wanted)
    with _captured(step, wanted) as joint:
        found = _plan_of(joint, wanted)
        return found.cut_at(joint.graph_break) if joint.graph_break else found


def _of_inductor(step: FakeStep, wanted: _Wanted) -> Plan:
    """The plan of a step that inductor compiles, by the code that it generates."""
    if wanted.inner not in INNER:
        raise PlanModeError(
            f"Got inner={wanted.inner!r}, expected one of {', '.join(INNER)}."
            f"{nearest(str(wanted.inner), INNER)}"
        )
    made: list[Plan] = []

    def look(gm: fx.GraphModule, inputs: Sequence[Any], names: list[str]) -> None:
        partitioner = Partitioner(
            wanted.chosen,
            step.regions,
            tuple(names),
            wanted.goal,
            offload=wanted.offload or Offload(),
            leaves=leaves_among(inputs),
        )
        found = plan_within(gm, inputs, partitioner, {}, None)
        assert found is not None, "the graph has a backward"
        made.append(found)

    with _captured(step, wanted, look) as joint:
        if not made:
            raise SeveralGraphsError(
                f"torch.compile cuts the step of {type(step.model).__name__} at "
                f"{joint.graph_break}. Expected one graph where sizes are left open or one plan is "
                "asked for. Take the break out of the model, or plan the whole step "
                "(ckpt_pass.plan without dynamic=True)."
            )
    return made[-1]


def _captured(
    step: FakeStep, wanted: _Wanted, look: Look | None = None
) -> AbstractContextManager[JointGraph]:
    return capture(
        step.model,
        *step.args,
        kwargs=step.kwargs,
        loss_fn=step.loss_fn,
        regions=step.regions,
        dynamic=wanted.dynamic,
        look=look,
    )


def _plan_of(joint: JointGraph, wanted: _Wanted) -> Plan:
    return record_plan(
        decide(
            joint,
            wanted.chosen,
            wanted.goal,
            offload=wanted.offload or Offload(),
            cost=wanted.cost,
            workspaces=wanted.for_job,
        )
    )


def _eager_goal(mode: str, goal: Goal | None, taken: Mapping[str, object]) -> Goal:
    if mode not in MODES:
        raise PlanModeError(
            f"Got mode={mode!r}, expected one of {', '.join(MODES)}.{nearest(str(mode), MODES)}"
        )
    for name, value in taken.items():
        if value is not None:
            raise PlanModeError(
                f"Got mode='eager' and {name}={value!r}, which is for compiled plans. Leave "
                f"{name} out: an eager plan finds its regions, and what they keep, by the budget."
            )
    if goal is None:
        raise PlanModeError(
            "Got mode='eager' without a budget, expected one: '6GiB', bytes, or a fraction. For "
            "a policy without a budget use ckpt_pass.checkpoint(..., policy=...)."
        )
    return goal


def _check_microbatches(goal: Goal | None, mode: str) -> None:
    if goal is not None and goal.shard_over is not None and mode != "eager":
        raise PlanModeError(
            f"Got mode={mode!r} with shard_over=, which is for eager plans: nothing in a compiled "
            "graph gathers values for the backward. Give mode='eager', or leave it out."
        )
    if goal is None or mode == "eager" or (goal.in_flight is None and goal.gradients == "new"):
        return
    raise PlanModeError(
        f"Got mode={mode!r} with in_flight={goal.in_flight} and gradients={goal.gradients!r}, "
        "which are for eager plans. Give mode='eager', or leave them out: the peak of a compiled "
        "step is that of one microbatch whose gradients are new."
    )
