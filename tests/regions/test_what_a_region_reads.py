"""A recomputation reads what its forward read, or an error names what moved."""

from __future__ import annotations

import collections
import contextvars
import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass

Around = Callable[..., Any]
WIDTH = 8


def plain(fn: Any, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


WAYS: dict[str, Around] = {
    "region": ckpt_pass.checkpoint,
    "policy": partial(ckpt_pass.checkpoint, policy="save-matmul"),
    "context_fn": partial(
        torch_checkpoint, use_reentrant=False, context_fn=ckpt_pass.context_fn("save-matmul")
    ),
    "context_fn, nothing kept": partial(
        torch_checkpoint, use_reentrant=False, context_fn=ckpt_pass.context_fn("save-nothing")
    ),
}
every_way = pytest.mark.parametrize("around", WAYS.values(), ids=WAYS)


class Layer(nn.Module):
    """Two products and something between them that a subclass reads, keeps or moves."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.between(self.up(x))))

    def between(self, h: Tensor) -> Tensor:
        return h


class Stack(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module], around: Around = plain) -> None:
        super().__init__()
        self.front = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(3))
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        for layer in self.layers:
            x = self.around(layer, x)
        return x.square().mean()


def state_after(model: nn.Module, steps: int = 3) -> list[Tensor]:
    """Gradients of every step, and the buffers at the end."""
    found = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(6, WIDTH, generator=generator)).backward()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found + [b.clone() for b in model.buffers()]


def assert_alike(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def made(kind: Callable[[], nn.Module], around: Around = plain) -> Stack:
    torch.manual_seed(0)
    return Stack(kind, around)


# --- state of modules ------------------------------------------------------------------------


class DelayedScale(Layer):
    """A scale from earlier steps, as for float8."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("most", torch.ones(()))

    def between(self, h: Tensor) -> Tensor:
        scaled = h * (1.0 / self.most)
        with torch.no_grad():
            self.most.copy_(torch.maximum(self.most * 0.9, h.abs().max()))
        return scaled


class MovingMean(Layer):
    """Written past the version counter, and read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2 * WIDTH))

    def between(self, h: Tensor) -> Tensor:
        h = h - self.mean
        self.mean.data.mul_(0.5).add_(h.detach().mean(0))
        return h * (1 + self.mean)


class Membrane(Layer):
    """A value that stays on an attribute from call to call."""

    voltage: Tensor | None = None

    def between(self, h: Tensor) -> Tensor:
        value = h if self.voltage is None else h + 0.5 * self.voltage
        self.voltage = value.detach()
        return torch.sigmoid(value)


class Grown(Layer):
    """A cache that grows by concatenation, and a list of dataclasses."""

    @dataclass
    class Slot:
        keys: list[Tensor] = field(default_factory=list)

    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.zeros(0, 2 * WIDTH)
        self.slots = [self.Slot()]

    def between(self, h: Tensor) -> Tensor:
        h = h + self.cache.sum(0) + sum(key.sum() for key in self.slots[0].keys)
        self.cache = torch.cat([self.cache, h.detach()[:2]])
        self.slots[0].keys.append(h.detach().mean())
        return h


class Alternating(Layer):
    """A counter that decides what is computed."""

    calls = 0

    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * 2 if self.calls % 2 else h.sin()


class Powers(nn.Module):
    """Spectral norms: power iterations on buffers, in place; once as hooks, once parametrized."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.other = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(x)))


class Normed(Layer):
    """Running statistics, moved in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2 * WIDTH)

    def between(self, h: Tensor) -> Tensor:
        return self.norm(h)


SHARED: dict[str, Any] = {"scale": torch.ones(()), "calls": 0}
SEEN: list[Tensor] = []


class Late(Layer):
    """Makes the buffer, which it overwrites ever after, when it first runs."""

    def between(self, h: Tensor) -> Tensor:
        if not hasattr(self, "count"):
            self.register_buffer("count", torch.zeros(()))
        count: Any = self.count
        count += 1
        return h / count.clone()


class Global(Layer):
    """State in globals of its file."""

    def between(self, h: Tensor) -> Tensor:
        SEEN.append(h.detach().mean())
        SHARED["scale"] = SHARED["scale"] * 0.5 + 0.5
        return h * (len(SEEN) % 3 + SHARED["scale"])


class OfTheClass(Layer):
    """State that all modules of a class share."""

    history: ClassVar[list[Tensor]] = []

    def between(self, h: Tensor) -> Tensor:
        type(self).history = [*self.history[-1:], h.detach().mean()]
        return h + sum(self.history)


SCOPES: list[float] = [1.0]
DEPTH: contextvars.ContextVar[float] = contextvars.ContextVar("DEPTH", default=1.0)


class PushesAndPops(Layer):
    """It moves what it reads, and moves it back once the last value is saved."""

    count: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.waiting = 0, collections.deque([torch.ones(())])

    def forward(self, x: Tensor) -> Tensor:
        self.depth += 1
        PushesAndPops.count += 1
        SCOPES.append(0.5)
        token = DEPTH.set(0.5 * DEPTH.get())
        self.waiting.append(x)
        found = (self.depth, self.count, sum(SCOPES), DEPTH.get(), len(self.waiting))
        out: Tensor = super().forward(x) * sum(found)
        self.waiting.pop()
        DEPTH.reset(token)
        SCOPES.pop()
        PushesAndPops.count -= 1
        self.depth -= 1
        return out


STATE = [
    DelayedScale,
    MovingMean,
    Membrane,
    Grown,
    Alternating,
    Powers,
    Normed,
    Late,
    Global,
    OfTheClass,
    PushesAndPops,
]


def forget() -> None:
    SEEN.clear()
    SHARED["scale"] = torch.ones(())
    OfTheClass.history = []


@every_way
@pytest.mark.parametrize("kind", STATE)
def test_state_that_the_forward_moves(around: Around, kind: type[nn.Module]) -> None:
    forget()
    wanted = state_after(made(kind))
    forget()
    assert_alike(state_after(made(kind, around)), wanted)


@pytest.mark.parametrize("placement", ["all", "segments-1", "sqrt-segments"])
@pytest.mark.parametrize("kind", [DelayedScale, Membrane, Grown, Powers])
def test_state_under_placements(placement: str, kind: type[nn.Module]) -> None:
    wanted = state_after(made(kind))
    model = made(kind)
    with ckpt_pass.applied(model, placement):
        assert_alike(state_after(model), wanted)


@every_way
def test_what_is_moved_and_moved_back_is_where_it_was(around: Around) -> None:
    """A recomputation may stop before it is moved back."""
    model = made(PushesAndPops, around)
    state_after(model)
    assert (PushesAndPops.count, SCOPES, DEPTH.get()) == (0, [1.0], 1.0)
    for layer in model.layers:
        assert isinstance(layer, PushesAndPops)
        assert (layer.depth, len(layer.waiting)) == (0, 1)


@pytest.mark.parametrize("policy", ["save-nothing", "save-matmul"])
def test_what_is_moved_and_moved_back_now_and_then(policy: str) -> None:
    """Runs before that moved nothing tell nothing of the next."""
    step = [0]

    class Sometimes(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.scales = [1.0]

        def forward(self, x: Tensor) -> Tensor:
            if step[0] % 3 == 2:
                self.scales.append(0.5)
            out: Tensor = super().forward(x) * sum(self.scales)
            if step[0] % 3 == 2:
                self.scales.pop()
            return out

    def gradients(model: Stack) -> list[Tensor]:
        found = []
        for step[0] in range(7):
            found += state_after(model, steps=1)
        return found

    wanted, model = gradients(made(Sometimes)), made(Sometimes)
    with ckpt_pass.applied(model, "all", policy):
        assert_alike(gradients(model), wanted)


def test_state_of_closures_and_modules_behind_functions() -> None:
    def step(around: Around) -> list[Tensor]:
        torch.manual_seed(0)
        layer, kept, count = Membrane(), [], 0

        def fn(x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            kept.append(x.detach().mean())
            return layer(x) * (count + sum(kept))

        x = torch.randn(4, WIDTH, requires_grad=True)
        loss = sum(around(partial(lambda f, v: f(v), fn), x).sum() for _ in range(3))
        loss.backward()
        assert count == len(kept) == 3
        return [x.grad, *(p.grad for p in layer.parameters())]

    wanted = step(plain)
    for around in WAYS.values():
        assert_alike(step(around), wanted)


# --- changes between forward and backward ----------------------------------------------------


@every_way
def test_a_parameter_that_somebody_moves_is_named(around: Around) -> None:
    model = made(DelayedScale, around)
    state_after(model)
    loss = model(torch.randn(6, WIDTH))
    with torch.no_grad():
        model.layers[1].up.weight.mul_(1)
    with pytest.raises(ckpt_pass.MutatedStateError, match=r"Parameter 'up\.weight' of Linear"):
        loss.backward()


@every_way
def test_a_buffer_that_moves_later_is_an_error_once(around: Around) -> None:
    class Late(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.ones(()))
            self.moves = False

        def between(self, h: Tensor) -> Tensor:
            h = h * (1.0 * self.gain)
            if self.moves:
                self.gain.mul_(0.5)
            return h

    layer, x = Late(), torch.randn(4, WIDTH, requires_grad=True)
    around(layer, x).sum().backward()
    layer.moves = True
    (plainly,) = torch.autograd.grad(copy.deepcopy(layer)(x).sum(), x)
    try:
        (got,) = torch.autograd.grad(around(layer, x).sum(), x)
        assert torch.equal(got, plainly)
    except ckpt_pass.MutatedStateError as error:
        assert "Buffer 'gain' of Late" in str(error)
    layer.gain.fill_(1)
    (again,) = torch.autograd.grad(around(layer, x).sum(), x)
    assert torch.equal(again, plainly)


@every_way
def test_one_layer_that_moves_a_buffer_later_tells_of_all(around: Around) -> None:
    class Observed(Layer):
        """As quantisation aware training switches its observers on, two buffers each."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("least", torch.ones(()))
            self.register_buffer("most", torch.ones(()))
            self.register_buffer("on", torch.zeros((), dtype=torch.bool))

        def between(self, h: Tensor) -> Tensor:
            least, most, on = self.least, self.most, self.on
            if on:
                least.copy_(torch.minimum(least, h.detach().amin()))
                most.copy_(torch.maximum(most, h.detach().amax()))
            return h * (most.clone() - 0.5 * least)

    model, x, errors = made(Observed, around), torch.randn(6, WIDTH), 0
    for number in range(4):
        for name, buffer in model.named_buffers():
            if name.endswith("on"):
                buffer.fill_(number > 0)
        try:
            model(x).backward()
        except ckpt_pass.MutatedStateError:
            errors += 1
    assert errors <= 1


@every_way
def test_what_is_moved_in_training_alone(around: Around) -> None:
    def train(around: Around) -> list[Tensor]:
        model = made(Powers, around)
        model.eval()
        model(torch.randn(6, WIDTH)).backward()
        model.train()
        return state_after(model)

    assert_alike(train(around), train(plain))


class Statistics(Layer):
    """Reads what its normalisation has moved: a mean, a count, or the same norm in evaluation."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.kind = nn.BatchNorm1d(2 * WIDTH), kind

    def between(self, h: Tensor) -> Tensor:
        y, norm = self.norm(h), self.norm
        mean, count = norm.running_mean, norm.num_batches_tracked
        assert mean is not None and count is not None
        if self.kind == "mean":
            return (h - mean.clone()) * y
        if self.kind == "count":
            return y / count.clone()
        norm.eval()
        y = norm(h)
        norm.train()
        return y


@every_way
@pytest.mark.parametrize("kind", ["mean", "count", "evaluated"])
def test_running_statistics_that_are_read(around: Around, kind: str) -> None:
    def after(around: Around) -> list[Tensor]:
        return state_after(made(lambda: Statistics(kind), around))

    assert_alike(after(around), after(plain))


@every_way
def test_swapped_parameters_mode_and_hooks(around: Around) -> None:
    """As functional_call, a hook for the forward only, eval() and other tied weights leave them."""

    def step(around: Around) -> list[Tensor]:
        model = made(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)), around)
        x = torch.randn(4, WIDTH)
        own = dict(model.named_parameters())
        fast = {name: (value * 1.5).detach().requires_grad_() for name, value in own.items()}
        torch.manual_seed(3)
        doubled = model.layers[0][0].register_forward_hook(lambda _m, _a, out: out * 2)
        loss = functional_call(model, fast, (x,))
        doubled.remove()
        model.eval()
        model.layers[1][0].weight = model.layers[0][0].weight
        return list(torch.autograd.grad(loss, list(fast.values())))

    assert_alike(step(around), step(plain))


def test_second_order_steps_on_fast_weights() -> None:
    def step(placement: str) -> list[Tensor]:
        model, x = made(Layer), torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
        with ckpt_pass.applied(model, placement):
            own = dict(model.named_parameters())
            first = torch.autograd.grad(
                functional_call(model, own, (x,)), list(own.values()), create_graph=True
            )
            fast = {name: p - 0.1 * g for (name, p), g in zip(own.items(), first, strict=True)}
            return list(
                torch.autograd.grad(functional_call(model, fast, (x + 1,)), list(own.values()))
            )

    wanted = step("none")
    for placement in ("all", "segments-2"):
        for got, expected in zip(step(placement), wanted, strict=True):
            torch.testing.assert_close(got, expected)


# --- containers in arguments -----------------------------------------------------------------


@dataclass
class Stream:
    value: Tensor
    history: list[Tensor]


def through_dict(layer: nn.Module, x: Tensor, around: Around) -> Tensor:
    def fn(data: dict[str, Any]) -> dict[str, Any]:
        data["x"] = layer(data["x"])
        data["nested"]["seen"].append(data["x"].detach().mean())
        data["x"] = data["x"] * len(data["nested"]["seen"])
        return data

    data: dict[str, Any] = {"x": x, "nested": collections.OrderedDict(seen=[])}
    for _ in range(3):
        data = around(fn, data=data)
    return data["x"].sum()


def through_list(layer: nn.Module, x: Tensor, around: Around) -> Tensor:
    features = [x]
    for _ in range(3):
        features.append(around(lambda found: layer(found[-1] + found[0]), features))
    out: Tensor = sum(features[1:], torch.zeros(())).sum()
    features.clear()
    return out


def through_dataclass(layer: nn.Module, x: Tensor, around: Around) -> Tensor:
    def fn(stream: Stream) -> None:
        stream.value = layer(stream.value) + sum(stream.history)
        stream.history.append(stream.value.detach())

    stream = Stream(x, [x.detach()])
    for _ in range(3):
        around(fn, stream)
    return stream.value.sum()


def through_outputs(layer: nn.Module, x: Tensor, around: Around) -> Tensor:
    out = around(lambda v: {"y": layer(v), "v": v}, x)
    y = out["y"]
    out["y"] = None
    out.clear()
    return y.square().sum()


@every_way
@pytest.mark.parametrize(
    "through", [through_dict, through_list, through_dataclass, through_outputs]
)
def test_containers_that_change(around: Around, through: Callable[..., Tensor]) -> None:
    def step(around: Around) -> list[Tensor]:
        torch.manual_seed(0)
        layer, x = Layer(), torch.randn(4, WIDTH, requires_grad=True)
        through(layer, x * 1, around).backward()
        return [x.grad, *(p.grad for p in layer.parameters())]

    assert_alike(step(around), step(plain))


def test_a_changed_argument_is_named() -> None:
    held, x = torch.randn(4), torch.randn(4, requires_grad=True)
    out = ckpt_pass.checkpoint(lambda v, box: (v * box["deep"][0]).exp(), x, {"deep": [held]})
    held.add_(1)
    with pytest.raises(ckpt_pass.MutatedArgumentError, match=r"args\[1\]\['deep'\]\[0\]"):
        out.sum().backward()


def test_the_callers_container_is_not_kept_with_its_outputs() -> None:
    """A list that gets the region's output would otherwise hold itself through autograd."""
    features = [torch.randn(4, requires_grad=True) * 1]
    features.append(ckpt_pass.checkpoint(lambda found: found[-1].exp(), features))
    gone = weakref.ref(features[1])
    del features
    gc.collect()
    assert gone() is None


# --- backwards inside a forward --------------------------------------------------------------


class Forces(nn.Module):
    """The gradient of an energy, and then more of the forward."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 3)
        self.drop = nn.Dropout(drop)

    def energy(self, x: Tensor) -> Tensor:
        return self.two(self.drop(torch.tanh(self.one(x)))).square().sum()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x), x, create_graph=False)
        (again,) = torch.autograd.grad(self.energy(x + force), x, create_graph=True)
        return again.square().mean() + self.energy(x - force)


INNER = [
    None,
    "save-nothing",
    "save-matmul",
    "save-everything",
    ckpt_pass.save(op="aten.mm") | ckpt_pass.recompute(),
    ckpt_pass.save(op_class="matmul", module="one", nth=1) | ckpt_pass.recompute(),
]


@pytest.mark.parametrize("policy", INNER, ids=str)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_gradients_inside_a_region(policy: Any, drop: float) -> None:
    def step(around: Around) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = Forces(drop), torch.randn(4, WIDTH)
        around(model, x).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert_alike(step(partial(ckpt_pass.checkpoint, policy=policy)), step(plain))


# --- what stays as it is ---------------------------------------------------------------------


def test_copies_and_pickles_of_a_module_that_was_a_region() -> None:
    layer, x = DelayedScale(), torch.randn(4, WIDTH)
    ckpt_pass.checkpoint(layer, x).sum().backward()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        ckpt_pass.checkpoint(other, x).sum().backward()
    assert list(layer.state_dict()) == list(DelayedScale().state_dict())


def test_a_module_that_was_a_region_is_let_go() -> None:
    layer = Membrane()
    ckpt_pass.checkpoint(layer, torch.randn(4, WIDTH)).sum().backward()
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
