"""Plan an eager training step: record it, choose regions and keeps, write the plan down."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._errors import CkptPassError
from ckpt_pass.eager.describe import eager_problem, left_out
from ckpt_pass.eager.step_record import EagerTrace, OpRecord
from ckpt_pass.eager.trace import trace_step
from ckpt_pass.graph.capture import untraceable
from ckpt_pass.graph.kernels import (
    WORKSPACE,
    WORKSPACE_AND_TIME,
    Kernels,
    warn_of_unmeasured,
)
from ckpt_pass.ops.taxonomy import classify, op_name
from ckpt_pass.planner.eager_problem import EagerPlan, EagerProblem, EagerProfile
from ckpt_pass.planner.eager_solve import EagerSolution, solve_eager
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.budget import resolve_budget
from ckpt_pass.plans.goal import Goal
from ckpt_pass.plans.parts import Decision, SavedActivation, SavedActivations, Signature
from ckpt_pass.plans.record import Asked, EagerExecution, Predicted, Proven
from ckpt_pass.plans.signature import eager_signature
from ckpt_pass.plans.timeline import Timeline
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.rules import Policy
from ckpt_pass.policy.sites import output_tensors
from ckpt_pass.version import __version__

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
        goal: the budget; its solver is not used, the eager one is.
        loss_fn: applied to the model's output, where that is no loss.

    Raises:
        NotTraceableError: the model's forward or backward fails on fake tensors.
        NothingToDifferentiateError: there is no backward.
        InfeasibleBudgetError: no plan fits the budget.
        InvalidBudgetError: the budget is no amount of memory.
    """
    kernels = Kernels()
    trace = traced(model, args, loss_fn, kwargs, kernels=kernels)
    problem = described(trace, times=goal.cost == "measured", kernels=kernels)
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
    return _Writer(trace, problem, solution).plan(asked, signature, plain)


def described(
    trace: EagerTrace, times: bool = False, kernels: Kernels | None = None
) -> EagerProblem:
    """A recorded step as a problem; kernels that may have a workspace are run once, alone.

    Args:
        trace: the record.
        times: whether kernels are timed as well.
        kernels: what measures them.
    """
    what = WORKSPACE_AND_TIME if times else WORKSPACE
    kernels = kernels or Kernels()
    calls = list(dict.fromkeys(op.call for op in trace.ops))
    found = {f.ops: kernels.formula_bytes(f.call, f.needs) for f in trace.formulas}
    formulas = {ops: nbytes for ops, nbytes in found.items() if nbytes is not None}
    return eager_problem(trace, kernels.facts(calls, what), formulas)


def traced(
    model: nn.Module,
    args: tuple[Any, ...],
    loss_fn: Callable[[Any], torch.Tensor] | None,
    kwargs: Mapping[str, Any] | None = None,
    kernels: Kernels | None = None,
) -> EagerTrace:
    """The record of a step (:func:`ckpt_pass.eager.trace.trace_step`).

    Raises:
        NotTraceableError: the model's forward or backward fails on fake tensors.
        NothingToDifferentiateError: there is no backward.
    """
    try:
        return trace_step(model, args, loss_fn, kwargs, kernels)
    except CkptPassError:
        raise
    except Exception as error:  # whatever the model's own code raises, with the place
        raise untraceable(model, error) from error


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


class _Writer:
    """Writes a solution down as a plan."""

    def __init__(self, trace: EagerTrace, problem: EagerProblem, solution: EagerSolution) -> None:
        self._trace = trace
        self._problem = problem
        self._solution = solution
        self._region_of: dict[int, str] = {}
        self._again: set[int] = set(problem.rerun_ops(solution.plan))
        for index in sorted(solution.plan.regions):
            region = problem.regions[index]
            self._region_of |= dict.fromkeys(range(*region.ops), region.name)

    def plan(self, asked: Asked, signature: Signature, plain: EagerProfile) -> Plan:
        """The plan."""
        regions = [self._problem.regions[index] for index in sorted(self._solution.plan.regions)]
        return Plan(
            fingerprint=_fingerprint(self._trace, asked.words, str(asked.goal), __version__),
            decisions=tuple(self._decisions()),
            saved=SavedActivations(self._saved()),
            regions=tuple(region.name for region in regions),
            sites=frozenset(op.site for op in self._trace.ops if op.site is not None),
            asked=asked,
            predicted=self._predicted(plain),
            proven=Proven(
                f"eager (the fastest of {self._solution.tried} simulated plans that fits)",
                self._solution.status,
                lower_bound_s=0.0,
            ),
            execution=EagerExecution(
                signature, frozenset(region.name for region in regions if region.extra_bytes)
            ),
        )

    def _predicted(self, plain: EagerProfile) -> Predicted:
        problem, found = self._problem, self._solution.profile
        return Predicted(
            peak_bytes=found.peak_bytes,
            peak_at=self._place(found),
            output_bytes=0,
            recompute_flops=found.recompute_flops,
            step_flops=sum(op.flops for op in problem.ops),
            recompute_time_s=found.recompute_time_s,
            step_time_s=problem.step_time_s,
            timeline=self._timeline(found),
            plain_timeline=self._timeline(plain),
            measured_workspaces=sum(1 for op in problem.ops if op.workspace_bytes),
        )

    def _timeline(self, profile: EagerProfile) -> Timeline:
        seconds = tuple(self._problem.ops[int(op)].time_s for op in profile.ops)
        at = tuple(int(nbytes) for nbytes in profile.bytes_at)
        return Timeline(at, profile.backward_begins, seconds)

    def _place(self, profile: EagerProfile) -> str:
        op = int(profile.ops[profile.peak_index])
        if op >= self._trace.forward_length:
            return f"in the backward ({self._problem.ops[op].name})"
        again = profile.peak_index >= profile.backward_begins
        return f"in the {'recomputation' if again else 'forward'} of {self._problem.ops[op].name}"

    def _held_by_autograd(self) -> set[int]:
        """The ops outside regions whose outputs autograd saves."""
        inside: set[int] = set()
        for index in self._solution.plan.regions:
            inside |= set(range(*self._problem.regions[index].values))
        return {
            self._problem.storages[value.storage].born
            for number, value in enumerate(self._problem.values)
            if value.storage >= 0 and number not in inside
        }

    def _decisions(self) -> list[Decision]:
        held, kept = self._held_by_autograd(), self._solution.plan.kept
        found = []
        for index, op in enumerate(self._trace.ops[: self._trace.forward_length]):
            assert op.site is not None and callable(op.call.target)
            region = self._region_of.get(index)
            saved = index in kept if region is not None else index in held
            again = index in self._again
            rule = "solver (eager)" if region is not None else "not in a region: autograd's own"
            found.append(
                Decision(
                    site=op.site,
                    op_class=str(classify(op.call.target)),
                    nbytes=sum(self._trace.storages[s].nbytes for s in op.makes),
                    decision=CheckpointPolicy.MUST_SAVE
                    if saved
                    else CheckpointPolicy.PREFER_RECOMPUTE,
                    rule=rule,
                    fate="saved" if saved else "recomputed" if again else "unused",
                    region=region,
                    times=int(again),
                    time_s=self._problem.ops[index].time_s,
                )
            )
        return found

    def _saved(self) -> list[SavedActivation]:
        """What is held from forward to backward: by regions, and by autograd outside of them."""
        reasons: dict[int, str] = {}
        for op in self._held_by_autograd():
            reasons |= dict.fromkeys(self._problem.ops[op].makes, "autograd, outside of regions")
        for index in sorted(self._solution.plan.regions):
            region = self._problem.regions[index]
            for storage in region.arguments:
                reasons.setdefault(storage, f"argument of region {region.name}")
        for op in sorted(self._solution.plan.kept):
            reasons |= dict.fromkeys(self._problem.ops[op].makes, "kept by its region")
        return [self._activation(storage, reasons[storage]) for storage in sorted(reasons)]

    def _activation(self, storage: int, reason: str) -> SavedActivation:
        record = self._trace.storages[storage]
        op = self._trace.ops[record.born]
        tensors = list(output_tensors(op.call.meta["val"]))
        tensor = tensors[min(op.makes.index(storage), len(tensors) - 1)]
        return SavedActivation(
            kind="activation",
            site=op.site,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            nbytes=record.nbytes,
            provenance=f"output of {op.site}",
            reason=reason,
        )


def _fingerprint(trace: EagerTrace, *extra: str) -> str:
    """A hash of the step's ops, call sites, shapes, dtypes, and of ``extra``; always the same."""
    digest = hashlib.sha256("\0".join(("eager", *extra)).encode())
    described: dict[Any, str] = {}
    for op in trace.ops:
        text = described.get(op.call)
        if text is None:
            text = described[op.call] = _described(op)
        digest.update(f"{op.site}{text}{op.uses}{op.makes}\n".encode())
    return digest.hexdigest()


def _described(op: OpRecord) -> str:
    tensors = output_tensors(op.call.meta.get("val"))
    shapes = [f"{tensor.dtype}{list(tensor.shape)}" for tensor in tensors]
    target = op_name(op.call.target) if callable(op.call.target) else str(op.call.target)
    return f"{target}{shapes}"
