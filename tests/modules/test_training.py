"""Training with regions: accumulation, mixed precision, running statistics, two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import ckpt_pass
from ckpt_pass import accumulate_gradients, accumulation_windows
from ckpt_pass.regions.wrapping import RegionSpec, apply_regions
from tests.test_distributed import RANKS, on_ranks
from tests.told import Told

WIDTH = 8
SAMPLES = 22  # 4 + 4 + 4 + 4 + 4 + 2: the last batch is short, and so is the last window
BATCH, WINDOW = 4, 4
LAYERS = ("layers.0", "layers.1", "layers.2")

Pair = list[Tensor]


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], dropout: float) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))
        return hidden


class Net(nn.Module):
    def __init__(
        self, norm: Callable[[int], nn.Module] = nn.LayerNorm, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(norm, dropout) for _ in LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def made(*, regions: bool, double: bool = False, **options: Any) -> Net:
    torch.manual_seed(0)
    net = Net(**options)
    if double:
        net = net.double()
    if regions:
        apply_regions(net, {name: RegionSpec() for name in LAYERS})
    return net


def data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    shape = SAMPLES, WIDTH
    return TensorDataset(*(torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2)))


def loader(dataset: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=BATCH)


def mean_loss(model: nn.Module, batch: Pair) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys() and wanted
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys() and wanted
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


# --- accumulation ---------------------------------------------------------------------------


def windows_of(dataset: Any) -> list[list[Pair]]:
    return list(accumulation_windows(loader(dataset), WINDOW))


def test_windows_have_all_batches_in_order() -> None:
    found = windows_of(data())
    assert [[len(x) for x, _ in window] for window in found] == [[4, 4, 4, 4], [4, 2]]
    assert torch.equal(torch.cat([x for w in found for x, _ in w]), data().tensors[0])


@pytest.mark.parametrize("regions", [False, True])
def test_uneven_batches_weigh_by_samples(regions: bool) -> None:
    """Equal to one step over the whole window, to rounding (in double precision)."""
    dataset = data(torch.float64)
    *_, uneven = windows_of(dataset)
    whole = [torch.cat(tensors) for tensors in zip(*uneven, strict=True)]
    plain = made(regions=False, double=True)
    wanted_loss = mean_loss(plain, whole)
    wanted_loss.backward()
    model = made(regions=regions, double=True)
    loss = accumulate_gradients(model, uneven, mean_loss)
    assert_close(gradients(model), gradients(plain))
    torch.testing.assert_close(loss, wanted_loss.detach())
    assert not loss.requires_grad


def test_the_mean_of_means_is_another_gradient() -> None:
    """What is avoided differs by far more than the tolerance above."""
    dataset = data(torch.float64)
    *_, uneven = windows_of(dataset)
    right, naive = (made(regions=False, double=True) for _ in range(2))
    accumulate_gradients(right, uneven, mean_loss)
    for batch in uneven:
        (mean_loss(naive, batch) / len(uneven)).backward()
    difference = max(
        float((naive_grad - gradients(right)[name]).abs().max())
        for name, naive_grad in gradients(naive).items()
    )
    assert difference > 1e-3


def test_regions_change_no_bit_of_an_epoch() -> None:
    """Real loader, dropout, several optimizer steps."""
    losses = []
    for regions in (False, True):
        model = made(regions=regions, dropout=0.3)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.manual_seed(2)
        found = []
        for window in accumulation_windows(loader(data()), WINDOW):
            found.append(accumulate_gradients(model, window, mean_loss).item())
            optimizer.step()
            optimizer.zero_grad()
        losses.append((found, {n: p.detach().clone() for n, p in model.named_parameters()}))
    assert losses[0][0] == losses[1][0] and len(losses[0][0]) == 2
    assert_equal(losses[1][1], losses[0][1])


def test_tokens_are_counted_as_the_loss_counts_them() -> None:
    ids = torch.randint(0, WIDTH, (3, 5), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, 1:] = -100
    labels[2] = -100  # a batch without a label adds nothing, and no NaN
    batches = [[ids[i : i + 1], labels[i : i + 1]] for i in range(3)]

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embed(x))
            return logits

    def token_loss(model: nn.Module, batch: Pair) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    torch.manual_seed(0)
    model = Tokens().double()
    plain = copy.deepcopy(model)
    token_loss(plain, [ids, labels]).backward()
    count: Callable[[Pair], Tensor] = lambda batch: (batch[1] != -100).sum()  # noqa: E731
    accumulate_gradients(model, batches, token_loss, count=count)
    assert_close(gradients(model), gradients(plain))


def test_wrong_arguments() -> None:
    model = made(regions=False)
    with pytest.raises(ckpt_pass.AccumulationError, match="size=0"):
        list(accumulation_windows([1, 2], 0))
    with pytest.raises(ckpt_pass.AccumulationError, match="Counted 0 samples in 0 batches"):
        accumulate_gradients(model, [], mean_loss)
    with pytest.raises(ckpt_pass.AccumulationError, match="pass count="):
        accumulate_gradients(model, [{"text": "no tensor"}], lambda m, b: torch.zeros(()))


# --- mixed precision ------------------------------------------------------------------------


class Watched(nn.Module):
    """A linear layer that notes the dtype and the autocast state of each of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.seen = Told()
        self.seen.calls = []

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        enabled = torch.is_autocast_enabled("cpu")
        self.seen.calls.append((result.dtype, enabled, torch.get_autocast_dtype("cpu")))
        return torch.sin(result)


def test_the_recomputation_has_the_forwards_autocast() -> None:
    """The backward runs outside of autocast; the second run is as the first."""
    model = nn.Sequential(Watched(), Watched())
    apply_regions(model, {"0": RegionSpec(), "1": RegionSpec()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(4, WIDTH)).float().sum()
    loss.backward()
    for watched in model:
        assert isinstance(watched, Watched)
        assert watched.seen.calls == [(torch.bfloat16, True, torch.bfloat16)] * 2


@pytest.mark.parametrize("policy", [None, "save-matmul"])
def test_scaled_and_accumulated_in_bf16(policy: str | None) -> None:
    """Autocast, GradScaler on the CPU and uneven batches: no bit changes with regions."""

    def cast_loss(model: nn.Module, batch: Pair) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean_loss(model, batch)

    found = []
    for regions in (False, True):
        model = made(regions=False, dropout=0.2)
        if regions:
            apply_regions(model, {name: RegionSpec(policy=policy) for name in LAYERS})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        torch.manual_seed(4)
        losses = []
        for window in windows_of(data()):
            losses.append(accumulate_gradients(model, window, cast_loss, scaler=scaler).item())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append((losses, scaler.get_scale(), dict(model.named_parameters())))
    (losses, scale, wanted), (other_losses, other_scale, got) = found
    assert losses == other_losses and scale == other_scale == 2048.0
    assert_equal(got, wanted)  # type: ignore[arg-type]


def test_a_step_that_overflows_is_left_out() -> None:
    model = made(regions=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    big = [[torch.randn(2, WIDTH), torch.full((2, WIDTH), 1e6)]]
    accumulate_gradients(model, big, mean_loss, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert_equal({name: p.detach() for name, p in model.named_parameters()}, before)


# --- running statistics ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, "save-matmul"])
def test_running_statistics_move_once(policy: str | None) -> None:
    found = []
    for regions in (False, True):
        model = made(regions=False, norm=nn.BatchNorm1d)
        if regions:
            apply_regions(model, {name: RegionSpec(policy=policy) for name in LAYERS})
        for window in windows_of(data()):
            accumulate_gradients(model, window, mean_loss)
        found.append({**gradients(model), **dict(model.named_buffers())})
    assert_equal(found[1], found[0])
    batches = len(loader(data()))
    assert int(found[1]["layers.0.norm.num_batches_tracked"]) == batches


# --- two processes --------------------------------------------------------------------------

#: Uneven on purpose: other numbers of batches and of samples on each rank.
SHARES = ((4, 4, 3), (4, 2))


def share(rank: int, dtype: torch.dtype) -> Iterator[Pair]:
    x, y = data(dtype).tensors
    start = sum(SHARES[0]) * rank
    for size in SHARES[rank]:
        yield [x[start : start + size], y[start : start + size]]
        start += size


def as_many(batches: Iterator[Pair]) -> list[Pair]:
    """The same samples in two batches."""
    first, *rest = batches
    return [first, [torch.cat(tensors) for tensors in zip(*rest, strict=True)]]


def counted_exchanges(calls: list[int]) -> Callable[[object, dist.GradBucket], Any]:
    """Averages as DDP does, and notes each exchange of a bucket."""

    def average(state: object, bucket: dist.GradBucket) -> Any:
        calls.append(bucket.index())
        work = dist.all_reduce(bucket.buffer().div_(RANKS), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    # DDP reads them, and does not resolve strings.
    average.__annotations__ = {"bucket": dist.GradBucket}
    return average


def accumulate_on_ranks(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for regions in (False, True):
        net = made(regions=regions, double=True)
        parallel = DistributedDataParallel(net)
        calls: list[int] = []
        parallel.register_comm_hook(None, counted_exchanges(calls))
        loss = accumulate_gradients(parallel, share(rank, torch.float64), mean_loss)
        grads = {n: g.numpy() for n, g in gradients(net).items()}
        found[f"ddp {regions}"] = (grads, loss.item(), len(calls))
    net = made(regions=True, double=True)
    sharded = fully_shard(net)
    with pytest.raises(ckpt_pass.AccumulationError, match=r"batches \[3, 2\].*gathers"):
        accumulate_gradients(sharded, share(rank, torch.float64), mean_loss)
    accumulate_gradients(sharded, as_many(share(rank, torch.float64)), mean_loss)
    full = {n: p.grad.full_tensor().numpy() for n, p in net.named_parameters()}
    found["fsdp"] = (full, 0.0, 0)
    nothing = [] if rank == 1 else share(rank, torch.float64)
    with pytest.raises(ckpt_pass.AccumulationError, match=r"By rank: samples \[11, 0\]"):
        accumulate_gradients(parallel, nothing, mean_loss)
    return found


@pytest.mark.distributed
def test_ranks_with_other_numbers_of_samples(tmp_path: Path) -> None:
    """Equal to one process over all samples; gradients are exchanged once.

    A rank without samples is an error on every rank, and no rank hangs.
    """
    dtype = torch.float64
    parts = [list(share(rank, dtype)) for rank in range(RANKS)]
    whole = [torch.cat([b[i] for part in parts for b in part]) for i in range(2)]
    plain = made(regions=False, double=True)
    mean_loss(plain, whole).backward()
    wanted = gradients(plain)
    for found in on_ranks(accumulate_on_ranks, tmp_path):
        for grads, _, exchanges in found.values():
            assert_close({n: torch.from_numpy(g) for n, g in grads.items()}, wanted)
            assert exchanges <= 1
        ((one, loss, calls), (two, same, _)) = found["ddp False"], found["ddp True"]
        assert loss == same and calls == 1
        assert all((one[name] == two[name]).all() for name in one)
