"""Arguments and attributes that show a container as it is by then: views, iterators, methods."""

from __future__ import annotations

import collections
import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_pass
from ckpt_pass.state.objects import SpentIteratorError

Gradients = list[torch.Tensor]


def _gradients(step: Callable[[Any, torch.Tensor], torch.Tensor]) -> tuple[Gradients, Gradients]:
    """Those of a step as it is, and with what it is given as regions."""
    found = []
    for around in (lambda fn, *args: fn(*args), ckpt_pass.checkpoint):
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        step(around, x).sum().backward()
        assert x.grad is not None
        found.append([x.grad])
    return found[0], found[1]


def _assert_right(step: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    plain, ours = _gradients(step)
    assert all(map(torch.equal, plain, ours))


def _dense(shown: Any) -> torch.Tensor:
    return torch.stack(list(shown)).sum(0).tanh() * 2


VIEWS: dict[str, Callable[[dict[int, torch.Tensor]], Any]] = {
    "values": lambda d: d.values(),
    "read-only": lambda d: types.MappingProxyType(d).values(),
    "iterator": lambda d: iter(list(d.values())),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_of_a_dict_that_its_caller_fills(view: Callable[[Any], Any]) -> None:
    def step(around: Any, x: torch.Tensor) -> torch.Tensor:
        features = {0: x * 3}
        for number in (1, 2, 3):
            features[number] = around(_dense, view(features))
        return features[3]

    _assert_right(step)


TURNED: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "iter": iter,
    "reversed": reversed,
    "deque": lambda features: iter(collections.deque(features)),
}


@pytest.mark.parametrize("turned", TURNED.values(), ids=TURNED)
def test_iterators_over_a_list_that_its_caller_fills(turned: Callable[[Any], Any]) -> None:
    def step(around: Any, x: torch.Tensor) -> torch.Tensor:
        features = [x * 3]
        for _ in range(3):
            features.append(around(_dense, turned(features)))
        return features[-1]

    _assert_right(step)


def test_a_bound_pop_takes_the_same_value_again() -> None:
    def step(around: Any, x: torch.Tensor) -> torch.Tensor:
        skips = [x * 2, x.sin(), x * 5]
        y = x
        for _ in range(2):
            y = around(lambda y, pop: (y * pop()).tanh(), y, skips.pop)
        assert len(skips) == 1
        return y

    _assert_right(step)


def test_a_bound_pop_in_a_closure() -> None:
    def step(around: Any, x: torch.Tensor) -> torch.Tensor:
        pop = [x * 2, x.sin(), x * 5].pop

        def layer(y: torch.Tensor) -> torch.Tensor:
            return (y * pop()).tanh()

        return around(layer, around(layer, x))

    _assert_right(step)


class _Shared:
    scale = 1.0


class _Through(nn.Module):
    """Counts on an object that it does not own."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = weakref.proxy(owner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.owner.scale *= 1.5
        return (x * self.owner.scale).tanh()


def test_state_behind_a_weak_proxy() -> None:
    owner = _Shared()
    layer = _Through(owner)

    def step(around: Any, x: torch.Tensor) -> torch.Tensor:
        owner.scale = 1.0
        return around(layer, around(layer, x))

    _assert_right(step)
    assert owner.scale == 1.5**2


SPENT: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "product": lambda features: map(lambda pair: pair[0], itertools.product(features, [1])),
    "pairwise": lambda features: itertools.starmap(torch.add, itertools.pairwise(features * 2)),
    "reversed values": lambda features: reversed(dict(enumerate(features)).values()),
}


@pytest.mark.parametrize("made", SPENT.values(), ids=SPENT)
def test_iterators_that_cannot_be_set_back_are_refused(made: Callable[[Any], Any]) -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(SpentIteratorError, match="has moved on"):
        ckpt_pass.checkpoint(_dense, made([x * 2, x * 3]))


def test_a_counter_held_by_its_method_alone_is_refused() -> None:
    number = itertools.count(1).__next__
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(SpentIteratorError, match="count"):
        ckpt_pass.checkpoint(lambda y: (y * number()).tanh(), x)


def test_a_plan_looks_at_arguments_through_a_view() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 48), nn.Linear(48, 6)

        def forward(self, values: Any) -> torch.Tensor:
            return self.down(_dense(map(self.up, values)))

    features = {0: torch.ones(64, 6), 1: torch.ones(64, 6) / 2}
    plan = ckpt_pass.plan(Sum(), features.values(), mode="eager", loss_fn=torch.sum, budget=1.0)
    assert plan.peak_bytes > 64 * 48 * 4
    assert type(features[0]) is torch.Tensor
