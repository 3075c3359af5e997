"""State that is neither on modules nor in closures, and what is around a forward only."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import enum
import functools
import gc
import io
import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass

ROWS, WIDTH = 4, 8
Around = Callable[..., Any]
WAYS: dict[str, Around] = {
    "region": ckpt_pass.checkpoint,
    "policy": partial(ckpt_pass.checkpoint, policy="save-matmul"),
    "context_fn": partial(
        torch_checkpoint, use_reentrant=False, context_fn=ckpt_pass.context_fn("save-nothing")
    ),
}


class Scaled(nn.Module):
    """Scales between two layers by what a subclass reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def scale(self) -> Any:
        return 1.0

    def change(self) -> None:
        """What happens between forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x) * self.scale())).tanh()


def gained() -> float:
    gained.calls = getattr(gained, "calls", 0) + 1  # type: ignore[attr-defined]
    return float(gained.calls)  # type: ignore[attr-defined]


def factor() -> Any:
    return factor.value  # type: ignore[attr-defined]


factor.value = torch.tensor(2.0)  # type: ignore[attr-defined]


class OwnCalls(Scaled):
    def scale(self) -> float:
        return gained()


class OwnTensor(Scaled):
    def scale(self) -> Any:
        return factor()

    def change(self) -> None:
        factor.value = factor.value + 1  # type: ignore[attr-defined]


def counted(fn: Callable[[Any], float]) -> Callable[[Any], float]:
    @functools.wraps(fn)
    def wrapped(self: Any) -> float:
        wrapped.calls += 1  # type: ignore[attr-defined]
        return fn(self) * float(wrapped.calls)  # type: ignore[attr-defined]

    wrapped.calls = 0  # type: ignore[attr-defined]
    return wrapped


class Decorated(Scaled):
    @counted
    def scale(self) -> float:
        return 0.5


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class OfEnum(Scaled):
    def scale(self) -> float:
        Level.LOW.seen = getattr(Level.LOW, "seen", 0) + 1  # type: ignore[attr-defined]
        return float(Level.LOW.seen)  # type: ignore[attr-defined]


class Environment(Scaled):
    def scale(self) -> float:
        before = float(os.environ.get("CKPT_PASS_TEST_SCALE", "1"))
        os.environ["CKPT_PASS_TEST_SCALE"] = str(before + 1)
        return before

    def change(self) -> None:
        os.environ["CKPT_PASS_TEST_SCALE"] = "7"


class ImportedInside(Scaled):
    def scale(self) -> float:
        import os as system

        return float(system.getenv("CKPT_PASS_TEST_OTHER", "1"))

    def change(self) -> None:
        os.environ["CKPT_PASS_TEST_OTHER"] = "3"


ARGUMENTS = argparse.Namespace(scale=2.0)


class Parsed(Scaled):
    def scale(self) -> float:
        return float(ARGUMENTS.scale)

    def change(self) -> None:
        ARGUMENTS.scale += 1


class OnParameter(Scaled):
    def scale(self) -> float:
        weight: Any = self.first.weight
        weight.uses = getattr(weight, "uses", 0) + 1
        return float(weight.uses)


class OnPartial(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.make = partial(float, 2.0)
        self.make.gain = 1.0  # type: ignore[attr-defined]

    def scale(self) -> float:
        return float(self.make.gain)  # type: ignore[attr-defined]

    def change(self) -> None:
        self.make.gain += 1  # type: ignore[attr-defined]


class FirstTime(Scaled):
    def scale(self) -> float:
        type(self).runs = getattr(type(self), "runs", 0) + 1  # type: ignore[attr-defined]
        return float(type(self).runs)  # type: ignore[attr-defined]


class Metaclass(type):
    gain = 2.0


class Described(metaclass=Metaclass):
    pass


class OfMetaclass(Scaled):
    def scale(self) -> float:
        return Described.gain

    def change(self) -> None:
        Metaclass.gain += 1


MODE = "twice"
act = torch.sin


class ByName(Scaled):
    def scale(self) -> float:
        return 2.0 if MODE == "twice" else 3.0

    def change(self) -> None:
        global MODE
        MODE = "thrice" if MODE == "twice" else "twice"


class OtherFunction(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(act(self.first(x))).tanh()

    def change(self) -> None:
        global act
        act = torch.cos if act is torch.sin else torch.sin


class OtherMethod(Scaled):
    def change(self) -> None:
        OtherMethod.scale = lambda _: 4.0  # type: ignore[method-assign]


class FromFile(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.file = io.StringIO("1\n2\n3\n4\n5\n6\n")

    def scale(self) -> float:
        return float(self.file.readline())


class OfC(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.number, self.bytes = ctypes.c_int(0), memoryview(bytearray(4))

    def scale(self) -> float:
        self.number.value += 1
        self.bytes[0] += 1
        return self.number.value + float(self.bytes[0])


class OtherMemory(Scaled):
    def change(self) -> None:
        self.first.weight.data = self.first.weight.data * 2


class OtherStrides(Scaled):
    def change(self) -> None:
        self.first.weight.data = self.first.weight.data.t().contiguous().t() + 1


def seen(model: Scaled, around: Around, steps: int = 2) -> list[Tensor]:
    """Losses and gradients; what the code of the model holds is as it was before."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    found: list[Tensor] = []
    for _ in range(steps):
        loss = around(model, x).square().sum()
        model.change()
        leaves = [x, *model.parameters()]
        found += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return found


def plain(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def put_back() -> None:
    vars(gained).clear()
    vars(Level.LOW).pop("seen", None)
    factor.value = torch.tensor(2.0)  # type: ignore[attr-defined]
    Decorated.scale.calls = 0  # type: ignore[attr-defined]
    OtherMethod.scale = Scaled.scale  # type: ignore[method-assign]
    if "runs" in vars(FirstTime):
        del FirstTime.runs  # type: ignore[attr-defined]
    for name in ("CKPT_PASS_TEST_SCALE", "CKPT_PASS_TEST_OTHER"):
        os.environ.pop(name, None)
    ARGUMENTS.scale = Metaclass.gain = 2.0
    globals().update(MODE="twice", act=torch.sin)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    put_back()


MODELS: list[type[Scaled]] = Scaled.__subclasses__()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_the_forward_s_state_is_read_again(model: type[Scaled], way: str) -> None:
    wanted = seen(model(), plain)
    put_back()
    for got, expected in zip(seen(model(), WAYS[way]), wanted, strict=True):
        assert torch.equal(got, expected)


def test_memory_that_was_written_before_it_was_left_is_refused() -> None:
    model, x = Scaled(), torch.randn(ROWS, WIDTH)
    loss = ckpt_pass.checkpoint(model, x).sum()
    with torch.no_grad():
        model.first.weight.mul_(2)
    model.first.weight.data = model.first.weight.data.clone()
    with pytest.raises(ckpt_pass.errors.MutatedStateError, match=r"first\.weight"):
        loss.backward()


def test_memory_that_is_looked_at_in_another_way_is_read_as_it_was() -> None:
    model, x = Scaled(), torch.randn(ROWS, WIDTH)
    grads = []
    for run in (model, lambda x: ckpt_pass.checkpoint(model, x)):
        loss = run(x).square().sum()
        weight = model.first.weight
        weight.data = weight.data.t()
        loss.backward()
        weight.data = weight.data.t()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
        model.zero_grad()
    assert all(map(torch.equal, *grads))


class Tripled(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * 3 if func is torch.sin else made


class TripledOps(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * 3 if func is torch.ops.aten.sin.default else made


def doubled(module: nn.Module, args: Any, output: Any = None) -> Any:
    given = args[0] if output is None else output
    return given * 2 if isinstance(module, nn.Linear) else None


@contextlib.contextmanager
def removed(register: Callable[[Any], Any]) -> Iterator[None]:
    handle = register(doubled)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


class Tiny(Scaled):
    """Multiplies by what is zero where denormal numbers are flushed."""

    def forward(self, x: Tensor) -> Tensor:
        tiny = torch.full((WIDTH,), 1e-38) * 0.01
        return self.second(torch.sin(self.first(x) * (1 + tiny * 1e38))).tanh()


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "function mode": Tripled,
    "dispatch mode": TripledOps,
    "global hook": lambda: removed(register_module_forward_hook),
    "global pre-hook": lambda: removed(register_module_forward_pre_hook),
    "denormals": denormals_flushed,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_the_forward_only(around: str, way: str) -> None:
    def within(call: Around, model: nn.Module, x: Tensor) -> Any:
        with AROUND[around]():
            return call(model, x)

    kind = Tiny if around == "denormals" else Scaled
    wanted = seen(kind(), partial(within, plain))
    assert not torch.equal(wanted[1], seen(kind(), plain)[1])
    for got, expected in zip(seen(kind(), partial(within, WAYS[way])), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_around_the_backward_only(way: str) -> None:
    wanted, model = seen(Scaled(), plain, steps=1), Scaled()

    def backward(call: Around) -> list[Tensor]:
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        loss = call(model, x).square().sum()
        with Tripled(), removed(register_module_forward_hook):
            return [loss.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]

    for got, expected in zip(backward(WAYS[way]), wanted, strict=True):
        assert torch.equal(got, expected)


def made_inside() -> tuple[nn.Module, list[weakref.ref[Any]]]:
    class Item:
        pass

    class Local(Scaled):
        table: ClassVar[dict[str, float]] = {"gain": 1.0}

        def __init__(self) -> None:
            super().__init__()
            self.item, self.bound = Item(), self.scale

    model = Local()
    return model, [weakref.ref(found) for found in (model, Local, Item, model.first.weight)]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_written_on_a_module_nor_kept_of_it(way: str) -> None:
    model, references = made_inside()
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    for _ in range(3):
        WAYS[way](model, torch.randn(ROWS, WIDTH)).sum().backward()
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before
    del model
    gc.collect()
    assert [found() for found in references] == [None] * len(references)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator]
        return self.norm(self.first(x)).tanh() * self.calls.clone()  # type: ignore[operator]


@pytest.mark.parametrize("way", ["region", "context_fn"])
def test_counters_go_on_between_a_forward_and_its_backward(way: str) -> None:
    """A policy that saves everything saves no counter: the next forward moves it on."""
    around: dict[str, Around] = {
        "region": partial(ckpt_pass.checkpoint, policy="save-everything"),
        "context_fn": partial(
            torch_checkpoint,
            use_reentrant=False,
            context_fn=ckpt_pass.context_fn("save-everything"),
        ),
    }

    def run(call: Around) -> list[Tensor]:
        torch.manual_seed(0)
        model = Normed()
        for _ in range(2):
            losses = [call(model, torch.randn(ROWS, WIDTH)).square().sum() for _ in range(3)]
            for loss in reversed(losses):
                loss.backward()
        return [*(p.grad for p in model.parameters()), *model.buffers()]  # type: ignore[misc]

    for got, expected in zip(run(around[way]), run(plain), strict=True):
        assert torch.equal(got, expected)


def test_forward_derivatives_that_end_before_the_backward() -> None:
    def run(call: Around) -> list[Tensor]:
        torch.manual_seed(0)
        model = Scaled()
        with forward_ad.dual_level():
            given = forward_ad.make_dual(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
            value, slope = forward_ad.unpack_dual(call(model, given))
        return [slope.detach(), *torch.autograd.grad(value.sum(), list(model.parameters()))]

    for got, expected in zip(run(ckpt_pass.checkpoint), run(plain), strict=True):
        assert torch.equal(got, expected)
