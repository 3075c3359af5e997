"""Pinned memory and side streams: races that are forced, memory that is counted. Needs a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.offloading.pinned import PinnedCarrier
from ckpt_pass.offloading.rates import measured_rates
from ckpt_pass.offloading.store import PooledStore
from ckpt_pass.offloading.stores import disk_store, pinned_store, store_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
#: Some 50 ms on a GPU of 1 to 2 GHz.
CYCLES = 100_000_000
N = 4 * 2**20


@pytest.fixture
def store() -> PooledStore:
    return pinned_store(torch.device("cuda", torch.cuda.current_device()))


def streams(store: PooledStore) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    carrier = store.carrier
    assert isinstance(carrier, PinnedCarrier)
    return carrier.out_stream, carrier.back_stream


def slow(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]


def values(number: float) -> Tensor:
    return torch.full((N,), number, device="cuda")


@pytest.mark.parametrize("make", [pinned_store, lambda device: disk_store()])
@pytest.mark.parametrize("fetched", [False, True])
def test_what_comes_back(make: Any, fetched: bool) -> None:
    store = make(torch.device("cuda", 0))
    base = torch.randn(300, 200, device="cuda")
    for tensor in (base, base.t()[5:, ::2], base[:1].expand(7, 200), base.bfloat16(), base > 0):
        wanted = tensor.clone()
        ticket = store.put(tensor)
        ticket.release()
        if fetched:
            ticket.fetch()
        for _ in range(2):
            got = ticket.take()
            assert torch.equal(got, wanted) and got.stride() == tensor.stride()
            assert got.device == tensor.device and not got.requires_grad


def test_memory_that_is_used_again_while_its_copy_out_is_late(store: PooledStore) -> None:
    tensor = values(1)
    address = tensor.data_ptr()
    slow(streams(store)[0])
    ticket = store.put(tensor)
    del tensor
    ticket.release()
    other = values(2)
    assert other.data_ptr() == address, "the allocator gave other memory: nothing is forced"
    assert bool((ticket.take() == 1).all())


def test_a_ticket_that_dies_while_its_copies_are_late(store: PooledStore) -> None:
    """Neither its slot nor its memory may be used by others too early."""
    for begun in ("out", "back"):
        tensor = values(1)
        if begun == "out":
            slow(streams(store)[0])
            ticket = store.put(tensor)
            del tensor, ticket
        else:
            ticket = store.put(tensor)
            del tensor
            ticket.release()
            slow(streams(store)[1])
            ticket.fetch()
            del ticket
        other = values(2)
        kept = store.put(other)
        torch.cuda.synchronize()
        assert bool((other == 2).all())
        kept.release()
        assert bool((kept.take() == 2).all())


def test_a_fetch_waits_for_the_copy_out(store: PooledStore) -> None:
    tensor = values(3)
    slow(streams(store)[0])
    ticket = store.put(tensor)
    ticket.release()
    ticket.fetch()
    assert bool((ticket.take() == 3).all())


def test_a_fetch_waits_for_who_used_its_memory(store: PooledStore) -> None:
    ticket = store.put(values(4))
    ticket.release()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    old = values(5)
    torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
    total = old.sum()  # comes late, and reads memory that is given back at once
    del old
    ticket.fetch()
    assert bool((ticket.take() == 4).all()) and total.item() == 5 * N


def test_a_value_that_is_made_late(store: PooledStore) -> None:
    torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
    ticket = store.put(values(6))
    ticket.release()
    assert bool((ticket.take() == 6).all())


def test_on_another_stream(store: PooledStore) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
        ticket = store.put(values(7))
        ticket.release()
        other = values(8)
        got = ticket.take()
        assert bool((got == 7).all()) and bool((other == 8).all())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.nn.functional.gelu(self.up(x))))


def net() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(512) for _ in range(6))).cuda()
    return model, torch.randn(4096, 512, device="cuda")


def step(model: nn.Module, x: Tensor, forward: Any) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = forward(model, x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]


def regions(model: Any, x: Tensor, **options: Any) -> Tensor:
    for layer in model:
        x = ckpt_pass.checkpoint(layer, x, **options)
    return x


def hooks(model: Any, x: Tensor, to: Any) -> Tensor:
    with ckpt_pass.offload_activations(model, to):
        return model(x)  # type: ignore[no-any-return]


def ways(to: Any) -> dict[str, Any]:
    return {
        "everything": partial(regions, policy=ckpt_pass.offload(), offload=to),
        "inputs": partial(regions, offload=to, offload_inputs=True),
        "hooks": partial(hooks, to=to),
    }


@pytest.mark.parametrize("way", ["everything", "inputs", "hooks"])
@pytest.mark.parametrize("late", [False, True])
def test_gradients(store: PooledStore, way: str, late: bool) -> None:
    model, x = net()
    wanted = step(model, x, lambda model, x: model(x))
    for _ in range(3):
        for stream in streams(store) if late else ():
            slow(stream)
        assert all(map(torch.equal, step(model, x, ways(store)[way]), wanted))
    assert store.used_bytes == 0


def test_no_pinned_memory_after_two_steps(store: PooledStore) -> None:
    model, x = net()
    counts = []
    for number in range(12):
        step(model, x, ways(store)["everything"])
        if number >= 2:
            stats = torch.cuda.host_memory_stats()
            counts.append((store.allocated_bytes, stats.get("num_host_alloc", 0)))
    assert len(set(counts)) == 1


def test_device_memory_falls() -> None:
    model, x = net()
    peaks = []
    to = ckpt_pass.Offload(min_bytes=1)
    for forward in (lambda model, x: model(x), partial(hooks, to=to)):
        for _ in range(2):
            step(model, x, forward)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(model, x, forward)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.75 * peaks[0], peaks
    assert store_for(to, x.device).used_bytes == 0


def test_rates_of_the_link() -> None:
    out, back = measured_rates(ckpt_pass.Offload(), "cuda")
    assert out > 1e9 and back > 1e9
