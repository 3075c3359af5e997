"""Meet a budget: open the graph to the solver, and write its solution back as tags."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.budget import BudgetLike, resolve_budget
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.problem import build_problem
from ckpt_pass.ops import OpClass, classify
from ckpt_pass.planner.solution import Solution, without_recompute
from ckpt_pass.planner.solve import solve


class WorkspaceWarning(UserWarning):
    """The peak of a plan leaves out memory that kernels allocate for themselves."""


@dataclass(frozen=True)
class Met:
    """How a budget is met.

    Attributes:
        solution: what the solver found.
        drops: its drops, as nodes: after the first has run, the second's values are not kept.
        budget_bytes: the budget.
    """

    solution: Solution
    drops: frozenset[tuple[fx.Node, fx.Node]]
    budget_bytes: int


def meet_budget(joint: JointGraph, budget: BudgetLike) -> Met:
    """Choose what a tagged joint graph saves so that its peak is within the budget.

    MUST_* tags bind; PREFER_* tags are open to the solver, which overwrites them.

    Raises:
        InfeasibleBudgetError: no plan fits.
        InvalidBudgetError: the budget is no amount of memory.
        SymbolicBytesError: a size depends on data.
    """
    described = build_problem(joint)
    problem, index = described.problem, described.index
    budget_bytes = resolve_budget(budget, without_recompute(problem).peak_bytes)
    borders = [
        number
        for node, number in index.items()
        if problem.ops[number].savable and joint.crosses_border(node)
    ]
    solution = solve(problem, budget_bytes, borders)
    _write(joint, index, solution)
    _warn_of_workspaces(joint)
    nodes = described.nodes
    drops = frozenset((nodes[anchor], nodes[maker]) for anchor, maker in solution.drops)
    return Met(solution, drops, budget_bytes)


def _write(joint: JointGraph, index: dict[fx.Node, int], solution: Solution) -> None:
    for node in joint.forward:
        saved = index.get(node) in solution.saved
        node.meta["recompute"] = (
            CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
        )


def _warn_of_workspaces(joint: JointGraph) -> None:
    convolves = any(
        callable(node.target) and classify(node.target) is OpClass.CONVOLUTION
        for node in joint.forward
    )
    if convolves:
        warnings.warn(
            "The plan's peak leaves out the workspaces of convolutions, which their libraries "
            "allocate besides their outputs: the measured peak may exceed the budget by as much. "
            "Give a budget with some room.",
            WorkspaceWarning,
            stacklevel=2,
        )
