"""Ways to checkpoint a model, measured beside each other on the user's own step.

A strategy is a placement with a policy, or a budget that a plan is made for. Every one is applied
to the model in turn, compared with the plain step bit by bit, measured and timed; nothing stays
applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.eager.prediction import Predictor, predictor
from ckpt_pass.graph.capture import LossFn, NotTraceableError
from ckpt_pass.measure.gradients import Run, gradients_restored
from ckpt_pass.measure.step import Measurement, measure_step
from ckpt_pass.measure.timing import Variant, clock_for, interleave, resting_collector
from ckpt_pass.modules.applying import choose
from ckpt_pass.modules.choice import Choice, PlacementError
from ckpt_pass.modules.layers.find import NoLayersError
from ckpt_pass.modules.placement import Placement, as_placement
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.budget import BudgetLike, check_budget, parse_budget
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.named import POLICIES, as_policy
from ckpt_pass.policy.rules import PolicyLike, describe
from ckpt_pass.regions.wrapping import (
    RegionSpec,
    applied_regions,
    apply_regions,
    regions_of,
    remove_regions,
)
from ckpt_pass.report.strategy_rows import PLAIN, StrategyRow
from ckpt_pass.report.strategy_table import Comparison
from ckpt_pass.state.given import check_module
from ckpt_pass.state.untouched import untouched
from ckpt_pass.tools.ahead import plan_one as make_plan
from ckpt_pass.tools.users_step import Progress, Told, UsersStep
from ckpt_pass.tools.verification import compare_with_regions, step_of

#: What is compared where nobody says: every named kind once.
DEFAULT_STRATEGIES: tuple[str, ...] = (
    PLAIN,
    "all",
    "alternate",
    "every-3",
    "heavy-ops",
    "sqrt-segments",
    "all:save-matmul-attention",
    "budget=0.5",
)
#: Timings of each strategy; their median is shown.
ROUNDS = 5
_BUDGET = "budget="


class StrategyError(CkptPassError):
    """Something that is no strategy, or a comparison that cannot be made."""


@dataclass(frozen=True)
class Strategy:
    """One way to checkpoint a model.

    Attributes:
        name: as the table shows it.
        placement: which modules are regions, as for :func:`ckpt_pass.apply`.
        policy: what each keeps; what the placement says where ``None``.
        budget: in the place of both: a plan for eager mode within a peak.
        offload: where that plan may move values to, if it may.
        plan: in the place of all: an eager plan that was made before.
    """

    name: str
    placement: Any = None
    policy: PolicyLike | None = None
    budget: BudgetLike | None = None
    plan: Plan | None = None
    offload: OffloadLike | None = None


#: A name, a placement, (placement, policy), an eager plan, or a :class:`Strategy`.
StrategyLike: TypeAlias = "str | Strategy | Plan | tuple[Any, PolicyLike | None] | Placement"


def as_strategy(given: StrategyLike) -> Strategy:
    """Turn what a user passed into a strategy.

    Args:
        given: ``"all"`` or another placement's name; ``"all:save-matmul"``, with a policy's name;
            a policy's name alone, for every layer; ``"budget=0.5"`` or ``"budget=6GiB"``; a
            placement; a tuple of placement and policy; an eager plan; or a strategy.

    Raises:
        StrategyError: it is none of these, or a plan for compiled graphs.
        UnknownPlacementError, UnknownPolicyError, InvalidBudgetError: a part is none.
    """
    if isinstance(given, Strategy):
        return given
    if isinstance(given, Plan):
        if given.mode != "eager":
            raise StrategyError(
                "Got a plan for compiled graphs; strategies are compared in eager mode. Expected "
                "ckpt_pass.plan(..., mode='eager'); for compiled plans use ckpt_pass.sweep."
            )
        return Strategy(f"plan {given.fingerprint[:12]}", plan=given)
    if isinstance(given, str):
        return _named(given)
    if isinstance(given, tuple) and len(given) == 2:
        return _placed(*given)
    return _placed(given, None)


def _named(text: str) -> Strategy:
    if text.startswith(_BUDGET):
        budget = check_budget(parse_budget(text.removeprefix(_BUDGET)))
        return Strategy(text, budget=budget)
    placement, colon, policy = text.partition(":")
    if colon:
        return _placed(placement, policy)
    return _placed("all", text) if text in POLICIES else _placed(text, None)


def _placed(placement: Any, policy: PolicyLike | None) -> Strategy:
    as_placement(placement)
    if policy is not None:
        as_policy(policy)
    if isinstance(placement, str):
        shown = placement
    else:
        shown = str(getattr(placement, "name", getattr(placement, "__name__", placement)))
    if policy is not None:
        shown += f":{policy if isinstance(policy, str) else describe(as_policy(policy))}"
    return Strategy(shown, placement, policy)


def compare_strategies(
    model: nn.Module,
    *args: Any,
    strategies: Sequence[StrategyLike] = DEFAULT_STRATEGIES,
    loss_fn: LossFn | None = None,
    rounds: int = ROUNDS,
    predict: bool = True,
    offload: OffloadLike | bool | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Measure what ways to checkpoint a model cost a training step of ``model(*args)``, in eager.

    The plain step is measured always and comes first; savings and overhead are against it. Nothing
    is trained: gradients, buffers and random states are given back, and no region stays applied.

    Args:
        model: the module, without regions; returns a scalar loss, unless there is a ``loss_fn``.
        args: its arguments.
        strategies: as for :func:`as_strategy`. One that does not fit the model (a budget below the
            least, heavy ops that there are not) is a row that says why.
        loss_fn: applied to the model's output.
        rounds: timings of each strategy, all in turn; of CPU time on one thread.
        predict: also predict each peak, from a step recorded on fake tensors.
        offload: where values may be moved to, as for :func:`ckpt_pass.plan`: every budget has one
            more row, of a plan that may keep, recompute, or move.
        progress: told about each part of the work.

    Raises:
        NotAModuleError: the model is none.
        StrategyError: two strategies of one name, a model that has regions, no round, ``offload``
            without a budget.
        InvalidOffloadError: ``offload`` is no place.
        UnknownPlacementError, UnknownPolicyError, InvalidBudgetError: a strategy is misspelt.
        NoLossError: the step returns no scalar.
    """
    check_module(model, "compare_strategies")
    chosen = _with_offload([as_strategy(given) for given in strategies], as_offload(offload))
    if all(strategy.name != PLAIN for strategy in chosen):
        chosen.insert(0, Strategy(PLAIN, PLAIN))
    chosen.sort(key=lambda strategy: strategy.name != PLAIN)
    _check(model, chosen, rounds)
    step = _Step(model, args, loss_fn)
    work = Told(progress, len(chosen) + rounds + 3)
    with (
        resting_collector(),  # each measurement collects garbage: fast where the rest is frozen
        untouched(model, loss_fn, args, values=True),
        gradients_restored(step.leaves),
    ):
        known = _predictor(step, work) if predict else None
        found = [_measured(step, strategy, known, work) for strategy in chosen]
        work("timing")
        times = _timed(step, found, rounds, work)
    rows = [replace(one.row, time_s=times.get(one.row.name)) for one in found]
    return Comparison(
        rows=_against_plain(rows),
        model=type(model).__name__,
        device=str(step.device),
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        rounds=rounds,
    )


def _with_offload(chosen: list[Strategy], offload: OffloadLike | None) -> list[Strategy]:
    """The strategies, and after each budget the same with a place to move values to."""
    if offload is None:
        return chosen
    if all(strategy.budget is None for strategy in chosen):
        raise StrategyError(
            f"Got offload={offload!r} and no budget among the strategies, expected one: it is a "
            "plan that chooses what is moved. Add 'budget=0.5', or use a placement that offloads: "
            "Offloaded('all')."
        )
    found = []
    for strategy in chosen:
        found.append(strategy)
        if strategy.budget is not None and strategy.offload is None:
            found.append(replace(strategy, name=f"{strategy.name}, offload", offload=offload))
    return found


def _check(model: nn.Module, chosen: Sequence[Strategy], rounds: int) -> None:
    names = [strategy.name for strategy in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StrategyError(
            f"Got {len(twice)} strategies twice ({', '.join(twice)}); expected a name of its own "
            "for each. Name them: Strategy('mine', placement=...)."
        )
    if rounds < 1:
        raise StrategyError(f"Got rounds={rounds}; expected at least 1.")
    regions = regions_of(model)
    if regions:
        raise StrategyError(
            f"{type(model).__name__} has {len(regions)} regions applied already; expected the "
            "plain model, which all strategies are compared with. Call ckpt_pass.remove(model)."
        )


class _Step(UsersStep):
    """The user's step in eager mode."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], loss_fn: LossFn | None) -> None:
        super().__init__(model, args, loss_fn)
        self.run = step_of(model, args, loss_fn)


@dataclass(frozen=True)
class _Measured:
    """A row and the regions that it had; ``None`` if they do not fit the model."""

    row: StrategyRow
    regions: Mapping[str, RegionSpec] | None = None


def _predictor(step: _Step, work: Told) -> Predictor | None:
    work("recording the step")
    try:
        return predictor(step.model, step.args, step.loss_fn)
    except NotTraceableError:
        return None  # the step runs nevertheless: there is no prediction then


def _measured(step: _Step, strategy: Strategy, known: Predictor | None, work: Told) -> _Measured:
    work(strategy.name)
    row = StrategyRow(strategy.name)
    try:
        regions, count, predicted = _regions(step, strategy, known)
    except (PlacementError, NoLayersError, InfeasibleBudgetError, NotTraceableError) as error:
        if strategy.name == PLAIN:
            return _Measured(_filled(step, row, {}, None), {})
        return _Measured(replace(row, failure=_first_line(error)))
    row = replace(row, regions=count)
    return _Measured(_filled(step, row, regions, predicted), regions)


def _regions(
    step: _Step, strategy: Strategy, known: Predictor | None
) -> tuple[Mapping[str, RegionSpec], int, int | None]:
    """What is applied, how many regions that are, and the predicted peak."""
    plan = strategy.plan
    if strategy.budget is not None:
        how: dict[str, Any] = {"budget": strategy.budget, "offload": strategy.offload}
        plan = make_plan(step.model, *step.args, mode="eager", loss_fn=step.loss_fn, **how)
    if plan is not None:
        specs = plan.region_specs()
        return specs, len(specs), plan.peak_bytes
    choice = choose(step.model, strategy.placement, strategy.policy, example_inputs=step.args)
    return choice.regions, len(choice.segments), None if known is None else _peak(choice, known)


def _peak(choice: Choice, known: Predictor) -> int | None:
    """The simulated peak; ``None`` where the simulation does not know what the regions do."""
    specs = choice.regions
    segments = []
    for segment in choice.segments:
        first = specs[segment.names[0]]
        if segment.nested or first.follows or first.keeps is not None:
            return None
        segments.append((segment.names, first.policy))
    profile = known.predict(segments)
    return None if profile is None else profile.peak_bytes


def _filled(
    step: _Step, row: StrategyRow, regions: Mapping[str, RegionSpec], predicted: int | None
) -> StrategyRow:
    same = compare_with_regions(step.model, regions, Run(step.run))
    with applied_regions(step.model, regions):
        found: Measurement = measure_step(
            step.run, backward=True, params=step.leaves, device=step.device, warmup=0, repeats=1
        )
    return replace(
        row,
        peak_bytes=found.peak_bytes,
        predicted_bytes=predicted,
        saved_bytes=found.saved_bytes,
        flops=found.flops,
        loss_equal=same.loss_equal,
        equal=same.equal,
        timeline=found.timeline,
        backward_at_s=found.backward_at_s,
    )


def _timed(step: _Step, found: Sequence[_Measured], rounds: int, work: Told) -> dict[str, float]:
    """Medians by name of those that ran, all in turn."""

    def prepare(regions: Mapping[str, RegionSpec]) -> None:
        step.clear()
        if regions_of(step.model):
            remove_regions(step.model)
        apply_regions(step.model, regions)

    def run(_: None) -> None:
        step.run().backward()
        step.synchronise()

    variants = [
        Variant(one.row.name, run, partial(prepare, one.regions))
        for one in found
        if one.regions is not None
    ]
    try:
        times = interleave(
            variants,
            rounds=rounds,
            warmup=1,
            clock=clock_for(step.device),
            on_round=lambda: work("timing"),
        )
    finally:
        step.clear()
        if regions_of(step.model):
            remove_regions(step.model)
    return {row.variant: row.median_s for row in times}


def _first_line(error: CkptPassError) -> str:
    if isinstance(error, InfeasibleBudgetError):
        return f"infeasible: at least {error.least_feasible_bytes:,} bytes"
    return str(error).partition(":")[0]


def _against_plain(rows: Sequence[StrategyRow]) -> tuple[StrategyRow, ...]:
    """Fill in what each row saves and costs against the plain step, the first row."""
    plain = rows[0]
    assert plain.peak_bytes and plain.flops is not None
    found = []
    for row in rows:
        if row.peak_bytes is not None and row.flops is not None:
            again = row.flops - plain.flops
            row = replace(
                row,
                saving=1 - row.peak_bytes / plain.peak_bytes,
                recompute_flops=again,
                recompute_share=again / plain.flops if plain.flops else 0.0,
            )
        if row.time_s is not None and plain.time_s:
            row = replace(row, overhead=row.time_s / plain.time_s - 1)
        found.append(row)
    return tuple(found)
