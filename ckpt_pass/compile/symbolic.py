"""The peak of a plan as an expression in the sizes that were left symbolic.

The bytes at a moment of a step are a sum of storage sizes, and each of those is a sum of monomials
in the symbols. So the simulator, run once for each monomial with its coefficients in the place of
bytes, gives the bytes of every moment as polynomials, under the very rules that it has for numbers.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog

from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.problem import GraphProblem
from ckpt_pass.graph.shapes import Dimension, at_sizes, in_words, traced_sizes
from ckpt_pass.planner.liveness import simulate
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import Solution
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.policy.sites import Bytes, optimization_hint

Ints = NDArray[np.int64]
Rationals = dict[sympy.Expr, sympy.Rational]


class BudgetExceededWarning(UserWarning):
    """A compiled step does not keep to its plan's budget, at these sizes or on this machine."""


def symbolic_peak(
    described: GraphProblem, solution: Solution, dimensions: Iterable[Dimension]
) -> Bytes:
    """The peak of a step for every size of its symbolic dimensions, under one plan.

    Args:
        described: the step, with the sizes as expressions.
        solution: what it saves and drops, and its schedule.
        dimensions: the least sizes of the symbols; those not listed are 1 or more.

    Returns:
        A number where no size is symbolic; else the maximum over the moments of the step, without
        those that others are never below. It holds for sizes from the least ones on.
    """
    described = replace(described, workspace_sizes=open_workspaces(described))
    sizes = (*described.storage_sizes, *described.workspace_sizes)
    if not _symbols_of(sizes):
        return solution.peak_bytes
    written = _Written.of(sizes, dimensions)
    random = {sympy.S.One: written.scale}
    moments = np.stack(
        [
            _coefficients(
                described, solution, written.terms, monomial, written.scale, random.get(monomial, 0)
            )
            for monomial in written.monomials
        ],
        axis=1,
    )
    return written.most(moments)


def peak_of_lifetimes(
    lifetimes: Sequence[tuple[int, int, Bytes]], dimensions: Sequence[Dimension], peak_bytes: int
) -> Bytes:
    """The peak of code that makes and frees storages, for every size of its symbolic dimensions.

    Args:
        lifetimes: of each storage when it is made, when it is gone, and its bytes.
        dimensions: the symbols, their least sizes, and those that were traced.
        peak_bytes: the peak at the traced sizes. What it has more than the storages, or less (what
            kernels allocate besides, blocks that are rounded up), is the same at all sizes.
    """
    sizes = [size for _, _, size in lifetimes]
    if not _symbols_of(sizes):
        return peak_bytes
    written = _Written.of(sizes, dimensions)
    number = {monomial: column for column, monomial in enumerate(written.monomials)}
    steps = np.zeros((2 + max(died for _, died, _ in lifetimes), len(number)), dtype=np.int64)
    for born, died, size in lifetimes:
        for monomial, coefficient in written.terms[size].items():
            steps[born, number[monomial]] += int(coefficient * written.scale)
            steps[died, number[monomial]] -= int(coefficient * written.scale)
    moments = steps.cumsum(axis=0)
    found = written.most(moments)
    besides = peak_bytes - at_sizes(found, traced_sizes(dimensions))
    moments[:, number[sympy.S.One]] += besides * written.scale
    return written.most(moments)


def _symbols_of(sizes: Iterable[Bytes]) -> set[sympy.Symbol]:
    return set().union(*(s.free_symbols for s in sizes if isinstance(s, sympy.Expr)))


@dataclass(frozen=True)
class _Written:
    """Sizes as sums of monomials in what each symbol has above its least size.

    Written so, few coefficients are negative, and one polynomial whose coefficients are nowhere
    below another's is nowhere below it.

    Attributes:
        terms: the coefficients of each size.
        monomials: all that there are.
        scale: makes the coefficients whole numbers.
        back: from the new symbols to sizes.
    """

    terms: Mapping[Bytes, Rationals]
    monomials: Sequence[sympy.Expr]
    scale: int
    back: Mapping[sympy.Symbol, sympy.Expr]

    @classmethod
    def of(cls, sizes: Iterable[Bytes], dimensions: Iterable[Dimension]) -> _Written:
        least = {dimension.symbol: dimension.least for dimension in dimensions}
        symbols = _symbols_of(sizes)
        above = {s: sympy.Symbol(f"{s}_above", integer=True, nonnegative=True) for s in symbols}
        shifted = {s: new + least.get(str(s), 1) for s, new in above.items()}
        back = {new: s - least.get(str(s), 1) for s, new in above.items()}
        terms = {size: _terms(size, shifted) for size in set(sizes)}
        every = {sympy.S.One, *(m for found in terms.values() for m in found)}
        monomials = sorted(every, key=sympy.default_sort_key)
        scale = math.lcm(*(int(c.q) for found in terms.values() for c in found.values()))
        return cls(terms, monomials, scale, back)

    def most(self, moments: Ints) -> Bytes:
        """The largest of some moments, whatever the sizes are.

        Args:
            moments: [moments, monomials] coefficients, times ``scale``.
        """
        signs = [bool(monomial.is_nonnegative) for monomial in self.monomials]
        rows = undominated(moments, signs)
        peaks = [
            sum(
                sympy.Rational(int(c), self.scale) * m
                for c, m in zip(row, self.monomials, strict=True)
            )
            for row in rows
        ]
        found = [sympy.expand(sympy.sympify(peak).xreplace(self.back)) for peak in peaks]
        return found[0] if len(found) == 1 else sympy.Max(*found, evaluate=False)


#: A workspace is taken to grow in so many parts of the output: kernels' casts and masks have a
#: half, a quarter or an eighth of its bytes, or one in itself.
_PARTS = 64


def open_workspaces(described: GraphProblem) -> tuple[Bytes, ...]:
    """Workspaces at every size, from those that were measured at the traced shape.

    What is no rule but a measured number is the traced shape's. If it is as large as a tensor that
    the op touches, it grows as that one; if it is a multiple of a tensor of fixed size (sums for
    each feature), it stays; else it grows with the largest output, and a rest stays.
    """
    problem, sizes = described.problem, described.storage_sizes
    return tuple(
        _open_workspace(
            nbytes,
            {s: (sizes[s], problem.storage_bytes[s]) for s in op.touches},
            [s for s in op.makes if isinstance(sizes[s], sympy.Expr)],
        )
        if isinstance(nbytes, int) and nbytes
        else nbytes
        for nbytes, op in zip(described.workspace_sizes, problem.ops, strict=True)
    )


def _open_workspace(
    nbytes: int, touched: Mapping[int, tuple[Bytes, int]], outputs: Sequence[int]
) -> Bytes:
    for size, traced in touched.values():
        if isinstance(size, sympy.Expr) and traced == nbytes:
            return size
    fixed = [size for size, _ in touched.values() if isinstance(size, int) and size]
    if not outputs or any(nbytes % size == 0 for size in fixed):
        return nbytes
    size, traced = max((touched[s] for s in outputs), key=lambda found: found[1])
    if not traced:
        return nbytes
    share = sympy.Rational(_PARTS * nbytes // traced, _PARTS)
    return share * size + (nbytes - share * traced)


def _terms(size: Bytes, shifted: Mapping[sympy.Symbol, sympy.Expr]) -> Rationals:
    """A size as coefficients of monomials; what is no polynomial is a monomial of its own."""
    expanded = sympy.expand(sympy.sympify(size).subs(shifted))
    found: Rationals = {sympy.S.One: sympy.S.Zero}
    for term, coefficient in expanded.as_coefficients_dict().items():
        found[term] = sympy.Rational(coefficient)
    return found


def _coefficients(
    described: GraphProblem,
    solution: Solution,
    terms: Mapping[Bytes, Rationals],
    monomial: sympy.Expr,
    scale: int,
    random_scale: int,
) -> Ints:
    """How often a monomial is alive at each moment of the schedule."""

    def of(sizes: Sequence[Bytes]) -> list[int]:
        return [int(terms[size].get(monomial, 0) * scale) for size in sizes]

    storages, workspaces = of(described.storage_sizes), of(described.workspace_sizes)
    total = np.zeros(len(solution.profile.schedule), dtype=np.int64)
    for sign in (1, -1):  # a problem has no negative bytes
        parts = [max(sign * c, 0) for c in storages], [max(sign * c, 0) for c in workspaces]
        randoms = random_scale if sign > 0 else 0
        if any(map(any, parts)) or randoms:
            problem = _with_bytes(described.problem, *parts, randoms)
            profile = simulate(problem, solution.steps)
            total += sign * np.array(profile.bytes_at, dtype=np.int64)
    return total


def _with_bytes(
    problem: Problem, storages: Sequence[int], workspaces: Sequence[int], randoms: int
) -> Problem:
    ops = list(problem.ops)
    for index, (op, workspace) in enumerate(zip(ops, workspaces, strict=True)):
        if op.workspace_bytes or op.random_state_bytes:
            state = randoms * op.random_state_bytes
            ops[index] = replace(op, workspace_bytes=workspace, random_state_bytes=state)
    return replace(problem, ops=tuple(ops), storage_bytes=tuple(storages))


def undominated(rows: Ints, nonnegative: Sequence[bool]) -> Ints:
    """The rows that matter for the maximum, whatever the monomials are.

    A row goes if a mean of others, weighted anyhow, is nowhere below it: then so is the largest of
    them. First those that a single other row is above, then the rest by a linear program each.

    Args:
        rows: [moments, monomials] coefficients.
        nonnegative: whether each monomial is known to be; of the others, the coefficient of a row
            must be equal to that of what is above it.
    """
    unknown = [column for column, known in enumerate(nonnegative) if not known]
    unique = np.unique(rows, axis=0)
    compared = np.concatenate([unique, -unique[:, unknown]], axis=1).astype(np.float64)
    kept: list[int] = []
    for row in np.argsort(-unique.sum(axis=1), kind="stable").tolist():
        if not (kept and (compared[kept] >= compared[row]).all(axis=1).any()):
            kept.append(row)
    for row in reversed(kept):
        others = [other for other in kept if other != row]
        if others and _below_a_mean(compared[row], compared[others]):
            kept.remove(row)
    found: Ints = unique[kept]
    return found


def _below_a_mean(row: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    """Whether weights of 0 or more with sum 1 make a mean of ``others`` that is >= ``row``."""
    size = np.maximum(np.abs(others).max(axis=0), 1.0)  # coefficients differ by powers of ten
    ones = np.ones((1, len(others)))
    found = linprog(np.zeros(len(others)), -(others / size).T, -row / size, ones, [1.0])
    # The solver is content with 1e-7. What is taken for equal is a byte in a gigabyte.
    return bool(found.success) and bool((found.x @ others >= row - 1e-9 * size).all())


def dimensions_of(joint: JointGraph) -> tuple[Dimension, ...]:
    """The symbolic sizes of a graph's inputs in their order, and where they are found."""
    found: dict[sympy.Symbol, tuple[torch.SymInt, list[str]]] = {}
    for node in joint.primals:
        value = node.meta.get("val")
        for place, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                name = f"{joint.input_names.get(node.name, node.name)} dim {place}"
                found.setdefault(size.node.expr, (size, []))[1].append(name)
    return tuple(_dimension(symbol, size, places) for symbol, (size, places) in found.items())


def _dimension(symbol: sympy.Symbol, size: torch.SymInt, places: Sequence[str]) -> Dimension:
    bounds = size.node.shape_env.var_to_range.get(symbol)
    least = max(int(bounds.lower), 1) if bounds is not None else 1
    upper = bounds.upper if bounds is not None else sympy.oo
    most = int(upper) if sympy.sympify(upper).is_Integer else None
    return Dimension(str(symbol), tuple(places), optimization_hint(size), least, most)


def watch_sizes(
    compiled: Callable[..., Any], plan: Plan, inputs: Sequence[object]
) -> Callable[..., Any]:
    """Let a compiled graph say, once, that it runs at sizes whose peak is above the budget.

    Args:
        compiled: the graph; symbols are arguments of it.
        plan: what it was compiled with.
        inputs: its arguments as they were traced: symbolic numbers for symbols.

    Returns:
        ``compiled`` itself where there is nothing to watch: no budget, or no symbolic sizes.
    """
    expression, budget_bytes = plan.peak_expression, plan.budget_bytes
    places = {
        str(value.node.expr): place
        for place, value in reversed([*enumerate(inputs)])
        if isinstance(value, torch.SymInt)
    }
    if budget_bytes is None or not isinstance(expression, sympy.Expr):
        return compiled
    symbols = sorted(str(symbol) for symbol in expression.free_symbols)
    if not places.keys() >= set(symbols):
        return compiled

    # As many shapes as torch compiles by default before it gives up (recompile_limit), and more.
    @functools.lru_cache(maxsize=64)
    def peak_bytes(sizes: tuple[int, ...]) -> int:
        return at_sizes(expression, dict(zip(symbols, sizes, strict=True)))

    said = False

    @functools.wraps(compiled)
    def watched(*args: Any) -> Any:
        nonlocal said
        if not said:
            sizes = tuple(int(args[places[symbol]]) for symbol in symbols)
            if peak_bytes(sizes) > budget_bytes:
                said = True
                named = dict(zip(symbols, sizes, strict=True))
                _warn(plan, budget_bytes, peak_bytes(sizes), named)
        return compiled(*args)

    return watched


def _warn(plan: Plan, budget_bytes: int, peak_bytes: int, sizes: Mapping[str, int]) -> None:
    where = ", ".join(str(dimension) for dimension in plan.dimensions)
    warnings.warn(
        f"A step with {in_words(sizes)} peaks at {peak_bytes:,} bytes "
        f"({format_bytes(peak_bytes)}), above the budget of {budget_bytes:,} bytes "
        f"({format_bytes(budget_bytes)}). Sizes are {where}. The plan was made at "
        f"{in_words(traced_sizes(plan.dimensions))} and keeps to the budget for {plan.holds_for}. "
        "Compile at the largest sizes first, or give each shape a plan of its own with "
        "torch.compile(dynamic=False).",
        BudgetExceededWarning,
        stacklevel=3,
    )
