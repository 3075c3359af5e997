"""Meet a budget: open the graph to the solver, and write its solution back as tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.compile.moving import MovedNode, moved_nodes, with_immovable
from ckpt_pass.graph.device_rates import with_device_times
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.kernel_cache import KernelFacts
from ckpt_pass.graph.kernels import (
    WORKSPACE,
    WORKSPACE_AND_TIME,
    Kernels,
    warn_of_unmeasured,
)
from ckpt_pass.graph.link import device_of_graph, link_for
from ckpt_pass.graph.paper import kernels_for
from ckpt_pass.graph.problem import GraphProblem, borders_of, build_problem, check_sizes
from ckpt_pass.graph.real_looks import tell_real_sizes
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.moves import in_problem
from ckpt_pass.planner.problem import Problem, with_costs, with_waiting
from ckpt_pass.planner.solution import (
    InfeasibleBudgetError,
    Solution,
    evaluate,
    solution_of,
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
        moved: what leaves the device.
        link: what moves it, if anything may be moved.
    """

    solution: Solution
    drops: frozenset[tuple[fx.Node, fx.Node]]
    budget_bytes: int | None
    facts: Mapping[fx.Node, KernelFacts]
    plain: Timeline
    moved: tuple[MovedNode, ...] = ()
    link: Link | None = None


@dataclass(frozen=True)
class Opened:
    """A tagged joint graph as a problem, ready to be solved for any budget.

    Attributes:
        described: the graph as the planner sees it.
        facts: what was measured of the kernels.
        kernels: what measured them.
        borders: the ops whose results cross from one layer to the next.
        link: what may move values, if any does.
    """

    described: GraphProblem
    facts: Mapping[fx.Node, KernelFacts]
    kernels: Kernels
    borders: tuple[int, ...]
    link: Link | None = None

    @property
    def problem(self) -> Problem:
        """The problem alone."""
        return self.described.problem

    def solved(self, goal: Goal, budget_bytes: int, asked: Problem | None = None) -> Solution:
        """What a solver finds for a number of bytes.

        Args:
            goal: how it is to be met.
            budget_bytes: the budget.
            asked: the problem where others hold bytes, if they do
                (:func:`ckpt_pass.planner.problem.with_waiting`); their bytes are within the budget
                too, but not in what is found.

        Raises:
            InfeasibleBudgetError: no plan fits.
        """
        problem = self.problem if asked is None else asked
        found = run_solver(
            goal.solver, problem, budget_bytes, self.borders, goal.time_limit_s, self.link
        )
        if problem is self.problem:
            return found
        alone = evaluate(self.problem, found.saved, found.solver, found.drops)
        moves = in_problem(found.moves, alone.steps, len(self.problem.ops))
        return solution_of(self.problem, alone.steps, alone.drops, found.solver, moves, self.link)


def open_up(joint: JointGraph, goal: Goal) -> Opened:
    """Describe a tagged joint graph to the planner.

    Kernels that may have a workspace of their own are run once on made-up data, unless that was
    done before (:mod:`ckpt_pass.graph.kernels`).

    Raises:
        SymbolicBytesError: a size depends on data.
    """
    check_sizes(joint)
    kernels = kernels_for(goal.cost)
    what = WORKSPACE_AND_TIME if goal.cost == "measured" else WORKSPACE
    calls = [n for n in joint.nodes if n.op == "call_function"]
    facts = kernels.facts(calls, what)
    tell_real_sizes(facts)
    link = None
    if goal.offload is not None:
        facts = with_device_times(facts, calls, kernels)
    described = build_problem(joint, facts)
    if goal.offload is not None:
        described = with_immovable(described, goal.offload)
        link = link_for(goal.cost, goal.offload, device_of_graph(joint))
    return Opened(described, facts, kernels, borders_of(joint, described), link)


def meet_budget(joint: JointGraph, goal: Goal, part: bool = False, waiting_bytes: int = 0) -> Met:
    """Choose what a tagged joint graph saves so that its peak is within the budget.

    MUST_* tags bind; PREFER_* tags are open to the solver, which overwrites them.

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
    opened = open_up(joint, goal)
    plain = without_recompute(with_costs(opened.described.written))
    budget_bytes = resolve_budget(goal.budget, plain.peak_bytes)
    asked = with_waiting(opened.problem, waiting_bytes)
    try:
        solution = opened.solved(goal, budget_bytes, asked)
    except InfeasibleBudgetError as error:
        if not (part and isinstance(goal.budget, float)):
            raise
        budget_bytes = error.least_feasible_bytes
        solution = opened.solved(goal, budget_bytes, asked)
    _write(joint, opened.described.index, solution)
    warn_of_unmeasured(opened.kernels)
    nodes = opened.described.nodes
    drops = frozenset((nodes[anchor], nodes[maker]) for anchor, maker in solution.drops)
    timeline = timeline_of(opened.described.written, plain.profile)
    moved = moved_nodes(opened.described, solution.steps, solution.moves)
    return Met(solution, drops, budget_bytes, opened.facts, timeline, moved, opened.link)


def _write(joint: JointGraph, index: dict[fx.Node, int], solution: Solution) -> None:
    for node in joint.forward:
        saved = index.get(node) in solution.saved
        node.meta["recompute"] = (
            CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
        )
