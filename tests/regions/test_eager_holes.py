"""Where eager regions could leak, race, or be silently wrong: each place once."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from tests.zoo.surroundings import no_collector, on_threads

Around = Callable[..., Any]


def hooked(fn: Callable[..., Any], *args: Any, policy: str = "save-matmul") -> Any:
    context_fn = ckpt_pass.context_fn(policy)
    return torch_checkpoint(fn, *args, use_reentrant=False, context_fn=context_fn)


def region(fn: Callable[..., Any], *args: Any) -> Any:
    return ckpt_pass.checkpoint(fn, *args)


def selective(fn: Callable[..., Any], *args: Any) -> Any:
    return ckpt_pass.checkpoint(fn, *args, policy="save-matmul")


every = pytest.mark.parametrize("around", [region, selective, hooked])


class Held:
    """Told apart from its equals; only a weak reference counts it."""


@every
@pytest.mark.parametrize("end", ["backward", "never", "retained", "failed"])
def test_a_region_dies_with_its_graph(around: Around, end: str) -> None:
    """Without the collector: arguments, closures and saved values, however the graph ends."""
    runs = [0]

    def scope() -> list[weakref.ref[Any]]:
        held, w = Held(), torch.randn(8, 8, requires_grad=True)
        x = torch.randn(4, 8, requires_grad=True) * 1

        def fn(v: Tensor, _held: Held = held) -> Tensor:
            runs[0] += 1
            if end == "failed" and runs[0] == 2:
                raise ValueError("on purpose")
            return ((v @ w).sin() @ w).exp()

        out = around(fn, x)
        if end == "failed":
            with contextlib.suppress(ValueError):
                out.sum().backward()
        elif end != "never":
            out.sum().backward(retain_graph=end == "retained")
        return [weakref.ref(held), weakref.ref(x)]

    with no_collector():
        assert [ref() for ref in scope()] == [None, None]


@every
def test_many_threads_share_one_region_module(around: Around) -> None:
    """Forward and backward of one module on eight threads at once."""
    block = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    xs = [torch.randn(8, 16) for _ in range(8)]
    leaves = list(block.parameters())
    wanted = [torch.autograd.grad(block(x).square().sum(), leaves) for x in xs]
    barrier, wrong = threading.Barrier(len(xs)), []

    def work(x: Tensor, expected: tuple[Tensor, ...]) -> None:
        barrier.wait()
        for _ in range(10):
            got = torch.autograd.grad(around(block, x).square().sum(), leaves)
            if not all(map(torch.equal, got, expected)):
                wrong.append(x)

    on_threads(work, zip(xs, wanted, strict=True))
    assert not wrong


@every
def test_a_forward_here_and_a_backward_on_another_thread(around: Around) -> None:
    """As in pipelines, and on the threads that autograd keeps for devices."""
    x = torch.randn(4, 8, requires_grad=True)
    fn = lambda v: nn.functional.dropout(v.sin(), 0.5).exp()  # noqa: E731
    torch.manual_seed(0)
    (wanted,) = torch.autograd.grad(fn(x).sum(), x)
    torch.manual_seed(0)
    out = around(fn, x)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(out.sum(), x)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], wanted)


@every
def test_outputs_that_alias_arguments(around: Around) -> None:
    x, y = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)

    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return a, b.view(-1), (a * b).sin()

    def gradients(call: Around) -> tuple[Tensor, ...]:
        same, view, value = call(fn, x, y)
        return torch.autograd.grad((same.sin() * value).sum() + view.cos().sum(), (x, y))

    wanted = gradients(lambda f, *args: f(*args))
    assert all(map(torch.equal, gradients(around), wanted))


@every
def test_an_argument_in_a_container_that_changes(around: Around) -> None:
    """An error that says so, in torch's regions with our contexts too."""
    held = torch.randn(4)
    x = torch.randn(4, requires_grad=True)
    out = around(lambda v, box: (v * box["deep"][0]).exp(), x, {"deep": [held]})
    held.add_(1)
    if around is hooked:
        with pytest.raises(ckpt_pass.MutatedStateError, match="Element 0 of a list"):
            out.sum().backward()
        return
    with pytest.raises(ckpt_pass.MutatedArgumentError, match="changed in place 1 times"):
        out.sum().backward()


@every
def test_inference_and_no_grad_inside_and_around(around: Around) -> None:
    x = torch.randn(4, requires_grad=True)

    def fn(v: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = float(v.detach().exp().sum())
        with torch.no_grad():
            shift = v.cos()
        return (v * scale + shift).sin()

    wanted = torch.autograd.grad(fn(x).sum(), x)
    assert torch.equal(torch.autograd.grad(around(fn, x).sum(), x)[0], wanted[0])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not around(fn, x).requires_grad
    with torch.inference_mode():
        constant = torch.ones(4)
    if around is hooked:
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            around(lambda v, c: v.sin() + c, x, constant)  # torch keeps arguments as saved values
        return
    out = around(lambda v, c: v.sin() + c, x, constant)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], x.cos())


@every
def test_second_order_gradients(around: Around) -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def second(call: Around) -> tuple[Tensor, ...]:
        out = call(lambda a, b: (a @ b).tanh(), x, w)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x, w))

    wanted = second(lambda f, *args: f(*args))
    if around is region:
        assert all(map(torch.equal, second(around), wanted))
        return
    with pytest.raises(ckpt_pass.BackwardTwiceError):  # a kept value is handed out once
        second(around)


@every
def test_hooks_on_values_inside_a_region(around: Around) -> None:
    """They run in the graph of the forward, once, and may change gradients."""
    x = torch.randn(4, requires_grad=True)
    seen: list[int] = []

    def fn(v: Tensor) -> Tensor:
        y = v.sin()
        if y.requires_grad:
            y.register_hook(lambda g: (seen.append(1), 2 * g)[1])
        return y.exp()

    wanted = torch.autograd.grad(fn(x).sum(), x)[0]
    seen.clear()
    assert torch.equal(torch.autograd.grad(around(fn, x).sum(), x)[0], wanted)
    assert seen == [1]


@pytest.mark.parametrize("around", [region, selective])
def test_functional_transforms(around: Around) -> None:
    """Torch's own checkpoint does not work under them."""
    x = torch.randn(4, 3)
    fn = lambda v: v.sin().exp().sum()  # noqa: E731
    inside = partial(around, fn)
    assert torch.equal(torch.func.grad(inside)(x), torch.func.grad(fn)(x))
    per_row = torch.func.vmap(torch.func.grad(inside))
    assert torch.equal(per_row(x), torch.func.vmap(torch.func.grad(fn))(x))
    assert torch.equal(torch.func.hessian(inside)(x), torch.func.hessian(fn)(x))


@every
def test_retained_graphs_and_values_that_wait(around: Around) -> None:
    """Partial backwards through one region, in any order, with the graph kept or not."""
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        hidden = a.sin() @ b
        return a.exp(), b.cos(), hidden.tanh()

    parts = fn(x, w)
    wanted = [torch.autograd.grad(part.sum(), (x, w), allow_unused=True) for part in parts]
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        parts = around(fn, x, w)
        for index in order:
            found = torch.autograd.grad(parts[index].sum(), (x, w), allow_unused=True)
            for got, expected in zip(found, wanted[index], strict=True):
                assert (got is None) == (expected is None)
                assert got is None or torch.equal(got, expected)
