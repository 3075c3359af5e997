"""Containers that a region fills and its user replaces; values that are looked for weakly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.regions import histories
from tests.regions.test_kept_values import WAYS

STEPS = 30
#: Runs that may be there: so many are let be before they are looked at, and there are two of them.
FEW = 8


@dataclass
class Aside:
    norms: list[Tensor] = field(default_factory=list)


class Collecting(nn.Module):
    """Puts a norm aside, with its history; its user has a fresh container for it each step."""

    def __init__(self, made: Callable[[], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.made = made
        self.aside = made()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        norm, aside = h.square().mean(), self.aside
        if isinstance(aside, list):
            aside.append(norm)
        elif isinstance(aside, dict):
            aside["norm"] = norm
        else:
            aside.norms.append(norm)
        return x + h


class Window(nn.Module):
    """Keeps its last three norms, in a list that it makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.last: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        self.last.append(h.norm())
        self.last = self.last[-3:]
        return x + h


class Told(nn.Module):
    """Writes a norm into a container that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, told: dict[str, Tensor]) -> Tensor:
        h = torch.tanh(self.layer(x))
        told["norm"] = h.norm()
        return x + h


def alive_after(step: Callable[[Tensor], Any], backward: bool = True) -> int:
    """How many of the steps' inputs are still there."""
    inputs = []
    for _ in range(STEPS):
        x = torch.randn(4, 8)
        out = step(x)
        if backward:
            out.sum().backward()
        inputs.append(weakref.ref(x))
        del x, out
    return sum(one() is not None for one in inputs)


@pytest.mark.parametrize("backward", [True, False], ids=["backward", "none"])
@pytest.mark.parametrize("made", [list, dict, Aside], ids=["list", "dict", "dataclass"])
@pytest.mark.parametrize("way", list(WAYS))
def test_fresh_containers_for_what_no_loss_reads(way: str, made: Any, backward: bool) -> None:
    module = Collecting(made)

    def step(x: Tensor) -> Any:
        module.aside = module.made()
        return WAYS[way](module, x)

    assert alive_after(step, backward) <= FEW


@pytest.mark.parametrize("way", list(WAYS))
def test_a_list_that_is_made_anew(way: str) -> None:
    module = Window()
    assert alive_after(lambda x: WAYS[way](module, x)) <= FEW
    assert len(module.last) == 3 and module.last[-1].grad_fn is not None


@pytest.mark.parametrize("backward", [True, False], ids=["backward", "none"])
def test_a_container_among_the_arguments(backward: bool) -> None:
    module, told = Told(), dict[str, Tensor]()
    assert alive_after(lambda x: ckpt_pass.checkpoint(module, x, told), backward) <= FEW


@pytest.mark.parametrize("made", [list, dict, Aside], ids=["list", "dict", "dataclass"])
def test_recomputations_begin_with_what_the_forward_found(made: Any) -> None:
    """One backward after many runs, whose containers only they hold by then."""

    def gradients(run: Callable[[nn.Module, Tensor], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        module, total, asides = Collecting(made), torch.zeros(()), []
        for number in range(3 * FEW):
            module.aside = made()
            total = total + run(module, torch.randn(4, 8)).sin().sum()
            if number % 4 == 0:  # this one's user still has it, and its loss
                asides.append(module.aside)
        for aside in asides:
            norms = aside.norms if isinstance(aside, Aside) else aside
            (norm,) = norms.values() if isinstance(norms, dict) else norms
            total = total + norm
        return list(torch.autograd.grad(total, list(module.parameters())))

    found, expected = gradients(ckpt_pass.checkpoint), gradients(lambda m, x: m(x))
    assert all(map(torch.equal, found, expected))


class Object:
    """Plain, and looked for by weak references."""

    norm: Tensor


def test_what_is_looked_for_weakly_stays_as_it_is() -> None:
    torch.manual_seed(0)
    seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.last: Tensor | None = None
            self.aside = Object()

        def forward(self, x: Tensor) -> Tensor:
            last = self.last
            self.last = seen[len(seen)] = torch.tanh(self.layer(x))
            self.aside.norm = self.last.norm()
            return x + self.last + (0 if last is None else last)

    module, objects = Seen(), []
    for _ in range(3 * FEW):
        module.aside = Object()
        objects.append(weakref.ref(module.aside))
        ckpt_pass.checkpoint(module, torch.randn(4, 8))
    assert all(value.grad_fn is not None for value in seen.values() if value.dim())
    there = [found for one in objects if (found := one()) is not None]
    assert there and all(hasattr(found, "norm") for found in there)


class OverItself(nn.Module):
    """Gradients inside through what the run before left, which it had made by writing over it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.last: Tensor | None = None

    def inner(self, h: Tensor) -> Tensor:
        if self.last is None:
            return h
        energy = (self.last * h.detach()).tanh().sum() + self.layer.bias.sum()
        (found,) = torch.autograd.grad(energy, self.layer.bias, retain_graph=True)
        return h + 0.1 * found

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        changed = torch.tanh(self.layer(h)).clone()
        changed[:, :2] *= 0.5
        self.last = self.inner(changed)
        return self.last + self.layer(x) * 0.1


@pytest.mark.parametrize("steps", [2, 4])
def test_gradients_inside_go_through_a_stand_in(steps: int) -> None:
    def gradients(run: Callable[[nn.Module, Tensor], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        module = OverItself()
        losses = [run(module, torch.randn(4, 6)).square().mean() for _ in range(steps)]
        return list(torch.autograd.grad(sum(losses), list(module.parameters())))

    found, expected = gradients(ckpt_pass.checkpoint), gradients(lambda m, x: m(x))
    assert all(map(torch.equal, found, expected))


def test_a_nested_tensor_on_an_attribute() -> None:
    module = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="prototype"):
        module.rows = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    x = torch.randn(2, 4, requires_grad=True)
    ckpt_pass.checkpoint(module, x).sum().backward()
    assert x.grad is not None


def test_one_look_does_for_all_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many layers would come to look at the runs of all."""
    looks = []
    held_by = histories.held_by_none_but
    monkeypatch.setattr(
        histories, "held_by_none_but", lambda owners: looks.append(1) or held_by(owners)
    )

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.last = torch.zeros(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layer(x) + self.last.detach())
            self.last = h
            return x + h

    layers, total = [Reading() for _ in range(16)], torch.zeros(())
    for _ in range(16):
        x = torch.randn(4, 8)
        for layer in layers:
            x = ckpt_pass.checkpoint(layer, x)
        total = total + x.sum()
    total.backward()
    assert 1 <= len(looks) <= 16
