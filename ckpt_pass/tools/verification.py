"""Run a training step plain and planned, and compare everything that a plan promises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import compilers
from ckpt_pass.compile.backend import make_backend
from ckpt_pass.graph.capture import LossFn, whole_step
from ckpt_pass.job.jobs import Job, JobLike, as_job
from ckpt_pass.job.totals import TotalLike
from ckpt_pass.measure.gradients import (
    GradientComparison,
    NoLossError,
    Run,
    compare_runs,
)
from ckpt_pass.measure.step import Measurement, measure_step
from ckpt_pass.modules.layers.find import NoLayersError, find_layers
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.plans.budget import BudgetLike
from ckpt_pass.plans.signature import check_eager_step
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.policy.named import as_policy
from ckpt_pass.policy.rules import PolicyLike, describe
from ckpt_pass.regions.wrapping import (
    RegionSpec,
    applied_regions,
)
from ckpt_pass.state.untouched import holders_restored, untouched
from ckpt_pass.tools.ahead import plan as make_plan
from ckpt_pass.tools.arguments import step_arguments, without_histories
from ckpt_pass.tools.job_run import measured_job_peak

#: How far the measured peak may be from the predicted one: what was seen on models with kernels'
#: workspaces, whose prediction is a measurement of its own (docs/use/verify.md).
PEAK_SHARE = 0.01
PEAK_BYTES = 4096


class VerificationError(CkptPassError):
    """A planned step is not what its plan promises."""


class NoRegionsError(CkptPassError):
    """There is nothing to checkpoint: no layers were found."""


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        what: in words.
        expected, got: as shown.
        ok: whether it is kept.
    """

    what: str
    expected: str
    got: str
    ok: bool


@dataclass(frozen=True)
class Verdict:
    """All promises of a plan.

    Attributes:
        title: what was verified.
        checks: each promise.
    """

    title: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every promise is kept."""
        return all(check.ok for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raise :class:`VerificationError` unless every promise is kept."""
        if not self.ok:
            failed = [check for check in self.checks if not check.ok]
            words = "; ".join(f"{c.what}: expected {c.expected}, got {c.got}" for c in failed)
            raise VerificationError(
                f"{self.title} does not hold: {words}. Look first for random numbers drawn anew, "
                "for code that does something else in its second run, and for other shapes."
            )

    def __str__(self) -> str:
        rows = [("", "expected", "got", "")]
        rows += [(c.what, c.expected, c.got, "ok" if c.ok else "FAILED") for c in self.checks]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        return "\n".join([self.title, *(line.rstrip() for line in lines)])


def verify(
    model: nn.Module,
    *args: Any,
    plan: Plan | StepPlan | None = None,
    policy: PolicyLike | None = None,
    budget: BudgetLike | None = None,
    total: TotalLike | None = None,
    optimizer: JobLike | None = None,
    mode: str = "compiled",
    inner: str = "aot_eager",
    offload: OffloadLike | bool | None = None,
    loss_fn: LossFn | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Verdict:
    """Run the step as it is and as planned; compare loss, gradients, buffers, peak and flops.

    A compiled plan runs under ``torch.compile`` with what it was made for, beside torch's own
    ``aot_eager`` or ``inductor``; an eager plan runs on the model itself, its regions applied
    meanwhile. Both sides start from the same state; the model and its arguments are left as they
    were.

    Args:
        model, args, named: the step; what the model returns is a loss, unless there is ``loss_fn``.
        plan: the plan; or one is made of ``policy``, ``budget``, ``mode``, ``inner``, ``offload``
            as by :func:`ckpt_pass.plan`. ``mode="eager"`` with a policy and no budget makes each
            layer a region with that policy, of which no peak is predicted.
        total, optimizer: as by :func:`ckpt_pass.plan`; three steps of the whole job then run on
            copies of model and optimizer, and the job's peak is compared with the account's.
        loss_fn: makes a loss of the model's output.
        rtol, atol: how far gradients may be apart; bit by bit equal by default. Of a plan for
            inductor they are not: it fuses other ops with ours, and rounds elsewhere.
        kwargs: further keyword arguments of the model, such as have the name of one of these.

    Raises:
        NoLossError: the step returns no scalar.
        StepArgumentError: the model's forward does not take these arguments.
        NoRegionsError: no layers were found for an eager policy.
        PlanMismatchError, UnknownRegionError: the plan is for another step.
        UnknownPolicyError, InfeasibleBudgetError and others: see :func:`ckpt_pass.plan`.
    """
    inputs = step_arguments(model, verify, args, kwargs, named)
    args, inputs = without_histories((args, inputs))
    used = _Used(model, args, inputs, loss_fn, rtol, atol)
    with untouched(model, loss_fn, args, inputs, values=True):
        if plan is None and mode == "eager" and budget is None and total is None:
            return _verify_policy(policy, used)
        if plan is None:
            how: dict[str, Any] = {"policy": policy, "budget": budget, "offload": offload}
            how |= {"total": total, "optimizer": optimizer, "inner": inner}
            plan = make_plan(model, *args, mode=mode, loss_fn=loss_fn, kwargs=inputs, **how)
        if isinstance(plan, Plan) and plan.mode == "eager":
            found = _verify_eager(plan, used, as_offload(offload))
        else:
            found = _verify_compiled(plan, used)
        if optimizer is None or plan.account is None:
            return found
        return replace(found, checks=(*found.checks, *_of_job(plan, used, as_job(optimizer))))


def _of_job(plan: Plan | StepPlan, used: _Used, job: Job) -> Iterator[Check]:
    """The promises of an account."""
    account = plan.account
    assert account is not None
    got = measured_job_peak(used.model, used.args, used.kwargs, used.loss_fn, plan, job)
    room = max(PEAK_BYTES, int(PEAK_SHARE * account.peak_bytes))
    near = abs(got - account.peak_bytes) <= room
    expected = format_bytes(account.peak_bytes)
    yield Check("peak of the job, predicted", expected, format_bytes(got), near)
    if account.total_bytes is not None:
        within = f"at most {format_bytes(account.total_bytes)}"
        yield Check("peak of the job, total", within, format_bytes(got), got <= account.total_bytes)


@dataclass(frozen=True)
class _Used:
    """The step that is verified, and how far gradients may be apart."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss_fn: LossFn | None
    rtol: float
    atol: float

    @property
    def plain(self) -> Callable[[], Tensor]:
        """The plain step."""
        return step_of(self.model, self.args, self.loss_fn, self.kwargs)

    def measured(self, step: Callable[[], Tensor] | None = None) -> Measurement:
        """What a step (the plain one) costs that begins with the same attributes each time.

        What it leaves on them is there until its backward is over.
        """
        forward = step or self.plain
        given = [*self.model.parameters(), *tree_leaves((self.args, dict(self.kwargs)))]
        leaves = [leaf for leaf in given if isinstance(leaf, Tensor) and leaf.requires_grad]

        def whole() -> None:
            with self.anew():
                forward().backward()

        return measure_step(whole, repeats=1, backward=False, params=leaves)

    def anew(self) -> AbstractContextManager[None]:
        """For a step to begin with the attributes that the first one began with.

        What a model makes at first use would be there in the second run, and change its graph.
        """
        return holders_restored(self.model, self.loss_fn, self.args, self.kwargs)

    @contextlib.contextmanager
    def compared(self) -> Iterator[None]:
        """The same, and with arguments that the first one had: a step may write to them."""
        with self.anew(), untouched(self.args, self.kwargs, values=True):
            yield

    def same(self, found: GradientComparison) -> tuple[Check, Check]:
        """What a comparison says."""
        return _same(found, self.rtol, self.atol)

    def with_regions(self, specs: Mapping[str, RegionSpec]) -> tuple[Check, Check]:
        """The plain step beside the one with regions."""
        plain = Run(self.plain, self.compared)
        return self.same(compare_with_regions(self.model, specs, plain, self.rtol, self.atol))


def step_of(
    model: nn.Module,
    args: tuple[Any, ...],
    loss_fn: LossFn | None,
    kwargs: Mapping[str, Any] | None = None,
) -> Callable[[], Tensor]:
    named = dict(kwargs or {})

    def step() -> Tensor:
        output = model(*args, **named)
        loss = output if loss_fn is None else loss_fn(output)
        if not isinstance(loss, Tensor):
            raise NoLossError(loss)
        return loss

    return step


def layers_of(model: nn.Module) -> tuple[str, ...]:
    """The layers of a model.

    Raises:
        NoRegionsError: it has none.
    """
    try:
        return find_layers(model).names
    except NoLayersError as error:
        raise NoRegionsError(
            f"{error} Or make regions by hand with ckpt_pass.checkpoint, or give a budget."
        ) from None


def _verify_policy(policy: PolicyLike | None, used: _Used) -> Verdict:
    """Each layer as a region with one policy."""
    words = "none" if policy is None else describe(as_policy(policy))
    specs = {name: RegionSpec(policy=policy) for name in layers_of(used.model)}
    same = used.with_regions(specs)  # first: it says so where there is no loss
    plain = used.measured()
    with applied_regions(used.model, specs):
        measured = used.measured()
    return Verdict(f"eager regions, policy {words}", (*same, _not_above(plain, measured)))


def _verify_eager(plan: Plan, used: _Used, offload: OffloadLike | None) -> Verdict:
    check_eager_step(plan.signature, used.model, used.args, used.kwargs)
    same = used.with_regions(plan.region_specs(offload))
    with plan.applied(used.model, offload):
        measured = used.measured()
    return Verdict(f"eager plan {plan.fingerprint[:12]}", (*same, *_promises(plan, measured)))


def _verify_compiled(plan: Plan | StepPlan, used: _Used) -> Verdict:
    backend = make_backend(plan=plan)
    dynamic = bool(plan.dimensions) if isinstance(plan, Plan) else None
    whole = whole_step(used.model, used.loss_fn)

    def run_of(compiler: Any) -> Run:
        compiled = compilers.compile_apart(whole, compiler, dynamic)
        return Run(lambda: compiled(*used.args, **used.kwargs), used.compared)

    planned = run_of(backend)
    with compilers.own_profile():
        found = compare_runs(
            run_of(backend.inner), planned, used.model, rtol=used.rtol, atol=used.atol
        )
        promises = tuple(_promises(plan, used.measured(planned.forward)))
    return Verdict(f"plan {plan.fingerprint[:12]}", (*used.same(found), *promises))


def compare_with_regions(
    model: nn.Module,
    specs: Mapping[str, RegionSpec],
    plain: Run,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> GradientComparison:
    """The step as it is beside the step with regions, which stay until its backward is over.

    Raises:
        NoLossError: the step returns no scalar.
    """

    @contextlib.contextmanager
    def with_regions() -> Iterator[None]:
        with applied_regions(model, specs), plain.around():
            yield

    return compare_runs(plain, Run(plain.forward, with_regions), model, rtol=rtol, atol=atol)


def _same(found: GradientComparison, rtol: float, atol: float) -> tuple[Check, Check]:
    wanted = "bitwise equal" if not (rtol or atol) else f"within rtol {rtol:g}, atol {atol:g}"
    rest = [name for name in found.different if name != "loss"]
    got = f"{found.compared} equal"
    if rest:
        got = f"{len(rest)} of {found.compared} differ, worst {found.worst} "
        got += f"by {found.max_abs_diff:.3g}"
    loss = Check("loss", wanted, "equal" if found.loss_equal else "differs", found.loss_equal)
    return loss, Check("gradients and buffers", wanted, got, not rest)


def _promises(plan: Plan | StepPlan, measured: Measurement) -> Iterator[Check]:
    # A plan for a step that adds to gradients is compared where there are some: in the job.
    if plan.account is None or not plan.account.keeps_gradients:
        yield from _peaks(plan, measured.peak_bytes)
    if isinstance(plan, StepPlan) or plan.inner == "inductor":
        return  # what runs between the graphs has flops of its own; fused kernels are not counted
    got = measured.flops - plan.predicted.step_flops
    expected = plan.predicted.recompute_flops
    yield Check("recomputed flops", f"{expected:,}", f"{got:,}", got == expected)


def _peaks(plan: Plan | StepPlan, peak: int) -> Iterator[Check]:
    room = max(PEAK_BYTES, int(PEAK_SHARE * plan.peak_bytes))
    near = abs(peak - plan.peak_bytes) <= room
    yield Check("peak, predicted", format_bytes(plan.peak_bytes), format_bytes(peak), near)
    if plan.budget_bytes is not None:
        within = f"at most {format_bytes(plan.budget_bytes)}"
        yield Check("peak, budget", within, format_bytes(peak), peak <= plan.budget_bytes)


def _not_above(plain: Measurement, measured: Measurement) -> Check:
    within = f"at most {format_bytes(plain.peak_bytes)}"
    good = measured.peak_bytes <= plain.peak_bytes
    return Check("peak", within, format_bytes(measured.peak_bytes), good)
