"""Plans of one rank among many that are not there: torch's fake process group stands for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import ckpt_pass
from tests.distributed.ranks import WIDTH, Block, Blocks, batch, made, simulated, tracked_bytes

pytestmark = pytest.mark.distributed
RANKS = (64, 512)


@pytest.fixture(params=RANKS)
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group of so many, of which this process is the first."""
    with simulated(request.param):
        yield request.param


def sharded(model: nn.Module, layers: Any = None, **how: Any) -> nn.Module:
    for layer in model.layers if layers is None else layers:  # type: ignore[union-attr]
        fully_shard(layer, **how)
    fully_shard(model, **how)
    return model


def test_peaks_of_a_rank(ranks: int) -> None:
    """Predicted to the byte; the step really runs, and only the exchange is left out."""
    inputs = batch(0)
    budget = ckpt_pass.plan(sharded(made()), inputs, budget=1.0, mode="eager").peak_bytes
    for part in (0.95, 0.8, 0.01):
        model = sharded(made())
        try:
            plan = ckpt_pass.plan(model, inputs, budget=int(part * budget), mode="eager")
        except ckpt_pass.InfeasibleBudgetError as error:
            least = error.least_feasible_bytes
            plan = ckpt_pass.plan(model, inputs, budget=least, mode="eager")
        plan.apply(model)
        measured = ckpt_pass.measure_step(
            lambda model=model: model(inputs),  # type: ignore[misc]
            params=model.parameters(),
            repeats=1,
        )
        assert plan.budget_bytes is not None
        assert measured.peak_bytes == plan.peak_bytes <= plan.budget_bytes


class Experts(nn.Module):
    """Parameters of fewer rows than there are ranks: their gradients are filled up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2 * WIDTH, WIDTH) * 0.1)
        self.layers = nn.ModuleList([nn.Linear(2 * WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.einsum("bh,eoh->ebo", x, self.weight).tanh().sum(0)
        return self.layers[0](found).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("reduced", [torch.float32, None])
def test_gradients_of_few_rows(ranks: int, reduced: torch.dtype | None) -> None:
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduced)
    torch.manual_seed(0)
    model, inputs = sharded(Experts(), mp_policy=mixed), batch(0)
    plan = ckpt_pass.plan(model, inputs, budget=1.0, mode="eager")
    measured = ckpt_pass.measure_step(
        lambda: model(inputs), params=model.parameters(), repeats=1
    ).peak_bytes
    assert measured == plan.peak_bytes


def test_meta_tensors_stand_for_a_rank_too(ranks: int) -> None:
    real = ckpt_pass.plan(sharded(made()), batch(0), budget=0.95, mode="eager")
    with torch.device("meta"):
        model = Blocks()
    meta = ckpt_pass.plan(sharded(model), batch(0).to("meta"), budget=0.95, mode="eager")
    assert (meta.peak_bytes, meta.regions) == (real.peak_bytes, real.regions)
    assert meta.predicted.timeline == real.predicted.timeline


def test_torchs_tracker_finds_no_higher_peak(ranks: int) -> None:
    model, inputs = sharded(made()), batch(0)
    plan = ckpt_pass.plan(model, inputs, budget=1.0, mode="eager")
    assert plan.peak_bytes >= 0.99 * tracked_bytes(model, inputs)


def test_saved_dtensors_stay_what_they_are_under_a_mode() -> None:
    """Weights that stay are held without their history, by an alias: a DTensor's own."""
    with simulated(2):
        model = made()
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.layers:  # type: ignore[union-attr]
            parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        with FlopCounterMode(display=False), ckpt_pass.offload_activations(model):
            model(batch(0)).backward()
        assert all(isinstance(p.grad, DTensor) for n, p in model.named_parameters() if "up" in n)


@pytest.mark.parametrize("policy", ["save-everything", "by-size", "offload"])
def test_regions_that_hold_units(policy: str) -> None:
    """FSDP gathers within the region, less often when it runs again, and frees what it gathers."""
    chosen = {
        "by-size": ckpt_pass.save(min_bytes=2**12) | ckpt_pass.recompute(),
        "offload": ckpt_pass.offload(),
    }.get(policy, policy)

    def gradients(placed: bool) -> list[Tensor]:
        model = made()
        for layer in model.layers:
            layer.act = nn.Dropout(0.1)  # what draws has the region run again to its end
            fully_shard(layer.up)
            fully_shard(layer.down)
        fully_shard(model)
        if placed:
            ckpt_pass.apply(model, "all", chosen)
        torch.manual_seed(1)
        model(batch(0)).backward()
        return [p.grad.to_local() for p in model.parameters()]  # type: ignore[union-attr]

    with simulated(2):
        assert all(map(torch.equal, gradients(True), gradients(False)))


@pytest.mark.parametrize("mode", ["compiled", "eager"])
@pytest.mark.parametrize("kind", ["FSDP1", "replicate"])
def test_wrappers_that_a_plan_would_break(kind: str, mode: Literal["compiled", "eager"]) -> None:
    """They are refused before they run on anything, and train on."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if kind == "FSDP1":
            model: nn.Module = FullyShardedDataParallel(made(), device_id=torch.device("cpu"))
        else:
            model = replicate(made())
        for _ in range(2):
            with pytest.raises(ckpt_pass.WrapperError, match=f"{kind}.* counts on the tensors"):
                ckpt_pass.plan(model, batch(0), budget=0.9, mode=mode)
            model(batch(0)).backward()
            assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("orig", [False, True])
def test_regions_inside_units_of_fsdp1(orig: bool) -> None:
    """Those that hold a unit are refused."""

    def gradients(placed: bool) -> list[Tensor]:
        model = FullyShardedDataParallel(
            made(),
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            device_id=torch.device("cpu"),
            use_orig_params=orig,
        )
        if placed:
            with pytest.raises(ckpt_pass.PlacementError, match="hold a FullyShardedDataParallel"):
                ckpt_pass.apply(model, "all")
            ckpt_pass.apply(model, ckpt_pass.ByName("Block"))
        model(batch(0)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    with simulated(2):
        found, expected = gradients(True), gradients(False)
        assert found and all(map(torch.equal, found, expected))


def test_a_rank_whose_part_is_padded() -> None:
    """FSDP pads anew where tensors are others; the step makes nothing of its own."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        model = sharded(nn.Sequential(Blocks(1).layers[0], nn.Linear(WIDTH, 3)), layers=())
        with warnings.catch_warnings():
            warnings.simplefilter("error", ckpt_pass.FirstUseWarning)
            ckpt_pass.plan(model, batch(0), budget=1.0, mode="eager", loss_fn=torch.sum)
    finally:
        dist.destroy_process_group()


def test_compiled_steps_of_another_size() -> None:
    """Dynamo leaves the size open at the second step; gradients are none of open sizes."""
    with simulated(2):
        model = sharded(made())
        backend = ckpt_pass.make_backend(policy="save-matmul", inner="aot_eager")
        step = torch.compile(model, backend=backend)
        for rows in (32, 48):
            step(batch(0, rows=rows)).backward()
        assert all(p.grad is not None for p in model.parameters())
