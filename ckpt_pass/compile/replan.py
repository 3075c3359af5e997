"""The closed loop: plan again until what inductor makes of the plan keeps to the budget.

A plan is exact for the graph that inductor is given, and knows what its kernels compute where they
read it (:mod:`ckpt_pass.graph.inlined`). Inductor then fuses and reorders, so that its peak is
another. The code that it generates tells that peak before anything runs and before any kernel is
compiled (:mod:`ckpt_pass.compile.dry_run`). Where it is above the budget, inductor is told to fuse
with care, and then the plan is made for less; where it is well below, for more. Kernels are
compiled for the plan that is taken.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ckpt_pass._torch import compilers
from ckpt_pass._torch.generated import GeneratedHalf
from ckpt_pass.compile.dry_run import StepPeak, open_lifetimes, step_peak
from ckpt_pass.compile.engine import FreeOps, Partitioner
from ckpt_pass.compile.remembered import Remembered, key_of, recalled, remember
from ckpt_pass.compile.replay import warn_if_over
from ckpt_pass.compile.symbolic import peak_of_lifetimes
from ckpt_pass.planner.built_in import NumberedCut
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.goal import Goal
from ckpt_pass.plans.record import InductorPeak
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.sites import Bytes

#: Plans made for less by what the last one was over.
_LOWERED = 2
#: ... and at least so many parts of the budget less.
_STEP = 500
#: Plans made for more, to recompute less, once one is within the budget.
_RAISED = 2
#: ... as long as this share of the budget is left to gain.
_WORTH_IT = 0.03
#: A cut whose peak before inductor's changes is so many budgets is not tried. Those that stock
#: torch 2.13 reaches its least with have 1.48 (max_unpool2d) and 1.57 times what becomes of them.
_HOPELESS = 2
#: Last resorts: for the least that any plan needs, and so much more of the way to no recomputation.
_LAST_RESORTS = (0.0, 0.1, 0.3)
#: The careful way: inductor's options where the user gives none. Channels-last copies of weights
#: and images are memory on top. What is to be reused stays from its last use to the next one, up to
#: the peak that inductor thinks the half has: a Llama of 4 layers with a large loss takes 20.0 MB
#: with it where 15.8 do. Kernels keep to the plan's order then (:mod:`ckpt_pass._torch.fusion`): on
#: T5 (4 and 4 layers) kernels over the whole backward take 19.6 MB where 7.3 are planned. So do
#: calls of libraries: for fewer CUDA graphs (``mode="reduce-overhead"``), those that only make
#: gradients would run last, where no graph can hold them, on the CPU all of them.
_CAREFUL = {
    "layout_optimization": False,
    "allow_buffer_reuse": False,
    "triton.reorder_for_reducing_graph_partitions": False,
}


@dataclass(frozen=True)
class _Round:
    """One lowering by inductor; no plan where the graph has no backward.

    Attributes:
        artefacts: its name in torch's caches; empty where they are not used.
        careful: whether inductor was told to fuse with care.
    """

    compiled: Callable[..., Any]
    plan: Plan | None
    peak: StepPeak
    halves: tuple[GeneratedHalf, ...]
    artefacts: str
    careful: bool

    def finished(self) -> Callable[..., Any]:
        """The compiled graph with its kernels."""
        for half in self.halves:
            half.compile_kernels()
        return self.compiled

    def planned(self) -> Plan | None:
        """Its plan, with the peak of what inductor makes of it."""
        return None if self.plan is None else self.taken(self.plan, self.plan.budget_bytes)

    def taken(self, plan: Plan, budget_bytes: int | None, replans: int = 0) -> Plan:
        """The plan of this round for a budget, with the peak of what inductor makes of it."""
        inner = InductorPeak(self.peak.nbytes, replans, self.careful)
        dimensions = plan.dimensions
        expression: Bytes = self.peak.nbytes
        if dimensions:
            expression = peak_of_lifetimes(open_lifetimes(self.halves), dimensions, expression)
        return plan.within_inductor(budget_bytes, inner, self.peak.where, expression)

    @property
    def overhead_s(self) -> float:
        return self.plan.predicted.overhead_s if self.plan is not None else 0.0


def compile_within(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: Partitioner,
    inner_options: dict[str, Any],
    mode: str | None,
) -> tuple[Callable[..., Any], Plan | None]:
    """Compile with inductor so that the code that it generates keeps to the budget.

    Returns:
        The compiled graph, and the plan that it was given; ``None`` where there is no backward.

    Raises:
        InfeasibleBudgetError: no plan fits the budget after inductor's changes.
        DryRunError: the code that inductor generates needs data to be followed.
    """
    partitioner = replace(partitioner, free=FreeOps())
    key = key_of(gm, example_inputs, partitioner, inner_options, mode)
    step = _Step(gm, example_inputs, inner_options, mode, key is not None)
    kept = recalled(key, step.named) if key is not None else None
    if kept is not None:
        return kept
    best, plan = _best(step, partitioner)
    compiled = best.finished()
    if key is not None:
        remember(key, Remembered(best.artefacts, best.careful, plan))
    return compiled, plan


def plan_within(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: Partitioner,
    inner_options: dict[str, Any],
    mode: str | None,
) -> Plan | None:
    """The plan that :func:`compile_within` makes of the same; no kernel is compiled.

    Without a budget it is the policy's, with the peak of what inductor makes of it.

    Raises:
        InfeasibleBudgetError, DryRunError: as there.
    """
    partitioner = replace(partitioner, free=FreeOps())
    step = _Step(gm, example_inputs, inner_options, mode, kept=False)
    if partitioner.goal is not None:
        return _best(step, partitioner)[1]
    return step.lowered(partitioner, careful=False).planned()


def compile_planned(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: Partitioner,
    inner_options: dict[str, Any],
    mode: str | None,
    careful: bool,
) -> tuple[Callable[..., Any], Plan | None]:
    """Compile with inductor what a plan says that was made for it.

    Returns:
        The compiled graph, and the plan with the peak that it has here.

    Raises:
        PlanMismatchError: the plan was made for another graph.
    """
    step = _Step(gm, example_inputs, inner_options, mode, kept=False)
    found = step.lowered(replace(partitioner, free=FreeOps()), careful)
    plan = found.planned()
    if plan is not None:
        warn_if_over(plan.budget_bytes, plan.peak_bytes)
    return found.finished(), plan


def _best(step: _Step, partitioner: Partitioner) -> tuple[_Round, Plan | None]:
    """The round that is taken, and the plan that says what inductor makes of it.

    Where no plan that moves values fits, those that move none are tried, too: inductor fuses across
    what it knows, not across a move, so that its peak may be the lower one without.
    """
    goal = partitioner.goal
    assert goal is not None
    try:
        return _best_of(step, partitioner, goal)
    except InfeasibleBudgetError as error:
        if goal.offload is None:
            raise
        try:
            return _best_of(step, partitioner, replace(goal, offload=None))
        except InfeasibleBudgetError as other:
            raise min(error, other, key=lambda e: e.least_feasible_bytes) from None


def _best_of(step: _Step, partitioner: Partitioner, goal: Goal) -> tuple[_Round, Plan | None]:

    def planned_for(asked_bytes: int, careful: bool) -> _Round:
        other = replace(partitioner, goal=replace(goal, budget=max(asked_bytes, 1)))
        return step.lowered(other, careful)

    def cut_for(number: int, most_bytes: int) -> _Round:
        asked = replace(goal, budget=most_bytes, solver=NumberedCut(number), offload=None)
        return step.lowered(replace(partitioner, goal=asked), careful=False)

    try:
        first = step.lowered(replace(partitioner, goal=goal), careful=False)
    except InfeasibleBudgetError as error:
        search = _Search(planned_for, cut_for, error.budget_bytes, error.least_feasible_bytes)
    else:
        if first.plan is None or first.plan.budget_bytes is None:
            return first, first.plan
        search = _Search(planned_for, cut_for, first.plan.budget_bytes)
        search.add(first.plan.budget_bytes, first)
    best = search.found()
    assert best.plan is not None
    plan = best.taken(best.plan, search.budget_bytes, search.rounds - 1)
    return best, _as_asked(plan, goal)


def _as_asked(plan: Plan, goal: Goal) -> Plan:
    """A plan that says what the user asked for, whatever the planner was asked at last."""
    last = plan.asked.goal
    assert last is not None
    users = replace(last, budget=goal.budget, solver=goal.solver)
    return replace(plan, asked=replace(plan.asked, goal=users))


@dataclass
class _Search:
    """Looks for what to ask the planner for, so that inductor's peak is within the budget.

    First inductor fuses as it does; if that is over the budget, carefully: kernels keep to the
    order of the plan. At last as inductor is, with the cuts at one price for every saved byte.

    Attributes:
        planned_for: plans for a number of bytes and lowers the plan, perhaps carefully.
        cut_for: lowers a cut, by its number, whose peak before inductor's changes is no more than
            so many bytes.
        budget_bytes: what the peak may be.
        floor: the least that a plan needs before inductor's changes; 0 where it is not known.
        rounds: how many plans were lowered.
        best: the fastest plan within the budget.
        asked_for_best: what it was made for; ``None`` of a cut.
        careful: how inductor fuses now.
        peaks: inductor's peak by what was asked for, where it fuses so.
        plain_bytes: the peak of the graph with nothing recomputed.
    """

    planned_for: Callable[[int, bool], _Round]
    cut_for: Callable[[int, int], _Round]
    budget_bytes: int
    floor: int = 0
    rounds: int = 0
    best: _Round | None = None
    asked_for_best: int | None = None
    careful: bool = False
    peaks: dict[int, int] = field(default_factory=dict)
    plain_bytes: int = 0

    def add(self, asked: int, found: _Round) -> None:
        """Note a plan for so many bytes; it is held only if it is the best."""
        self.peaks[asked] = found.peak.nbytes
        self._note(asked, found)

    def _note(self, asked: int | None, found: _Round) -> None:
        assert found.plan is not None
        self.rounds += 1
        plain = found.plan.predicted.plain_timeline
        self.plain_bytes = plain.peak_bytes if plain is not None else 0
        if found.peak.nbytes > self.budget_bytes:
            return
        if self.best is None or found.overhead_s < self.best.overhead_s:
            self.best, self.asked_for_best = found, asked

    def found(self) -> _Round:
        """The fastest plan within the budget that is found.

        Raises:
            InfeasibleBudgetError: none is.
        """
        # All last resorts are tried whatever the budget is: what a refusal names can be met.
        peaks = self._reach_far() if self.floor > self.budget_bytes else []
        without_care = self.peaks
        if self.best is None:
            peaks += self._fuse_carefully()
        if self.best is None:
            self.careful, self.peaks = False, without_care
            peaks += self._last_resorts()
        if self.best is None:
            raise InfeasibleBudgetError(self.budget_bytes, min(peaks, default=self.floor))
        self._raise()
        return self.best

    def _reach_far(self) -> list[int]:
        """No plan of the graph alone fits: those whose kernels need less; inductor's peaks."""
        self._try(self.floor)
        lower = self.peaks.get(self.floor, self.floor) < self.floor
        return self._cuts() if lower else []

    def _fuse_carefully(self) -> list[int]:
        self.careful, self.peaks = True, {}
        if self.floor <= self.budget_bytes:
            self._try(self.budget_bytes)
        self._lower()
        return self._last_resorts()

    def _try(self, asked: int) -> None:
        if asked in self.peaks:
            return
        try:
            self.add(asked, self.planned_for(asked, self.careful))
        except InfeasibleBudgetError as error:
            self.floor = error.least_feasible_bytes

    def _lower(self) -> None:
        """Ask for less by what the last plan was over."""
        for _ in range(_LOWERED):
            if self.best is not None or not self.peaks:
                return
            lowest = min(self.peaks)
            over = self.peaks[lowest] - self.budget_bytes
            # A little more than that: inductor's peak does not fall byte by byte.
            asked = lowest - over - over // 4 - self.budget_bytes // _STEP
            if self.floor and asked <= self.floor:
                return
            self._try(asked)

    def _cuts(self) -> list[int]:
        """Try cuts, fastest first, until one is within the budget; inductor's peaks.

        Where the step needs less than its graph: kernels that reach far never write what is, say,
        unpooled in the backward again (max_unpool2d: 464 kB, 554 with care, 623 of the graph
        alone). The graph does not tell which values these are. What stock inductor saves where it
        needs least is such a cut.
        """
        found: list[int] = []
        for number in itertools.count():
            try:
                cut = self.cut_for(number, _HOPELESS * self.budget_bytes)
            except InfeasibleBudgetError:
                return found
            self._note(None, cut)
            found.append(cut.peak.nbytes)
            if cut.peak.nbytes <= self.budget_bytes:
                return found
        raise AssertionError("there are no more cuts than prices")

    def _last_resorts(self) -> list[int]:
        """Try what needs least until it is within the budget; inductor's peaks."""
        found: list[int] = []
        if self.best is not None:
            return found
        if not self.floor:
            self._try(1)
        self._try(max(self.floor, 1))
        above = max(self.plain_bytes - self.floor, 0)
        for asked in (self.floor + int(share * above) for share in _LAST_RESORTS):
            if self.best is None:
                self._try(asked)
                found += [self.peaks[asked]] if asked in self.peaks else []
        return found

    def _raise(self) -> None:
        """Ask for more while inductor's peak is well below the budget and ops run again."""
        for _ in range(_RAISED):
            best, asked = self.best, self.asked_for_best
            assert best is not None
            if asked is None:  # a cut: those that recompute less were tried before
                return
            over = min((a for a, p in self.peaks.items() if p > self.budget_bytes), default=None)
            if over is not None and over > asked:
                more = (over - asked) // 2
            else:
                more = self.budget_bytes - best.peak.nbytes
            room = min(more, self.budget_bytes - best.peak.nbytes)
            if not best.overhead_s or room < _WORTH_IT * self.budget_bytes:
                return
            self._try(asked + more)


@dataclass(frozen=True)
class _Step:
    """Dynamo's graph, to be lowered again and again.

    Attributes:
        gm, inputs: the graph and its example inputs.
        options, mode: inductor's.
        kept: whether torch is to keep what it compiles.
    """

    gm: fx.GraphModule
    inputs: Sequence[Any]
    options: dict[str, Any]
    mode: str | None
    kept: bool

    def lowered(self, partitioner: Partitioner, careful: bool) -> _Round:
        """One round: the code that inductor generates for a plan, and its peak."""
        halves: list[GeneratedHalf] = []
        plans: list[Plan] = []
        # A name that no cache knows: what comes from one is not generated, and has no peak.
        name = secrets.token_hex(16) if self.kept else ""
        partition = replace(partitioner, on_plan=plans.append, artefacts=name)
        compiled = self._compiled(partition, careful, halves.append)
        peak = step_peak(halves) if plans else StepPeak(0, "")
        plan = plans[-1] if plans else None
        return _Round(compiled, plan, peak, tuple(halves), name, careful)

    def named(self, partition: compilers.NamedPartitioner, careful: bool) -> Callable[..., Any]:
        """What torch's caches have of a round that was taken before."""
        generated: list[GeneratedHalf] = []
        compiled = self._compiled(partition, careful, generated.append)
        for half in generated:
            half.compile_kernels()
        return compiled

    def _compiled(
        self,
        partition: compilers.NamedPartitioner,
        careful: bool,
        on_half: Callable[[GeneratedHalf], None],
    ) -> Callable[..., Any]:
        return compilers.compile_inductor(
            compilers.copied(self.gm),  # inductor changes the graph that it is given
            self.inputs,
            partition,
            {**_CAREFUL, **self.options} if careful else self.options,
            self.mode,
            on_half,
            careful,
            self.kept,
        )
