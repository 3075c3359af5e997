"""A lower bound on recompute time and waiting that holds with a link."""

from ckpt_pass.planner.link import Link
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import Solution


def overhead_bound(problem: Problem, budget_bytes: int, link: Link, plan: Solution) -> float:
    return 0.0
