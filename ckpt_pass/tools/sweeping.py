"""The trade-off curve: what each amount of memory costs, measured on the user's own step.

Every point is compiled, run and measured in the same process: plans for a row of budgets, beside
them torch's ``activation_memory_budget`` and a checkpoint around every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import compilers
from ckpt_pass.compile.backend import make_backend
from ckpt_pass.compile.options import check_inner
from ckpt_pass.graph.capture import LossFn, capture
from ckpt_pass.measure.gradients import gradients_restored
from ckpt_pass.measure.step import Measurement, measure_step
from ckpt_pass.measure.timing import Variant, clock_for, interleave
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.budget import BudgetLike, check_budget, resolve_budget
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.rules import PolicyLike
from ckpt_pass.report.sweeps import BLOCKS, OURS, TORCH, SweepRow, plot_sweep, sweep_text
from ckpt_pass.state.untouched import untouched
from ckpt_pass.tools.ahead import plan
from ckpt_pass.tools.arguments import step_arguments
from ckpt_pass.tools.curve import budgets_between
from ckpt_pass.tools.users_step import Progress, Told, UsersStep

#: torch's knob, from "recompute only what is nearly free" to "recompute everything".
TORCH_BUDGETS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
#: Timings of each point; their median is shown.
ROUNDS = 5

#: A budget that no step reaches.
_UNBOUNDED = 1 << 60


class SweepArgumentError(CkptPassError):
    """A sweep was asked for too few points or rounds."""

    def __init__(self, name: str, got: int, least: int) -> None:
        super().__init__(f"sweep got {name}={got}; expected at least {least}. Raise {name}.")


@dataclass(frozen=True)
class Sweep:
    """The measured points of one step's trade-off; prints itself as a table.

    Attributes:
        rows: the points; the plan that recomputes nothing comes last of ours.
        model: the model's class.
        inner: what compiled every point.
        device, torch_version, threads: where it was measured.
        rounds: timings of each point.
    """

    rows: tuple[SweepRow, ...]
    model: str
    inner: str
    device: str
    torch_version: str
    threads: int
    rounds: int

    @property
    def title(self) -> str:
        """What was measured, in words."""
        return f"{self.model}, {self.inner}, {self.device}: peak against recomputation"

    def of(self, family: str) -> tuple[SweepRow, ...]:
        """The rows of one family: ``ckpt_pass``, ``torch`` or ``per block``."""
        return tuple(row for row in self.rows if row.family == family)

    def plot(self, path: str | Path) -> Path:
        """Draw peak against recomputed flops and against time as a PNG; return its path.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return plot_sweep(self.title, self.rows, Path(path))

    def __str__(self) -> str:
        return (
            f"{self.title}\n\n{sweep_text(self.rows)}\n\ntimes: medians of {self.rounds}, in turn"
        )


def sweep(
    model: nn.Module,
    *args: Any,
    points: int = 8,
    budgets: Sequence[BudgetLike] | None = None,
    policy: PolicyLike | None = None,
    inner: str = "aot_eager",
    offload: OffloadLike | bool | None = None,
    with_torch: bool = True,
    torch_budgets: Sequence[float] = TORCH_BUDGETS,
    loss_fn: LossFn | None = None,
    rounds: int = ROUNDS,
    progress: Progress = lambda what, done, total: None,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Sweep:
    """Measure what a row of budgets costs a training step of a model.

    The model is trained nowhere, but run; it and its arguments are left as they were.

    Args:
        model: the module; returns a scalar loss, unless there is a ``loss_fn``.
        args, named: its arguments.
        kwargs: further keyword arguments of the model, such as have the name of one of these.
        points: budgets from the least that a plan reaches to the peak with nothing recomputed, in
            equal ratios. That last one is always measured: the others are compared with it.
        budgets: these budgets in the place of ``points``.
        policy: as for :func:`ckpt_pass.make_backend`.
        inner: ``aot_eager`` or ``inductor``, for every point.
        offload: where values may be moved to, as for :func:`ckpt_pass.make_backend`.
        with_torch: also measure torch's own settings and a checkpoint around every layer.
        torch_budgets: torch's own settings, from 1 (recompute only what is nearly free) to 0.
        loss_fn: applied to the model's output.
        rounds: timings of each point; of CPU time on one thread, of the wall's time otherwise.
        progress: told about each part of the work.

    Raises:
        SweepArgumentError: ``points`` below 2, or ``rounds`` below 1.
        InvalidBudgetError, UnknownOptionError, UnknownPolicyError: an argument is none of these.
        NotTraceableError, NothingToDifferentiateError: see :func:`ckpt_pass.plan`.
        NoLossError: the step returns no scalar.
    """
    for name, got, least in (("points", points, 2), ("rounds", rounds, 1)):
        if got < least:
            raise SweepArgumentError(name, got, least)
    for budget in budgets or ():
        check_budget(budget)
    check_inner(inner, {})
    make = partial(make_backend, policy, inner=inner, offload=offload)
    make(budget=_UNBOUNDED)  # what is misspelt is said before anything runs
    inputs = step_arguments(model, sweep, args, kwargs, named)
    step = UsersStep(model, args, loss_fn, inputs)
    progress("the least peak", 0, 1)
    amounts = _budgets(step, policy, points, budgets, offload)
    todo = [_ours(amount, make) for amount in amounts[:-1]]
    if budgets is None:  # the least is that of the graph: what inductor makes of it may need more
        todo = [replace(point, instead=partial(_ours, make=make)) for point in todo]
    todo.append(_unbounded(amounts[-1], make))
    todo += _torch_points(step, inner, torch_budgets) if with_torch else []
    tell = Told(progress, len(todo) + rounds + 1)
    with untouched(model, loss_fn, args, inputs, values=True), gradients_restored(step.leaves):
        found = [_measured(step, point, tell) for point in todo]
        measured = list({(one.row.family, one.row.setting): one for one in found}.values())
        tell("timing")
        rows = _timed(step, measured, rounds, tell)
    final = _against_plain(rows)
    device, threads = str(step.device), torch.get_num_threads()
    return Sweep(final, type(model).__name__, inner, device, torch.__version__, threads, rounds)


@dataclass(frozen=True)
class _Point:
    """One way to compile the step.

    Attributes:
        around: in place whenever it runs.
        instead: the point for the least budget that there is, where this one is refused.
    """

    family: str
    setting: str
    backend: Any
    budget_bytes: int | None = None
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    instead: Callable[[int], _Point] | None = None


@dataclass(frozen=True)
class _Measured:
    """A point's row, and how to run it again; ``None`` if it failed."""

    row: SweepRow
    run: Callable[[], Any] | None = None


# --- the points -----------------------------------------------------------------------------


def _budgets(
    step: UsersStep,
    policy: PolicyLike | None,
    points: int,
    asked: Sequence[BudgetLike] | None,
    offload: OffloadLike | bool | None,
) -> list[int]:
    """Bytes, falling; the peak with nothing recomputed comes last."""
    how: dict[str, Any] = {"policy": policy, "offload": offload}
    how |= {"loss_fn": step.loss_fn, "kwargs": step.kwargs}
    planned = partial(plan, step.model, *step.args, **how)
    plain = planned(budget=1.0).budget_bytes
    assert plain is not None
    if asked is not None:
        found = {resolve_budget(budget, plain) for budget in asked}
        return [*sorted(found - {plain}), plain]
    try:
        least = planned(budget=1).peak_bytes or 1
    except InfeasibleBudgetError as error:
        least = error.least_feasible_bytes
    return budgets_between(least, plain, points)


def _ours(amount: int, make: Callable[..., Any]) -> _Point:
    return _Point(OURS, f"{amount / 1e6:.3g} MB", make(budget=amount), amount)


def _unbounded(plain: int, make: Callable[..., Any]) -> _Point:
    """The plan that recomputes nothing: dynamo's graph may need a little more than the traced."""
    return _Point(OURS, "no recomputation", make(budget=_UNBOUNDED), plain)


def _torch_points(step: UsersStep, inner: str, budgets: Sequence[float]) -> list[_Point]:
    points = [
        _Point(TORCH, f"budget {setting:g}", compilers.stock_backend(inner, setting))
        for setting in budgets
    ]
    layers = _layers(step)
    if layers:
        wrapped = _Checkpointed(layers)
        backend = compilers.stock_backend(inner, 1.0)
        name = f"{len(layers)} checkpoints"
        points.append(_Point(BLOCKS, name, backend, around=wrapped.in_place))
    return points


def _layers(step: UsersStep) -> list[nn.Module]:
    """The repeated layers, as the library finds them."""
    with capture(step.model, *step.args, kwargs=step.kwargs, loss_fn=step.loss_fn) as joint:
        regions = [r.partition("@")[0] for r in joint.regions.values() if r is not None]
    named = dict(step.model.named_modules())
    return [named[fqn] for fqn in dict.fromkeys(regions) if fqn in named]


@dataclass(frozen=True)
class _Checkpointed:
    """Layers whose forward runs as a checkpoint region, for a while."""

    layers: list[nn.Module]
    wrapped: list[Callable[..., Any]] = field(init=False)

    def __post_init__(self) -> None:
        # Made once: dynamo would compile again for functions that it has not seen.
        forwards = [_region(layer.forward) for layer in self.layers]
        object.__setattr__(self, "wrapped", forwards)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the regions in; afterwards every layer is as it was."""
        before = [vars(layer).get("forward") for layer in self.layers]
        for layer, forward in zip(self.layers, self.wrapped, strict=True):
            vars(layer)["forward"] = forward
        try:
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                vars(layer).pop("forward")
                if own is not None:
                    vars(layer)["forward"] = own


def _region(forward: Callable[..., Any]) -> Callable[..., Any]:
    def region(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return region


# --- measuring ------------------------------------------------------------------------------


def _measured(step: UsersStep, point: _Point, tell: Told) -> _Measured:
    """Compile and measure one point; a point that cannot be is a row that says why."""
    tell(f"{point.family}, {point.setting}")
    compiled = step.compiled(point.backend)

    def run() -> Any:
        with point.around():
            return compiled()

    row = SweepRow(point.family, point.setting, point.budget_bytes)
    try:
        found = measure_step(
            run, backward=True, params=step.leaves, device=step.device, warmup=0, repeats=1
        )
    except RuntimeError as error:  # dynamo wraps a backend's errors
        why = getattr(error, "inner_exception", error)
        if isinstance(why, InfeasibleBudgetError):
            if point.instead is not None:
                return _measured(step, point.instead(why.least_feasible_bytes), tell)
        elif point.family == OURS:
            raise
        return _Measured(replace(row, failure=_failure(why)))
    return _Measured(_filled(row, point, found), run)


def _failure(why: BaseException) -> str:
    if isinstance(why, InfeasibleBudgetError):
        return f"infeasible: at least {why.least_feasible_bytes:,} bytes"
    first = str(why).strip().splitlines()[0] if str(why).strip() else "no message"
    return f"{type(why).__name__}: {first}"


def _filled(row: SweepRow, point: _Point, found: Measurement) -> SweepRow:
    plans: Sequence[Plan] = getattr(point.backend, "plans", ())
    # Of several graphs each has a peak of its own; that of the step is not among them.
    predicted = plans[0].peak_bytes if len(plans) == 1 else None
    return replace(row, peak_bytes=found.peak_bytes, predicted_bytes=predicted, flops=found.flops)


def _timed(step: UsersStep, measured: list[_Measured], rounds: int, tell: Told) -> list[SweepRow]:
    """The rows, those that ran with their times."""

    def run(once: Callable[[], Any], _: None) -> None:
        once().backward()
        step.synchronise()

    variants = [
        Variant(str(number), partial(run, made.run), step.clear)
        for number, made in enumerate(measured)
        if made.run is not None
    ]
    times = interleave(
        variants,
        rounds=rounds,
        warmup=1,
        clock=clock_for(step.device),
        on_round=lambda: tell("timing"),
    )
    step.clear()
    medians = {int(row.variant): row.median_s for row in times}
    return [replace(made.row, time_s=medians.get(n)) for n, made in enumerate(measured)]


def _against_plain(rows: list[SweepRow]) -> tuple[SweepRow, ...]:
    """Fill in what each row recomputes, against the plan that recomputes nothing."""
    plain = [row.flops for row in rows if row.family == OURS][-1]
    return tuple(
        replace(row, recompute_share=(row.flops - plain) / plain) if row.flops and plain else row
        for row in rows
    )
