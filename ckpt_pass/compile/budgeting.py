"""Meet a budget: open the graph to the solver, and write its solution back as tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.kernel_cache import KernelFacts
from ckpt_pass.graph.kernels import (
    WORKSPACE,
    WORKSPACE_AND_TIME,
    Kernels,
    warn_of_unmeasured,
)
from ckpt_pass.graph.problem import borders_of, build_problem, check_sizes
from ckpt_pass.graph.real_looks import tell_real_sizes
from ckpt_pass.planner.problem import with_waiting
from ckpt_pass.planner.solution import (
    InfeasibleBudgetError,
    Solution,
    evaluate,
    without_recompute,
)
from ckpt_pass.planner.solvers import run_solver
from ckpt_pass.plans.budget import resolve_budget
from ckpt_pass.plans.goal import Goal
from ckpt_pass.plans.timeline import Timeline, timeline_of


@dataclass(frozen=True)
class Met:
    """How a budget is met.

    Attributes:
        solution: what the solver found.
        drops: its drops, as nodes: after the first has run, the second's values are not kept.
        budget_bytes: the budget; ``None`` where a plan without one is carried out again.
        facts: what was measured of the kernels.
        plain: memory of the step with nothing recomputed.
    """

    solution: Solution
    drops: frozenset[tuple[fx.Node, fx.Node]]
    budget_bytes: int | None
    facts: Mapping[fx.Node, KernelFacts]
    plain: Timeline


def meet_budget(joint: JointGraph, goal: Goal, part: bool = False, waiting_bytes: int = 0) -> Met:
    """Choose what a tagged joint graph saves so that its peak is within the budget.

    MUST_* tags bind; PREFER_* tags are open to the solver, which overwrites them. Kernels that may
    have a workspace of their own are run once on made-up data, unless that was done before
    (:mod:`ckpt_pass.graph.kernels`).

    Args:
        joint: the graph.
        goal: the budget, and how it is to be met.
        part: whether it is one of several graphs of a step. A fraction is the step's then, and
            says little of one graph: a graph with nothing to give (an embedding, a loss) gets the
            least that it can run in.
        waiting_bytes: what others hold between forward and backward of the graph, within the
            budget too; not in the peak of what is found.

    Raises:
        InfeasibleBudgetError: no plan fits.
        InvalidBudgetError: the budget is no amount of memory.
        SymbolicBytesError: a size depends on data.
    """
    check_sizes(joint)
    kernels = Kernels()
    what = WORKSPACE_AND_TIME if goal.cost == "measured" else WORKSPACE
    facts = kernels.facts([n for n in joint.nodes if n.op == "call_function"], what)
    tell_real_sizes(facts)
    described = build_problem(joint, facts)
    problem, index = described.problem, described.index
    plain = without_recompute(problem)
    budget_bytes = resolve_budget(goal.budget, plain.peak_bytes)
    borders = borders_of(joint, described)
    asked = with_waiting(problem, waiting_bytes)
    try:
        solution = run_solver(goal.solver, asked, budget_bytes, borders, goal.time_limit_s)
    except InfeasibleBudgetError as error:
        if not (part and isinstance(goal.budget, float)):
            raise
        budget_bytes = error.least_feasible_bytes
        solution = run_solver(goal.solver, asked, budget_bytes, borders, goal.time_limit_s)
    if waiting_bytes:
        solution = evaluate(problem, solution.saved, solution.solver, solution.drops)
    _write(joint, index, solution)
    warn_of_unmeasured(kernels)
    nodes = described.nodes
    drops = frozenset((nodes[anchor], nodes[maker]) for anchor, maker in solution.drops)
    return Met(solution, drops, budget_bytes, facts, timeline_of(problem, plain.profile))


def _write(joint: JointGraph, index: dict[fx.Node, int], solution: Solution) -> None:
    for node in joint.forward:
        saved = index.get(node) in solution.saved
        node.meta["recompute"] = (
            CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
        )
