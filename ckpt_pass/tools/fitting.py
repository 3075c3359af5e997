"""The largest batch, or sequence, whose training step fits an amount of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ckpt_pass.compile.engine import decide, policy_for
from ckpt_pass.compile.symbolic import dimensions_of, symbolic_peak
from ckpt_pass.graph.capture import LossFn, NotTraceableError, capture
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.problem import GraphProblem, borders_of
from ckpt_pass.graph.shapes import Dimension, at_sizes, largest, traced_sizes
from ckpt_pass.job.counting import Around
from ckpt_pass.job.jobs import JobLike
from ckpt_pass.job.totals import InfeasibleTotalError, JobAsked, TotalLike, asked_job
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import InfeasibleBudgetError, without_recompute
from ckpt_pass.planner.solve import solve
from ckpt_pass.plans.budget import BudgetLike, InvalidBudgetError, check_budget, resolve_budget
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.policy.rules import Policy, PolicyLike
from ckpt_pass.policy.sites import Bytes
from ckpt_pass.tools.ahead import check_ranks, plan_one
from ckpt_pass.tools.arguments import step_arguments
from ckpt_pass.tools.axis import Axis, DimLike, UnknownDimensionError


@dataclass(frozen=True)
class Fit:
    """The largest size of a dimension that fits a budget, and the plan for it.

    Attributes:
        size: the largest that fits.
        dim: the dimension's name, or ``given`` for one that was listed by argument.
        places: the arguments' dimensions that have this size.
        plan: the fastest plan within the budget at that size.
        next_peak_bytes: the least peak of any plan at the size above; ``None`` where there is no
            such step, and ``limit`` says why.
        limit: what stands against a larger size, in words.
    """

    size: int
    dim: str
    places: tuple[str, ...]
    plan: Plan
    next_peak_bytes: int | None
    limit: str

    @property
    def peak_bytes(self) -> int:
        """The peak of the plan, at ``size``."""
        return self.plan.peak_bytes

    @property
    def budget_bytes(self) -> int:
        """The budget."""
        assert self.plan.budget_bytes is not None
        return self.plan.budget_bytes

    def __str__(self) -> str:
        room = f"{self.peak_bytes:,} of {self.budget_bytes:,} bytes"
        account = self.plan.account
        if account is not None and account.total_bytes is not None:
            room = f"{account.peak_bytes:,} of {account.total_bytes:,} bytes for the whole job"
        return "\n".join(
            [
                f"fits         {self.dim} {self.size} ({', '.join(self.places)}): {room}",
                f"above that   {self.limit}",
                self.plan.summary(),
            ]
        )


def fit(
    model: nn.Module,
    *args: Any,
    budget: BudgetLike | None = None,
    total: TotalLike | None = None,
    optimizer: JobLike | None = None,
    dim: DimLike = "batch",
    policy: PolicyLike | None = None,
    loss_fn: LossFn | None = None,
    regions: tuple[str, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Fit:
    """Find the largest size of one dimension for which some plan keeps to a budget.

    The step is traced once with that size left symbolic, and the least peak at other sizes is
    found without tracing again. The answer is confirmed on traces of its own, there and one above.
    Nothing is computed. What only the data tell is not seen: a table of positions may be too short
    for a sequence that fits.

    Args:
        model: the module.
        args, named: its arguments; the size that they have now does not matter, but that a
            fraction as ``budget`` is one of the peak at that size.
        budget: as for :func:`ckpt_pass.make_backend`.
        total, optimizer: the memory of the whole job instead, and what steps, as for
            :func:`ckpt_pass.plan`; the inputs grow with the size.
        dim: ``"batch"`` (dimension 0) or ``"sequence"`` (dimension 1) of the first tensor that has
            it, and of all tensors that have the same size there; or the dimension of each
            argument, by its index or name, as ``{0: 1, "labels": 1}``.
        policy, loss_fn, regions, kwargs: as for :func:`ckpt_pass.plan`.

    Raises:
        InfeasibleBudgetError: not even size 1 fits.
        UnknownDimensionError: there is no such dimension, or every size of it fits.
        InvalidBudgetError, NotTraceableError, UnknownPolicyError: as for :func:`ckpt_pass.plan`.
    """
    asked = asked_job(total, optimizer, budget)
    of_total = asked is not None and asked.total is not None
    inputs = step_arguments(model, fit, args, kwargs, named)
    if asked is not None:
        check_ranks(model, "compiled")
    given: dict[int | str, Any] = {**dict(enumerate(args))}
    given.update(inputs)
    axis = Axis.of(given, dim)
    chosen = policy_for(policy, 1 if of_total else check_budget(_given(budget)))
    distinct, distinct_named = axis.resized(axis.distinct_size())
    how: dict[str, Any] = {"loss_fn": loss_fn, "regions": regions, "dynamic": True}
    with capture(model, *distinct, kwargs=distinct_named, **how) as joint:
        family = _Family.of(joint, chosen, axis)
    limit: Callable[[int], int]
    if asked is not None and of_total:
        limit = _left_by(asked, Around.of_step(model, args, inputs, loss_fn), axis)
    else:
        plain = without_recompute(family.at(axis.size))
        budget_bytes = resolve_budget(_given(budget), plain.peak_bytes)
        limit = lambda _: budget_bytes  # noqa: E731  (the other one is made, too)

    def planned(size: int) -> Plan:
        options: dict[str, Any] = {"policy": policy, "loss_fn": loss_fn, "regions": regions}
        resized, resized_named = axis.resized(size)
        options["kwargs"] = resized_named

        def made(budget_bytes: int | None) -> Plan:
            bound = limit(size) if budget_bytes is None else budget_bytes
            return plan_one(model, *resized, budget=bound, **options)

        if asked is None:
            return made(None)
        return asked.planned(Around.of_step(model, resized, resized_named, loss_fn), made)

    guess = family.guess(max(limit(axis.size), 1), axis)
    size = largest_that_fits(lambda n: family.fits(n, limit(n)), guess)
    return _confirmed(axis, planned, size)


def _given(budget: BudgetLike | None) -> BudgetLike:
    """A budget that has to be there.

    Raises:
        InvalidBudgetError: there is none.
    """
    if budget is None:
        raise InvalidBudgetError(budget, "there is neither a budget= nor a total=")
    return budget


def _left_by(asked: JobAsked, around: Around, axis: Axis) -> Callable[[int], int]:
    """What a total leaves for the step at each size; 0 where the rest alone does not fit."""
    account = asked.account(around)
    total_bytes = account.total_bytes
    assert total_bytes is not None
    highest = max((phase.peak_bytes for phase in account.updates), default=0)

    def left(size: int) -> int:
        more = axis.bytes_at(size) - axis.bytes_at(axis.size)
        fits = highest + more <= total_bytes
        return max(total_bytes - account.pass_standing_bytes - more, 0) if fits else 0

    return left


def _confirmed(axis: Axis, planned: Callable[[int], Plan], guess: int) -> Fit:
    """The size that a trace of its own says fits, while the one above does not.

    Raises:
        InfeasibleBudgetError, NotTraceableError: there is no such size.
    """
    found: dict[int, Plan | InfeasibleBudgetError | InfeasibleTotalError | NotTraceableError] = {}

    def fits(size: int) -> bool:
        if size not in found:
            try:
                found[size] = planned(size)
            except (InfeasibleBudgetError, InfeasibleTotalError, NotTraceableError) as error:
                found[size] = error
        return isinstance(found[size], Plan)

    size = largest_that_fits(fits, guess)
    fits(size)  # 1 may not have been asked for
    best = found[size]
    if not isinstance(best, Plan):
        raise best
    above = found[size + 1]
    next_peak: int | None = None
    if isinstance(above, InfeasibleTotalError):
        next_peak = above.needed_bytes
    elif isinstance(above, InfeasibleBudgetError):
        next_peak = above.least_feasible_bytes
    limit = f"{axis.name} {size + 1} needs {next_peak or 0:,} bytes at least"
    if next_peak is None:
        limit = f"{axis.name} {size + 1} cannot be traced: {above}"
    return Fit(size, axis.name, axis.places, best, next_peak, limit)


def largest_that_fits(fits: Callable[[int], bool], guess: int) -> int:
    """The largest size that fits, from a guess by steps that double, then by halving.

    Where the guess is right, it and the size above are asked for, and nothing else. 1 if none fits.
    """
    low, high, step = 0, guess, 1
    while fits(high):
        low, high, step = high, high + step, step * 2
    step = 1
    while not low and high > 1:
        below = max(high - step, 1)
        if fits(below):
            low = below
        else:
            high, step = below, step * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(low, 1)


@dataclass(frozen=True)
class _Family:
    """The same step at any size of one dimension.

    Attributes:
        described: the step as it was traced.
        borders: ops whose results cross from one layer to the next.
        dimension: the symbol that varies.
        dimensions: all of them.
    """

    described: GraphProblem
    borders: tuple[int, ...]
    dimension: Dimension
    dimensions: tuple[Dimension, ...]

    @classmethod
    def of(cls, joint: JointGraph, policy: Policy, axis: Axis) -> _Family:
        """Read a joint graph with symbolic sizes; a policy's MUST_* decisions are tagged on it."""
        described = decide(joint, policy).described
        borders = borders_of(joint, described)
        dimensions = dimensions_of(joint)
        for dimension in dimensions:
            if axis.places[0] in dimension.places:
                return cls(described, borders, dimension, dimensions)
        raise UnknownDimensionError(
            f"The step does not depend on the size of {', '.join(axis.places)}, or works for the "
            f"size {axis.size} alone: torch left no symbol for it. Name another dimension."
        )

    def at(self, size: int) -> Problem:
        """The problem at another size. Times stay as traced: they do not matter to the peak."""
        sizes = {**traced_sizes(self.dimensions), self.dimension.symbol: size}
        known: dict[Bytes, int] = {}

        def number(expression: Bytes) -> int:
            if expression not in known:
                known[expression] = at_sizes(expression, sizes)
            return known[expression]

        problem = self.described.problem
        workspaces = (number(nbytes) for nbytes in self.described.workspace_sizes)
        ops = tuple(
            replace(op, workspace_bytes=nbytes) if op.workspace_bytes != nbytes else op
            for op, nbytes in zip(problem.ops, workspaces, strict=True)
        )
        storages = tuple(number(nbytes) for nbytes in self.described.storage_sizes)
        return replace(problem, ops=ops, storage_bytes=storages)

    def fits(self, size: int, budget_bytes: int) -> bool:
        """Whether a plan at that size keeps to the budget, as far as this trace tells."""
        if self.dimension.most is not None and size > self.dimension.most:
            return False
        return self._least_bytes(self.at(size)) <= budget_bytes

    def _least_bytes(self, problem: Problem) -> int:
        """The least peak of all plans."""
        try:
            return solve(problem, 0, self.borders).peak_bytes
        except InfeasibleBudgetError as error:
            return error.least_feasible_bytes

    def guess(self, budget_bytes: int, axis: Axis) -> int:
        """A size near the largest: the plan of least peak at the traced size, at other sizes.

        Raises:
            UnknownDimensionError: its peak is within the budget at every size.
        """
        problem = self.described.problem
        found = solve(problem, self._least_bytes(problem), self.borders)
        peak = symbolic_peak(self.described, found, self.dimensions)
        size = largest(peak, self.dimensions, self.dimension, budget_bytes)
        if size is not None:
            return max(size, 1)
        if self.dimension.most is not None:
            return self.dimension.most
        raise UnknownDimensionError(
            f"Every size of {', '.join(axis.places)} fits {format_bytes(budget_bytes)}: the peak "
            "does not depend on it. Name another dimension."
        )
