"""Containers that a region fills and its user replaces; values that are looked for weakly."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
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


def test_a_recomputation_sees_its_arguments_where_a_flag_was_switched() -> None:
    """Arguments are kept as copies, which nothing is put into and nothing is taken out of."""

    def region(h: Tensor, told: dict[str, Any]) -> Tensor:
        return (h * h * told["scale"] + told["skips"][0] + told["skips"][1]).sin()

    def gradient(run: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(0)
        x, bias = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
        total = torch.zeros(())
        for number in range(12):
            h = x * number
            total = total + run(region, h, {"scale": 3.0, "skips": [h * 2, bias]}).sum()
        bias.requires_grad_(False)
        total.backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(ckpt_pass.checkpoint), gradient(lambda f, *args: f(*args)))


@pytest.mark.parametrize(
    "among", [list, deque, set, OrderedDict.fromkeys], ids=["list", "deque", "set", "ordered"]
)
def test_iterators_over_what_only_runs_hold(among: Callable[..., Any]) -> None:
    def region(h: Tensor, given: Any, more: list[Tensor]) -> Tensor:
        return (h * next(given) + more[0] * more[1]).sin()

    def gradient(run: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(0)
        x, total = torch.randn(3, requires_grad=True), torch.zeros(())
        for number in range(14):
            h, given = x * number, iter(among([1.0, 2.0, 3.0]))
            next(given)
            total = total + run(region, h, given, [h * 2, h.sin()]).sum()
        total.backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(ckpt_pass.checkpoint), gradient(lambda f, *args: f(*args)))


def test_sets_are_gone_through_in_the_same_order() -> None:
    """One that had many members and is filled anew has another order."""

    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(3, 3), torch.zeros(3)
            self.names: set[int] | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = self.last = self.layer(x).tanh()
            assert self.names is not None
            for name in self.names:
                y = (y * (name + 0.3)).sin()
            return y

    def gradient(run: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(0)
        module, x, total = Ordered(), torch.randn(3, requires_grad=True), torch.zeros(())
        for number in range(14):
            module.names = set(range(100))
            for name in set(range(100)) - {9, 16}:
                module.names.discard(name)
            total = total + run(module, x * (1 + 0.1 * number)).sum()
        module.names = None
        total.backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(ckpt_pass.checkpoint), gradient(lambda f, *args: f(*args)))


class HashedByContents:
    """A key whose hash is made of what a list of its own holds."""

    def __init__(self, *parts: int) -> None:
        self.parts = list(parts)

    def __hash__(self) -> int:
        return hash(tuple(self.parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashedByContents) and self.parts == other.parts


def test_keys_keep_what_they_are_hashed_by() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(3, 3), torch.zeros(3)
            self.keys: list[HashedByContents] = []
            self.values: dict[HashedByContents, float] = {}

        def forward(self, x: Tensor) -> Tensor:
            y = self.last = self.layer(x).tanh()
            for key in self.keys:
                y = (y * self.values.get(HashedByContents(*key.parts), 7.0)).sin()
            return y

    def gradient(run: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(0)
        module, x, total = Looking(), torch.randn(3, requires_grad=True), torch.zeros(())
        for number in range(14):
            module.keys = [HashedByContents(1, number), HashedByContents(2, number)]
            module.values = dict(zip(module.keys, (1.5, 2.5), strict=True))
            total = total + run(module, x * (1 + 0.1 * number)).sum()
        module.keys, module.values = [], {}
        total.backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(ckpt_pass.checkpoint), gradient(lambda f, *args: f(*args)))


class Returning:
    """Says what it has when it goes."""

    def __init__(self, said: list[int]) -> None:
        self.said, self.norms = said, list[Tensor]()

    def __del__(self) -> None:
        self.said.append(len(self.norms))


def saying(said: list[int], norms: list[Tensor]) -> Iterator[None]:
    try:
        yield
    finally:
        said.append(len(norms))


@pytest.mark.parametrize("kind", ["object", "generator"])
def test_what_has_code_that_runs_at_its_end_finds_what_it_had(kind: str) -> None:
    said: list[int] = []

    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.aside, self.norms, self.end = Returning([]), list[Tensor](), None
            self.more = list[Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layer(x))
            norms = self.norms if kind == "generator" else self.aside.norms
            norms.append(h.norm().detach())
            self.more.append(h.norm())
            return x + h

    module = Filling()
    for _ in range(12):
        module.more = []
        if kind == "object":
            module.aside = Returning(said)
        else:
            module.norms = []
            module.end = saying(said, module.norms)  # type: ignore[assignment]
            next(module.end)  # type: ignore[call-overload]
        ckpt_pass.checkpoint(module, torch.randn(4, 8)).sum().backward()
    del module
    gc.collect()
    assert len(said) >= 12 - FEW and set(said) == {1}  # some wait for a look, as long as runs may


def test_containers_that_are_looked_for_weakly_stay_full() -> None:
    seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.row: deque[Tensor] = deque()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layer(x))
            self.row.append(h.norm())
            return x + h

    module = Filling()
    for number in range(12):
        module.row = seen[number] = deque()
        ckpt_pass.checkpoint(module, torch.randn(4, 8)).sum().backward()
        assert all(len(row) == 1 for row in seen.values())


def test_an_object_that_says_nothing_of_its_class_is_no_error() -> None:
    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.near: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layer(x))
            self.near.append(h.norm())
            return x + h

    module = Filling()
    for _ in range(12):
        gone = Object()
        module.near = [weakref.proxy(gone)]
        del gone
        ckpt_pass.checkpoint(module, torch.randn(4, 8))


def test_threads_that_recompute_while_others_look() -> None:
    wrong: list[BaseException] = []

    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.aside = Object()

        def forward(self, x: Tensor) -> Tensor:
            self.aside.norm = torch.tanh(self.layer(x * self.aside.scale))  # type: ignore[attr-defined]
            return x + self.aside.norm

    def train() -> None:
        try:
            layers, end = [Scaling() for _ in range(3)], time.monotonic() + 2
            while time.monotonic() < end:
                total = torch.zeros(())
                for number in range(12):
                    x = torch.randn(2, 4)
                    for layer in layers:
                        layer.aside = Object()
                        layer.aside.scale = number + 1.0  # type: ignore[attr-defined]
                        x = ckpt_pass.checkpoint(layer, x)
                    total = total + x.sum()
                total.backward()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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
