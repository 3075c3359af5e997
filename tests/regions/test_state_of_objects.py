"""State that no reference keeps, and modules that are not the region itself."""

from __future__ import annotations

import array
import itertools
import random
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions

Around = Callable[..., Any]
WIDTH = 6
GENERATOR = torch.Generator()


def plain(fn: Any, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


WAYS: dict[str, Around] = {
    "region": ckpt_pass.checkpoint,
    "policy": partial(ckpt_pass.checkpoint, policy="save-matmul"),
    "context_fn": partial(
        torch_checkpoint, use_reentrant=False, context_fn=ckpt_pass.context_fn("save-matmul")
    ),
}
every_way = pytest.mark.parametrize("around", WAYS.values(), ids=WAYS)

# --- what has a state, and a factor that moves it on ------------------------------------------

FACTORS: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: float(_drawn(g))),
    "python": (lambda: random.Random(1), lambda g: g.random()),
    "numpy": (lambda: np.random.default_rng(1), lambda g: float(g.random())),
    "numpy, legacy": (lambda: np.random.RandomState(1), lambda g: float(g.rand())),
    "array": (lambda: array.array("d", [1.0]), lambda a: _doubled(a)),
    "numpy array": (lambda: np.ones(2), lambda a: _doubled(a)),
    "bytes": (lambda: bytearray(b"\1"), lambda a: _doubled(a)),
    "count": (lambda: itertools.count(1), lambda i: float(next(i))),
    "list": (lambda: iter(range(1, 20)), lambda i: float(next(i))),
}


def _drawn(generator: torch.Generator) -> Tensor:
    return torch.rand((), generator=generator)


def _doubled(values: Any) -> float:
    values[0] = 2 * values[0]
    return float(values[0])


class Layer(nn.Module):
    """Multiplies by a factor that something with a state gives."""

    def __init__(self, thing: Any, factor: Callable[[Any], float]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.thing, self.factor = thing, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) * self.factor(self.thing)).tanh() * self.factor(self.thing))


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[arg-type]


def steps(layer: nn.Module, around: Around, times: int = 2) -> list[Tensor | None]:
    """The gradients of some steps, summed."""
    for _ in range(times):
        around(layer, torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)).square().sum().backward()
    return gradients(layer)


def made(kind: str) -> Layer:
    torch.manual_seed(0)
    make, factor = FACTORS[kind]
    return Layer(make(), factor)


@pytest.mark.parametrize("kind", FACTORS)
@every_way
def test_what_an_object_gives_is_given_again(around: Around, kind: str) -> None:
    wanted, layer = made(kind), made(kind)
    assert same(steps(layer, around), steps(wanted, plain))
    assert layer.factor(layer.thing) == wanted.factor(wanted.thing)  # moved as often


@pytest.mark.parametrize("kind", FACTORS)
def test_planning_moves_no_object(kind: str) -> None:
    wanted, layer = made(kind), made(kind)
    x = torch.randn(3, WIDTH)
    ckpt_pass.plan(layer, x, loss_fn=torch.sum, budget=1.0, mode="eager")
    assert layer.factor(layer.thing) == wanted.factor(wanted.thing)


class Noisy(nn.Module):
    """Draws from generators that are nobody's attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if random.random() < 0.5:
            x = x * np.random.rand()
        return (self.fc(x) * random.uniform(1, 2)).tanh() * torch.rand((), generator=GENERATOR)


@every_way
def test_global_generators(around: Around) -> None:
    found = []
    for way in (plain, around):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        GENERATOR.manual_seed(0)
        layer = Noisy()
        found.append((steps(layer, way, times=4), random.random(), np.random.rand()))
    assert same(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def numbers() -> Any:
    for k in itertools.count(1):
        yield float(k)


@every_way
def test_an_iterator_that_cannot_be_set_back_is_named(around: Around) -> None:
    layer = Layer(numbers(), next)
    with pytest.raises(ckpt_pass.errors.SpentIteratorError, match="'thing' of Layer"):
        steps(layer, around)
    unused = Layer(numbers(), lambda _: 2.0)
    steps(unused, around)


# --- modules that are not the region itself ---------------------------------------------------


class Busy(nn.Module):
    """Moves a buffer, running statistics and a counter, and reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.register_buffer("scale", torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(1.5)
        self.calls += 1
        return (self.norm(self.fc(x)) * self.scale.clone()).tanh() * self.calls


class Pipe:
    """A plain object around a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.runs = module, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.module(x) * self.runs

    def run(self, x: Tensor) -> Tensor:
        return self.module(x)


def call(module: Any, x: Tensor) -> Tensor:
    return module(x)


def call_all(modules: list[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def in_a_closure(module: nn.Module) -> Callable[[Tensor], Tensor]:
    pipe = Pipe(module)
    return lambda x: pipe.run(x)


def behind_a_reference(module: nn.Module) -> Callable[[Tensor], Tensor]:
    reference = weakref.ref(module)
    return lambda x: reference()(x)  # type: ignore[misc]


THROUGH: dict[str, Callable[[Around, nn.Module, Tensor], Tensor]] = {
    "argument": lambda around, module, x: around(call, module, x),
    "list": lambda around, module, x: around(call_all, [module], x),
    "method": lambda around, module, x: around(Pipe(module).run, x),
    "callable": lambda around, module, x: around(Pipe(module), x),
    "partial": lambda around, module, x: around(partial(call, module), x),
    "closure": lambda around, module, x: around(in_a_closure(module), x),
    "reference": lambda around, module, x: around(behind_a_reference(module), x),
}


@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
@every_way
def test_modules_behind_functions(around: Around, through: Callable[..., Tensor]) -> None:
    found = []
    for way in (plain, around):
        torch.manual_seed(0)
        module = Busy()
        for _ in range(3):
            through(way, module, torch.randn(4, WIDTH)).square().sum().backward()
        buffers = [b.clone() for b in module.buffers()]
        found.append((gradients(module), buffers, module.calls))
    (wanted, buffers, calls), (got, buffers_too, calls_too) = found
    assert same(wanted, got) and calls == calls_too
    assert all(map(torch.equal, buffers, buffers_too))


# --- what moves but is not read, and what is swapped ------------------------------------------


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x).tanh())


@every_way
def test_only_what_is_read_must_not_move(around: Around) -> None:
    layer = Counted()
    loss = around(layer, torch.randn(2, WIDTH)).sum()
    layer.steps += 1
    loss.backward()
    loss = around(layer, torch.randn(2, WIDTH)).sum()
    with torch.no_grad():
        layer.fc.weight.mul_(2)
    with pytest.raises(ckpt_pass.MutatedStateError, match=r"fc\.weight"):
        loss.backward()


class Noised(Counted):
    """Its weight has noise for the time of the forward; its buffer gets new memory."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        kept = weight.data
        weight.data = kept + torch.rand_like(kept)
        self.steps.data = self.steps.data + 1
        made = super().forward(x) * self.steps
        weight.data = kept
        return made


@every_way
def test_tensors_whose_memory_is_swapped(around: Around) -> None:
    found = []
    for way in (plain, around):
        torch.manual_seed(0)
        layer = Noised()
        for _ in range(3):
            way(layer, torch.randn(2, WIDTH)).sum().backward()
        found.append([*gradients(layer), layer.fc.weight.detach(), layer.steps])
    assert same(*found)


@every_way
def test_flags_are_those_of_the_forward(around: Around) -> None:
    found = []
    for way in (plain, around):
        torch.manual_seed(0)
        layer, x = Counted(), torch.randn(2, WIDTH)
        layer.fc.requires_grad_(False)
        loss = way(layer, x).sum()
        layer.fc.requires_grad_(True)
        loss.backward()
        assert layer.fc.weight.requires_grad
        found.append(gradients(layer))
    assert same(*found)


def test_an_argument_whose_flag_is_set_later() -> None:
    layer, x = Counted(), torch.randn(2, WIDTH)
    layer(x).sum().backward()
    wanted = gradients(layer)
    layer.zero_grad()
    loss = ckpt_pass.checkpoint(layer, x).sum()
    x.requires_grad_()
    loss.backward()
    assert x.grad is None and same(gradients(layer), wanted)


class Switched(Counted):
    def forward(self, x: Tensor) -> Tensor:
        third = (torch.tensor(1 / 3) * torch.tensor(1 / 7)).item()
        twice = 2.0 if torch.are_deterministic_algorithms_enabled() else 1.0
        q = super().forward(x).view(1, 1, 2, WIDTH)
        return nn.functional.scaled_dot_product_attention(q, q, q * third) * twice


@every_way
def test_torchs_switches_are_those_of_the_forward(around: Around) -> None:
    found = []
    for way in (plain, around):
        torch.manual_seed(0)
        layer, x = Switched(), torch.randn(2, WIDTH)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        try:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                loss = way(layer, x).sum()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
        loss.backward()
        found.append(gradients(layer))
        assert torch.get_default_dtype() is torch.float32
        assert not torch.are_deterministic_algorithms_enabled()
    assert same(*found)


class SetsAndSetsBack(Counted):
    """Its recomputation ends in between."""

    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.requires_grad_(False)
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")
        y: Tensor = super().forward(x).tanh().sin()
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        self.fc.weight.requires_grad_(True)
        return y


@every_way
def test_what_a_region_sets_and_sets_back_is_as_before(around: Around) -> None:
    layer, x = SetsAndSetsBack(), torch.randn(2, WIDTH, requires_grad=True)
    try:
        around(layer, x).sum().backward()
        assert layer.fc.weight.requires_grad
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)


class Quasirandom(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.engine = torch.quasirandom.SobolEngine(WIDTH, scramble=True, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x + self.engine.draw(len(x))).tanh()
        return y


@every_way
def test_quasirandom_numbers(around: Around) -> None:
    found = []
    for way in (plain, around):
        torch.manual_seed(0)
        layer, x = Quasirandom(), torch.randn(2, WIDTH)
        for _ in range(2):
            way(layer, x).sum().backward()
        found.append(gradients(layer))
    assert same(*found)


# --- what allows no region --------------------------------------------------------------------


def test_where_hooks_are_not_allowed() -> None:
    layer, x = Counted(), torch.randn(2, WIDTH)
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        got = ckpt_pass.checkpoint(layer, x)
    assert torch.equal(got, layer(x))


def slope(x: Tensor) -> Tensor:
    return x * torch.func.grad(lambda v: v.square().sum())(x)


def test_a_transform_inside_is_named() -> None:
    x = torch.randn(2, WIDTH, requires_grad=True)
    model = nn.Sequential(Run(slope))
    with pytest.raises(ckpt_pass.errors.TransformInRegionError, match=r"slope.*grad"):
        ckpt_pass.checkpoint(slope, x)
    with (
        applied_regions(model, {"0": RegionSpec()}),
        pytest.raises(ckpt_pass.errors.TransformInRegionError, match="0 is a checkpoint region"),
    ):
        model(x)


class Run(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)
