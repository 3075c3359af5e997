"""State that a region's code leads to by its closures, classes, modules, threads and contexts."""

from __future__ import annotations

import contextvars
import functools
import itertools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from tests.regions.test_state_of_objects import WIDTH, Around, every_way, gradients, plain, same

LOCAL = threading.local()
VARIABLE: contextvars.ContextVar[list[float]] = contextvars.ContextVar("VARIABLE")
SETTINGS = types.ModuleType("settings_of_a_test")


class Counter:
    """Counts on the class."""

    runs = 0.0
    shared: Counter | None = None

    def __init__(self) -> None:
        self.value = 0.0

    @classmethod
    def get(cls) -> Counter:
        if cls.shared is None:
            cls.shared = Counter()
        return cls.shared


def kept(value: float, store: list[float] = []) -> float:  # noqa: B006
    store.append(value)
    return float(len(store))


def called(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def inner(*args: Any) -> Any:
        return make(*args)

    return inner


class Base(nn.Module):
    """Reads a factor before and after what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def factor(self) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) * self.factor()).tanh() * self.factor())


class OfAThread(Base):
    def factor(self) -> float:
        LOCAL.scale = getattr(LOCAL, "scale", 0.0) + 1
        return float(LOCAL.scale)


class OfAContext(Base):
    def factor(self) -> float:
        VARIABLE.get().append(1.0)
        return float(len(VARIABLE.get()))


class OfAClass(Base):
    def factor(self) -> float:
        Counter.runs += 1
        Counter.get().value += 1
        return Counter.runs + Counter.get().value


class OfAModule(Base):
    def factor(self) -> float:
        SETTINGS.step += 1  # type: ignore[attr-defined]
        return float(SETTINGS.step)  # type: ignore[attr-defined]


class OfADefault(Base):
    def factor(self) -> float:
        return kept(1.0)


class OfADecorated(Base):
    @called
    def factor(self) -> float:
        Counter.runs += 2
        return Counter.runs


class OfAProperty(Base):
    @property
    def scale(self) -> float:
        SETTINGS.step += 2  # type: ignore[attr-defined]
        return float(SETTINGS.step)  # type: ignore[attr-defined]

    def factor(self) -> float:
        return self.scale


class OfWeakOnes(Base):
    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()
        self.seen = weakref.WeakKeyDictionary({self.counter: 1.0})

    def factor(self) -> float:
        self.seen[self.counter] += 1
        return self.seen[self.counter]


def of_a_closure() -> type[Base]:
    runs = 0.0

    def count() -> float:
        nonlocal runs
        runs += 1
        return runs

    class OfAClosure(Base):
        def factor(self) -> float:
            return count()

    return OfAClosure


KINDS: dict[str, Callable[[], type[Base]]] = {
    cls.__name__: functools.partial(lambda found: found, cls)
    for cls in (
        *(OfAThread, OfAContext, OfAClass, OfAModule, OfADefault, OfADecorated, OfAProperty),
        OfWeakOnes,
    )
} | {"OfAClosure": of_a_closure}


def made(kind: str) -> Base:
    torch.manual_seed(0)
    LOCAL.__dict__.clear()
    VARIABLE.set([])
    SETTINGS.step = 0  # type: ignore[attr-defined]
    Counter.runs, Counter.shared = 0.0, None
    defaults = kept.__defaults__
    assert defaults is not None
    defaults[0].clear()
    return KINDS[kind]()()


def grown(kind: str, around: Around) -> tuple[list[Tensor | None], float]:
    """The gradients of two steps of two layers, each changing what the other reads."""
    layers = [made(kind), made(kind)]
    x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
    for _ in range(2):
        found = x
        for layer in layers:
            found = around(layer, found)
        found.square().sum().backward()
    return [grad for layer in layers for grad in gradients(layer)], layers[0].factor()


@pytest.mark.parametrize("kind", KINDS)
@every_way
def test_state_behind_code_is_read_again(around: Around, kind: str) -> None:
    (wanted, factor), (got, now) = grown(kind, plain), grown(kind, around)
    assert same(got, wanted)
    assert now == factor  # moved as often


@pytest.mark.parametrize("kind", ["OfAThread", "OfAClass", "OfAClosure"])
@pytest.mark.parametrize("nested", [False, True])
def test_segments_read_it_again(kind: str, nested: bool) -> None:
    found = []
    for segments in (None, ckpt_pass.Segments(1, nested=nested)):
        model = nn.Sequential(*(nn.Sequential(made(kind)) for _ in range(3)))
        if segments is not None:
            ckpt_pass.apply(model, segments)
        model(torch.ones(2, WIDTH)).square().sum().backward()
        found.append(gradients(model))
    assert same(*found)


class Taking(nn.Module):
    """Takes factors from an iterator among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, factors: Any, *, more: Any) -> Tensor:
        return self.fc(self.fc(x * next(factors)) * next(more[0])).tanh() * next(factors)


@every_way
def test_iterators_among_the_arguments(around: Around) -> None:
    found = []
    for way in (plain, around):
        torch.manual_seed(0)
        layer, factors, more = Taking(), itertools.count(1), [iter([1.5, 2.5, 3.5])]
        x = torch.ones(2, WIDTH)
        outputs = [way(layer, x, factors, more=more) for _ in range(3)]
        sum(outputs).square().sum().backward(retain_graph=way is plain)
        found.append(gradients(layer))
        assert next(factors) == 7  # moved once
    assert same(*found)


@every_way
def test_a_lazy_module_is_made_once(around: Around) -> None:
    found = []
    for way in (plain, around):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.LazyLinear(WIDTH), nn.Tanh(), nn.LazyLinear(WIDTH))
        for _ in range(2):
            way(layer, torch.ones(2, WIDTH)).square().sum().backward()
        found.append(gradients(layer))
    assert same(*found)


class Replacing(nn.Module):
    """Puts a new buffer in the place of the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("codes", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x * self.codes)
        self.codes = self.codes * 0.9 + y.detach().mean(0)
        return y


@every_way
def test_a_buffer_that_was_replaced_is_let_go(around: Around) -> None:
    layer = Replacing()
    for _ in range(3):
        old = weakref.ref(layer.codes)
        around(layer, torch.ones(2, WIDTH)).square().sum().backward()
        assert old() is None
