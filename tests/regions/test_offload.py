"""Regions that offload: what moves, what comes back, what runs again, what is left."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from ckpt_pass.offloading.stores import disk_store, host_store, store_for
from ckpt_pass.ops.flops import FlopCounter
from ckpt_pass.regions.keeps import Keeps
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions

aten = torch.ops.aten
SMALL = ckpt_pass.Offload(min_bytes=1)


class Watched:
    """A store that tells what was put into it."""

    def __init__(self, store: Any = None) -> None:
        self.store = host_store() if store is None else store
        self.put_bytes: list[int] = []
        self.addresses: list[int] = []
        self.tickets: list[weakref.ref[Any]] = []

    def put(self, tensor: Tensor) -> Any:
        ticket = self.store.put(tensor)
        self.put_bytes.append(ticket.nbytes)
        self.addresses.append(tensor.untyped_storage().data_ptr())
        self.tickets.append(weakref.ref(ticket))
        return ticket

    def reserve(self, nbytes: int) -> None:
        self.store.reserve(nbytes)

    @property
    def allocated_bytes(self) -> int:
        return int(self.store.allocated_bytes)

    @property
    def used_bytes(self) -> int:
        return int(self.store.used_bytes)


class Block(nn.Module):
    """Attention from views of one product, dropout, and a ReLU in place."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, 4, width // 4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(x.shape)))
        return x + self.drop(self.down(F.relu_(self.up(x))))  # type: ignore[no-any-return]


Around = Callable[..., Any]


class Net(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.around: Around = lambda layer, x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = self.around(layer, x)
        return x.square().mean()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: Tensor = X, autocast: bool = False) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", enabled=autocast):
        loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(got) == len(wanted) and all(map(torch.equal, got, wanted))


EVERYTHING = ckpt_pass.offload()
PRODUCTS = ckpt_pass.offload(op_class="matmul") | ckpt_pass.save(op_class="attention")
WAYS: dict[str, Callable[[Any], Around]] = {
    "everything": lambda to: partial(ckpt_pass.checkpoint, policy=EVERYTHING, offload=to),
    "products": lambda to: partial(ckpt_pass.checkpoint, policy=PRODUCTS, offload=to),
    "inputs": lambda to: partial(ckpt_pass.checkpoint, offload=to, offload_inputs=True),
    "inputs and products": lambda to: partial(
        ckpt_pass.checkpoint, policy=PRODUCTS, offload=to, offload_inputs=True
    ),
    "context_fn": lambda to: partial(
        torch_checkpoint,
        use_reentrant=False,
        context_fn=ckpt_pass.context_fn(EVERYTHING, offload=to),
    ),
}


@pytest.mark.parametrize("to", ["host", "disk"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients(net: Net, way: str, to: str) -> None:
    place = ckpt_pass.Offload(to, min_bytes=1)
    for autocast in (False, True):
        net.around = lambda layer, x: layer(x)
        wanted = step(net, autocast=autocast)
        net.around = WAYS[way](place)
        assert same(step(net, autocast=autocast), wanted)
        assert same(step(net, autocast=autocast), wanted)


@pytest.mark.parametrize("member", ["MUST_CPU_OFFLOAD", "PREFER_CPU_OFFLOAD"])
@pytest.mark.parametrize("ours", [True, False])
def test_torchs_members_mean_what_they_say(member: str, ours: bool) -> None:
    decision, store = getattr(CheckpointPolicy, member), Watched()

    def policy_fn(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return decision if op is aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    x, w = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).sigmoid() @ w

    if ours:
        out = ckpt_pass.checkpoint(fn, x, w, policy=policy_fn, offload=store)
    else:
        contexts = ckpt_pass.context_fn(policy_fn, offload=store)
        out = torch_checkpoint(fn, x, w, use_reentrant=False, context_fn=contexts)
    with FlopCounter() as counter:
        got = torch.autograd.grad(out.sum(), (x, w))
    assert store.put_bytes == [256, 256]
    assert counter.flops == 4 * 2 * 8**3  # four products of the backward, none again
    assert same(list(got), list(torch.autograd.grad(fn(x, w).sum(), (x, w))))


def test_a_rule_among_others() -> None:
    policy = ckpt_pass.offload(op_class="matmul", min_bytes=1000) | ckpt_pass.recompute()
    assert str(policy) == "offload(op_class=matmul, min_bytes=1000) | recompute()"
    preferred = ckpt_pass.rule(CheckpointPolicy.PREFER_CPU_OFFLOAD, op="aten.mm")
    assert str(preferred) == "offload[PREFER_CPU_OFFLOAD](op=aten.mm)"
    large, small = nn.Linear(16, 16), nn.Linear(16, 2)
    store, x = Watched(), torch.randn(16, 16, requires_grad=True)
    with ckpt_pass.watch_regions() as regions:
        out = ckpt_pass.checkpoint(lambda v: small(large(v)), x, policy=policy, offload=store)
    out.sum().backward()
    assert store.put_bytes == [1024]
    assert [site.op for site in regions[0].offloaded_sites] == ["aten.addmm.default"]


def test_small_values_are_kept() -> None:
    gc.collect()  # of other tests' steps that were never differentiated, in the same store
    store, layer = store_for(ckpt_pass.Offload(), torch.device("cpu")), nn.Linear(8, 8)
    before, found = store.used_bytes, []
    for least in (1, 10_000):
        place = ckpt_pass.Offload(min_bytes=least)
        out = ckpt_pass.checkpoint(
            layer, torch.randn(4, 8), policy=EVERYTHING, offload=place, offload_inputs=True
        )
        found.append(store.used_bytes - before)
        with FlopCounter() as counter:
            out.sum().backward()
        assert counter.flops == 2 * 4 * 8 * 8  # nothing again, wherever it was
    assert found == [512, 0]


def test_executions_as_a_plan_lists_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    store, x = Watched(), torch.randn(4, 8)
    wanted = step(nn.Sequential(model, Mean()), x)
    keeps = Keeps(moved=(("aten.addmm.default", (0,)), ("aten.tanh.default", (0,))))
    with applied_regions(model, {"0": RegionSpec(keeps, offload=store)}):
        assert same(step(nn.Sequential(model, Mean()), x), wanted)
    assert store.put_bytes == [128, 128]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


# --- what moves and what does not ---------------------------------------------------------------


def test_inputs_without_a_history_stay() -> None:
    layer, store = nn.Linear(8, 8), Watched()
    weight = nn.Parameter(torch.randn(8, 8))
    mask, leaf = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)

    def fn(x: Tensor, others: dict[str, Tensor]) -> Tensor:
        return layer(x) @ others["weight"] + others["mask"] * others["leaf"]

    x = leaf * 2
    wanted = torch.autograd.grad(
        fn(x, {"weight": weight, "mask": mask, "leaf": leaf}).sum(), (leaf, weight)
    )
    x = leaf * 2
    out = ckpt_pass.checkpoint(
        fn,
        x,
        {"weight": weight, "mask": mask, "leaf": leaf},
        offload=store,
        offload_inputs=True,
    )
    assert store.addresses == [x.untyped_storage().data_ptr()]
    del x
    assert same(list(torch.autograd.grad(out.sum(), (leaf, weight))), list(wanted))


def test_an_input_of_many_regions_moves_once() -> None:
    """And so do views of one storage."""
    store, start = Watched(), torch.randn(6, 8, requires_grad=True)
    memory = start * 2

    def layer(x: Tensor, whole: Tensor, part: Tensor) -> Tensor:
        return (x * whole).tanh() + part.sum()

    def run(around: Around) -> Tensor:
        x, memory = start + 1, start * 2
        for _ in range(3):
            x = around(layer, x, memory, memory[:2])
        return x.sum()

    (wanted,) = torch.autograd.grad(run(lambda fn, *args: fn(*args)), start)
    region = partial(ckpt_pass.checkpoint, offload=store, offload_inputs=True)
    loss = run(region)
    assert len(store.put_bytes) == 4  # three values of x and the memory
    (got,) = torch.autograd.grad(loss, start)
    assert torch.equal(got, wanted) and memory is not None


def test_memory_is_let_go_of_at_the_regions_end(net: Net) -> None:
    storages: list[Any] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        storages.extend(weakref.ref(t.untyped_storage()) for t in (*args, output))

    for layer in net.layers:
        layer.register_forward_hook(watch)
    net.around = partial(ckpt_pass.checkpoint, offload=SMALL, offload_inputs=True)
    out = net(X)
    assert [ref() is None for ref in storages[:-1]] == [True] * (len(storages) - 1)
    out.backward()


def peak(net: Net, around: Around) -> tuple[int, int]:
    net.around = around
    x = torch.randn(8, 64, 32)
    for _ in range(2):
        net(x).backward()
    found = ckpt_pass.measure_step(lambda: net(x), repeats=1)
    assert found.saved_bytes is not None
    return found.peak_bytes, found.saved_bytes


@pytest.mark.parametrize("make", [host_store, disk_store])
def test_the_peak_falls_by_what_is_moved(make: Any) -> None:
    net, store = Net(2), Watched(make())
    kept = peak(net, partial(ckpt_pass.checkpoint, policy=ckpt_pass.save(op_class="matmul")))
    moved = peak(net, partial(ckpt_pass.checkpoint, policy=PRODUCTS, offload=store))
    everything = peak(
        net,
        partial(ckpt_pass.checkpoint, policy=PRODUCTS, offload=store, offload_inputs=True),
    )
    of_one_step = 2 * 8 * 64 * 4 * (3 * 32 + 32 + 4 * 32 + 32)  # the four products of two blocks
    attention = 2 * 8 * 64 * 4 * (32 + 4)  # outputs and logarithms, which PRODUCTS keeps
    assert kept[1] - moved[1] == of_one_step - attention
    assert moved[1] - everything[1] == 2 * 8 * 64 * 4 * 32  # what enters the two blocks
    assert kept[0] > moved[0] > everything[0]  # the backward of one block is most of it


def test_nothing_is_allocated_after_two_steps(net: Net) -> None:
    for make in (host_store, disk_store):
        store = make()
        net.around = partial(
            ckpt_pass.checkpoint, policy=EVERYTHING, offload=store, offload_inputs=True
        )
        sizes = []
        for _ in range(4):
            step(net)
            sizes.append(store.allocated_bytes)
        assert len(set(sizes[1:])) == 1 and store.used_bytes == 0


# --- what is left ---------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("no_collector")
def test_nothing_stays(net: Net, way: str) -> None:
    store = Watched()
    net.around = WAYS[way](store)
    for backward in (True, False):
        loss = net(X)
        if backward:
            loss.backward()
        del loss
        assert store.tickets and not any(ref() is not None for ref in store.tickets)
        assert store.used_bytes == 0


def test_two_backwards(net: Net) -> None:
    net.around = partial(ckpt_pass.checkpoint, offload=SMALL, offload_inputs=True)
    for layer in net.layers:
        layer.drop.p = 0.0
    wanted = step(net)
    net.zero_grad()
    loss = net(X)
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    net.zero_grad()
    loss.backward()
    assert same([p.grad for p in net.parameters()], first) and same(first, wanted[1:])
    net.around = partial(ckpt_pass.checkpoint, policy=EVERYTHING, offload=SMALL)
    loss = net(X)
    loss.backward(retain_graph=True)
    with pytest.raises(ckpt_pass.BackwardTwiceError):
        loss.backward()


def test_in_place_inside_and_outside() -> None:
    store = Watched(disk_store(bytes_per_s=1e6))

    def inside(x: Tensor) -> Tensor:
        made = x * 3
        used = made * 2
        made.mul_(3)  # while it is on its way
        return made.tanh() + used.sin_()

    x = torch.randn(500, requires_grad=True)
    (wanted,) = torch.autograd.grad(inside(x).sum(), x)
    out = ckpt_pass.checkpoint(inside, x, policy=EVERYTHING, offload=store)
    (got,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(got, wanted)
    # A region's output that is changed later is in the store already.
    out = ckpt_pass.checkpoint(lambda v: v.exp(), x, policy=EVERYTHING, offload=store)
    out.mul_(2)
    with torch.no_grad():
        wanted = 2 * x.exp()
    (got,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(got, wanted)


def test_an_input_that_its_region_changes() -> None:
    x = torch.randn(100, requires_grad=True)
    y = x * 2
    out = ckpt_pass.checkpoint(lambda v: v.add_(1).sin(), y, offload=Watched(), offload_inputs=True)
    with pytest.raises(ckpt_pass.MutatedArgumentError, match=r"\[100\].*offloaded"):
        out.sum().backward()
    y = x * 2
    out = ckpt_pass.checkpoint(lambda v: v.sin(), y, offload=Watched(), offload_inputs=True)
    y.add_(1)  # it was put away before
    (got,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(got, torch.autograd.grad((x * 2).sin().sum(), x)[0])


def test_running_statistics_move_once() -> None:
    torch.manual_seed(0)
    layer, x = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        torch.randn(2, 2, 6, 6),
    )
    buffers = []
    for around in (
        lambda fn, x: fn(x),
        partial(ckpt_pass.checkpoint, policy=EVERYTHING, offload=SMALL, offload_inputs=True),
    ):
        layer[1].reset_running_stats()
        layer.zero_grad()
        around(layer, x * 1.0).square().sum().backward()
        buffers.append(
            [*(b.clone() for b in layer.buffers()), *(p.grad for p in layer.parameters())]
        )
    assert same(*buffers)


def test_segments(net: Net) -> None:
    wanted = step(net)
    for nested in (False, True):
        store = Watched()
        placement = ckpt_pass.Segments(2, nested=nested)
        with ckpt_pass.applied(net, placement, offload=store, offload_inputs=True):
            assert same(step(net), wanted)
        assert len(store.put_bytes) == 2  # what enters the two segments


def test_two_threads_train_two_models() -> None:
    place, nets = ckpt_pass.Offload("disk", min_bytes=1), []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(Net(2))
        for layer in nets[-1].layers:
            layer.drop.p = 0.0
    wanted = [step(net) for net in nets]
    right: list[bool] = []

    def train(number: int) -> None:
        nets[number].around = partial(
            ckpt_pass.checkpoint, policy=EVERYTHING, offload=place, offload_inputs=True
        )
        for _ in range(3):
            nets[number].zero_grad()
            loss = nets[number](X)
            loss.backward()
            got = [p.grad for p in nets[number].parameters()]
            right.append(same([loss.detach(), *got], wanted[number]))  # type: ignore[list-item]

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 6


# --- compiled ---------------------------------------------------------------------------------


def test_compiled_regions_refuse() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)

    def step(**options: Any) -> Any:
        return torch.compile(
            lambda v: ckpt_pass.checkpoint(layer, v, **options).sum(), backend="aot_eager"
        )(x)

    with pytest.raises(Exception, match="offloading is not supported in a compiled graph"):
        step(policy=EVERYTHING)


def test_nested_regions(net: Net) -> None:
    wanted = step(net)
    store = Watched()
    inner = WAYS["inputs and products"](store)
    for outer in ("everything", "inputs", "context_fn"):
        around = WAYS[outer](store)
        net.around = lambda layer, x, around=around: around(lambda v: inner(layer, v), x)  # type: ignore[misc]
        assert same(step(net), wanted), outer
    assert store.used_bytes == 0
