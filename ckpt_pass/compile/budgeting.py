"""Meet a budget: open the graph to the solver, and write its solution back as tags."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.kernel_cache import KernelFacts
from ckpt_pass.graph.kernels import WORKSPACE, WORKSPACE_AND_TIME, Kernels
from ckpt_pass.graph.problem import borders_of, build_problem, check_sizes
from ckpt_pass.graph.real_looks import tell_real_sizes
from ckpt_pass.ops.taxonomy import OpClass, classify
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import InfeasibleBudgetError, Solution, without_recompute
from ckpt_pass.planner.solvers import run_solver
from ckpt_pass.plans.budget import resolve_budget
from ckpt_pass.plans.goal import Goal
from ckpt_pass.plans.timeline import Timeline, timeline_of
from ckpt_pass.policy.sites import output_tensors


class WorkspaceWarning(UserWarning):
    """The peak of a plan leaves out memory that kernels allocate for themselves."""


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


def meet_budget(joint: JointGraph, goal: Goal) -> Met:
    """Choose what a tagged joint graph saves so that its peak is within the budget.

    MUST_* tags bind; PREFER_* tags are open to the solver, which overwrites them. Kernels that may
    have a workspace of their own are run once on made-up data, unless that was done before
    (:mod:`ckpt_pass.graph.kernels`).

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
    solution = _solved(goal, problem, budget_bytes, borders, _is_inexact(joint))
    _write(joint, index, solution)
    _warn_of_unmeasured(kernels)
    nodes = described.nodes
    drops = frozenset((nodes[anchor], nodes[maker]) for anchor, maker in solution.drops)
    return Met(solution, drops, budget_bytes, facts, timeline_of(problem, plain.profile))


def _solved(
    goal: Goal, problem: Problem, budget_bytes: int, borders: Sequence[int], inexact: bool
) -> Solution:
    """Solve, for a little less than the budget: more where the simulator is not exact."""
    if not inexact or without_recompute(problem).peak_bytes <= budget_bytes:
        return run_solver(goal.solver, problem, budget_bytes, borders, goal.time_limit_s)
    asked = max(budget_bytes - reserve_bytes(budget_bytes), 1)
    try:
        return run_solver(goal.solver, problem, asked, borders, goal.time_limit_s)
    except InfeasibleBudgetError as error:
        least = error.least_feasible_bytes
        # So that what is left of it after its own reserve is enough.
        raise InfeasibleBudgetError(budget_bytes, least + 2 * reserve_bytes(least)) from None


def reserve_bytes(budget_bytes: int) -> int:
    """What is kept free where the simulator is not exact.

    The largest difference seen was 0.08 % of the peak (ResNet, BERT and their like under
    autocast, CPU, torch 2.13), and 384 bytes on the smallest models.
    """
    return max(512, budget_bytes // 1000)


def _is_inexact(joint: JointGraph) -> bool:
    """Whether measured and simulated peaks may differ by more than a few bytes.

    That was seen with convolutions, and with autocast, whose norms keep their statistics in
    another dtype than their fake tensors say.
    """
    dtypes = {
        tensor.dtype
        for node in joint.forward
        for tensor in output_tensors(node.meta.get("val"))
        if tensor.dtype.is_floating_point
    }
    return len(dtypes) > 1 or any(
        callable(node.target) and classify(node.target) is OpClass.CONVOLUTION
        for node in joint.forward
    )


def _write(joint: JointGraph, index: dict[fx.Node, int], solution: Solution) -> None:
    for node in joint.forward:
        saved = index.get(node) in solution.saved
        node.meta["recompute"] = (
            CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
        )


def _warn_of_unmeasured(kernels: Kernels) -> None:
    if not kernels.unmeasured:
        return
    first = kernels.unmeasured[0]
    more = f" and {len(kernels.unmeasured) - 1} more" if len(kernels.unmeasured) > 1 else ""
    warnings.warn(
        f"The plan's peak leaves out what the kernel of {first.name} ({first.op}){more} allocates "
        f"besides its outputs: it could not be run alone ({first.reason}). The measured peak may "
        "exceed the budget by as much. Give a budget with some room.",
        WorkspaceWarning,
        stacklevel=2,
    )
