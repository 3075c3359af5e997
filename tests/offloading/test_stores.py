"""Stores: what comes back, where it lies meanwhile, and what is left of it."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.offloading.rates import measured_rates
from ckpt_pass.offloading.slots import ALIGNMENT, Slot, Slots
from ckpt_pass.offloading.store import PooledStore, Store
from ckpt_pass.offloading.stores import close_shared_stores, disk_store, host_store, store_for

STORES: dict[str, Callable[..., PooledStore]] = {"host": host_store, "disk": disk_store}
each_store = pytest.mark.parametrize("make", STORES.values(), ids=STORES)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(40, 30)
    return {
        "plain": base,
        "transposed": base.t(),
        "strided view with an offset": base[3:, 1::2],
        "expanded": torch.randn(5, 1, 7).expand(5, 9, 7),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "bool": base > 0,
        "complex": torch.randn(6, 5, dtype=torch.complex64),
        "bfloat16, with history": torch.randn(50, requires_grad=True).bfloat16(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.randn(9)),
        "inference": _inference(),
        "large": torch.randn(700, 1000),
    }


@torch.inference_mode()
def _inference() -> Tensor:
    return torch.randn(20)


@each_store
@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize("fetched", [False, True])
def test_what_comes_back(make: Callable[..., Store], name: str, fetched: bool) -> None:
    tensor = tensors()[name]
    wanted, storage = tensor.detach().clone(), tensor.untyped_storage().nbytes()
    ticket = make().put(tensor)
    for _ in range(2):
        ticket.release()
    for _ in range(2 * fetched):
        ticket.fetch()
    first, second = ticket.take(), ticket.take()
    assert ticket.nbytes == storage
    for got in (first, second):
        assert torch.equal(got, wanted) and got.dtype == tensor.dtype
        assert (got.size(), got.stride()) == (tensor.size(), tensor.stride())
        assert got.storage_offset() == tensor.storage_offset()
        assert got.untyped_storage().nbytes() == storage
        assert not got.requires_grad and got.grad_fn is None and got.is_leaf
    if storage:
        assert len({t.data_ptr() for t in (tensor, first, second)}) == 3


@each_store
def test_before_it_is_released_the_value_is_where_it_was(make: Callable[..., Store]) -> None:
    tensor = torch.randn(1000)
    ticket = make().put(tensor)
    assert ticket.take().data_ptr() == tensor.data_ptr()
    assert not ticket.released


@each_store
def test_memory_is_let_go_of_when_it_is_released(make: Callable[..., Store]) -> None:
    tensor = torch.randn(100_000)
    storage = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
    ticket = make().put(tensor)
    del tensor
    assert not storage.expired()
    ticket.release()
    assert storage.expired() and ticket.released


@each_store
def test_a_place_is_free_again_with_its_ticket(make: Callable[..., Store]) -> None:
    store = make()
    for _ in range(30):  # no backward comes
        tickets = [store.put(torch.randn(n)) for n in (1000, 70_000, 3)]
        assert store.used_bytes > 4 * 71_003
        if random.random() < 0.5:
            tickets[1].release()
            tickets[1].fetch()
    del tickets
    assert store.used_bytes == 0
    assert store.allocated_bytes == 64 * 2**20


@each_store
def test_a_budget(make: Callable[..., Store]) -> None:
    store = make(budget_bytes=3 * ALIGNMENT)
    kept = [store.put(torch.zeros(100)) for _ in range(3)]
    with pytest.raises(ckpt_pass.StoreFullError, match=r"400 bytes|512 bytes.*1,536 of 1,536"):
        store.put(torch.zeros(100))
    kept.pop()
    store.put(torch.ones(100)).release()
    with pytest.raises(ckpt_pass.StoreFullError, match="host_budget"):
        store.put(torch.zeros(100_000))
    assert all(torch.equal(ticket.take(), torch.zeros(100)) for ticket in kept)
    assert store.allocated_bytes == 3 * ALIGNMENT


@each_store
def test_reserved_at_once(make: Callable[..., Store]) -> None:
    store = make(budget_bytes=10_240)
    store.reserve(10_000)
    assert store.allocated_bytes == 10_240
    ticket = store.put(torch.ones(2560))
    assert store.allocated_bytes == store.used_bytes == ticket.nbytes
    with pytest.raises(ckpt_pass.StoreFullError):
        store.reserve(20_000)


def test_slots_never_overlap_and_join_again() -> None:
    rng = random.Random(0)
    for contiguous in (False, True):
        slots, taken = Slots(), list[Slot]()
        for _ in range(1500):
            if taken and rng.random() < 0.48:
                slots.give(taken.pop(rng.randrange(len(taken))))
                continue
            nbytes = rng.randrange(1, 60)
            slot = slots.take(nbytes)
            if slot is None:
                if contiguous and slots.capacity_bytes:
                    slots.extend(nbytes - slots.tail_bytes)
                else:
                    slots.add_chunk(max(nbytes, 100))
                slot = slots.take(nbytes)
            assert slot is not None and slot.nbytes == nbytes
            for other in taken:
                apart = other.offset + other.nbytes <= slot.offset
                apart = apart or slot.offset + nbytes <= other.offset
                assert other.chunk != slot.chunk or apart
            taken.append(slot)
            assert slots.used_bytes == sum(s.nbytes for s in taken) <= slots.capacity_bytes
        for slot in taken:
            slots.give(slot)
        assert slots.used_bytes == 0
        if contiguous:
            assert slots.take(slots.capacity_bytes) == Slot(0, 0, slots.capacity_bytes)


@each_store
def test_a_link_of_a_known_rate(make: Callable[..., Store]) -> None:
    store = make(bytes_per_s=50e6)
    values = [torch.randn(125_000) for _ in range(4)]  # 10 ms each
    began = time.perf_counter()
    tickets = [store.put(value) for value in values]
    assert time.perf_counter() - began < 0.035  # nobody waits yet
    for ticket in tickets:
        ticket.release()
    assert 0.039 < time.perf_counter() - began < 0.5
    began = time.perf_counter()
    for ticket in tickets:
        ticket.fetch()
    assert all(torch.equal(t.take(), v) for t, v in zip(tickets, values, strict=True))
    assert 0.039 < time.perf_counter() - began < 0.5


@each_store
def test_changed_on_its_way(make: Callable[..., Store]) -> None:
    store, tensor = make(), torch.randn(1000)
    ticket = store.put(tensor)
    tensor.add_(1)
    with pytest.raises(ckpt_pass.MovedValueChangedError, match=r"\[1000\].*in place"):
        ticket.take()
    ticket.release()
    with pytest.raises(ckpt_pass.MovedValueChangedError):
        ticket.take()
    ticket = store.put(tensor)
    ticket.release()
    wanted = tensor.clone()
    tensor.add_(1)  # it is in the store
    assert torch.equal(ticket.take(), wanted)


def test_what_cannot_be_moved() -> None:
    store = host_store()
    for tensor in (
        torch.eye(3).to_sparse(),
        torch.randn(3, device="meta"),
        torch.randn(3, dtype=torch.complex64).conj(),
    ):
        with pytest.raises(ckpt_pass.UnmovableTensorError, match="plain, strided"):
            store.put(tensor)
    assert store.used_bytes == 0


@each_store
def test_two_threads(make: Callable[..., Store]) -> None:
    store, wrong = make(), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(25):
            values = [torch.randn(n, generator=generator) for n in (1000, 5000, 20_000)]
            tickets = [store.put(value) for value in values]
            for ticket in tickets:
                ticket.release()
            for ticket in reversed(tickets):
                ticket.fetch()
            for ticket, value in zip(tickets, values, strict=True):
                if not torch.equal(ticket.take(), value):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and store.used_bytes == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_disk_takes_values_out_of_memory() -> None:
    store = disk_store()
    before = resident_bytes()
    tickets = []
    for _ in range(4):
        tickets.append(store.put(torch.ones(10 * 2**20)))  # 40 MiB each: mapped by themselves
        tickets[-1].release()
    assert resident_bytes() - before < 60 * 2**20
    assert store.used_bytes == 160 * 2**20
    assert all(bool((ticket.take() == 1).all()) for ticket in tickets)


@each_store
def test_copies_of_a_store_are_stores_of_their_own(make: Callable[..., Any]) -> None:
    store = make(budget_bytes=2**20)
    ticket = store.put(torch.ones(100))
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert isinstance(other, Store) and other.used_bytes == 0
        with pytest.raises(ckpt_pass.StoreFullError):
            other.put(torch.ones(2**20))
    assert ticket.nbytes == 400 and store.used_bytes == ALIGNMENT


def test_one_store_for_equal_options(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    here = ckpt_pass.Offload("disk", folder=tmp_path)
    assert store_for(here, cpu) is store_for(
        ckpt_pass.Offload("disk", None, 1e9, None, tmp_path), cpu
    )
    assert store_for(here, cpu) is not store_for(ckpt_pass.Offload("disk"), cpu)
    own = host_store()
    assert store_for(own, cpu) is own
    ticket = store_for(here, cpu).put(torch.ones(10))
    close_shared_stores()
    gc.collect()
    assert torch.equal(ticket.take(), torch.ones(10))
    with pytest.raises(ckpt_pass.InvalidOffloadError, match="on meta"):
        store_for(here, torch.device("meta"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"to": "cpu"}, "to='cpu'.*host, disk"),
        ({"to": "dsk"}, "Did you mean 'disk'"),
        ({"host_budget": "32"}, "host_budget='32'"),
        ({"host_budget": -1}, "host_budget=-1"),
        ({"host_budget": True}, "host_budget=True"),
        ({"host_budget": 0.5}, "host_budget=0.5"),
        ({"d2h_bytes_per_s": 0}, "d2h_bytes_per_s=0"),
        ({"h2d_bytes_per_s": "fast"}, "h2d_bytes_per_s='fast'"),
        ({"folder": "/tmp"}, "only a disk has folders"),
        ({"to": "disk", "folder": 3}, "of type int"),
        ({"min_bytes": -1}, "min_bytes=-1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ckpt_pass.InvalidOffloadError, match=says):
        ckpt_pass.Offload(**options)


RULES = ckpt_pass.offload(op_class="matmul") | ckpt_pass.recompute()
MOVING: dict[str, Callable[[nn.Module, Tensor, Any], Any]] = {
    "checkpoint": lambda m, x, to: ckpt_pass.checkpoint(m, x, policy=RULES, offload=to),
    "context_fn": lambda m, x, to: ckpt_pass.checkpoint(
        m, x, context_fn=ckpt_pass.context_fn(RULES, to)
    ),
    "applied": lambda m, x, to: _applied(m, x, "all", offload=to, offload_inputs=True),
    "Offloaded": lambda m, x, to: _applied(m, x, ckpt_pass.Offloaded(ckpt_pass.AllLayers(), to)),
    "activations": lambda m, x, to: _with_activations(m, x, to),
}


def _applied(model: nn.Module, x: Tensor, placement: Any, **how: Any) -> Tensor:
    with ckpt_pass.applied(model, placement, **how):
        found: Tensor = model(x)
        found.sum().backward()
    return found


def _with_activations(model: nn.Module, x: Tensor, to: Any) -> Tensor:
    with ckpt_pass.offload_activations(model, to):
        found: Tensor = model(x)
    return found


@pytest.mark.parametrize("way", MOVING)
def test_a_place_is_checked_before_anything_runs(way: str) -> None:
    layers = (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))
    model, x = nn.Sequential(*layers), torch.randn(4, 8)
    assert torch.equal(MOVING[way](model, x, True), model(x))
    for wrong in ("disk", 3):
        with pytest.raises(ckpt_pass.InvalidOffloadError, match=f"offload={wrong!r}"):
            MOVING[way](model, x, wrong)


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_whether_inputs_are_offloaded_is_true_or_false(wrong: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    with pytest.raises(ckpt_pass.InvalidOffloadError, match=f"offload_inputs={wrong!r}"):
        ckpt_pass.checkpoint(model, x, offload_inputs=wrong)
    with pytest.raises(ckpt_pass.InvalidOffloadError, match=f"offload_inputs={wrong!r}"):
        ckpt_pass.apply(model, "all", offload_inputs=wrong)


def test_options() -> None:
    assert ckpt_pass.Offload(host_budget="1.5 GiB").host_budget_bytes == 3 * 2**29
    assert ckpt_pass.Offload(host_budget=7).host_budget_bytes == 7
    assert str(ckpt_pass.Offload("disk", "2GB")) == "offload to disk, at most 2GB"
    assert hash(ckpt_pass.Offload("disk")) == hash(ckpt_pass.Offload("disk"))


def test_rates() -> None:
    assert measured_rates(ckpt_pass.Offload("host", None, 3.0, 4.0), "cpu") == (3.0, 4.0)
    out, back = measured_rates(ckpt_pass.Offload("host", h2d_bytes_per_s=5), "cpu")
    assert out > 1e6 and back == 5
    assert measured_rates(ckpt_pass.Offload(), "cpu")[0] == out  # once
