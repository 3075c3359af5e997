"""Steps that dynamo cuts in several graphs, planned together."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ckpt_pass
from ckpt_pass._torch import compilers
from ckpt_pass.compile.engine import OPEN, Partitioner
from ckpt_pass.plans.goal import as_goal
from ckpt_pass.policy.named import as_policy
from ckpt_pass.steps.choosing import Level, choose, least, moments_of, peak_of
from ckpt_pass.steps.graphs import GraphCall, StepRun
from ckpt_pass.steps.running import FakeStep
from tests.zoo import Built, run_step, seeded


class Block(nn.Module):
    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(x))))


@torch.compiler.disable
def apart(x: Tensor) -> Tensor:
    """What dynamo never sees; it saves values of its own."""
    return x.sin() * x.cos()


class Cut(nn.Module):
    """Dynamo cuts it before its layers, between them, and where a value is looked at."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(50, 32)
        self.first = nn.Sequential(*(Block(dropout=0.1) for _ in range(2)))
        self.norm = nn.BatchNorm1d(32)
        self.second = nn.Sequential(*(Block() for _ in range(2)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.kind == "twice":
            torch._dynamo.graph_break()
        x = self.norm(self.first(x))
        if self.kind == "apart":
            x = apart(x)
        elif self.kind == "looks":
            if x.sum().item() > 1e9:
                x = x.clamp(-1, 1)
        else:
            torch._dynamo.graph_break()
        return nn.functional.mse_loss(self.second(x), x.detach())


class Loop(nn.Module):
    """Dynamo gives its forward up and compiles what it calls: the layers."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x.square().mean()


@functools.cache
def cut(kind: str) -> Callable[[], Built]:
    return seeded(lambda: (Cut(kind), (torch.randint(0, 50, (1024,)),)))


loop = seeded(lambda: (Loop(), (torch.randn(1024, 32),)))


@functools.cache
def planned(make: Callable[[], Built], budget: float | int) -> ckpt_pass.StepPlan:
    model, inputs = make()
    plan = ckpt_pass.plan(model, *inputs, budget=budget)
    assert isinstance(plan, ckpt_pass.StepPlan)
    return plan


def measured(make: Callable[[], Built], plan: ckpt_pass.StepPlan | str | Path) -> int:
    """The peak of the step that carries a plan out; its gradients are those of the plain one."""
    model, inputs = make()
    expected = run_step(*make())
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ckpt_pass.UncoveredBudgetWarning)
        compiled = torch.compile(model, backend=backend)
        found = run_step(model, inputs, forward=compiled)
        assert torch.equal(found.loss, expected.loss)
        for name, gradient in expected.gradients.items():
            assert torch.equal(found.gradients[name], gradient), name
        for name, buffer in expected.buffers.items():
            assert torch.equal(found.buffers[name], buffer), name
        return ckpt_pass.measure_step(lambda: compiled(*inputs), repeats=1).peak_bytes


@pytest.mark.parametrize("kind", ["twice", "apart", "looks"])
def test_the_whole_step_is_within_the_budget(kind: str, tmp_path: Path) -> None:
    plan = planned(cut(kind), 0.5)
    assert plan.budget_bytes == plan.plain_peak_bytes // 2
    assert plan.peak_bytes <= plan.budget_bytes
    assert len(plan.parts) == (3 if kind == "twice" else 2)
    assert measured(cut(kind), plan.save(tmp_path / "plan.json")) == plan.peak_bytes


def test_a_graph_for_each_layer() -> None:
    plan = planned(loop, 0.6)
    # The layers after the first share one graph, and its plan.
    assert len(plan.parts) == 2 and plan.budget_bytes is not None
    assert measured(loop, plan) == plan.peak_bytes <= plan.budget_bytes
    assert plan.outside_bytes <= plan.peak_bytes


def test_a_refusal_names_what_can_be_met() -> None:
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        planned(cut("apart"), 1000)
    plan = planned(cut("apart"), caught.value.least_feasible_bytes)
    assert measured(cut("apart"), plan) == plan.peak_bytes <= caught.value.least_feasible_bytes


def test_a_policy_alone() -> None:
    model, inputs = cut("twice")()
    plan = ckpt_pass.plan(model, *inputs, policy="save-matmul")
    assert isinstance(plan, ckpt_pass.StepPlan) and plan.budget_bytes is None
    assert measured(cut("twice"), plan) == plan.peak_bytes < plan.plain_peak_bytes


def test_the_model_stays_as_it_was() -> None:
    model, inputs = cut("looks")()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ckpt_pass.plan(model, *inputs, budget=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_says_what_it_is() -> None:
    plan = planned(cut("twice"), 0.5)
    text = str(plan)
    assert "3 with a backward" in text and text.count("  at ") == 2 == len(plan.breaks)
    assert plan.decisions[0] in plan.parts[0].decisions
    assert ckpt_pass.StepPlan.from_json(plan.to_json()) == plan
    with pytest.raises(ckpt_pass.PlanFileError, match=r"StepPlan\.load"):
        ckpt_pass.Plan.from_json(plan.to_json())
    with pytest.raises(ckpt_pass.PlanFileError, match="checksum"):
        ckpt_pass.StepPlan.from_json(plan.to_json().replace('"peak_bytes": ', '"peak_bytes": 1'))


def test_other_plans_take_no_other_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = cut("apart")()
    step, compiled = FakeStep(model, inputs, {}), list[object]()
    real = compilers.compile_eager
    monkeypatch.setattr(compilers, "compile_eager", lambda *a: compiled.append(a) or real(*a))
    plain = Partitioner(OPEN, in_place=True, goal=as_goal(1 << 40))
    tight = Partitioner(as_policy("save-nothing"), in_place=True)
    with step.opened(plain) as runs:
        before = len(compiled)
        again, other, back = runs.again(plain), runs.again(tight), runs.again(plain)
        assert len(compiled) == before
    with step.opened(tight) as alone:
        assert other.curve.most() == alone.first.curve.most() != runs.first.curve.most()
    for run in (again, back):
        assert run.curve.bytes_at == runs.first.curve.bytes_at


class Copies(nn.Module):
    """The user's own hooks copy what the graphs save."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.Tensor.contiguous):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x).square().mean()


def test_values_that_hooks_of_the_user_take() -> None:
    make = seeded(lambda: (Copies(), (torch.randn(256, 32),)))
    plan = planned(make, 0.9)
    assert measured(make, plan) == plan.peak_bytes


def test_the_same_on_every_run() -> None:
    assert planned.__wrapped__(cut("apart"), 0.5) == planned(cut("apart"), 0.5)


def test_verify_and_explain() -> None:
    model, inputs = cut("apart")()
    verdict = ckpt_pass.verify(model, *inputs, plan=planned(cut("apart"), 0.5))
    assert verdict.ok, str(verdict)
    assert "graph 1" in ckpt_pass.explain(model, *inputs)


def test_another_step_is_refused() -> None:
    plan = planned(cut("twice"), 0.5)
    model, inputs = loop()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan, inner="aot_eager"))
    with pytest.raises(BackendCompilerFailed, match="nearest of 3 plans") as caught:
        compiled(*inputs)
    assert isinstance(caught.value.inner_exception, ckpt_pass.PlanMismatchError)


def test_sharing_a_budget_is_as_good_as_trying_all() -> None:
    from ckpt_pass.graph.held import Curve

    at = (2, 4, 5, 9, 10, 16, 12, 20, 14, 11, 6)
    curve = Curve(tuple(n << 20 for n in at), ("",) * len(at))
    calls = (
        GraphCall(0, (1, 3), (8, 10)),
        GraphCall(1, (3, 5), (6, 8)),
    )
    moments = moments_of(StepRun((), calls, curve, ()))
    levels = [
        [Level(b, 0, -s << 20, -f << 20, -s << 20, t) for b, s, f, t in some]
        for some in (
            [(1, 4, 1, 5.0), (2, 2, 1, 2.0), (9, 0, 0, 0.0)],
            [(1, 6, 2, 4.0), (2, 3, 1, 1.0), (9, 0, 0, 0.0)],
        )
    ]

    def peak(choice: tuple[int, int]) -> int:
        return peak_of(moments, levels, choice)

    choices = [(one, other) for one in range(3) for other in range(3)]
    lowest = min(map(peak, choices))
    assert peak(tuple(least(moments, levels))) == lowest  # type: ignore[arg-type]
    assert choose(moments, levels, lowest - 100) is None
    for budget in sorted(set(map(peak, choices))):
        fits = [c for c in choices if peak(c) <= budget]
        best = min(sum(levels[g][n].time_s for g, n in enumerate(c)) for c in fits)
        found = choose(moments, levels, budget)
        assert found is not None and peak(tuple(found)) <= budget  # type: ignore[arg-type]
        assert sum(levels[g][n].time_s for g, n in enumerate(found)) == best


class Halves(nn.Module):
    """Dynamo cuts each layer in two; the input of the first half of the first needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        torch._dynamo.graph_break()
        return x + self.down(hidden.tanh())


def test_forwards_that_are_alike_have_backwards_of_their_own() -> None:
    model, x = nn.Sequential(Halves(), Halves()), torch.randn(64, 32)
    plan = ckpt_pass.plan(model, x, budget=1.0, loss_fn=torch.sum)
    assert isinstance(plan, ckpt_pass.StepPlan)
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ckpt_pass.BudgetExceededWarning)
        compiled(x).sum().backward()
    assert len({part.peak_bytes for part in plan.parts if len(part.sites) == 2}) == 2
    made = {(part.peak_bytes, part.budget_bytes) for part in plan.parts}
    assert {(run.peak_bytes, run.budget_bytes) for run in backend.plans} <= made


class Towers(nn.Module):
    """One layer, which dynamo cuts in two, for rows of either of two lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Halves()

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.layer(queries).square().mean() + self.layer(keys).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("known", ["nothing", "these sizes", "none but the sizes"])
def test_sizes_that_change_within_a_step(known: str) -> None:
    torch.manual_seed(0)
    model, inputs = Towers(), (torch.randn(24, 32), torch.randn(96, 32))
    plan = ckpt_pass.plan(model, *inputs, budget=1.0)
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
    if known == "these sizes":  # another step of the same model has taught them
        torch.compile(model, backend="aot_eager")(*inputs)
    compiled = torch.compile(model, backend=backend, dynamic=True if "none" in known else None)
    with warnings.catch_warnings():
        if known == "nothing":
            warnings.simplefilter("error", ckpt_pass.BudgetExceededWarning)
        found = ckpt_pass.measure_step(lambda: compiled(*inputs), repeats=1)
    assert found.peak_bytes == plan.peak_bytes


class Edges(nn.Module):
    """Messages along edges, but those of a node to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(8, 8)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[:, edges[0] != edges[1]]
        sent = self.message(nodes).tanh()
        return (sent[source] * sent[target]).square().mean()


class Packed(nn.Module):
    """Sequences of given lengths, packed: dynamo leaves the LSTM to Python, whose step runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)

    def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
        rows = self.first(rows)
        packed = pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].square().mean()


def edges() -> Built:
    return Edges(), (torch.randn(16, 8), torch.randint(0, 16, (2, 400)))


def packed() -> Built:
    return Packed(), (torch.randn(4, 12, 8), torch.tensor([12, 3, 2, 6]))


@pytest.mark.parametrize("make", [edges, packed])
def test_what_is_sized_by_values_is_as_large_as_these_say(make: Callable[[], Built]) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    plan = ckpt_pass.plan(model, *inputs, budget=1.0)
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    found = ckpt_pass.measure_step(lambda: compiled(*inputs), repeats=1)
    assert found.peak_bytes == plan.peak_bytes


class Drawing(Block):
    """Draws a number of Python's in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(random.random())
        return super().forward(x)


def test_numbers_that_resumed_code_draws() -> None:
    """Dynamo fails on them on fake tensors that are told of values: the step runs for real."""
    model = nn.Sequential(Drawing(), Drawing())
    x = torch.randn(64, 32)
    state = random.getstate()
    # Not to the byte: dynamo compiles such code anew in every run, and gives it up at last.
    plan = ckpt_pass.plan(model, x, budget="1MB", loss_fn=lambda out: out.square().mean())
    assert isinstance(plan, ckpt_pass.StepPlan) and plan.parts
    assert random.getstate() == state and not any(block.drawn for block in model)
