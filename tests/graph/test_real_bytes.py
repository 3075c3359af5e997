"""Bytes that fake tensors do not tell: storages of outputs, opaque bytes, kernels that die."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.graph.capture import capture
from ckpt_pass.graph.kernel_cache import KernelCache
from ckpt_pass.graph.kernel_ops import is_runnable, may_have_workspace
from ckpt_pass.graph.kernels import WORKSPACE_AND_TIME, Kernels
from ckpt_pass.policy.sites import output_tensors
from tests.zoo import loss_of

#: What a step does with [6, 12] values, beside a bias: ops of many classes.
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda x: F.mse_loss(x, x.detach().flip(0)),
    "smooth l1": lambda x: F.smooth_l1_loss(x, x.detach().roll(1, 1)),
    "huber": lambda x: F.huber_loss(x, x.detach().repeat(2, 1)[:6]),
    "bce": lambda x: F.binary_cross_entropy(x.sigmoid(), x.detach().sigmoid()),
    "soft margin": lambda x: F.soft_margin_loss(x, x.detach().sign()),
    "kl": lambda x: F.kl_div(x.log_softmax(-1), x.detach().softmax(-1), reduction="batchmean"),
    "nll": lambda x: F.cross_entropy(x, torch.arange(6) % 12, label_smoothing=0.1),
    "triangle": lambda x: x.triu(1).tril(3).sum(),
    "degrees": lambda x: x.deg2rad().rad2deg().sum(),
    "unfold": lambda x: F.fold(F.unfold(x.view(1, 2, 6, 6), 3), (6, 6), 3).sum(),
    "sort": lambda x: (x.sort(-1)[0] * x.topk(12, -1)[0]).cumsum(0).sum(),
    "scatter": lambda x: x.scatter_add(1, torch.zeros(6, 12, dtype=torch.int64), x).sum(),
    "index": lambda x: (x[torch.arange(5)] * x.index_select(0, torch.arange(5))).sum(),
    "interpolate": lambda x: F.interpolate(x[None], scale_factor=2.0, mode="linear").sum(),
    "pools": lambda x: (F.max_pool1d(x, 3) * F.avg_pool1d(x, 3)).sum(),
    "casts": lambda x: (x.to(torch.bfloat16).mean(0, dtype=torch.float64) * 2).exp().sum(),
    "one hot": lambda x: (F.one_hot(torch.arange(6) % 12, 12) * x).sum(),
}


class Applied(nn.Module):
    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bias, self.op = nn.Parameter(torch.rand(12) + 0.1), op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x + self.bias)


@pytest.mark.parametrize("name", OPS)
def test_predicted_is_measured_to_the_byte(name: str) -> None:
    model, x = Applied(OPS[name]), torch.randn(6, 12)
    backend = ckpt_pass.make_backend(budget="1GiB", inner="aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    measured = ckpt_pass.measure_step(lambda: compiled(x), warmup=1, repeats=1)
    assert measured.peak_bytes == backend.plans[0].peak_bytes

    plan = ckpt_pass.plan(model, x, budget="1GiB", mode="eager")
    eager = ckpt_pass.measure_step(lambda: model(x), warmup=1, repeats=1)
    assert eager.peak_bytes <= plan.peak_bytes <= eager.peak_bytes + 64


@pytest.mark.parametrize("name", OPS)
def test_what_is_not_measured_allocates_what_its_fake_outputs_say(
    name: str, tmp_path: Path
) -> None:
    with capture(Applied(OPS[name]), torch.randn(6, 12)) as joint:
        left_out = [n for n in joint.nodes if is_runnable(n) and not may_have_workspace(n)]
        # Time is asked for too, so that nothing is left out.
        for node, facts in (
            Kernels(KernelCache(tmp_path)).facts(left_out, WORKSPACE_AND_TIME).items()
        ):
            assert facts.workspace_bytes == 0 and facts.outputs is not None, node
            for fake, real in zip(output_tensors(node.meta["val"]), facts.outputs, strict=True):
                assert (tuple(fake.shape), fake.stride()) == (real.size, real.stride), node
                assert real.storage_bytes in (None, fake.untyped_storage().nbytes()), node


class Columns(nn.Module):
    """Blocks whose kernels need more than their outputs; a loss that is larger than it looks."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(4, 36) * 0.1 for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        start = x
        for weight, norm in zip(self.weights, self.norms, strict=True):
            columns = torch.tanh(weight @ F.unfold(x, 3, padding=1)).view_as(x)
            x = F.max_pool2d(norm(x + columns), 3, stride=1, padding=1)
        return F.mse_loss(x, start)


@pytest.mark.parametrize("autocast", [False, True])
def test_budgets_hold_to_the_byte(autocast: bool) -> None:
    torch.manual_seed(0)
    model, x = Columns(), torch.randn(2, 4, 16, 16)

    def step(forward: Callable[..., Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss_of(forward(x))

    model(x)  # running statistics move
    for budget in (1.0, 0.7):
        torch._dynamo.reset()
        backend = ckpt_pass.make_backend(budget=budget, inner="aot_eager")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        measured = ckpt_pass.measure_step(lambda f=compiled: step(f), warmup=1, repeats=1)
        (plan,) = backend.plans
        assert plan.budget_bytes is not None
        assert measured.peak_bytes == plan.peak_bytes <= plan.budget_bytes


def test_a_larger_storage_grows_with_its_input() -> None:
    plan = ckpt_pass.plan(
        Applied(OPS["mse"]), torch.randn(6, 12), budget="1GiB", dynamic=True, mode="compiled"
    )
    (rows,) = plan.dimensions
    other = torch.randn(30, 12)
    at_other = ckpt_pass.plan(Applied(OPS["mse"]), other, budget="1GiB", mode="compiled")
    assert at_other.peak_bytes is not None
    # Rests of a few bytes of workspace do not grow, or grow with something else.
    assert 0 <= plan.peak_bytes_at({rows.symbol: 30}) - at_other.peak_bytes <= 64


def test_a_kernel_with_other_strides_than_its_fake_one_is_recorded_as_it_is() -> None:
    """A batch normalisation of a transposed input: linear layers behind it copy, or do not."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.BatchNorm1d(8), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(self.norm(x.mT).mT))).square().mean()

    model, x = Transposed(), torch.randn(4, 6, 8)
    plan = ckpt_pass.plan(model, x, budget=1.0, mode="eager")
    measured = ckpt_pass.measure_step(lambda: model(x), warmup=1, repeats=1)
    assert measured.peak_bytes == plan.peak_bytes


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_nets_in_eager_mode(kind: type[nn.LSTM]) -> None:
    """An LSTM's backward believes the bytes that its forward wrote; made-up ones crash it."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(16, 16, num_layers=2, dropout=0.1, batch_first=True)
            self.head = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0]).square().mean()

    torch.manual_seed(0)
    model, x = Reader(), torch.randn(8, 3, 16)
    plan = ckpt_pass.plan(model, x, budget=1.0, mode="eager")
    measured = ckpt_pass.measure_step(lambda: model(x), warmup=1, repeats=1)
    assert measured.peak_bytes == plan.peak_bytes


@torch.library.custom_op("ckpt_pass_test::deadly", mutates_args=())
def deadly(x: Tensor) -> Tensor:
    """Kills its process where the data are not those of the test."""
    if not bool((x == 7.0).all()):
        signal.raise_signal(signal.SIGSEGV)  # to this thread: at once, not when another wakes
    return x.clone()


deadly.register_fake(lambda x: torch.empty_like(x))
deadly.register_autograd(lambda ctx, gradient: gradient)


def test_a_kernel_that_dies_of_made_up_data_takes_a_child_along() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))

        def forward(self, x: Tensor) -> Tensor:
            return (deadly(x) * self.weight).square().sum()

    with pytest.warns(ckpt_pass.WorkspaceWarning, match=r"deadly.*the process that ran it died"):
        plan = ckpt_pass.plan(Mine(), torch.full((32,), 7.0), budget="1GiB")
    assert plan.peak_bytes is not None


class _Spectral(nn.Module):
    """Fourier modes times complex weights: products of conjugate views, copies into views."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)
        self.weight = nn.Parameter(torch.randn(2, 8, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(self.mix(x).tanh())[..., :4]
        weight = torch.complex(*self.weight.unbind(0))
        mixed = torch.einsum("bim,iom->bom", modes, weight)
        return torch.fft.irfft(mixed, n=32).square().mean()


@pytest.mark.parametrize("mode", ["compiled", "eager"])
def test_conjugate_views_and_views_of_larger_memory(mode: str) -> None:
    torch.manual_seed(0)
    model, x = _Spectral(), torch.randn(4, 8, 32)
    plan = ckpt_pass.plan(model, x, mode=mode, budget=1.0)
    step = model
    if mode == "compiled":
        backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
        step = torch.compile(model, backend=backend)
    measured = ckpt_pass.measure_step(lambda: step(x), repeats=1)
    assert measured.peak_bytes == plan.peak_bytes
