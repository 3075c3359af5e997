"""Plan a step that dynamo cuts: the graphs together, within one budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ckpt_pass.compile.engine import OPEN, FreeOps, Partitioner, opened
from ckpt_pass.graph.capture import no_graph
from ckpt_pass.offloading.options import Offload
from ckpt_pass.planner.problem import with_waiting
from ckpt_pass.planner.solution import InfeasibleBudgetError, without_recompute
from ckpt_pass.plans.budget import resolve_budget
from ckpt_pass.plans.goal import Goal
from ckpt_pass.plans.record import Asked
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.policy.rules import Policy, describe
from ckpt_pass.steps.choosing import (
    Level,
    choose,
    held_between,
    least,
    level_of,
    moments_of,
    peak_of,
)
from ckpt_pass.steps.fused import FusedGraph
from ckpt_pass.steps.graphs import SAVES_ALL, StepRun
from ckpt_pass.steps.running import FakeStep, StepRuns
from ckpt_pass.steps.seen import SeenGraph

#: Budgets that are tried for each graph: parts of the way from its least peak to its plain one.
_PARTS = (0.0, 0.08, 0.2, 0.4, 0.7)
#: How often the whole step is run on fake tensors to see whether it is within the budget.
_ROUNDS = 6


def plan_graphs(
    step: FakeStep, policy: Policy, goal: Goal | None, inner: str = "aot_eager"
) -> StepPlan:
    """Plan all graphs of a step; the peak is that of the whole step.

    Args:
        step: what is planned.
        policy: binds in each graph.
        goal: the budget of the whole step, and how it is to be met.
        inner: what compiles the graphs.

    Raises:
        InfeasibleBudgetError: no plan of the graphs brings the step within the budget.
        NotTraceableError: dynamo makes no graph of it.
        NothingToDifferentiateError, OtherPathError: see
            :meth:`ckpt_pass.steps.running.FakeStep.opened`.
        InvalidBudgetError and others: as of a single graph.
    """
    how = Partitioner(OPEN, step.regions, in_place=True, offload=Offload())
    if inner == "inductor":
        how = replace(how, in_place=False, free=FreeOps())
    with step.opened(replace(how, goal=SAVES_ALL)) as runs:
        plain = runs.first
        if not plain.graphs:
            raise no_graph(step.model)
        if goal is not None:
            planning = _Planning(step, policy, goal, plain, runs, how)
            return planning.within(resolve_budget(goal.budget, plain.curve.most()))
    # Seen anew: for a budget the sizes of values were set to what kernels really return.
    with step.opened(replace(how, policy=policy)) as runs:
        planning = _Planning(step, policy, None, plain, runs, how)
        return planning.finished([planning.plan(graph, None) for graph in runs.first.graphs], None)


@dataclass
class _Planning:
    """The search for the plans of a step's graphs."""

    step: FakeStep
    policy: Policy
    goal: Goal | None
    plain: StepRun
    runs: StepRuns
    how: Partitioner
    careful: bool = False
    _made: dict[tuple[int, Level], Plan] = field(default_factory=dict)

    def plan(self, graph: SeenGraph, budget_bytes: int | None, waiting_bytes: int = 0) -> Plan:
        """The plan of one graph; without a budget as the policy says."""
        goal = None
        if budget_bytes is not None:
            assert self.goal is not None
            goal = replace(self.goal, budget=budget_bytes)
        where = (goal.offload if goal is not None else None) or Offload()
        how = replace(
            self.how, policy=self.policy, goal=goal, offload=where, waiting_bytes=waiting_bytes
        )
        made = graph.plan(how, self.careful)
        if goal is not None:  # its share of the step's budget is what it takes
            share = made.peak_bytes
            assert made.asked.goal is not None
            goal = replace(made.asked.goal, budget=share)
            asked = replace(made.asked, goal=goal, budget_bytes=share)
            made = replace(made, asked=asked)
        return made.cut_at(graph.graph_break) if graph.graph_break else made

    def finished(self, parts: Sequence[Plan], budget_bytes: int | None) -> StepPlan:
        """The plan of the step, with the peak of a run on fake tensors."""
        plans = tuple(parts)
        run = self.runs.again(replace(self.how, plans=plans))
        words = describe(self.policy)
        outside = [m.nbytes for m in moments_of(run) if m.running is None]
        return StepPlan(
            parts=plans,
            asked=Asked(words, self.policy, self.step.regions, self.goal, budget_bytes),
            peak_bytes=run.curve.most(),
            peak_at=run.curve.peak_at,
            plain_peak_bytes=self.plain.curve.most(),
            outside_bytes=max(outside, default=0),
            breaks=self.plain.breaks,
        )

    def within(self, budget_bytes: int) -> StepPlan:
        """The plan within a budget.

        Raises:
            InfeasibleBudgetError: none was found.
        """
        found: list[StepPlan] = []
        for careful in (False, True) if self._fuses else (False,):
            self.careful, self._made = careful, {}
            found += self._searched(budget_bytes)
            if found[-1].peak_bytes <= budget_bytes:
                return found[-1]
        lowest = min(found, key=lambda plan: plan.peak_bytes)
        cuts = f" (it cuts the step at {'; at '.join(lowest.breaks)})" if lowest.breaks else ""
        why = (
            f"{format_bytes(lowest.outside_bytes)} are held while code runs that dynamo "
            f"leaves to Python{cuts}; "
            "what that code saves is in no plan. mode='eager' plans the whole step."
        )
        raise InfeasibleBudgetError(budget_bytes, lowest.peak_bytes, why)

    def _searched(self, budget_bytes: int) -> Iterator[StepPlan]:
        """Plans, until one is within the budget; at last the one with the least peak."""
        levels = self._levels()
        moments = moments_of(self.plain)
        aim = budget_bytes
        for _ in range(_ROUNDS):
            chosen = self._settled(levels, partial(choose, moments, levels, aim))
            if chosen is None:
                break
            found = self._chosen(levels, chosen, budget_bytes)
            yield found
            if found.peak_bytes <= budget_bytes:
                return
            # What a plan changes is known of its graph alone; beside others it may be a little
            # less. What was seen to be lacking is asked for as well, so that others are chosen.
            lacking = found.peak_bytes - peak_of(moments, levels, chosen)
            aim = min(aim - 1, budget_bytes - lacking)
        chosen = self._settled(levels, partial(least, moments, levels))
        assert chosen is not None  # every graph has a level
        yield self._chosen(levels, chosen, budget_bytes)

    def _settled(
        self, levels: list[list[Level]], pick: Callable[[], list[int] | None]
    ) -> list[int] | None:
        """What is picked of levels that are known to be what inductor makes of them."""
        while True:
            chosen = pick()
            if chosen is None or not self._measured_anew(levels, chosen):
                return chosen

    def _measured_anew(self, levels: list[list[Level]], chosen: Sequence[int]) -> bool:
        """Have inductor make what was picked; whether it takes other bytes than was thought."""
        before = [some[number] for some, number in zip(levels, chosen, strict=True)]
        for index, (graph, some, number) in enumerate(
            zip(self.plain.graphs, levels, chosen, strict=True)
        ):
            level = some[number]
            if isinstance(graph, FusedGraph) and not level.measured:
                plan = self._plan_at(index, level)
                some[number] = level.beside(graph.peak_of(plan), graph.first.peak)
                self._made[index, some[number]] = plan
        return before != [some[number] for some, number in zip(levels, chosen, strict=True)]

    @property
    def _fuses(self) -> bool:
        return self.how.free is not None

    def _chosen(
        self, levels: Sequence[Sequence[Level]], chosen: Sequence[int], budget_bytes: int
    ) -> StepPlan:
        picked = (some[number] for some, number in zip(levels, chosen, strict=True))
        parts = [self._plan_at(index, level) for index, level in enumerate(picked)]
        return self.finished(parts, budget_bytes)

    def _plan_at(self, index: int, level: Level) -> Plan:
        """A graph's plan at a level; of graphs that are alike the least may differ a little."""
        if (index, level) not in self._made:
            graph = self.plain.graphs[index]
            try:
                made = self.plan(graph, level.budget_bytes, level.waiting_bytes)
            except InfeasibleBudgetError as error:
                made = self.plan(graph, error.least_feasible_bytes, level.waiting_bytes)
            self._made[index, level] = made
        return self._made[index, level]

    def _levels(self) -> list[list[Level]]:
        """What each graph may do; graphs that are alike can do the same."""
        known: dict[str, list[Level]] = {}
        found = []
        for number, graph in enumerate(self.plain.graphs):
            # A policy may speak of one layer alone.
            key = graph.looks if self.policy is OPEN else str(number)
            if key not in known:
                known[key] = self._levels_of(graph)
            found.append(known[key])
        return found

    def _levels_of(self, graph: SeenGraph) -> list[Level]:
        """Plans that take less while they run, and such as save less while others run."""
        assert self.goal is not None
        goal = self.goal
        joint = graph.joint(replace(self.how, goal=goal))
        graph_as_problem = opened(joint, self.policy, goal, goal.offload or Offload())
        plain = without_recompute(graph_as_problem.problem)
        found = {plain.steps: level_of(plain, plain, plain.peak_bytes)}
        for waiting in (0, plain.peak_bytes):
            asked = with_waiting(graph_as_problem.problem, waiting)
            try:
                graph_as_problem.solved(goal, 1, asked)
                floor = 1
            except InfeasibleBudgetError as error:
                floor = error.least_feasible_bytes
            top = waiting + (held_between(plain) if waiting else plain.peak_bytes)
            for part in _PARTS if top > floor else (0.0,):
                budget = floor + int(part * (top - floor))
                try:
                    made = graph_as_problem.solved(goal, budget, asked)
                except InfeasibleBudgetError:  # in the time that there is
                    continue
                found.setdefault(made.steps, level_of(made, plain, budget, waiting))
        return list(found.values())
