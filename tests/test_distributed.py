"""Several processes: plans are compared, and regions train as they do on one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from ckpt_pass import Segments
from ckpt_pass.distributed import (
    NoProcessGroupError,
    PlansDivergeError,
    RankMissingError,
    agree,
)

pytestmark = pytest.mark.distributed
RANKS = 2
STEPS = 3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return hidden


class Blocks(nn.Module):
    def __init__(self, around: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(16) for _ in range(3))
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.around is None else self.around(layer, x)
        return x.square().mean()


def made(around: Callable[..., Tensor] | None = None) -> Blocks:
    torch.manual_seed(0)
    return Blocks(around)


def batch(rank: int, step: int, rows: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(17 * step + rank)
    return torch.randn(rows, 16, generator=generator)


def region(layer: nn.Module, x: Tensor) -> Tensor:
    return ckpt_pass.checkpoint(layer, x)  # type: ignore[no-any-return]


def selective(layer: nn.Module, x: Tensor) -> Tensor:
    context_fn = ckpt_pass.context_fn("save-matmul")
    return torch_checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)  # type: ignore[no-any-return]


# --- what runs on each rank -----------------------------------------------------------------


def on_every_rank(rank: int, job: Callable[[int], object], folder: str, results: Any) -> None:
    """Run ``job`` in a process group of its own; report what it returns or raises."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS
    )
    try:
        results[rank] = job(rank)
    except ckpt_pass.CkptPassError as error:
        results[rank] = (type(error).__name__, str(error))
    finally:
        dist.destroy_process_group()


def on_ranks(job: Callable[[int], object], folder: Path) -> list[Any]:
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(on_every_rank, (job, str(folder), results), nprocs=RANKS)
        return [results[rank] for rank in range(RANKS)]


def same_plan(rank: int) -> str:
    plan = ckpt_pass.plan(made(), batch(0, 0), budget=0.8, mode="eager")
    agree(plan)
    agree(plan, name="again")
    return plan.fingerprint


def twice_under_one_name(rank: int) -> str:
    """The second time rank 1 has another plan than the first time, and rank 0 comes later."""
    plan, other = (
        ckpt_pass.plan(made(), batch(0, 0), budget=part, mode="eager") for part in (0.8, 0.9)
    )
    agree(plan)
    time.sleep(1.0 - rank)
    with pytest.raises(PlansDivergeError):
        agree(other if rank == 1 else plan)
    agree(other)
    return other.fingerprint


def other_shape(rank: int) -> float:
    plan = ckpt_pass.plan(made(), batch(0, 0, 32 + 32 * rank), budget=0.8, mode="eager")
    start = time.monotonic()
    try:
        agree(plan)
    except PlansDivergeError as error:
        assert plan.fingerprint in str(error)
        assert "aten." in str(error) or "peak_bytes" in str(error)
        return time.monotonic() - start
    raise AssertionError("the plans differ")


def absent(rank: int) -> str:
    if rank == 1:
        return "did not come"
    plan = ckpt_pass.plan(made(), batch(0, 0), budget=0.8, mode="eager")
    with pytest.raises(RankMissingError, match="Rank 1 did not bring its plan within 1 s"):
        agree(plan, timeout_s=1.0)
    return "noticed"


# One step: its loss, and this rank's part of every gradient.
Step = tuple[float, bytes]


def train(rank: int, model: nn.Module, wrapped: Callable[[nn.Module], nn.Module]) -> list[Step]:
    return steps(rank, wrapped(model))


def steps(rank: int, parallel: nn.Module) -> list[Step]:
    """A few steps of SGD."""
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    found = []
    for step in range(STEPS):
        loss = parallel(batch(rank, step))
        optimizer.zero_grad()
        loss.backward()
        gradients = [_local(parameter.grad).numpy() for parameter in parallel.parameters()]
        found.append((loss.item(), b"".join(gradient.tobytes() for gradient in gradients)))
        optimizer.step()
    return found


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)
    return model


def sharded_in_part(model: nn.Module) -> nn.Module:
    """The second layer's parameters belong to the root, and are there all the time."""
    fully_shard(model.layers[0])  # type: ignore[index]
    fully_shard(model.layers[2])  # type: ignore[index]
    fully_shard(model)
    return model


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fsdp": sharded,
    "fsdp-in-part": sharded_in_part,
}


def ways_to_train(rank: int) -> dict[str, list[Step]]:
    """Steps with each kind of region, beside those without."""
    found = {}
    for name in ("ddp", "fsdp"):
        wrapped = WRAPPERS[name]
        for kind, around in (("plain", None), ("region", region), ("context_fn", selective)):
            found[f"{name} {kind}"] = train(rank, made(around), wrapped)
        planned = made()
        plan = ckpt_pass.plan(planned, batch(rank, 0), budget=0.8, mode="eager")
        agree(plan, name=name)
        plan.apply(planned)
        found[f"{name} plan"] = train(rank, planned, wrapped)
    backend = ckpt_pass.make_backend(budget=0.9, inner="aot_eager")
    compiled = torch.compile(made(), backend=backend)
    found["ddp compiled"] = train(rank, compiled, DistributedDataParallel)
    return found | placements(rank)


def looks(model: nn.Module) -> list[tuple[str, type, list[str]]]:
    return [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules()]


def placements(rank: int) -> dict[str, list[Step]]:
    """Steps with a placement and, after it was removed, without, beside those without."""
    found = {}
    for name, wrapped in WRAPPERS.items():
        parallel = wrapped(made())
        found[f"{name} plain"] = steps(rank, parallel) + steps(rank, parallel)
        keys = list(parallel.state_dict())
        for placement in ("all", "segments-1", Segments(1, nested=True)):
            model = made()
            ckpt_pass.apply(model, placement)
            parallel = wrapped(model)
            assert list(parallel.state_dict()) == keys
            with_regions = steps(rank, parallel)
            ckpt_pass.remove(model)
            assert not any("forward" in module.__dict__ for module in model.modules())
            found[f"{name} {placement} first"] = with_regions + steps(rank, parallel)

            parallel = wrapped(made())
            before = looks(parallel)
            assert len(ckpt_pass.apply(parallel, placement).names) == 3
            assert list(parallel.state_dict()) == keys
            with_regions = steps(rank, parallel)
            ckpt_pass.remove(parallel)
            assert looks(parallel) == before
            found[f"{name} {placement} last"] = with_regions + steps(rank, parallel)
    return found


def tensor_parallel(rank: int) -> bool:
    """Gradients of weights that are DTensors, with collectives inside the regions."""
    found = []
    for around in (None, region, selective):
        model = made(around)
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.layers:
            how = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(layer, mesh, how)
        model(batch(0, 0)).backward()
        found.append([_local(parameter.grad) for parameter in model.parameters()])
    plain, *others = found
    return all(all(map(torch.equal, plain, other)) for other in others)


def _local(gradient: Any) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


# --- tests ----------------------------------------------------------------------------------


def test_ranks_agree(tmp_path: Path) -> None:
    one, other = on_ranks(same_plan, tmp_path)
    assert one == other and len(one) == 64


def test_what_was_said_before_is_not_heard_again(tmp_path: Path) -> None:
    one, other = on_ranks(twice_under_one_name, tmp_path)
    assert one == other and len(one) == 64


def test_another_shape_on_one_rank(tmp_path: Path) -> None:
    assert all(seconds < 5 for seconds in on_ranks(other_shape, tmp_path))


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    assert on_ranks(absent, tmp_path) == ["noticed", "did not come"]


def test_data_parallel_and_sharded_training(tmp_path: Path) -> None:
    for found in on_ranks(ways_to_train, tmp_path):
        for name, steps_taken in found.items():
            plain = found[f"{name.partition(' ')[0]} plain"]
            assert steps_taken == plain[: len(steps_taken)], name


def test_tensor_parallel_regions(tmp_path: Path) -> None:
    assert on_ranks(tensor_parallel, tmp_path) == [True, True]


def test_without_a_process_group() -> None:
    plan = ckpt_pass.plan(copy.deepcopy(made()), batch(0, 0), budget=0.8, mode="eager")
    with pytest.raises(NoProcessGroupError, match="not initialised"):
        agree(plan)
