"""Budgets with Inductor as the inner compiler: what is predicted, what is measured, and stock's.

Each model gets budgets on the way from the least peak that a plan of ours has to Inductor's own
peak with nothing recomputed. Peaks are measured (allocation events) and exact. Beside them stands
the least peak that stock Inductor reaches with any setting of its ``activation_memory_budget``.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config

import ckpt_pass
from benchmarks.budgets import AMPLE, TORCH_BUDGETS, Models, made
from benchmarks.common import Bar, InductorRow, Result, torch_threads
from ckpt_pass.plans.record import CompiledExecution
from tests.zoo import Built, hf, loss_of

#: The models of the default run; :mod:`benchmarks.inductor_table` has more.
SMALL: Models = {"gpt2": hf.gpt2, "resnet": hf.resnet}
#: Budgets: from the least of our peaks (0) to the peak with nothing recomputed (1).
PARTS = (0.0, 0.15, 0.3, 0.5, 0.7)
#: Kernels with a workspace take a little more or less beside others than alone.
CLOSE, CLOSE_BYTES = 0.005, 64


def run(
    models: Models = SMALL,
    parts: Sequence[float] = PARTS,
    stock_budgets: Sequence[float] = TORCH_BUDGETS,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Measure every point of every model, and what stock Inductor reaches.

    Args:
        models: what makes each model.
        parts: budgets, from our least peak (0) to the peak with nothing recomputed (1).
        stock_budgets: settings of torch's own budget.
        dtype: of the models.
    """
    with torch_threads(1):
        rows = [
            row
            for name, make in models.items()
            for row in _rows(name, lambda make=make: made(make, dtype), parts, stock_budgets)  # type: ignore[misc]
        ]
    name = "inductor" if dtype == torch.float32 else f"inductor {dtype}".replace("torch.", "")
    title = f"{name}: budgets, and the least that stock reaches (CPU)"
    return Result("inductor", title, tuple(rows), bars_of(rows))


def bars_of(rows: Sequence[InductorRow]) -> tuple[Bar, ...]:
    """What must hold of rows of ours, and beside stock's."""
    ours = [row for row in rows if row.part is not None]
    least = {row.label: row.above_gradients for row in ours if row.part == 0.0}
    # Of a single setting it is not the least that stock reaches.
    stock = {row.label: row.above_gradients for row in rows if row.part is None and row.rounds > 1}
    met = max(row.measured_bytes - row.budget_bytes for row in ours)
    under = max(row.measured_bytes - row.predicted_bytes for row in ours)
    off = max(_off(row) for row in ours)
    bars = [
        Bar("measured peak over the budget, worst", met, 0, "bytes"),
        Bar("measured peak over the prediction, worst", under, 0, "bytes"),
        Bar("prediction away from what is measured, worst", off, CLOSE),
    ]
    ratios = [least[name] / stock[name] for name in stock if stock[name] and name in least]
    if ratios:
        what = "least peak above the gradients, ours / stock"
        bars += [
            Bar(f"{what}, median", statistics.median(ratios), 0.6),
            Bar(f"{what}, worst", max(ratios), 0.9),
        ]
    times = [
        row.compile_s / plain.compile_s
        for row in ours
        for plain in rows
        if row.compile_s and _plain(row, plain)
    ]
    if times:
        bars.append(
            Bar("first call with a budget / stock's, median", statistics.median(times), 1.5)
        )
    return tuple(bars)


def _off(row: InductorRow) -> float:
    off = abs(row.measured_bytes - row.predicted_bytes)
    return 0.0 if off <= CLOSE_BYTES else off / row.measured_bytes


def _plain(row: InductorRow, other: InductorRow) -> bool:
    return other.part is None and other.label == row.label


def _rows(
    name: str, make: Callable[[], Built], parts: Sequence[float], stock_budgets: Sequence[float]
) -> Iterator[InductorRow]:
    module, inputs = make()
    # Gradients stay at the end of every step, whatever is recomputed.
    gradient_bytes = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    model = Model(name, module, inputs, gradient_bytes)
    yield from model.stock(stock_budgets)
    plain, least = model.plain_bytes(), least_bytes(module, inputs)
    for part in parts:
        yield model.at(part, least + int(part * (plain - least)))


def least_bytes(module: torch.nn.Module, inputs: Sequence[Any]) -> int:
    """What the refusal of a budget of one byte names."""
    backend = ckpt_pass.make_backend(budget=1, inner="inductor")
    try:
        torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    except RuntimeError as error:  # dynamo wraps a backend's errors
        why = getattr(error, "inner_exception", error)
        if isinstance(why, ckpt_pass.InfeasibleBudgetError):
            return why.least_feasible_bytes
        raise
    raise AssertionError("a budget of one byte was met")


class Model:
    """A model and its steps."""

    def __init__(
        self, name: str, module: torch.nn.Module, inputs: tuple[Any, ...], gradient_bytes: int
    ) -> None:
        self._name, self._module, self._inputs = name, module, inputs
        self._gradient_bytes = gradient_bytes

    def at(self, part: float, budget: int, cold: bool = True) -> InductorRow:
        """A budget of ours; unless cold, with the caches as they are."""
        backend = ckpt_pass.make_backend(budget=budget, inner="inductor")
        took_s, measured = self._measured(backend, cold)
        plan = backend.plans[-1]
        execution = plan.execution
        assert isinstance(execution, CompiledExecution) and execution.inductor is not None
        return InductorRow(
            model=self._name,
            part=part,
            budget_bytes=budget,
            predicted_bytes=plan.peak_bytes,
            measured_bytes=measured,
            gradient_bytes=self._gradient_bytes,
            rounds=execution.inductor.replans + 1,
            compile_s=took_s if cold else 0.0,
        )

    def plain_bytes(self) -> int:
        """Inductor's peak with nothing recomputed."""
        return self._measured(ckpt_pass.make_backend(budget=AMPLE, inner="inductor"), False)[1]

    def stock(self, budgets: Sequence[float]) -> Iterator[InductorRow]:
        """The lowest peak of stock Inductor, and how long its first call at a budget of 1 took."""
        found: list[tuple[float, int]] = []
        for budget in budgets:
            with functorch_config.patch(activation_memory_budget=budget):
                found.append(self._measured("inductor"))
        if found:
            peak = min(measured for _, measured in found)
            yield InductorRow(
                model=self._name,
                part=None,
                budget_bytes=peak,
                predicted_bytes=peak,
                measured_bytes=peak,
                gradient_bytes=self._gradient_bytes,
                rounds=len(found),
                compile_s=found[0][0],
            )

    def _measured(self, backend: Any, cold: bool = True) -> tuple[float, int]:
        """Seconds of the first step, which compiles; and a later step's peak."""
        torch._dynamo.reset()
        compiled = torch.compile(self._module, backend=backend, fullgraph=True)
        with torch._inductor.utils.fresh_cache() if cold else contextlib.nullcontext():
            began = time.process_time(), _children_s()
            loss_of(compiled(*self._inputs)).backward()
            took_s = time.process_time() - began[0] + _children_s() - began[1]
            self._module.zero_grad(set_to_none=True)
            measured = ckpt_pass.measure_step(
                lambda: loss_of(compiled(*self._inputs)),
                warmup=0,
                repeats=1,
                params=self._module.parameters(),
            )
        return took_s, measured.peak_bytes


def _children_s() -> float:
    """CPU seconds of the compilers that were called."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
