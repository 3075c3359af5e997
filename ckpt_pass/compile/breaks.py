"""Where dynamo cut a model into several graphs, and what a budget does not cover then."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import fx

from ckpt_pass._torch import frames
from ckpt_pass.plans.budget import BudgetLike
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes

_CURE = (
    "To plan the whole step ahead, with what runs between its graphs: plan = ckpt_pass.plan(model, "
    "*inputs, budget=...), for inductor with inner='inductor', then torch.compile(model, "
    "backend=ckpt_pass.make_backend(plan=plan)); or, without torch.compile, mode='eager' and "
    "plan.apply(model), for a loop that is cut inside, too. To have one graph, take the break "
    "away: torch.compile(..., fullgraph=True) is an error at each."
)


class UncoveredBudgetWarning(UserWarning):
    """A budget is not the whole step's: dynamo cut a function in parts, or did not compile it."""


class Coverage:
    """What was said of the steps that a backend's budget does not cover; each thing is said once.

    A part of a function that was spoken of is not spoken of again: what follows a break, and what
    the function calls.
    """

    def __init__(self) -> None:
        self._cut: set[frames.Function] = set()
        self._skipped: set[frames.Function] = set()
        self._raised: set[frames.Function] = set()
        #: The most bytes that a graph of a function got.
        self._given: dict[frames.Function, int] = {}

    def is_part(self, graph: fx.GraphModule) -> bool:
        """Whether a graph that is being compiled is known to be one of several of a step."""
        if frames.cut_after(graph) or frames.cut_before(graph):
            return True
        return _is_inside(self._cut | self._skipped)

    def note(self, plans: Sequence[Plan]) -> None:
        """Know what the graphs of the function that is being compiled got."""
        function = frames.compiled_function()
        given = max((plan.budget_bytes or 0 for plan in plans), default=0)
        if function is not None:
            self._given[function] = max(given, self._given.get(function, 0))

    def raised_for_shape(self, budget: BudgetLike | None, least_bytes: int) -> int | None:
        """The least that fits a graph, where a fraction of its peak does not; it is told of.

        Only where a graph of the same function got as much at another shape: a last batch, say, is
        smaller, and its gradients are not. Else ``None``.
        """
        function = frames.compiled_function()
        if not isinstance(budget, float) or function is None:
            return None
        if self._given.get(function, 0) < least_bytes:
            return None
        if function not in self._raised:
            self._raised.add(function)
            warnings.warn_explicit(
                f"{function.name} is compiled for another shape, at which no plan fits in {budget} "
                f"of its peak. The least that fits, {format_bytes(least_bytes)}, is given to it: "
                "the budget was more at the first shape. To have the same budget at all shapes, "
                "give it in bytes.",
                UncoveredBudgetWarning,
                function.filename,
                function.line,
            )
        return least_bytes

    def tell_of_cut(self, graph: fx.GraphModule, budget: BudgetLike) -> None:
        """Say where dynamo cut the function that a graph is a part of, if it did."""
        cut = frames.cut_after(graph) or frames.cut_before(graph)
        function = frames.compiled_function()
        if cut is None or function in self._cut or _is_inside(self._cut | self._skipped):
            return
        if function is not None:
            self._cut.add(function)
        name = function.name if function is not None else cut.within
        warnings.warn_explicit(
            f"The budget of {budget} was given to each graph of {name} alone: dynamo cut it at "
            f"{place(cut)}. {_alone(budget)} What runs between the graphs is in no plan. {_CURE}",
            UncoveredBudgetWarning,
            *_line(cut),
        )

    def tell_of_skip(self, skipped: frames.SkippedFunction, budget: BudgetLike) -> None:
        """Say that dynamo does not compile a function. Does not raise: dynamo is not ready for it.

        A filter that makes errors of warnings leaves this one a warning.
        """
        function = skipped.function
        if function in self._skipped or _is_inside(self._skipped):
            return
        self._skipped.add(function)
        message = (
            f"The budget of {budget} does not cover {function.name} "
            f"({Path(function.filename).name}:{function.line}): dynamo does not compile it, because"
            f" of {place(skipped.cut)}. It runs as it is, without a plan, and takes what it takes. "
            f"What it calls may be compiled by itself, each graph with the budget alone. {_CURE}"
        )
        try:
            warnings.warn_explicit(message, UncoveredBudgetWarning, *_line(skipped.cut))
        except UncoveredBudgetWarning:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UncoveredBudgetWarning)
                warnings.warn_explicit(message, UncoveredBudgetWarning, *_line(skipped.cut))

    def tell_of_raised(self, graph: fx.GraphModule, plan: Plan, budget: BudgetLike) -> None:
        """Say that a part of a step got more than the fraction of its peak, if it did."""
        plain, given = plan.predicted.plain_timeline, plan.budget_bytes
        if not isinstance(budget, float) or plain is None or given is None:
            return
        function = frames.compiled_function()
        if given <= int(budget * plain.peak_bytes) or function in self._raised:
            return
        if function is not None:
            self._raised.add(function)
        cut = frames.cut_after(graph) or frames.cut_before(graph) or frames.Cut("", 0, "", "")
        name = function.name if function is not None else "a function"
        warnings.warn_explicit(
            f"A graph of {name} cannot run in {budget} of its own peak without recomputation, "
            f"which is {format_bytes(plain.peak_bytes)}: it got its least, "
            f"{format_bytes(given)}. Where that is little of the step it does not matter; else the "
            f"step is above {budget} of its peak. {_CURE}",
            UncoveredBudgetWarning,
            *_line(cut),
        )


def graph_break(graph: fx.GraphModule) -> str:
    """Where dynamo cut the model after one of its graphs, and why; empty where it did not."""
    cut = frames.cut_after(graph)
    return place(cut) if cut is not None else ""


def place(cut: frames.Cut) -> str:
    """A cut in words."""
    if not cut.filename:
        return cut.reason
    why = f" ({cut.reason})" if cut.reason else ""
    return f"{Path(cut.filename).name}:{cut.line} in {cut.within}{why}"


def _line(cut: frames.Cut) -> tuple[str, int]:
    """What a warning is said to come from."""
    return cut.filename or __file__, cut.line


def _alone(budget: BudgetLike) -> str:
    if isinstance(budget, float):
        return "It is that part of each graph's own peak, not of the step's."
    return "What one graph saves stays while the others run, so that the step may take more."


def _is_inside(functions: set[frames.Function]) -> bool:
    return any(function in functions for function in frames.running_functions())
