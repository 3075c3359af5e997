"""The fastest way to run a training job within an amount of memory: microbatch, plan, and way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from ckpt_pass.graph.capture import LossFn
from ckpt_pass.job.counting import Around
from ckpt_pass.job.jobs import Job, JobLike
from ckpt_pass.job.totals import TotalLike, asked_job, check_total
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.planner.device import Device
from ckpt_pass.planner.devices import DeviceLike
from ckpt_pass.plans.goal import cost_on
from ckpt_pass.report.tunings import Tuned
from ckpt_pass.state.given import check_module
from ckpt_pass.tools.ahead import MODES, PlanModeError, check_ranks
from ckpt_pass.tools.candidates import (
    Batches,
    MakeBatch,
    Planned,
    Planner,
    TuneArgumentError,
    Way,
    microbatches_of,
)
from ckpt_pass.tools.timed_steps import Stopwatch, is_real
from ckpt_pass.tools.users_step import Progress, Told
from ckpt_pass.tools.weighing import MOST, Weighed

#: Timings of each candidate that is measured, and of each block in turn; their median counts.
ROUNDS = 5


def tune(
    model: nn.Module,
    make_batch: MakeBatch,
    *,
    total: TotalLike,
    optimizer: JobLike,
    global_batch: int = 256,
    microbatches: Iterable[int] | None = None,
    mode: str | Sequence[str] = "compiled",
    inner: str = "aot_eager",
    offload: OffloadLike | bool | None = None,
    device: DeviceLike | None = None,
    loss_fn: LossFn | None = None,
    measure: int | None = None,
    rounds: int = ROUNDS,
    time_limit_s: float | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Tuned:
    """Find the microbatch and the plan that train the most samples per second within a total.

    Each microbatch that makes up the global batch is planned for the total: with nothing recomputed
    as long as that fits. What does not fit is never run. Times are predicted for all that fit; the
    most promising are measured, and what they took puts the predictions of the others right.

    The model, its optimizer and the random state are left as they were; the optimizer's step is
    timed on copies of both.

    Args:
        model: the module.
        make_batch: makes the model's arguments for so many samples: a tensor, a tuple of arguments,
            or a mapping of named ones. It may be called several times for a size.
        total: the memory of the whole job, as for :func:`ckpt_pass.plan`.
        optimizer: what steps: an optimizer, several, or a :class:`ckpt_pass.Job`, which says how
            many microbatches are added up only here.
        global_batch: samples of an optimizer's step. It is met exactly: microbatches are its
            divisors.
        microbatches: these alone.
        mode: ``compiled``, ``eager``, or both of them to choose from.
        inner: what compiles a step: ``aot_eager`` or ``inductor``.
        offload: where values may be moved to: candidates that recompute are then also planned with
            that.
        device: a device on paper; then, and where a tensor has no values, nothing is measured.
        loss_fn: applied to the model's output, where the model does not return a loss.
        measure: candidates that are measured at the most; fewer than a third of those that fit, one
            at least and five at the most, where ``None``.
        rounds: timings of each that is measured; those that are about as fast as the fastest are
            timed in turn, up to four times as often, until they differ.
        time_limit_s: seconds for the solver, for each plan.
        progress: told about each part of the work.

    Raises:
        TuneArgumentError: a global batch, microbatches, ``make_batch``, ``measure`` or ``rounds``
            that is none.
        InfeasibleTotalError: no candidate fits; the message names the least that would do.
        InvalidTotalError, InvalidJobError, ForeignOptimizerError, PlanModeError,
            StepArgumentError, NotTraceableError, UnknownDeviceError: as for :func:`ckpt_pass.plan`.
        NoLossError: the step returns no scalar.
    """
    check_module(model, "tune")
    sizes = microbatches_of(global_batch, microbatches)
    _check_counts(measure, rounds)
    batches = Batches(model, make_batch, tune)
    ways = _ways(mode, inner)
    for way in ways:
        check_ranks(model, way.mode)
    paper = cost_on("roofline", device)
    check_total(total)
    asked = asked_job(total, optimizer, None, paper if isinstance(paper, Device) else None)
    assert asked is not None, "there is a total"
    _check_job(asked.job)
    args, kwargs = batches.at(sizes[0])
    around = Around.of_step(model, args, kwargs, loss_fn)
    account = asked.account(around)
    # What a device has free changes while candidates are tried.
    asked = replace(asked, total=account.total_bytes)
    place = as_offload(offload)
    most = 0 if paper != "roofline" or not is_real(model, loss_fn, args, kwargs) else measure
    plans = len(sizes) * len(ways) * (1 if place is None else 2)
    tell = Told(progress, plans + (MOST if most is None else most) + 1)
    how = {"device": device, "time_limit_s": time_limit_s}
    planner = Planner(batches, loss_fn, how, asked, tell)
    found = _planned(planner, ways, place, sizes, global_batch)
    weighed = Weighed.of([one for one in found if one.plan is not None], asked)
    if most != 0:
        stopwatch = Stopwatch(model, loss_fn, batches, rounds)
        with stopwatch.opened():
            weighed.measure(stopwatch, most, tell)
    return weighed.tuned(found, type(model).__name__, rounds)


def _check_counts(measure: int | None, rounds: int) -> None:
    for name, got, least in (("measure", measure, 0), ("rounds", rounds, 1)):
        if got is not None and (isinstance(got, bool) or not isinstance(got, int) or got < least):
            raise TuneArgumentError(f"Got {name}={got!r}, expected a count, {least} or more.")


def _check_job(job: Job) -> None:
    if job.accumulate != 1:
        raise TuneArgumentError(
            f"Got a Job with accumulate={job.accumulate}, expected none: how many microbatches are "
            "added up is what is chosen. Leave it out, and give global_batch."
        )


def _ways(mode: str | Sequence[str], inner: str) -> list[Way]:
    modes = [mode] if isinstance(mode, str) else list(dict.fromkeys(mode))
    unknown = [one for one in modes if one not in MODES]
    if unknown or not modes:
        raise PlanModeError(f"Got mode={mode!r}, expected one of {', '.join(MODES)}, or several.")
    return [Way(one, inner if one == "compiled" else "aot_eager") for one in modes]


def _planned(
    planner: Planner,
    ways: Sequence[Way],
    place: OffloadLike | None,
    sizes: Sequence[int],
    global_batch: int,
) -> list[Planned]:
    """All candidates, of which at least one fits.

    Raises:
        InfeasibleTotalError: none does.
        NotTraceableError: none can be traced.
    """
    found: list[Planned] = []
    for way in ways:
        plain = planner.planned(way, sizes, global_batch)
        found += plain
        # Where everything fits as it is, there is nothing to move.
        pressed = [one.microbatch for one in plain if one.plan is None or one.overhead_s > 0]
        if place is not None and pressed:
            moving = replace(way, offload=place)
            found += planner.planned(moving, pressed, global_batch)
    if any(one.plan is not None for one in found):
        return found
    if all(one.error is None for one in found):
        raise next(one.refused for one in reversed(found) if one.refused is not None)
    nearest = min((one for one in found if one.error is not None), key=_needed_bytes)
    assert nearest.error is not None
    planner.cures(nearest.way, nearest.microbatch, nearest.accumulate)
    raise nearest.error


def _needed_bytes(candidate: Planned) -> int:
    assert candidate.error is not None
    return candidate.error.needed_bytes
