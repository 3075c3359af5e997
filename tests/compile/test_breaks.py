"""A budget and a model that dynamo does not compile as one graph: what runs, and what is said."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import ckpt_pass

HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()  # a function that dynamo gave up is not tried again
    yield
    torch._dynamo.reset()


class Stack(nn.Module):
    """An embedding, some wide layers and a loss; subclasses break."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for layer in self.layers:
            h = h + layer(h)
        return h.square().mean()


class Halved(Stack):
    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        torch._dynamo.graph_break()
        for layer in self.layers:
            h = h + layer(h)
        torch._dynamo.graph_break()
        return h.square().mean()


class DropsLayers(Stack):
    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for layer in self.layers:
            if torch.rand([]) < 0:  # whether a layer runs depends on a random number
                continue
            h = h + layer(h)
        return h.square().mean()


class Recurrent(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.table(x))[0].square().mean()


@torch.compiler.disable
def left_out(h: Tensor) -> Tensor:
    return h.sin()


class BeginsOutside(Stack):
    def forward(self, x: Tensor) -> Tensor:
        h = left_out(self.table.weight)[x]
        for layer in self.layers:
            h = h + layer(h)
        return h.square().mean()


def run(
    model: nn.Module, budget: float | str | int, **how: object
) -> tuple[ckpt_pass.Backend, Callable[..., Tensor], list[warnings.WarningMessage]]:
    """A compiled step, its gradients equal to the plain step's; what was said meanwhile."""
    x = torch.arange(256).remainder(50).view(8, 32)
    plain = copy.deepcopy(model)
    plain(x).backward()
    backend = ckpt_pass.make_backend(budget=budget, inner="aot_eager")
    compiled = torch.compile(model, backend=backend, **how)  # type: ignore[call-overload]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model.zero_grad()
            compiled(x).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    told = [w for w in said if issubclass(w.category, ckpt_pass.UncoveredBudgetWarning)]
    return backend, compiled, told


def test_one_graph_says_nothing() -> None:
    backend, _, told = run(Stack(), 0.5)
    assert len(backend.plans) == 1 and told == []


def test_a_cut_model_runs_at_a_fraction_and_says_where_it_was_cut() -> None:
    backend, _, (cut, raised) = run(Halved(), 0.5)
    assert len(backend.plans) == 3
    assert f"given to each graph of Halved.forward alone: dynamo cut it at {HERE}:" in str(
        cut.message
    )
    assert cut.filename == __file__ and "mode='eager'" in str(cut.message)
    # The embedding alone has nothing to give: it runs in the least that it can.
    assert "Halved.forward cannot run in 0.5 of its own peak" in str(raised.message)
    first, middle, _ = backend.plans
    for plan in backend.plans:
        assert plan.budget_bytes is not None and plan.peak_bytes <= plan.budget_bytes
    assert first.plain_timeline is not None and middle.plain_timeline is not None
    assert first.peak_bytes == first.plain_timeline.peak_bytes
    assert middle.peak_bytes <= 0.5 * middle.plain_timeline.peak_bytes


def test_bytes_and_whole_graphs_are_refused_as_ever() -> None:
    with pytest.raises(Exception, match="No plan fits a peak of 16 bytes"):
        run(Halved(), 16)
    with pytest.raises(Exception, match="No plan fits"):
        run(Stack(depth=1), 0.01)


GIVES_UP_RNNS = TorchVersion(torch.__version__) < (2, 15)  # later, it compiles what is around


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (DropsLayers(), "Data-dependent branching"),
        pytest.param(
            Recurrent(),
            "RNN, GRU, or LSTM",
            marks=pytest.mark.skipif(not GIVES_UP_RNNS, reason="not given up"),
        ),
    ],
)
def test_a_function_that_dynamo_gives_up_is_named_once(model: nn.Module, why: str) -> None:
    backend, _, (said,) = run(model, 64)
    message = str(said.message)
    assert len(backend.plans) == 0
    assert f"does not cover {type(model).__name__}.forward ({HERE}:" in message
    assert why in message and f"because of {HERE}:" in message and said.filename == __file__


@pytest.mark.skipif(GIVES_UP_RNNS, reason="given up")
def test_a_budget_is_that_of_each_graph_around_an_rnn() -> None:
    backend, _, (cut, *_) = run(Recurrent(), 0.9)
    assert backend.plans
    assert "given to each graph of Recurrent.forward alone" in str(cut.message)


def test_what_runs_before_the_first_graph_is_spoken_of() -> None:
    _, _, told = run(BeginsOutside(), 0.9)
    assert "graph of BeginsOutside.forward alone" in str(told[0].message)


def test_functions_that_a_skipped_one_calls() -> None:
    inner = Halved()

    def outer(x: Tensor) -> Tensor:
        total = torch.zeros(())
        for _ in range(2):
            total = total + wrapped(x)
            torch._dynamo.graph_break()
        return total

    def wrapped(x: Tensor) -> Tensor:
        return inner(x)

    backend = ckpt_pass.make_backend(budget=0.5, inner="aot_eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ckpt_pass.UncoveredBudgetWarning)
        torch.compile(outer, backend=backend)(torch.arange(64).remainder(50)).backward()
    told = [str(w.message) for w in said if w.category is ckpt_pass.UncoveredBudgetWarning]
    assert len(backend.plans) >= 3  # each a part of the step, and the embedding alone is feasible
    assert "does not cover test_functions_that_a_skipped_one_calls.<locals>.outer" in told[0]
    assert not any("given to each graph" in message for message in told)


def test_a_filter_that_makes_errors_of_warnings_leaves_dynamo_whole() -> None:
    backend = ckpt_pass.make_backend(budget=64, inner="aot_eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("error", ckpt_pass.UncoveredBudgetWarning)
        torch.compile(DropsLayers(), backend=backend)(
            torch.zeros(2, 3, dtype=torch.long)
        ).backward()
    assert [w.category for w in said] == [ckpt_pass.UncoveredBudgetWarning]
    torch._dynamo.reset()  # raises if dynamo believes that a compilation has not ended
    assert len(run(DropsLayers(), 64)[2]) == 1


def test_a_budget_among_the_options_and_no_budget() -> None:
    x = torch.zeros(2, 3, dtype=torch.long)
    options = {"budget": 64, "inner": "aot_eager"}
    backend = ckpt_pass.make_backend()
    with pytest.warns(ckpt_pass.UncoveredBudgetWarning, match="budget of 64 does not cover"):
        torch.compile(DropsLayers(), backend=backend, options=options)(x).backward()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ckpt_pass.UncoveredBudgetWarning)
        torch.compile(DropsLayers(), backend=ckpt_pass.make_backend(inner="aot_eager"))(
            x
        ).backward()


def test_one_graph_asked_for_is_torchs_own_error() -> None:
    with (
        warnings.catch_warnings(),
        pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"),
    ):
        warnings.simplefilter("error", ckpt_pass.UncoveredBudgetWarning)
        run(Recurrent(), 64, fullgraph=True)
