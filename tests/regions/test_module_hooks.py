"""Hooks on modules inside a region: called as often with ours as with torch's own checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass

Region = Callable[..., Any]
Seen = list[tuple[str, str]]


def bare(fn: Region, x: Tensor) -> Any:
    return ckpt_pass.checkpoint(fn, x)


def selective(fn: Region, x: Tensor) -> Any:
    return ckpt_pass.checkpoint(fn, x, policy="save-matmul")


def hooked(fn: Region, x: Tensor) -> Any:
    contexts = ckpt_pass.context_fn("save-nothing")
    return torch_checkpoint(fn, x, use_reentrant=False, context_fn=contexts)


def torchs(fn: Region, x: Tensor) -> Any:
    return torch_checkpoint(fn, x, use_reentrant=False)


def applied(fn: nn.Module, x: Tensor) -> Any:
    """As a region of a placement; hooks on the module itself run outside of the region."""
    with ckpt_pass.applied(nn.ModuleDict({"block": fn}), ckpt_pass.ByName("block")):
        out = fn(x)
    return out


every = pytest.mark.parametrize("ours", [bare, selective, hooked, applied])


class Block(nn.Module):
    """Recomputation ends inside of the innermost module that saves something last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.last = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def balanced(seen: Seen) -> bool:
    """Whether each module that was entered was left, the last one first."""
    open_ones: list[str] = []
    for what, name in seen:
        if what == "enter":
            open_ones.append(name)
        elif not open_ones or open_ones.pop() != name:
            return False
    return not open_ones


def on_each(block: nn.Module, seen: Seen) -> None:
    for name, module in block.named_modules():
        if name:
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(("enter", name)))
            module.register_forward_hook(
                lambda *_, name=name: seen.append(("leave", name)), always_call=True
            )


def run(way: Region, block: nn.Module) -> None:
    way(block, torch.ones(2, 4, requires_grad=True)).sum().backward()


@every
def test_hooks_that_are_always_called(ours: Region) -> None:
    found: dict[Region, Seen] = {}
    for way in (torchs, ours):
        torch.manual_seed(0)
        block = Block()
        on_each(block, found.setdefault(way, []))
        run(way, block)
        assert balanced(found[way])
    assert found[ours] == found[torchs]


@pytest.fixture
def followed() -> Iterator[Seen]:
    """Hooks on all modules, as torch's trackers of modules and of memory have them."""
    seen: Seen = []
    before = register_module_forward_pre_hook(
        lambda module, *_: seen.append(("enter", str(id(module))))
    )
    after = register_module_forward_hook(
        lambda module, *_: seen.append(("leave", str(id(module)))), always_call=True
    )
    yield seen
    before.remove()
    after.remove()


@every
def test_hooks_on_all_modules(ours: Region, followed: Seen) -> None:
    run(ours, Block())
    assert balanced(followed) and len(followed) > 14  # all seven modules, and some again


@every
def test_a_hook_that_fails_at_the_early_stop(ours: Region) -> None:
    """The module has no output then; torch warns, and goes on."""
    block = Block()
    wanted = torch.autograd.grad(block(torch.ones(2, 4)).sum(), list(block.parameters()))
    block.last[1].register_forward_hook(lambda _, __, out: out * 1, always_call=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(ours, block)
    assert any("always_call=True" in str(warning.message) for warning in caught)
    got = [parameter.grad for parameter in block.parameters()]
    assert all(g is not None and torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


class Guarded(nn.Module):
    """Falls back on another way to compute where the first one fails, and remembers that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.layer(x).exp()
        except Exception:
            self.fails = True
            return self.layer(x).sin().exp()


@pytest.mark.parametrize("ours", [bare, selective, applied])
def test_a_region_that_catches_every_error(ours: Region) -> None:
    """The end of a recomputation is none, where no hook waits for it."""
    block = Guarded()
    block.layer.register_forward_hook(lambda *_: None)
    wanted = torch.autograd.grad(block(torch.ones(2, 4)).sum(), list(block.parameters()))
    run(ours, block)
    got = [parameter.grad for parameter in block.parameters()]
    assert all(g is not None and torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
    assert not block.fails


@pytest.mark.parametrize("ours", [bare, hooked, applied])
def test_a_region_that_catches_every_error_among_hooks(ours: Region) -> None:
    """The early stop is one then, as torch's is: the recomputation runs on, and all is right."""
    block = Guarded()
    seen: Seen = []
    on_each(block, seen)
    wanted = torch.autograd.grad(block(torch.ones(2, 4)).sum(), list(block.parameters()))
    run(ours, block)
    got = [parameter.grad for parameter in block.parameters()]
    assert all(g is not None and torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
    assert balanced(seen)
