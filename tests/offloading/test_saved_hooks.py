"""Offloading what autograd saves: what moves, once, and comes back as it was."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.offloading.stores import disk_store, host_store
from tests.regions.test_offload import SMALL, Net, Watched, X, same, step


def hooked(net: nn.Module, to: Any, in_flight: int, x: Tensor) -> Tensor:
    with ckpt_pass.offload_activations(net, to, in_flight=in_flight):
        return net(x)  # type: ignore[no-any-return]


class Hooked(nn.Module):
    """A model whose forward runs inside the hooks."""

    def __init__(self, net: nn.Module, to: Any, in_flight: int = 5) -> None:
        super().__init__()
        self.net, self.to_, self.in_flight = net, to, in_flight

    def forward(self, x: Tensor) -> Tensor:
        return hooked(self.net, self.to_, self.in_flight, x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net(2)


@pytest.mark.parametrize("to", ["host", "disk"])
@pytest.mark.parametrize("in_flight", [0, 1, 5])
def test_gradients(net: Net, to: str, in_flight: int) -> None:
    place = ckpt_pass.Offload(to, min_bytes=1)
    for autocast in (False, True):
        wanted = step(net, autocast=autocast)
        for _ in range(2):
            assert same(step(Hooked(net, place, in_flight), autocast=autocast), wanted)


def test_a_storage_moves_once_and_nobody_elses(net: Net) -> None:
    """Queries, keys and values are views of one product; a ReLU in place is saved twice."""
    layer, store = net.layers[0], Watched()
    x = torch.randn(4, 16, 32, requires_grad=True)
    kept = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), x)}
    layer.eval()  # no dropout
    out = hooked(layer, store, 5, x)
    tokens = 4 * 16
    floats = [n // 4 for n in store.put_bytes]
    assert floats.count(tokens * 3 * 32) == 1 and floats.count(tokens * 4 * 32) == 1
    assert not kept & set(store.addresses)
    assert len(store.addresses) == len(set(store.addresses))
    out.sum().backward()


def test_strides_and_offsets_come_back() -> None:
    seen: list[tuple[Any, ...]] = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return sum(t.sum() for t in tensors)  # type: ignore[return-value]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            for t in ctx.saved_tensors:
                seen.append((t.size(), t.stride(), t.storage_offset(), t.dtype, t.clone()))
            return tuple(torch.ones_like(t) for t in ctx.saved_tensors)

    x = torch.randn(6, 8, requires_grad=True)
    made = x * 2
    views = (made, made.t(), made[1:, ::3], made[0].expand(5, 8), made.double()[2:])
    store = Watched(disk_store())
    with ckpt_pass.offload_activations(offload=store, in_flight=0):
        out = Looks.apply(*views)
    assert len(store.put_bytes) == 2  # one storage, and that of the doubles
    out.backward()
    for view, (size, stride, offset, dtype, value) in zip(views, seen, strict=True):
        assert (view.size(), view.stride(), view.storage_offset()) == (size, stride, offset)
        assert view.dtype == dtype and torch.equal(view, value)


def test_the_last_ones_in_flight_never_leave(net: Net) -> None:
    counts = []
    for in_flight in (0, 3):
        store = Watched()
        loss = hooked(net, store, in_flight, X)
        counts.append(sum(not ref().released for ref in store.tickets))  # type: ignore[union-attr]
        loss.backward()
    assert counts == [0, 3]


def test_the_peak_falls(net: Net) -> None:
    x, found = torch.randn(8, 64, 32), []
    for to in (None, disk_store()):
        run = net if to is None else Hooked(net, to, 0)
        run(x).backward()
        found.append(ckpt_pass.measure_step(partial(run, x), repeats=1))
    plain, moved = found
    assert plain.saved_bytes is not None and moved.saved_bytes is not None
    assert moved.saved_bytes < 0.02 * plain.saved_bytes
    assert moved.peak_bytes < 0.6 * plain.peak_bytes


def test_backwards() -> None:
    """Twice, of the second order, through a part of the graph, and none at all."""
    store = Watched()
    x, w = torch.randn(30, requires_grad=True), nn.Parameter(torch.randn(30))

    def fn() -> Tensor:
        return ((x * 2 * w).tanh() * w).exp().sum()

    def moved() -> Tensor:
        with ckpt_pass.offload_activations(offload=store, in_flight=1):
            return fn()

    for again in (False, True):
        grads = []
        for make in (fn, moved):
            first = torch.autograd.grad(make(), (x, w), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))
            grads.append([*first, *second])
        assert same(*grads), again
    loss = moved()
    one = torch.autograd.grad(loss, x, retain_graph=True)
    two = torch.autograd.grad(loss, (x, w))
    assert torch.equal(one[0], two[0]) and same(list(two), list(torch.autograd.grad(fn(), (x, w))))
    del loss, first, second, grads
    moved()
    gc.collect()
    assert store.used_bytes == 0


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_stays(net: Net, backward: bool) -> None:
    store, refs = Watched(), []
    for layer in net.layers:
        layer.register_forward_hook(
            lambda module, args, out: refs.append(weakref.ref(out.untyped_storage()))
        )
    gc.disable()
    try:
        loss = hooked(net, store, 5, X)
        if backward:
            loss.backward()
        del loss
        assert store.used_bytes == 0 and refs and not any(ref() is not None for ref in refs)
    finally:
        gc.enable()


def test_what_a_plain_step_refuses_is_refused() -> None:
    x = torch.randn(100_000, requires_grad=True)
    with ckpt_pass.offload_activations(offload=host_store(bytes_per_s=1e7)):
        y = x.exp()
        out = y.sum()
        y.add_(1)
    with pytest.raises(ckpt_pass.MovedValueChangedError):
        out.backward()


@pytest.mark.parametrize("in_flight", [0, 5])
def test_what_an_op_writes_after_autograd_has_saved_it(in_flight: int) -> None:
    """The noise of a randomised leaky ReLU is saved empty, and filled by the op."""
    x = torch.randn(64, 64, requires_grad=True)

    def fn() -> Tensor:
        y = nn.functional.rrelu(x * 3, training=True) * torch.rand(64, 64)
        return (nn.functional.rrelu(y, 0.0, 0.9, training=True)).sum()

    torch.manual_seed(0)
    wanted = torch.autograd.grad(fn(), x)
    for place in (SMALL, ckpt_pass.Offload("disk", min_bytes=1)):
        torch.manual_seed(0)
        with ckpt_pass.offload_activations(offload=place, in_flight=in_flight):
            out = fn()
        assert same(list(torch.autograd.grad(out, x)), list(wanted))


def test_a_constant_that_is_changed_after_its_op_is_refused() -> None:
    x, mask = torch.randn(50, requires_grad=True), torch.rand(50)
    with ckpt_pass.offload_activations(offload=SMALL):
        out = (x * mask).sum()
        mask.zero_()
    with pytest.raises(ckpt_pass.MovedValueChangedError):
        out.backward()


def test_what_cannot_be_moved_is_kept() -> None:
    x = torch.randn(6, 6, requires_grad=True)

    def fn() -> Tensor:
        sparse = torch.eye(6).to_sparse()
        return (torch.sparse.mm(sparse, x * 3).tanh() * torch.randn(6, 6).conj()).sum()

    torch.manual_seed(0)
    wanted = torch.autograd.grad(fn(), x)
    torch.manual_seed(0)
    with ckpt_pass.offload_activations(offload=SMALL):
        out = fn()
    assert same(list(torch.autograd.grad(out, x)), list(wanted))


def test_regions_inside_and_around(net: Net) -> None:
    wanted = step(net)
    store = Watched()
    net.around = ckpt_pass.checkpoint
    assert same(step(Hooked(net, store)), wanted)
    assert (
        max(store.put_bytes) == 4 * 16 * 32 * 4
    )  # no more than what enters a region, and the loss
    net.around = lambda layer, x: layer(x)

    def inside(x: Tensor) -> Tensor:
        return hooked(net, store, 1, x)

    net.zero_grad()
    torch.manual_seed(3)
    loss = ckpt_pass.checkpoint(inside, X)
    loss.backward()
    grads = [p.grad for p in net.parameters()]
    assert same([loss.detach(), *grads], wanted)  # type: ignore[list-item]
