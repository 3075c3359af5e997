"""Run a training step plain and planned, and compare everything that a plan promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.compile.backend import make_backend
from ckpt_pass.measure.gradients import GradientComparison, NoLossError, compare_gradients
from ckpt_pass.measure.step import Measurement, measure_step
from ckpt_pass.modules.layers.find import NoLayersError, find_layers
from ckpt_pass.plans.budget import BudgetLike
from ckpt_pass.plans.signature import check_eager_step
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.policy.named import as_policy
from ckpt_pass.policy.rules import PolicyLike, describe
from ckpt_pass.regions.wrapping import (
    RegionSpec,
    applied_regions,
    apply_regions,
    regions_of,
    remove_regions,
)
from ckpt_pass.tools.ahead import plan as make_plan

LossFn = Callable[[Any], Tensor]

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
    plan: Plan | None = None,
    policy: PolicyLike | None = None,
    budget: BudgetLike | None = None,
    mode: str = "compiled",
    loss_fn: LossFn | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> Verdict:
    """Run the step as it is and as planned; compare loss, gradients, buffers, peak and flops.

    A compiled plan runs under ``torch.compile`` with ``aot_eager`` halves, beside torch's own
    ``aot_eager``; an eager plan runs on the model itself, its regions applied meanwhile. Both
    sides start from the same random state; parameters, gradients and buffers are left as they were.

    Args:
        model, args: the step; what the model returns is a loss, unless there is ``loss_fn``.
        plan: the plan; or one is made of ``policy``, ``budget`` and ``mode`` as by
            :func:`ckpt_pass.plan`. ``mode="eager"`` with a policy and no budget makes each layer a
            region with that policy, of which no peak is predicted.
        loss_fn: makes a loss of the model's output.
        rtol, atol: how far gradients may be apart; bit by bit equal by default.

    Raises:
        NoLossError: the step returns no scalar.
        NoRegionsError: no layers were found for an eager policy.
        PlanMismatchError, UnknownRegionError: the plan is for another step.
        UnknownPolicyError, InfeasibleBudgetError and others: see :func:`ckpt_pass.plan`.
    """
    step = step_of(model, args, loss_fn)
    if plan is None and mode == "eager" and budget is None:
        words = "none" if policy is None else describe(as_policy(policy))
        title = f"eager regions, policy {words}"
        specs = {name: RegionSpec(policy=policy) for name in layers_of(model)}
        plain = measure_step(step, repeats=1)
        same = _same(compare_with_regions(model, specs, step, rtol, atol), rtol, atol)
        with applied_regions(model, specs):
            measured = measure_step(step, repeats=1)
        return Verdict(title, (*same, _not_above(plain, measured)))
    if plan is None:
        how: dict[str, Any] = {"policy": policy, "budget": budget, "loss_fn": loss_fn}
        plan = make_plan(model, *args, mode=mode, **how)
    if plan.mode == "eager":
        return _verify_eager(plan, model, args, step, rtol, atol)
    return _verify_compiled(plan, model, args, loss_fn, rtol, atol)


def step_of(
    model: nn.Module, args: tuple[Any, ...], loss_fn: LossFn | None
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        output = model(*args)
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


def _verify_eager(
    plan: Plan,
    model: nn.Module,
    args: tuple[Any, ...],
    step: Callable[[], Tensor],
    rtol: float,
    atol: float,
) -> Verdict:
    check_eager_step(plan.signature, model, args)
    same = _same(compare_with_regions(model, plan.region_specs(), step, rtol, atol), rtol, atol)
    with plan.applied(model):
        measured = measure_step(step, repeats=1)
    return Verdict(f"eager plan {plan.fingerprint[:12]}", (*same, *_promises(plan, measured)))


def _verify_compiled(
    plan: Plan,
    model: nn.Module,
    args: tuple[Any, ...],
    loss_fn: LossFn | None,
    rtol: float,
    atol: float,
) -> Verdict:
    backend = make_backend(plan=plan, inner="aot_eager")
    # A second model with the same code gets open sizes otherwise, which a plan of fixed ones is not
    # for (dynamo's automatic dynamic shapes).
    dynamic = None if plan.dimensions else False
    steps = []
    for used in ("aot_eager", backend):
        whole = model if loss_fn is None else _WithLoss(model, loss_fn)
        compiled = torch.compile(whole, backend=used, dynamic=dynamic)
        steps.append(lambda c=compiled: c(*args))
    plain, planned = steps
    same = _same(compare_gradients(plain, planned, model, rtol=rtol, atol=atol), rtol, atol)
    promises = _promises(plan, measure_step(planned, repeats=1))
    return Verdict(f"plan {plan.fingerprint[:12]}", (*same, *promises))


class _WithLoss(nn.Module):
    """The model and its loss, compiled together as they were planned."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, *args: Any) -> Tensor:
        return self.loss_fn(self.model(*args))


def compare_with_regions(
    model: nn.Module,
    specs: Mapping[str, RegionSpec],
    step: Callable[[], Tensor],
    rtol: float = 0.0,
    atol: float = 0.0,
) -> GradientComparison:
    """The step as it is beside the step with regions, which stay until its backward is over.

    Raises:
        NoLossError: the step returns no scalar.
    """
    before = set(regions_of(model))

    def planned() -> Tensor:
        apply_regions(model, specs)
        return step()

    try:
        return compare_gradients(step, planned, model, rtol=rtol, atol=atol)
    finally:
        if set(regions_of(model)) != before:
            remove_regions(model)


def _same(found: GradientComparison, rtol: float, atol: float) -> tuple[Check, Check]:
    wanted = "bitwise equal" if not (rtol or atol) else f"within rtol {rtol:g}, atol {atol:g}"
    rest = [name for name in found.different if name != "loss"]
    got = f"{found.compared} equal"
    if rest:
        got = f"{len(rest)} of {found.compared} differ, worst {found.worst} "
        got += f"by {found.max_abs_diff:.3g}"
    loss = Check("loss", wanted, "equal" if found.loss_equal else "differs", found.loss_equal)
    return loss, Check("gradients and buffers", wanted, got, not rest)


def _promises(plan: Plan, measured: Measurement) -> Iterator[Check]:
    peak = measured.peak_bytes
    room = max(PEAK_BYTES, int(PEAK_SHARE * plan.peak_bytes))
    near = abs(peak - plan.peak_bytes) <= room
    yield Check("peak, predicted", format_bytes(plan.peak_bytes), format_bytes(peak), near)
    if plan.budget_bytes is not None:
        within = f"at most {format_bytes(plan.budget_bytes)}"
        yield Check("peak, budget", within, format_bytes(peak), peak <= plan.budget_bytes)
    got = measured.flops - plan.predicted.step_flops
    expected = plan.predicted.recompute_flops
    yield Check("recomputed flops", f"{expected:,}", f"{got:,}", got == expected)


def _not_above(plain: Measurement, measured: Measurement) -> Check:
    within = f"at most {format_bytes(plain.peak_bytes)}"
    good = measured.peak_bytes <= plain.peak_bytes
    return Check("peak", within, format_bytes(measured.peak_bytes), good)
