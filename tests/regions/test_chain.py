"""Regions in a row: what a segment holds, what it falls back on, and that the step is the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential as torchs_sequential

import ckpt_pass
from ckpt_pass import (
    CheckpointedSequential,
    Megatron,
    NotSequentialError,
    SegmentCountError,
    SegmentError,
    Segments,
    applied,
    checkpoint_sequential,
)
from ckpt_pass.measure.step import measure_step
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions
from tests.told import Told
from tests.zoo import run_step

WIDTH = 64
ROWS = 1024
NORMS = ("layernorm",)
UNIT = WIDTH * ROWS * 4  # bytes of one value between layers


class Block(nn.Module):
    """A residual block with dropout; calls are counted."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.runs[self] = CALLS.runs.get(self, 0) + 1
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))  # type: ignore[no-any-return]


#: How often each block ran; regions put back what they know of, not this.
CALLS = Told()
CALLS.runs = weakref.WeakKeyDictionary()
Glue = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Blocks in a row with something between them; a loss."""

    def __init__(self, depth: int = 8, glue: Glue | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.glue = glue

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.glue is not None:
                x = self.glue(x)
        return x.square().mean()


def net(**options: Any) -> Net:
    torch.manual_seed(1)
    return Net(**options).train()


def values() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))


def assert_same(model: nn.Module, placement: Any, x: Tensor) -> None:
    wanted = run_step(model, (x,))
    with applied(model, placement):
        got = run_step(model, (x,))
    assert torch.equal(got.loss, wanted.loss)
    assert got.gradients.keys() == wanted.gradients.keys()
    assert all(torch.equal(got.gradients[name], g) for name, g in wanted.gradients.items())


def peak_bytes(model: nn.Module, placement: Any, x: Tensor) -> int:
    with applied(model, placement):
        return measure_step(lambda: model(x), warmup=0, repeats=1).peak_bytes


# --- what is held ---------------------------------------------------------------------------


def test_a_segment_holds_what_enters_it() -> None:
    model, x = net(depth=16), values()
    plain, every = peak_bytes(model, "none", x), peak_bytes(model, "all", x)
    four, one = peak_bytes(model, Segments(4), x), peak_bytes(model, Segments(1), x)
    nested = peak_bytes(model, Segments(4, nested=True), x)
    # All of a single segment is there when its backward begins.
    assert every < four < one and abs(one - plain) < plain / 10
    # 16 values between layers, or 4 for the segments and up to 4 inside one of them.
    assert 7 * UNIT < every - nested < 10 * UNIT


def test_a_norm_whose_output_is_made_again() -> None:
    model, x = net(depth=8), values()
    plain, freed = peak_bytes(model, "none", x), peak_bytes(model, Megatron(modules=NORMS), x)
    assert abs(plain - freed - 8 * UNIT) < UNIT / 2  # one value in each block
    assert_same(model, Megatron(modules=NORMS), x)


def test_how_often_layers_run() -> None:
    model, x = net(depth=6), values()

    def calls(placement: Any) -> list[int]:
        for layer in model.layers:
            CALLS.runs[layer] = 0
        with applied(model, placement):
            model(x).backward()
        return [CALLS.runs[layer] for layer in model.layers]

    assert calls("none") == [1] * 6
    assert calls(Segments(2)) == [2] * 6
    assert calls(Segments(2, nested=True)) == [3, 3, 2, 3, 3, 2]


# --- the same step --------------------------------------------------------------------------


def in_place(x: Tensor) -> Tensor:
    return x.add_(0.5)


def scaled(x: Tensor) -> Tensor:
    return x * 0.5


@pytest.mark.parametrize("glue", [None, in_place, scaled, torch.Tensor.contiguous, torch.Tensor.t])
@pytest.mark.parametrize("placement", [Segments(2), Segments(1), Segments(2, nested=True)])
def test_whatever_stands_between_layers(glue: Glue | None, placement: Any) -> None:
    x = values()[:WIDTH] if glue is torch.Tensor.t else values()[:32]
    assert_same(net(depth=5, glue=glue), placement, x)


@pytest.mark.parametrize("nested", [False, True])
def test_double_backward(nested: bool) -> None:
    model = net(depth=4, dropout=0.0).double()
    x = values()[:4].double().requires_grad_()

    def second() -> list[Tensor]:
        model.zero_grad()
        (slope,) = torch.autograd.grad(model(x), x, create_graph=True)
        slope.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = second()
    with applied(model, Segments(2, nested)):
        got = second()
    assert len(wanted) == len(got) > 0
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("nested", [False, True])
def test_two_forwards_before_the_backwards(nested: bool) -> None:
    model, x = net(depth=4, dropout=0.0), values()[:16]

    def both() -> list[Tensor]:
        model.zero_grad()
        first, second = model(x), model(2 * x)
        first.backward(retain_graph=True)
        (second + first).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = both()
    with applied(model, Segments(2, nested)):
        got = both()
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("nested", [False, True])
def test_under_autocast(nested: bool) -> None:
    model, x = net(depth=4), values()[:16]

    def step(placement: Any) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        with applied(model, placement):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x)
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted, got = step("none"), step(Segments(2, nested))
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_a_backward_from_the_middle() -> None:
    model, x = net(depth=4, dropout=0.0), values()[:16]

    def middle() -> list[Tensor]:
        model.zero_grad()
        seen: list[Tensor] = []
        handle = model.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        loss = model(x)
        handle.remove()
        seen[0].sum().backward(retain_graph=True)
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = middle()
    with applied(model, Segments(1)):
        got = middle()
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_inside_an_outer_region_and_under_saved_tensor_hooks() -> None:
    model, x = net(depth=4, dropout=0.0), values()[:16]
    wanted = run_step(model, (x,))
    with applied(model, Segments(2)):
        outer = run_step(model, (x,), lambda x: ckpt_pass.checkpoint(model, x))
        with torch.autograd.graph.save_on_cpu():
            hooked = run_step(model, (x,))
    for got in (outer, hooked):
        assert all(torch.equal(got.gradients[n], g) for n, g in wanted.gradients.items())


def test_a_long_segment_needs_no_deep_stack() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(1500)))
    x = torch.randn(2, 2)
    model(x).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with applied(model, "segments-1"):
        model(x).sum().backward()
    got = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True) if b is not None)


def test_nothing_is_left_when_some_values_are_never_asked_for() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.b(x).cos()
            told.seen.append(weakref.ref(hidden))
            return self.a(x).sin(), hidden.exp()

    told = Told()
    told.seen = seen = []
    first, second = ckpt_pass.checkpoint(Two(), torch.randn(4, 8, requires_grad=True))
    first.sum().backward()
    assert len(seen) == 2
    del first, second
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


def test_regions_out_of_order() -> None:
    model = net(depth=3)
    for specs in (
        {"layers.1": RegionSpec(follows=("layers.0",)), "layers.0": RegionSpec()},
        {"layers.1": RegionSpec(follows=("layers.2",))},
    ):
        with pytest.raises(SegmentError, match="stand before it"), applied_regions(model, specs):
            pass
        assert not any("forward" in module.__dict__ for module in model.modules())


# --- sequential -----------------------------------------------------------------------------


def steps(depth: int = 6) -> list[nn.Module]:
    torch.manual_seed(4)
    return [
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        for _ in range(depth)
    ]


Run = Callable[[Any, Tensor], Tensor]


def result(run: Run, chain: Any) -> tuple[list[Tensor], list[Tensor]]:
    model = nn.ModuleList(chain)
    model.zero_grad()
    torch.manual_seed(5)
    x = torch.randn(16, 8, requires_grad=True)
    run(chain, x).square().sum().backward()
    assert x.grad is not None
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [x.grad, *gradients], [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("policy", [None, "save-matmul"])
@pytest.mark.parametrize("segments", [1, 3, 6, None])
def test_sequential_equals_the_plain_chain(segments: int | None, policy: str | None) -> None:
    wanted = result(lambda chain, x: chain(x), nn.Sequential(*steps()))
    torchs = result(lambda c, x: torchs_sequential(c, 3, x, use_reentrant=False),
                    nn.Sequential(*steps()))  # fmt: skip
    for got in (
        result(lambda c, x: checkpoint_sequential(c, segments, x, policy), nn.Sequential(*steps())),
        result(lambda c, x: checkpoint_sequential(c, segments, x, policy), steps()),
        result(
            lambda c, x: c(x), CheckpointedSequential(*steps(), segments=segments, policy=policy)
        ),
    ):
        for mine, theirs in zip(got, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(torchs[0], wanted[0], strict=True))


def test_functions_are_steps_too() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    chain = [torch.sin, lambda x: x @ weight, nn.Tanh(), torch.cos]
    x = torch.randn(4, 8, requires_grad=True)
    checkpoint_sequential(chain, 2, x).sum().backward()
    got, weight.grad = weight.grad, None
    torch.cos(torch.tanh(torch.sin(x) @ weight)).sum().backward()
    assert got is not None and weight.grad is not None and torch.equal(got, weight.grad)


def test_checkpointed_sequential_is_a_sequential() -> None:
    plain, ours = nn.Sequential(*steps()), CheckpointedSequential(*steps(), segments=2)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    assert "segments=2" in repr(ours)
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), plain.eval()(x))
    compiled = torch.compile(ours.train(), backend="aot_eager")
    torch.manual_seed(0)
    compiled(x).sum().backward()


def test_what_is_no_chain() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(NotSequentialError, match=r"expected an nn\.Sequential"):
        checkpoint_sequential(nn.Linear(8, 8), 2, x)  # type: ignore[arg-type]
    with pytest.raises(NotSequentialError, match="callable"):
        checkpoint_sequential([nn.Linear(8, 8), 3], 2, x)  # type: ignore[list-item]
    with pytest.raises(NotSequentialError, match="Got 0 functions"):
        checkpoint_sequential([], None, x)
    with pytest.raises(SegmentCountError, match="7 segments for 6 layers"):
        CheckpointedSequential(*steps(), segments=7)(x)
