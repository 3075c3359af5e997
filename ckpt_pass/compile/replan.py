"""The closed loop: plan again until what inductor makes of the plan keeps to the budget.

A plan is exact for the graph that inductor is given, and knows what its kernels compute where they
read it (:mod:`ckpt_pass.graph.inlined`). Inductor then fuses and reorders, so that its peak is
another. The code that it generates tells that peak before anything runs and before any kernel is
compiled (:mod:`ckpt_pass.compile.dry_run`). Where it is above the budget, inductor is told to fuse
with care, and then the plan is made for less; where it is well below, for more
(:mod:`ckpt_pass.compile.rounds`). Kernels are compiled for the plan that is taken.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ckpt_pass._torch import compilers
from ckpt_pass._torch.generated import GeneratedHalf
from ckpt_pass.compile.dry_run import StepPeak, step_peak
from ckpt_pass.compile.engine import FreeOps, Partitioner
from ckpt_pass.compile.remembered import Remembered, is_passed_over, key_of, recalled, remember
from ckpt_pass.compile.replay import warn_if_over
from ckpt_pass.compile.rounds import Round, Search
from ckpt_pass.planner.built_in import NumberedCut
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.goal import Goal
from ckpt_pass.plans.value import Plan

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
    # What torch's caches do not hold, they do not find again; it would only fill them.
    key = None if key is None or is_passed_over(key) else key
    step = Lowering(gm, example_inputs, inner_options, mode, key is not None)
    kept = recalled(key, step.named) if key is not None else None
    if kept is not None:
        return kept
    bypasses = compilers.cache_bypasses()
    best, plan = _best(step, partitioner)
    compiled = best.finished()
    if key is not None:
        passed_over = compilers.cache_bypasses() > bypasses
        found = Remembered(best.artefacts, best.careful, plan)
        remember(key, Remembered("", False, None) if passed_over else found)
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
    step = Lowering(gm, example_inputs, inner_options, mode, kept=False)
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

    Made in another mode, or with other options, it may be over its budget here: then inductor is
    told to fuse with care, as it is where a plan is made, if that helps.

    Returns:
        The compiled graph, and the plan with the peak that it has here.

    Raises:
        PlanMismatchError: the plan was made for another graph.
    """
    partitioner = replace(partitioner, free=FreeOps())
    step = Lowering(gm, example_inputs, inner_options, mode, kept=False)
    found = step.lowered(partitioner, careful)
    if found.is_over and not careful:
        found = min(found, step.lowered(partitioner, careful=True), key=lambda one: one.peak.nbytes)
    plan = found.planned()
    if plan is not None:
        warn_if_over(plan.budget_bytes, plan.peak_bytes)
    return found.finished(), plan


def _best(step: Lowering, partitioner: Partitioner) -> tuple[Round, Plan | None]:
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


def _best_of(step: Lowering, partitioner: Partitioner, goal: Goal) -> tuple[Round, Plan | None]:

    def planned_for(asked_bytes: int, careful: bool) -> Round:
        other = replace(partitioner, goal=replace(goal, budget=max(asked_bytes, 1)))
        return step.lowered(other, careful)

    def cut_for(number: int, most_bytes: int) -> Round:
        asked = replace(goal, budget=most_bytes, solver=NumberedCut(number), offload=None)
        return step.lowered(replace(partitioner, goal=asked), careful=False)

    try:
        first = step.lowered(replace(partitioner, goal=goal), careful=False)
    except InfeasibleBudgetError as error:
        search = Search(planned_for, cut_for, error.budget_bytes, error.least_feasible_bytes)
    else:
        if first.plan is None or first.plan.budget_bytes is None:
            return first, first.plan
        search = Search(planned_for, cut_for, first.plan.budget_bytes)
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


@dataclass(frozen=True)
class Lowering:
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

    def lowered(self, partitioner: Partitioner, careful: bool) -> Round:
        """One round: the code that inductor generates for a plan, and its peak."""
        halves: list[GeneratedHalf] = []
        plans: list[Plan] = []
        # A name that no cache knows: what comes from one is not generated, and has no peak.
        name = secrets.token_hex(16) if self.kept else ""
        partition = replace(partitioner, on_plan=plans.append, artefacts=name)
        compiled = self._compiled(partition, careful, halves.append)
        peak = step_peak(halves) if plans else StepPeak(0, "")
        plan = plans[-1] if plans else None
        return Round(compiled, plan, peak, tuple(halves), name, careful)

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
