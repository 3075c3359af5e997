"""What is planned ahead of time is what ``torch.compile`` then asks for: one capture, dynamo's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers.modeling_outputs import CausalLMOutput

import ckpt_pass
from tests.zoo import hf

WIDTH = 16
CASES = {case.name: case for case in hf.CASES}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    """Three blocks; what programs below do otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x).square().mean()

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class LossMadeHere(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return nn.SmoothL1Loss()(self.run(x), torch.zeros_like(x))


class OwnGetattr(Stack):
    def __getattr__(self, name: str) -> Any:
        return 3 if name == "number_of_layers" else super().__getattr__(name)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = OwnGetattr()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = x.tanh(), x.sigmoid()
        ctx.save_for_backward(one, other)
        return one, other

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        one, other = ctx.saved_tensors
        return grads[0] * (1 - one * one) + grads[1] * other * (1 - other)


class TwoOutputs(Stack):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            one, other = Both.apply(layer(x))
            x = one * other
        return x


class OutsideTheTree(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [Block()]  # a list's modules are no submodules

    def run(self, x: Tensor) -> Tensor:
        return self.hidden[0](super().run(x))


class Tied(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].up.weight = self.layers[0].up.weight


class HoldsTensors(Stack):
    """A constant that is no buffer, one in a list, and one that the first call makes and keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shifts, self.kept = torch.ones(WIDTH), [torch.zeros(WIDTH)], None

    def run(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.linspace(0, 1, WIDTH)
        return super().run(x * self.scale + self.shifts[0] * self.kept)


class Normalised(Stack):
    """Weights that every forward assigns anew: the module holds them after it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)))


class Inverse(Stack):
    def run(self, x: Tensor) -> Tensor:
        x = super().run(x)
        return torch.linalg.inv(x.T @ x + torch.eye(WIDTH))


ODD = [
    LossMadeHere,
    Around,
    TwoOutputs,
    OutsideTheTree,
    Tied,
    HoldsTensors,
    Normalised,
    Inverse,
]


def gradients(step: Callable[..., Any], model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    model.zero_grad()
    step(*args).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_carried_out(model: nn.Module, args: tuple[Any, ...], **options: Any) -> None:
    """The plan made ahead, the backend's own, and the plan carried out by a backend agree."""
    ahead = ckpt_pass.plan(model, *args, **options)
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(inner="aot_eager", **options)
    torch.compile(copy.deepcopy(model), backend=backend)(*args)  # a step may change its model
    (there,) = backend.plans
    assert (ahead.fingerprint, ahead.peak_bytes) == (there.fingerprint, there.peak_bytes)
    assert ahead.signature == there.signature
    assert [(d.site, d.fate) for d in ahead.decisions] == [
        (d.site, d.fate) for d in there.decisions
    ]
    torch._dynamo.reset()
    again = ckpt_pass.make_backend(plan=ahead, inner="aot_eager")
    torch.compile(model, backend=again)(*args).backward()
    assert again.plans[0].peak_bytes == ahead.peak_bytes


LLAMA = pytest.param("llama", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["gpt2", LLAMA, "mixtral", "bert", "vit", "resnet"])
def test_models_as_they_are_used(name: str) -> None:
    model, inputs = CASES[name].make()
    assert_carried_out(model, inputs)


@pytest.mark.parametrize("program", ODD, ids=lambda cls: cls.__name__)
def test_odd_models(program: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = program()
    assert_carried_out(model, (torch.randn(64, WIDTH),), policy="save-matmul")


def test_gradients_of_a_plan_made_ahead_within_a_budget() -> None:
    torch.manual_seed(0)
    model, x = HoldsTensors(), torch.randn(64, WIDTH)
    plan = ckpt_pass.plan(model, x, budget=0.7)
    assert model.kept is None
    plain = gradients(torch.compile(model, backend="aot_eager"), model, (x,))
    torch._dynamo.reset()
    model.kept = None
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan, inner="aot_eager"))
    for one, other in zip(plain, gradients(compiled, model, (x,)), strict=True):
        assert torch.equal(one, other)


def test_names_under_a_getattr_of_the_class() -> None:
    plan = ckpt_pass.plan(Around(), torch.randn(8, WIDTH))
    assert plan.regions == tuple(f"inner.layers.{n}" for n in range(3))


def test_verify_with_a_loss_function() -> None:
    model, x = nn.Sequential(Block(), Block()), torch.randn(64, WIDTH)
    verdict = ckpt_pass.verify(model, x, policy="save-matmul", loss_fn=lambda y: y.square().mean())
    assert verdict.ok, verdict


def test_real_fake_and_meta_tensors_give_one_plan() -> None:
    real, x = Tied(), torch.randn(32, WIDTH)
    with torch.device("meta"):
        on_meta = Tied()
    with FakeTensorMode():
        fake, fake_x = Tied(), torch.randn(32, WIDTH)
    plans = [
        ckpt_pass.plan(real, x, budget=0.8),
        ckpt_pass.plan(fake, fake_x, budget=0.8),
        ckpt_pass.plan(on_meta, x.to("meta"), budget=0.8),
        ckpt_pass.plan(on_meta, x, budget=0.8),
    ]
    assert len({(plan.fingerprint, plan.peak_bytes, plan.saved_bytes) for plan in plans}) == 1


class Named(nn.Module):
    """Arguments by name, one of which has the name of an option of plan()."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x: Tensor, *, scale: float = 1.0, budget: Tensor | None = None) -> Tensor:
        out = self.stack.run(x) * scale
        return (out if budget is None else out * budget).square().mean()


def test_keyword_arguments() -> None:
    model, x, weight = Named(), torch.randn(32, WIDTH), torch.rand(32, 1)
    plain = ckpt_pass.plan(model, x)
    assert ckpt_pass.plan(model, x=x).fingerprint == plain.fingerprint
    weighted = ckpt_pass.plan(model, x, scale=2.0, kwargs={"budget": weight})
    assert weighted.fingerprint != plain.fingerprint
    assert "argument budget" in [value.provenance for value in weighted.saved]
    assert "mul" in ckpt_pass.explain(model, x, scale=2.0)
    assert ckpt_pass.verify(model, x, policy="save-matmul", kwargs={"budget": weight}).ok
    fit = ckpt_pass.fit(model, x=x, budget="256KiB")
    assert fit.places == ("argument x dim 0",)
    with pytest.raises(ckpt_pass.StepArgumentError, match=r"'polcy'.*Did you mean 'policy'"):
        ckpt_pass.plan(model, x, polcy="save-matmul")


def test_what_is_no_model_is_told_so() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)

    def step(x: Tensor) -> Tensor:
        loss: Tensor = layer(x).sum()
        return loss

    tools: list[Callable[[Any], Any]] = [
        lambda given: ckpt_pass.plan(given, x, budget=0.9),
        lambda given: ckpt_pass.plan(given, x, budget=0.9, mode="eager"),
        lambda given: ckpt_pass.compare_strategies(given, x),
        lambda given: ckpt_pass.apply(given, "all"),
        ckpt_pass.remove,
    ]
    for tool in tools:
        with pytest.raises(ckpt_pass.NotAModuleError, match=r"of type function, expected a model"):
            tool(step)


def test_options_of_a_wrong_kind_are_told_so() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(ckpt_pass.StepArgumentError, match="got kwargs=3 of type int"):
        ckpt_pass.plan(layer, x, kwargs=3)  # type: ignore[arg-type]
    with pytest.raises(ckpt_pass.UnknownOptionError, match="Got regions=3"):
        ckpt_pass.plan(layer, x, regions=3)  # type: ignore[arg-type]
    with pytest.raises(ckpt_pass.PlanModeError, match="Got mode=3"):
        ckpt_pass.plan(layer, x, budget=0.9, mode=3)  # type: ignore[arg-type]


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stack(), Stack()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first.run(x)
        torch._dynamo.graph_break()
        return self.second(x)


class LateStart(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return super().forward(x)


class BreakInALoop(Stack):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("program", "words"),
    [(Halves, r"2 with a backward.*test_capture\.py:\d+ in forward"), (BreakInALoop, r"cuts the")],
)
def test_tools_of_one_graph_refuse_a_step_that_dynamo_cuts(
    program: type[nn.Module], words: str
) -> None:
    with pytest.raises(ckpt_pass.SeveralGraphsError, match=words):
        ckpt_pass.saved_activations(program(), torch.randn(8, WIDTH))


def test_a_break_before_the_only_backward_is_told() -> None:
    plan = ckpt_pass.plan(LateStart(), torch.randn(8, WIDTH))
    assert isinstance(plan, ckpt_pass.StepPlan) and len(plan.parts) == 1
    assert "test_capture.py" in plan.breaks[0]


def test_planning_does_not_count_as_a_compilation() -> None:
    """Neither dynamo's limit of compilations nor what it remembers of shapes is touched."""
    model = Stack()
    for batch in range(2, 12):
        ckpt_pass.plan(model, torch.randn(batch, WIDTH))
    backend = ckpt_pass.make_backend(inner="aot_eager")
    torch.compile(model, backend=backend)(torch.randn(12, WIDTH))
    assert [plan.dimensions for plan in backend.plans] == [()]


class ByHand(torch.autograd.Function):
    """A layer that keeps its input alone; dynamo leaves it to Python."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *weights)
        with torch.no_grad():
            found: torch.Tensor = x + layer(x)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            y = again + ctx.layer(again)
        return (None, *torch.autograd.grad(y, (again, *weights), gradients))


class Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = ByHand.apply(lambda z, layer=layer: layer(z).tanh(), x, *layer.parameters())
        return x.sum()


def test_a_backward_that_is_in_no_graph_is_said() -> None:
    """It trains; what torch.compile makes of it has no backward."""
    with pytest.raises(
        ckpt_pass.NotTraceableError, match=r"no graph of Reversed that has a backward.*eager"
    ):
        ckpt_pass.plan(Reversed(), torch.randn(4, 16), budget=1.0)


def test_an_output_that_the_step_makes_itself_has_no_name() -> None:
    """After a break dynamo knows such an output by a source that it refuses to name."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> CausalLMOutput:
            y = self.layer(x)
            torch._dynamo.graph_break()
            return CausalLMOutput(loss=y.square().mean(), logits=y)

    plan = ckpt_pass.plan(Cut(), torch.randn(4, 8), budget=1.0, loss_fn=lambda out: out.loss)
    assert isinstance(plan, ckpt_pass.StepPlan) and len(plan.parts) == 2
