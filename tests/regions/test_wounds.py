"""Known wounds of selective checkpointing in eager mode: torch's own beside ours.

Others are in ``test_eager_dropin.py`` (autocast's weight cache, in-place ops on saved values, a
second backward, exceptions, threads) and in ``test_distributed.py`` (all-gathers of FSDP2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from tests.zoo.surroundings import SINCE_2_13

Around = Callable[..., Any]


def torchs(policy_fn: Any) -> Around:
    context_fn = partial(create_selective_checkpoint_contexts, policy_fn)
    return partial(torch_checkpoint, use_reentrant=False, context_fn=context_fn)


def ours(policy: Any) -> Around:
    return partial(torch_checkpoint, use_reentrant=False, context_fn=ckpt_pass.context_fn(policy))


def region(policy: Any) -> Around:
    return partial(ckpt_pass.checkpoint, policy=policy)


def plainly(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)


def gradients(around: Around, fn: Any, *inputs: Tensor) -> list[Tensor | None]:
    for value in inputs:
        value.grad = None
    around(fn, *inputs).square().sum().backward()
    return [None if value.grad is None else value.grad.clone() for value in inputs]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(a is not None and b is not None and torch.equal(a, b)
               for a, b in zip(one, other, strict=True))  # fmt: skip


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)


# --- matmul counts that differ between forward and recomputation -----------------------------


def every_other_matmul() -> Any:
    """torchtitan's way: a policy that counts matmuls itself, in forward and recomputation."""
    counts = {"forward": 0, "recompute": 0}

    def policy_fn(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is not torch.ops.aten.mm.default:
            return CheckpointPolicy.PREFER_RECOMPUTE
        which = "recompute" if ctx.is_recompute else "forward"
        counts[which] += 1
        saves = counts[which] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    return policy_fn


def test_a_count_that_is_shared_by_two_regions(inputs: tuple[Tensor, Tensor]) -> None:
    """Three matmuls a region: a counter that both regions share saves others in the second."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w).sin() @ w).sin() @ w

    def two(around: Around) -> Around:
        return lambda f, x, w: around(f, around(f, x, w), w)

    wanted = gradients(two(plainly), fn, *inputs)
    policy = ckpt_pass.save(op="aten.mm", every=2)
    for around in (ours(policy), region(policy)):
        assert same(gradients(two(around), fn, *inputs), wanted)
    # Stock torch is right as well since 2.13: its recomputation goes by what the forward stored.
    assert same(gradients(two(torchs(every_other_matmul())), fn, *inputs), wanted) is SINCE_2_13


# --- compiled code inside an eager region ----------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_in_a_region(backend: str, inputs: tuple[Tensor, Tensor]) -> None:
    """Its recompilation between forward and backward changes nothing (#161889, #175258)."""
    compiled = torch.compile(lambda x, w: (x @ w).sin(), backend=backend)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = compiled(x, w) @ w
        return out

    wanted = gradients(plainly, fn, *inputs)
    for around in (ours("save-matmul"), region("save-matmul"), region(None)):
        output = around(fn, *inputs)
        torch._dynamo.reset()
        for value in inputs:
            value.grad = None
        output.square().sum().backward()
        assert same([value.grad for value in inputs], wanted)


# --- routing that drifts ---------------------------------------------------------------------


@pytest.fixture
def drifting() -> Iterator[Any]:
    """A matmul whose second run differs in its last bits, as kernels with atomics do."""
    runs = [0]
    with torch.library._scoped_library("ckpt_pass_test", "DEF") as library:
        library.define("drifting(Tensor x) -> Tensor")

        def drift(x: Tensor) -> Tensor:
            runs[0] += 1
            return x + (0.0 if runs[0] % 2 else 0.75)

        library.impl("drifting", drift, "CPU")
        library.impl("drifting", lambda x: torch.empty_like(x), "Meta")

        class Drifting(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return torch.ops.ckpt_pass_test.drifting(x)  # type: ignore[no-any-return]

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient

        yield Drifting.apply


class Experts(nn.Module):
    """Each token goes to the expert of its highest score; ``drift`` shifts the scores' rounding."""

    def __init__(self, drift: Any) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.drift = drift

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        moved = torch.cat([self.drift(scores[:, :1]), scores[:, 1:]], 1)
        weight, which = moved.topk(1, dim=1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (which[:, 0] == number).nonzero()[:, 0]
            out = out.index_add(0, rows, F.gelu(expert(x[rows])) * weight[rows].sigmoid())
        return out


@pytest.mark.filterwarnings("ignore:.*is in no class of the op taxonomy")
def test_routing_that_drifts(drifting: Any) -> None:
    """Saved router and choice: what the forward chose is what the backward sees."""
    torch.manual_seed(0)
    model, x = Experts(drifting), torch.randn(64, 8, requires_grad=True)

    def step(around: Around) -> list[Tensor | None]:
        leaves = [x, *model.parameters()]
        for leaf in leaves:
            leaf.grad = None
        around(model, x).square().sum().backward()
        drifting(torch.zeros(1))  # every step starts at an even count
        return [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]

    wanted = step(plainly)
    chosen = (
        ckpt_pass.save(op="ckpt_pass_test.drifting")
        | ckpt_pass.save(op="aten.topk")
        | ckpt_pass.save(op="aten.nonzero")
    )
    assert same(step(ours(chosen)), wanted)
    assert same(step(region(chosen)), wanted)
    with pytest.raises(ckpt_pass.RecomputeMismatchError, match="save what decides it"):
        step(region(None))
    # Torch's usual list saves products, not the choice: the experts see other tokens.
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    with pytest.raises(RuntimeError, match=r"must match|different metadata"):
        step(torchs(products))


# --- side effects ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is in no class of the op taxonomy")
def test_a_side_effect_runs_once_where_it_is_saved(inputs: tuple[Tensor, Tensor]) -> None:
    """torch replays it with the region (#196956), and so do we, unless a policy saves it."""
    counts = [0]
    with torch.library._scoped_library("ckpt_pass_test", "DEF") as library:
        library.define("counted(Tensor x) -> Tensor")

        def counted(x: Tensor) -> Tensor:
            counts[0] += 1
            return x.clone()

        library.impl("counted", counted, "CPU")

        def fn(x: Tensor, w: Tensor) -> Tensor:
            with torch.no_grad():
                torch.ops.ckpt_pass_test.counted(x)
            return (x @ w).sin() @ w

        def runs(around: Around) -> int:
            counts[0] = 0
            gradients(around, fn, *inputs)
            return counts[0]

        saved = ckpt_pass.save(op="ckpt_pass_test.counted")
        assert runs(plainly) == 1
        assert runs(torchs([torch.ops.aten.mm.default])) == 2
        assert runs(region(None)) == 2
        assert runs(ours(saved)) == 1
        assert runs(region(saved)) == 1


# --- profilers -------------------------------------------------------------------------------


def seen_in_profile(around: Around) -> set[str]:
    """The names that a profile of a step shows."""
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    x = torch.randn(4, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        around(block, x).sum().backward()
    return {event.key for event in profile.key_averages()}


def test_recomputation_has_a_name_in_profiles() -> None:
    """torch's own region has none; ours is named by its module, under torch's checkpoint, too."""
    assert "recompute Sequential" in seen_in_profile(region(None))
    assert "recompute Sequential" in seen_in_profile(ours("save-matmul"))
    named = partial(ckpt_pass.checkpoint, name="layers.3")
    assert "recompute layers.3" in seen_in_profile(named)
    plain = seen_in_profile(torchs([torch.ops.aten.mm.default]))
    assert not any("recompute" in name for name in plain)


@pytest.mark.skipif(not torch.profiler.itt.is_available(), reason="built without ITT")
def test_ranges_for_other_tools() -> None:
    """``emit_itt``, and ``emit_nvtx`` alike, make a range of every ``record_function``."""
    seen: list[str] = []

    class Sees(torch.autograd.profiler.record_function):
        def __enter__(self) -> Any:
            seen.append(self.name)
            return super().__enter__()

    block, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt_pass.regions.frame.record_function", Sees)
        ckpt_pass.checkpoint(block, x, name="quiet").sigmoid().sum().backward()
        assert not seen  # nothing is recorded where nobody looks
        with torch.autograd.profiler.emit_itt():
            ckpt_pass.checkpoint(block, x, name="layers.3").sigmoid().sum().backward()
    assert seen == ["recompute layers.3"]


@pytest.mark.parametrize(
    "around",
    [
        ckpt_pass.checkpoint,
        partial(ckpt_pass.checkpoint, policy=ckpt_pass.save()),
        partial(ckpt_pass.checkpoint, policy=ckpt_pass.offload()),
        ours(ckpt_pass.save()),
    ],
    ids=["region", "policy", "offloaded", "context_fn"],
)
def test_inference_mode_inside(around: Callable[..., Tensor]) -> None:
    """What is made there counts no changes; a policy may keep it all the same."""

    def layer(x: Tensor) -> Tensor:
        with torch.inference_mode():
            largest = float(x.sin().add_(1).topk(2)[0].max())
        return (x @ x).tanh() * largest

    x = torch.randn(8, 8, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(layer(x)).sum(), x)
    (got,) = torch.autograd.grad(around(layer, around(layer, x)).sum(), x)
    assert torch.equal(got, wanted)


def test_a_backward_in_inference_mode() -> None:
    layer = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    grads = []
    for run in (layer, partial(ckpt_pass.checkpoint, layer)):
        layer.zero_grad()
        loss = run(run(x)).sum()
        with torch.inference_mode():
            loss.backward()
        grads.append([p.grad for p in layer.parameters()])
    assert all(map(torch.equal, *grads))
