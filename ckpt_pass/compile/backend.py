"""The ``torch.compile`` backend."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass._torch import compilers, frames, functorch
from ckpt_pass._torch.nested import inline_nested_regions
from ckpt_pass.compile.breaks import Coverage, graph_break
from ckpt_pass.compile.engine import Partitioner, policy_for
from ckpt_pass.compile.options import OPTIONS, UnknownOptionError, as_patterns, check_inner
from ckpt_pass.compile.replan import compile_planned, compile_within
from ckpt_pass.compile.sizes_seen import SizesSeen
from ckpt_pass.compile.symbolic import watch_sizes
from ckpt_pass.graph.gradients import leaves_among
from ckpt_pass.job.counting import Around
from ckpt_pass.job.jobs import JobLike
from ckpt_pass.job.totals import (
    TotalLike,
    asked_job,
    check_updates,
    step_budget_bytes,
    told_of_total,
)
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.planner.solvers import DEFAULT_SOLVER, SolverLike
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.budget import BudgetLike
from ckpt_pass.plans.goal import as_goal, check_offload
from ckpt_pass.plans.signature import PlanMismatchError
from ckpt_pass.plans.step_plan import StepPlan, load_plan
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.named import as_policy
from ckpt_pass.policy.rules import Policy, PolicyLike, describe

#: Plans kept by a backend value: the newest ones, so that a backend shared by a whole process
#: does not grow without bound. A model has one plan a graph and shape.
PLANS_KEPT = 1024


@dataclass(eq=False)  # not frozen: torch writes its tags on a backend that it registers
class Backend:
    """A backend for ``torch.compile(model, backend=...)``.

    Build one with :func:`make_backend`; ``ckpt_backend`` is the default one.

    Attributes:
        policy: what to save; ``None`` for the default, which depends on there being a budget.
        inner: the compiler of both halves, ``inductor`` or ``aot_eager``.
        regions: FQN patterns of the layers; found from the module names where ``None``.
        inner_options: inductor's own options, as ``torch.compile(options=...)`` takes them.
        budget: the peak to stay within (:func:`make_backend`), if any.
        total, optimizer: the memory of the whole job instead, and what steps, if any.
        solver, time_limit_s, cost, offload: how it is to be met (:func:`make_backend`).
        plan: a plan whose decisions are carried out, if any; another graph is an error.
        plans: the plans made so far, one for each graph, oldest first (1,024 at most).
        coverage: what was said of steps that the budget does not cover.
        sizes: the sizes at which functions were compiled.
    """

    policy: Policy | None = None
    inner: str = "inductor"
    regions: tuple[str, ...] | None = None
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    budget: BudgetLike | None = None
    total: TotalLike | None = None
    optimizer: JobLike | None = None
    solver: SolverLike = DEFAULT_SOLVER
    time_limit_s: float | None = None
    cost: str = "roofline"
    offload: OffloadLike | bool | None = None
    plan: Plan | StepPlan | None = None
    plans: deque[Plan] = field(default_factory=lambda: deque(maxlen=PLANS_KEPT), repr=False)
    coverage: Coverage = field(default_factory=Coverage, repr=False)
    sizes: SizesSeen = field(default_factory=SizesSeen, repr=False)

    #: Read by torch.compile to name the compiler in its logs.
    compiler_name = "ckpt"

    def __post_init__(self) -> None:
        frames.listen(_told_of_skip)

    @property
    def __name__(self) -> str:
        """The compiler's name for torch's logs.

        ``torch.compile`` asks for it, and asks a backend for nothing else before it runs: if
        dynamo then gives a function up, nobody calls the backend, which has to have listened.
        """
        frames.listen(_told_of_skip)
        return self.compiler_name

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one of dynamo's graphs; called by ``torch.compile``.

        Raises:
            UnknownOptionError: an unknown option, or ``mode`` with an inner other than inductor.
        """
        backend = self.with_options(options or {})
        compiled = functools.partial(self._compiled, gm=gm, inputs=example_inputs, mode=mode)
        asked = asked_job(backend.total, backend.optimizer, backend.budget)
        if asked is None or backend.plan is not None or not torch.is_grad_enabled():
            try:
                return compiled(backend)
            except InfeasibleBudgetError as error:
                least = self.coverage.raised_for_shape(backend.budget, error.least_feasible_bytes)
                if least is None:
                    raise
            return compiled(replace(backend, budget=least))
        with functorch.real_tensors():
            account = asked.account(Around.of_graph(example_inputs, asked.job))
        check_updates(account)
        if account.total_bytes is not None:
            backend = replace(backend, budget=step_budget_bytes(account))
        with told_of_total(account):
            return compiled(backend, account=account)

    def _compiled(
        self,
        backend: Backend,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        mode: str | None,
        account: Account | None = None,
    ) -> Callable[..., Any]:
        if torch.is_grad_enabled():
            inline_nested_regions(gm)
        names = tuple(
            compilers.placeholder_source(node) for node in gm.graph.find_nodes(op="placeholder")
        )
        made: list[Plan] = []
        goal = as_goal(
            backend.budget, backend.solver, backend.time_limit_s, backend.cost, backend.offload
        )
        policy = policy_for(backend.policy, backend.budget)
        inner_options = dict(backend.inner_options)
        part = self.coverage.is_part(gm)
        if backend.budget is not None and backend.plan is None and torch.is_grad_enabled():
            self.sizes.take_largest(gm)
            self.coverage.tell_of_cut(gm, backend.budget)
        partition = Partitioner(
            policy,
            backend.regions,
            names,
            goal,
            made.append,
            backend.given,
            backend.inner == "aot_eager",
            part,
            offload=as_offload(backend.offload) or Offload(),
            leaves=leaves_among(inputs),
        )
        if backend.inner == "aot_eager":
            if mode is not None:
                raise UnknownOptionError(
                    f"Got mode={mode!r} with inner='aot_eager', which has no modes. "
                    "Leave mode out, or use inner='inductor'."
                )
            compiled = compilers.compile_eager(gm, inputs, partition)
        elif any(plan.inductor is not None for plan in backend.given):
            careful = any(p.inductor is not None and p.inductor.careful for p in backend.given)
            compiled, plan = compile_planned(gm, inputs, partition, inner_options, mode, careful)
            made = [plan] if plan is not None else []
        elif goal is not None and backend.plan is None:
            compiled, plan = compile_within(gm, inputs, partition, inner_options, mode)
            made += [plan] if plan is not None else []
        else:
            compiled = compilers.compile_inductor(gm, inputs, partition, inner_options, mode)
        cut = graph_break(gm)
        if cut:
            made = [plan.cut_at(cut) for plan in made]
        if account is not None:
            made = [plan.with_account(account) for plan in made]
        self.plans.extend(made)
        self.coverage.note(made)
        if part and backend.budget is not None:
            for plan in made:
                self.coverage.tell_of_raised(gm, plan, backend.budget)
        return watch_sizes(compiled, made[-1], inputs) if made else compiled

    def __deepcopy__(self, memo: object) -> Backend:
        """Itself, with its list of plans: Lightning copies what ``torch.compile`` is given.

        The sizes of a plan that were left open cannot be copied.
        """
        return self

    @property
    def given(self) -> tuple[Plan, ...]:
        """The plans whose decisions are carried out."""
        return () if self.plan is None else parts_of(self.plan)

    def with_options(self, options: Mapping[str, Any]) -> Backend:
        """This backend with some options changed; the list of plans stays shared.

        Args:
            options: ``policy``, ``inner``, ``regions``, ``inner_options``, ``budget``, ``total``,
                ``optimizer``, ``solver``, ``time_limit_s``, ``cost``, ``offload``.

        Raises:
            UnknownOptionError: an option is unknown or has a value that it does not take.
            UnknownPolicyError: no policy has that name.
        """
        for key in options:
            if key not in OPTIONS:
                raise UnknownOptionError(
                    f"The ckpt backend has no option {key!r}.{nearest(key, OPTIONS)} Known "
                    f"options: {', '.join(OPTIONS)}. Inductor's own go into 'inner_options'."
                )
        changed = dict(options)
        if changed.get("policy") is not None:
            changed["policy"] = as_policy(changed["policy"])
        how = ("budget", "solver", "time_limit_s", "cost", "offload")
        as_goal(*(changed.get(key, getattr(self, key)) for key in how))
        asked_job(*(changed.get(k, getattr(self, k)) for k in ("total", "optimizer", "budget")))
        if "regions" in changed:
            changed["regions"] = as_patterns(changed["regions"])
        inner = changed.get("inner", self.inner)
        check_inner(inner, changed.get("inner_options", {}))
        if "inner_options" in changed:
            changed["inner_options"] = dict(changed["inner_options"])
        return replace(self, **changed) if changed else self

    @property
    def limit(self) -> BudgetLike | None:
        """The budget or the total, if any."""
        return self.budget if self.total is None else self.total

    def __str__(self) -> str:
        return f"ckpt backend: {describe(policy_for(self.policy, self.limit))}; inner {self.inner}"


def parts_of(plan: Plan | StepPlan) -> tuple[Plan, ...]:
    """The plans of a step's graphs."""
    return plan.parts if isinstance(plan, StepPlan) else (plan,)


def _told_of_skip(skipped: frames.SkippedFunction) -> None:
    """Say so, where the function was to be compiled by a backend with a budget."""
    if not isinstance(skipped.backend, Backend):
        return
    try:
        backend = skipped.backend.with_options(skipped.options)
    except CkptPassError:
        return  # wrong options: an error once anything is compiled
    if backend.limit is not None and not isinstance(backend.plan, StepPlan):
        backend.coverage.tell_of_skip(skipped, backend.limit)


def make_backend(
    policy: PolicyLike | None = None,
    *,
    budget: BudgetLike | None = None,
    total: TotalLike | None = None,
    optimizer: JobLike | None = None,
    plan: Plan | StepPlan | str | Path | None = None,
    solver: SolverLike = DEFAULT_SOLVER,
    time_limit_s: float | None = None,
    cost: str = "roofline",
    offload: OffloadLike | bool | None = None,
    inner: str | None = None,
    regions: str | Sequence[str] | None = None,
    inner_options: Mapping[str, Any] | None = None,
) -> Backend:
    """Build a backend for ``torch.compile(model, backend=...)``.

    Args:
        policy: what to save: a name, a policy value, a callable or a list of ops
            (:func:`ckpt_pass.as_policy`). By default ``save-matmul-attention``; with a budget,
            whatever the solver finds best. A policy's MUST_* decisions bind under a budget too.
        budget: the peak of forward and backward, above what was allocated when the step began:
            ``"6GiB"``, a number of bytes, a fraction of the peak without recomputation, or
            ``"device"`` (what the accelerator has free). The plan's peak is exact for
            ``inner="aot_eager"``. Inductor fuses and reorders afterwards: the peak is that of
            the code that it generates, and plans are made until one is within the budget.
        total, optimizer: the memory of the whole training job instead, and what steps, as for
            :func:`ckpt_pass.plan`. What stands around a step is what its graph takes and what the
            optimizer steps; a parameter that is in neither is not known here.
        plan: a plan that :func:`ckpt_pass.plan` made ahead of time, or the path of its file: its
            decisions are carried out, nothing is solved again, and another graph is an error.
        solver: what looks for the plan: a name (``ckpt_pass.solver_names()``), a solver, or a
            callable.
        time_limit_s: seconds for the solver; the best so far is taken then.
        cost: ``roofline`` for modelled times, ``measured`` to run and time each kernel once
            (remembered on disk).
        offload: where values may be moved to between forward and backward, beside being saved or
            recomputed: ``True`` for the host, :class:`ckpt_pass.Offload`, or a store. It needs a
            budget or a policy that offloads.
        inner: the compiler of forward and backward: ``inductor`` or ``aot_eager``; by default that
            which ``plan`` was made for, and ``inductor`` without a plan.
        regions: module name patterns of the layers whose borders are saved under every policy;
            found from repeated module names where ``None``; ``[]`` for none.
        inner_options: options for inductor.

    Raises:
        UnknownPolicyError, UnknownOptionError, InvalidBudgetError, UnknownCostError: an argument is
            not one of these; so UnknownSolverError, InvalidTimeLimitError.
        PlanFileError: ``plan`` names a file that is none.
        UnknownOptionError: ``plan`` is none, or is given together with what it already says.
        PlanMismatchError: ``plan`` is an eager one; or comes when a graph is compiled.
        InvalidTotalError, InvalidJobError: a total or an optimizer that is none.
        InfeasibleBudgetError, InfeasibleTotalError, DryRunError: come when a graph is compiled.
    """
    options: dict[str, Any] = {"inner_options": {} if inner_options is None else inner_options}
    if inner is not None:
        options["inner"] = inner
    how = {"policy": policy, "budget": budget, "time_limit_s": time_limit_s}
    of_job = {"total": total, "optimizer": optimizer}
    if plan is not None:
        for key, value in (*how.items(), *of_job.items(), ("regions", regions)):
            if value is not None:
                raise UnknownOptionError(
                    f"Got plan= and {key}={value!r}, expected one of the two: a plan brings its "
                    f"own {key}. Leave {key} out, or make another plan with it."
                )
        if isinstance(plan, (str, Path)):
            plan = load_plan(plan)
        if not isinstance(plan, (Plan, StepPlan)):
            raise UnknownOptionError(
                f"Got plan of type {type(plan).__name__}, expected one that ckpt_pass.plan has "
                "made, or the path of its file. Sizes that differ take a backend each."
            )
        if isinstance(plan, Plan) and plan.mode == "eager":
            raise PlanMismatchError(
                "Got an eager plan, whose regions are modules of a step without torch.compile. "
                "Expected a plan of the compiled step: ckpt_pass.plan(...) without mode='eager'. "
                "An eager one is carried out by plan.apply(model)."
            )
        options.setdefault("inner", parts_of(plan)[0].inner)
        asked = plan.asked
        goals = [part.asked.goal for part in parts_of(plan) if part.asked.goal is not None]
        known = next((goal.offload for goal in goals if goal.offload is not None), None)
        where = known if offload is None else offload
        moves = any(part.with_fate("offloaded") for part in parts_of(plan))
        if where is None and goals and moves:
            raise UnknownOptionError(
                "The plan moves values to a store of the user's, which its file does not hold. "
                "Expected the store to be named: make_backend(plan=..., offload=store)."
            )
        made = replace(Backend(regions=asked.regions), plan=plan)
        options |= {"policy": asked.policy, "budget": plan.budget_bytes}
        if asked.goal is not None:
            goal = asked.goal
            options |= {"solver": goal.solver, "time_limit_s": goal.time_limit_s, "cost": goal.cost}
            options |= {"offload": where}
        return made.with_options(options)
    check_offload(offload, budget if total is None else total, policy)
    options |= {**how, **of_job, "solver": solver, "cost": cost, "offload": offload}
    return Backend(regions=as_patterns(regions)).with_options(options)


#: The default backend: ``torch.compile(model, backend=ckpt_backend)``.
ckpt_backend = make_backend()
