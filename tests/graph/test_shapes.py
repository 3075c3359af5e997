"""Open sizes: the symbolic peak is the measured one, budgets say where they hold, fit finds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ckpt_pass
from ckpt_pass.cli.commands import make_app
from ckpt_pass.compile.engine import OPEN, decide
from ckpt_pass.compile.symbolic import (
    dimensions_of,
    open_workspaces,
    symbolic_peak,
    undominated,
)
from ckpt_pass.graph.capture import capture
from ckpt_pass.graph.problem import GraphProblem
from ckpt_pass.planner.liveness import simulate
from ckpt_pass.planner.problem import Op, Problem
from ckpt_pass.tools.fitting import largest_that_fits
from tests.zoo import hf, loss_of

CASES = {case.name: case for case in hf.CASES}
#: What stays between prediction and allocation events: scalars that kernels make for themselves.
SLACK = 64


class Net(nn.Module):
    """Two layers on [batch, length, 16]; ``limit`` is the length of its table of positions."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.register_buffer("table", None if limit is None else torch.zeros(limit, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is not None:
            x = x + self.table[: x.shape[1]]
        for _ in range(3):
            x = x + self.down(torch.tanh(self.up(x)))
        return x.square().mean()


def dynamic_plan(**options: Any) -> ckpt_pass.Plan:
    return ckpt_pass.plan(Net(), torch.randn(4, 8, 16), dynamic=True, **options)


def shaped(inputs: tuple[torch.Tensor, ...], batch: int, length: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(batch, length, *x.shape[2:], dtype=x.dtype) for x in inputs)


def by_dimension(plan: ckpt_pass.Plan, batch: int, length: int) -> dict[str, int]:
    names = {name.rpartition(" dim ")[2]: symbol for name, symbol in plan.symbols.items()}
    return {names["0"]: batch, names["1"]: length}


def peak_of(step: Callable[[], torch.Tensor]) -> int:
    return ckpt_pass.measure_step(step, warmup=0, repeats=1).peak_bytes


# --- the peak as an expression --------------------------------------------------------------


def between(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """A budget halfway from the least peak to that of the step without recomputation."""
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(module, *inputs, budget=1, dynamic=True)
    plain = ckpt_pass.plan(module, *inputs, budget=1.0, dynamic=True)
    assert plain.budget_bytes is not None
    return (caught.value.least_feasible_bytes + plain.budget_bytes) // 2


SMALL = "two layers"


@pytest.mark.parametrize(
    "with_budget",
    [pytest.param(False, marks=pytest.mark.slow, id="default"), pytest.param(True, id="budget")],
)
@pytest.mark.parametrize(
    "name", [SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "llama", "bert"))]
)
def test_one_compilation_peaks_everywhere_as_its_expression_says(
    name: str, with_budget: bool
) -> None:
    """One compilation, so that nothing here has made torch guard on a size."""
    module, inputs = (Net(), (torch.randn(4, 8, 16),)) if name == SMALL else CASES[name].make()
    batch, length = inputs[0].shape[:2]
    budget = between(module, inputs) if with_budget else None
    backend = ckpt_pass.make_backend(budget=budget, inner="aot_eager")
    compiled = torch.compile(module, backend=backend, dynamic=True, fullgraph=True)
    shapes = [(batch, length), (3, length), (7, length), (batch, 17), (5, 9), (2, 31)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ckpt_pass.BudgetExceededWarning)
        for shape in shapes:
            args = shaped(inputs, *shape)
            measured = peak_of(lambda a=args: loss_of(compiled(*a)))
            (plan,) = backend.plans
            predicted = plan.peak_bytes_at(by_dimension(plan, *shape))
            assert abs(measured - predicted) <= SLACK, shape
    assert plan.peak_bytes == plan.peak_bytes_at(by_dimension(plan, batch, length))


def test_the_expression_is_the_simulator_at_every_size() -> None:
    """The same schedule, simulated with the bytes of other sizes, at sizes small and large."""
    module, inputs = CASES["gpt2"].make()
    with capture(module, *inputs, dynamic=True) as joint:
        decided = decide(joint, OPEN)
        dimensions = dimensions_of(joint)
        described, solution = decided.described, decided.solution
        peak = symbolic_peak(described, solution, dimensions)
    symbols = sorted(peak.free_symbols, key=str)
    assert 1 < len(peak.args) < 20  # of some 500 moments

    def at(nbytes: Any, values: dict[Any, int]) -> int:
        return nbytes if isinstance(nbytes, int) else int(nbytes.subs(values))

    for sizes in [(2, 3), (2, 500), (9, 3), (300, 40), (4, 32)]:
        values = dict(zip(symbols, sizes, strict=True))
        problem = described.problem
        workspaces = [at(nbytes, values) for nbytes in described.workspace_sizes]
        resized = replace(
            problem,
            ops=tuple(
                replace(op, workspace_bytes=nbytes)
                for op, nbytes in zip(problem.ops, workspaces, strict=True)
            ),
            storage_bytes=tuple(at(nbytes, values) for nbytes in described.storage_sizes),
        )
        profile = simulate(resized, solution.steps)
        assert at(peak, values) == profile.peak_bytes, sizes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_left_out_is_never_the_largest(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 4))
    signs = data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns))
    row = st.lists(st.integers(-5, 9), min_size=columns, max_size=columns)
    rows = np.array(data.draw(st.lists(row, min_size=1, max_size=12)), dtype=np.int64)
    kept = undominated(rows, signs)
    for _ in range(20):
        point = [data.draw(st.integers(0 if sign else -30, 30)) for sign in signs]
        assert (rows @ point).max() == (kept @ point).max()


def test_a_row_below_the_mean_of_two_others_goes() -> None:
    rows = np.array([[8, 0], [0, 8], [4, 4], [5, 4], [3, 4]], dtype=np.int64)
    assert sorted(undominated(rows, [True, True]).tolist()) == [[0, 8], [5, 4], [8, 0]]


def test_a_measured_workspace_grows_as_a_tensor_of_its_size_does() -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    ops = (Op("a", (), (0, 1), (0, 1), (0, 1, 2), True),)
    problem = Problem(ops, (800, 80, 24), (0,), (0,), (), ())

    def opened(nbytes: int) -> object:
        sizes = (8 * s * s, 8 * s, 24)  # at s = 10
        (found,) = open_workspaces(GraphProblem(problem, {}, (), sizes, (nbytes,), problem))
        return found

    assert opened(0) == 0
    assert opened(800) == 8 * s * s and opened(80) == 8 * s  # tensors of that size
    assert opened(48) == 48  # two sums for each feature
    assert opened(205) == 2 * s * s + 5  # a quarter of the larger output, and a rest


# --- a plan with open sizes -----------------------------------------------------------------


def test_a_plan_says_which_sizes_it_leaves_open() -> None:
    plan = dynamic_plan()
    symbols = plan.symbols
    assert list(symbols) == ["argument 0 dim 0", "argument 0 dim 1"]  # the weights fix the third
    static = ckpt_pass.plan(Net(), torch.randn(4, 8, 16))
    assert (static.symbols, static.peak_expression) == ({}, static.peak_bytes)
    assert static.peak_bytes_at({}) == static.peak_bytes == plan.peak_bytes
    there = {"argument 0 dim 0": 6, symbols["argument 0 dim 1"]: 20}
    other = ckpt_pass.plan(Net(), torch.randn(6, 20, 16))
    assert plan.peak_bytes_at(there) == other.peak_bytes
    summary = plan.summary()
    assert f"{symbols['argument 0 dim 0']} (argument 0 dim 0) was 4" in summary
    assert "predicted" in summary and "holds for" not in summary and plan.holds_for == ""


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"argument 0 dim 0": 4}, r"depends on s\d+ \(argument 0 dim 1\)"),
        ({}, r"depends on s\d+ \(argument 0 dim 0\), s\d+ \(argument 0 dim 1\)"),
        ({"argument 0 dim 5": 4}, r"called 'argument 0 dim 5'. Did you mean 'argument 0 dim"),
        ({"argument 0 dim 0": 1, "argument 0 dim 1": 8}, r"Got 1 for s\d+ .*expected 2 or more"),
    ],
)
def test_sizes_that_no_peak_can_be_told_for(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ckpt_pass.SizeError, match=message):
        dynamic_plan().peak_bytes_at(sizes)


def test_sizes_that_were_equal_share_a_symbol() -> None:
    plan = ckpt_pass.plan(Net(), torch.randn(8, 8, 16), dynamic=True)
    (symbol,) = set(plan.symbols.values())
    assert plan.peak_bytes_at({symbol: 8}) == plan.peak_bytes
    with pytest.raises(ckpt_pass.SizeError, match=r"Got 8 and 9 .* expected one size"):
        plan.peak_bytes_at({"argument 0 dim 0": 8, "argument 0 dim 1": 9})


def test_a_static_plan_has_no_sizes_to_give() -> None:
    with pytest.raises(ckpt_pass.SizeError, match=r"this plan is for one shape.*dynamic=True"):
        ckpt_pass.plan(Net(), torch.randn(4, 8, 16)).peak_bytes_at({"s0": 4})


def test_a_budget_says_for_which_sizes_it_holds() -> None:
    budget = 2 * dynamic_plan().peak_bytes
    plan = dynamic_plan(budget=budget)
    batch, length = plan.symbols["argument 0 dim 0"], plan.symbols["argument 0 dim 1"]
    first, second = plan.holds_for.split("; ")
    assert first.startswith(f"{batch} <= ") and first.endswith(f" where {length} = 8")
    assert second.startswith(f"{length} <= ") and second.endswith(f" where {batch} = 4")
    largest = int(first.split()[2])
    assert plan.peak_bytes_at({batch: largest, length: 8}) <= budget
    assert plan.peak_bytes_at({batch: largest + 1, length: 8}) > budget
    assert f"holds for  {plan.holds_for}" in plan.summary()


# --- under compile --------------------------------------------------------------------------


def test_a_run_beyond_the_budget_says_so_once() -> None:
    net = Net()
    budget = int(1.5 * ckpt_pass.plan(net, torch.randn(4, 8, 16)).peak_bytes)
    backend = ckpt_pass.make_backend(budget=budget, inner="aot_eager")
    compiled = torch.compile(net, backend=backend, dynamic=True, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(torch.randn(4, 8, 16)).backward()
        compiled(torch.randn(3, 9, 16)).backward()
    (plan,) = backend.plans
    peak = plan.peak_bytes_at(by_dimension(plan, 40, 8))
    with pytest.warns(ckpt_pass.BudgetExceededWarning) as caught:
        compiled(torch.randn(40, 8, 16)).backward()
        compiled(torch.randn(50, 8, 16)).backward()
    (warning,) = caught
    message = str(warning.message)
    assert f"peaks at {peak:,} bytes" in message and f"budget of {budget:,} bytes" in message
    assert " = 40" in message and plan.holds_for in message
    assert len(backend.plans) == 1


# --- fit ------------------------------------------------------------------------------------


def assert_fits(module: nn.Module, inputs: tuple[torch.Tensor, ...], budget: int, dim: str) -> None:
    """The answer's definition: measured within the budget there, infeasible one above."""
    found = ckpt_pass.fit(module, *inputs, budget=budget, dim=dim)
    batch, length = inputs[0].shape[:2]

    def args(size: int) -> tuple[torch.Tensor, ...]:
        shape = (size, length) if dim == "batch" else (batch, size)
        return tuple(torch.ones(*shape, *x.shape[2:], dtype=x.dtype) for x in inputs)

    backend = ckpt_pass.make_backend(budget=budget, inner="aot_eager")
    compiled = torch.compile(module, backend=backend, dynamic=False, fullgraph=True)
    there = args(found.size)
    assert peak_of(lambda: loss_of(compiled(*there))) <= budget
    assert found.peak_bytes <= budget < found.next_peak_bytes
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(module, *args(found.size + 1), budget=budget)
    assert caught.value.least_feasible_bytes == found.next_peak_bytes


@pytest.mark.parametrize("dim", ["batch", "sequence"])
def test_fit_finds_the_largest(dim: str) -> None:
    net, x = Net(), torch.randn(4, 8, 16)
    assert_fits(net, (x,), 5 * ckpt_pass.plan(net, x).peak_bytes, dim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dim"),
    [("gpt2", "batch"), ("llama", "batch"), ("bert", "batch"), ("llama", "sequence")],
)
def test_fit_finds_the_largest_of_real_models(name: str, dim: str) -> None:
    module, inputs = CASES[name].make()
    assert_fits(module, inputs, int(1.5 * ckpt_pass.plan(module, *inputs).peak_bytes), dim)


@pytest.mark.slow
def test_fit_does_not_depend_on_the_size_given() -> None:
    budget = 4 * ckpt_pass.plan(Net(), torch.randn(8, 8, 16)).peak_bytes
    found = [
        ckpt_pass.fit(Net(), torch.randn(size, 8, 16), budget=budget).size for size in (1, 8, 100)
    ]
    assert len(set(found)) == 1
    explicit = ckpt_pass.fit(Net(), torch.randn(2, 8, 16), budget=budget, dim={0: 0})
    assert (explicit.size, explicit.dim) == (found[0], "given")


def test_a_fraction_is_of_the_peak_at_the_size_given() -> None:
    net, x = Net(), torch.randn(64, 8, 16)
    found = ckpt_pass.fit(net, x, budget=1.0)
    assert found.budget_bytes == ckpt_pass.plan(net, x, budget=1.0).budget_bytes
    assert found.size >= 64


def test_fit_stops_where_the_model_does() -> None:
    found = ckpt_pass.fit(Net(limit=12), torch.randn(4, 8, 16), budget="1GiB", dim="sequence")
    assert (found.size, found.next_peak_bytes) == (12, None)
    assert "sequence 13 cannot be traced: Net cannot be traced" in str(found)


def test_fit_prints_what_it_found() -> None:
    found = ckpt_pass.fit(Net(), torch.randn(4, 8, 16), budget="200kB")
    first, second, *plan = str(found).splitlines()
    assert first.startswith(f"fits         batch {found.size} (argument 0 dim 0): ")
    assert f"{found.peak_bytes:,} of 200,000 bytes" in first
    assert f"batch {found.size + 1} needs {found.next_peak_bytes:,} bytes" in second
    assert "\n".join(plan) == found.plan.summary()


def test_fit_below_what_one_sample_needs() -> None:
    with pytest.raises(ckpt_pass.InfeasibleBudgetError, match="100 bytes; the least"):
        ckpt_pass.fit(Net(), torch.randn(4, 8, 16), budget=100)


class Flat(nn.Module):
    """Its memory does not depend on its argument's size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.sin().sum()


@pytest.mark.parametrize(
    ("model", "dim", "message"),
    [
        (Net(), "bach", r"Got dim='bach'. Did you mean 'batch'\?"),
        (Net(), {0: 3}, r"no argument 0 with a dimension 3: the arguments are \[4, 8, 16\]"),
        (Net(), {1: 0}, "no argument 1"),
        (Net(), {0: 2}, "works for the size 16 alone"),
        (Flat(), "batch", "does not depend on the size of argument 0 dim 0"),
    ],
)
def test_dimensions_that_cannot_vary(model: nn.Module, dim: Any, message: str) -> None:
    with pytest.raises(ckpt_pass.UnknownDimensionError, match=message):
        ckpt_pass.fit(model, torch.randn(4, 8, 16), budget="1MiB", dim=dim)


def test_arguments_of_several_sizes_and_of_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.fc(x).sum() + self.fc(y).sum()

    x, y = torch.randn(6, 4), torch.randn(3, 4)
    with pytest.raises(ckpt_pass.UnknownDimensionError, match=r"of the sizes \[3, 6\]"):
        ckpt_pass.fit(Two(), x, y, budget="1MiB", dim={0: 0, 1: 0})
    with pytest.raises(ckpt_pass.UnknownDimensionError, match="No argument has a batch"):
        ckpt_pass.fit(Net(), 3, budget="1MiB")
    assert ckpt_pass.fit(Two(), x, y, budget="1MiB").places == ("argument 0 dim 0",)


@pytest.mark.slow
def test_fit_on_the_command_line(tmp_path: Any) -> None:
    from typer.testing import CliRunner

    (tmp_path / "nets.py").write_text(
        "import torch\nfrom tests.graph.test_shapes import Net\n"
        "def make():\n    return Net(), torch.randn(4, 8, 16)\n"
    )
    found = ckpt_pass.fit(Net(), torch.randn(4, 8, 16), budget="200kB", dim="sequence")
    options = ["--budget", "200kB", "--dim", "sequence"]
    result = CliRunner().invoke(make_app(), ["fit", f"{tmp_path}/nets.py:make", *options])
    assert result.exit_code == 0
    assert result.stdout == f"{found}\n"


@settings(max_examples=100, deadline=None)
@given(largest=st.integers(1, 200), guess=st.integers(1, 300))
def test_the_search_finds_the_border_from_any_guess(largest: int, guess: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= largest

    assert largest_that_fits(fits, guess) == largest
    if guess == largest:
        assert asked == [largest, largest + 1]
    assert largest + 1 in asked
    assert len(asked) <= 2 * (abs(guess - largest) + 1).bit_length() + 2
