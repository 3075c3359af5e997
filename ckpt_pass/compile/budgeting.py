"""Meet a budget: open the graph to the solver, and write its solution back as tags."""

from __future__ import annotations

import warnings

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.budget import BudgetLike, resolve_budget
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.problem import build_problem
from ckpt_pass.ops import OpClass, classify
from ckpt_pass.planner.solve import Solution, solve, without_recompute


class WorkspaceWarning(UserWarning):
    """The peak of a plan leaves out memory that kernels allocate for themselves."""


def meet_budget(joint: JointGraph, budget: BudgetLike) -> tuple[Solution, int]:
    """Choose what a tagged joint graph saves so that its peak is within the budget.

    MUST_* tags bind; PREFER_* tags are open to the solver, which overwrites them.

    Returns:
        The solution and the budget in bytes.

    Raises:
        InfeasibleBudgetError: no plan fits.
        InvalidBudgetError: the budget is no amount of memory.
        SymbolicBytesError: sizes are symbolic.
    """
    problem, index = build_problem(joint)
    budget_bytes = resolve_budget(budget, without_recompute(problem).peak_bytes)
    borders = [
        number
        for node, number in index.items()
        if problem.ops[number].savable and joint.crosses_border(node)
    ]
    solution = solve(problem, budget_bytes, borders)
    _write(joint, index, solution)
    _warn_of_workspaces(joint)
    return solution, budget_bytes


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
