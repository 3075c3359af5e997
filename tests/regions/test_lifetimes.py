"""What a region leaves behind: nothing, however it is used and whichever way it was made.

Values that hold themselves through autograd's nodes are never collected. So each use of a region is
gone through with each way to make one, and afterwards none of the inputs and none of the values
that any of its runs has made may be alive, also without the collector. Gradients are those of the
plain step, or refused where a value that a policy has kept is asked for twice.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import set_checkpoint_early_stop

import ckpt_pass
from ckpt_pass.regions.keeps import Keeps
from ckpt_pass.regions.wrapping import RegionSpec, apply_regions
from tests.told import Told
from tests.zoo.surroundings import no_collector

Fn = Callable[..., Any]
Way = Callable[[Fn, Tensor], Any]
Gradients = tuple[Tensor | None, ...]

WEIGHTS = [torch.randn(6, 6, requires_grad=True) for _ in range(3)]

# --- the ways to make a region --------------------------------------------------------------


class Run(nn.Module):
    """A module that runs a function."""

    def __init__(self, fn: Fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Any:
        return self.fn(x)


def plain(fn: Fn, x: Tensor) -> Any:
    return fn(x)


def ours(fn: Fn, x: Tensor, **options: Any) -> Any:
    return ckpt_pass.checkpoint(fn, x, **options)


def hooked(fn: Fn, x: Tensor, policy: Any = "save-nothing") -> Any:
    contexts = ckpt_pass.context_fn(policy)
    return torch_checkpoint(fn, x, use_reentrant=False, context_fn=contexts)


def without_early_stop(fn: Fn, x: Tensor, way: Way) -> Any:
    with set_checkpoint_early_stop(False):
        return way(fn, x)


def among_hooks(fn: Fn, x: Tensor, way: Way) -> Any:
    """As in offloading: hooks around a region hold its arguments."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return way(fn, x)


def applied(fn: Fn, x: Tensor, spec: RegionSpec) -> Any:
    """As a placement or an eager plan makes it."""
    model = nn.Sequential(Run(fn))
    apply_regions(model, {"0": spec})
    return model(x)


def segment(fn: Fn, x: Tensor, nested: bool) -> Any:
    """The second and third of three regions that are recomputed together."""
    model = nn.Sequential(Run(lambda v: v * 1), Run(lambda v: v * 1), Run(fn))
    names = ("0", "1", "2")
    specs = {name: RegionSpec(follows=names[:at], nested=nested) for at, name in enumerate(names)}
    apply_regions(model, specs)
    return model(x)


MATMULS = Keeps((("aten.mm.default", (0, 1)),))
WAYS: dict[str, Way] = {
    "checkpoint": ours,
    "checkpoint-policy": partial(ours, policy="save-matmul"),
    "checkpoint-to-the-end": partial(without_early_stop, way=ours),
    "checkpoint-among-hooks": partial(among_hooks, way=ours),
    "context_fn": hooked,
    "context_fn-policy": partial(hooked, policy="save-matmul"),
    "context_fn-to-the-end": partial(without_early_stop, way=hooked),
    "placement": partial(applied, spec=RegionSpec()),
    "placement-policy": partial(applied, spec=RegionSpec(policy="save-matmul")),
    "eager-plan": partial(applied, spec=RegionSpec(keeps=MATMULS, draws=False)),
    "segment": partial(segment, nested=False),
    "nested-segment": partial(segment, nested=True),
}

#: Those that keep something.
KEEPING = [way for name, way in WAYS.items() if name.endswith(("policy", "plan"))]

# --- what a region runs ---------------------------------------------------------------------


class Watched:
    """Weak references to what the runs of a region have made."""

    def __init__(self) -> None:
        self.inputs: list[weakref.ref[Any]] = []
        self.storages: list[weakref.ref[Any]] = []

    def input(self) -> Tensor:
        x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        self.inputs.append(weakref.ref(x))
        return x

    def made(self, value: Tensor) -> Tensor:
        self.storages.append(weakref.ref(value.untyped_storage()))
        return value

    def alive(self) -> tuple[int, int]:
        """How many inputs, and how many values of a region."""
        inputs, storages = (
            sum(r() is not None for r in refs) for refs in (self.inputs, self.storages)
        )
        return inputs, storages

    # A layer with a second output, as routers and attention weights are.
    def layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.made(torch.tanh(self.made(x @ WEIGHTS[0])))
        return hidden @ WEIGHTS[1], self.made(torch.exp(self.made(hidden @ WEIGHTS[2])))

    def energy(self, x: Tensor) -> Tensor:
        return self.made(torch.tanh(self.made(x @ WEIGHTS[0])) @ WEIGHTS[1]).square().sum()

    def forces(self, x: Tensor) -> Tensor:
        return torch.autograd.grad(self.energy(x), x, create_graph=True)[0]

    def inner_step(self, x: Tensor) -> Tensor:
        """One step of descent, whose graph is released; what follows needs other values."""
        start = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.energy(start), start)
        return self.made(torch.tanh(self.made((x - slope) @ WEIGHTS[0])))


class StopsItError(Exception):
    """What a program raises."""


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise StopsItError


def gradients(x: Tensor) -> Gradients:
    return x.grad, *(weight.grad for weight in WEIGHTS)


# --- the uses -------------------------------------------------------------------------------


def everything_used(way: Way, watched: Watched, x: Tensor) -> None:
    hidden, extra = way(watched.layer, x)
    (hidden.sum() + extra.sum()).backward()


def one_output_unused(way: Way, watched: Watched, x: Tensor) -> None:
    way(watched.layer, x)[0].square().mean().backward()


def never_a_backward(way: Way, watched: Watched, x: Tensor) -> None:
    way(watched.layer, x)


def output_aside(way: Way, watched: Watched, x: Tensor) -> None:
    way(watched.layer, x)
    (x @ WEIGHTS[0]).sum().backward()


def one_input_of_the_backward(way: Way, watched: Watched, x: Tensor) -> None:
    way(watched.layer, x)[0].sum().backward(inputs=[WEIGHTS[1]])


def one_backward_after_the_other(way: Way, watched: Watched, x: Tensor) -> None:
    hidden, extra = way(watched.layer, x)
    hidden.sum().backward(retain_graph=True)
    extra.sum().backward()


def graph_retained(way: Way, watched: Watched, x: Tensor) -> None:
    hidden, _ = way(watched.layer, x)
    hidden.sum().backward(retain_graph=True)


def gradient_inside(way: Way, watched: Watched, x: Tensor) -> None:
    way(watched.forces, x).square().sum().backward()


def gradient_inside_alone(way: Way, watched: Watched, x: Tensor) -> None:
    way(watched.forces, x)


def step_inside(way: Way, watched: Watched, x: Tensor) -> None:
    way(watched.inner_step, x).sum().backward()


def gradient_of_a_gradient(way: Way, watched: Watched, x: Tensor) -> None:
    hidden, _ = way(watched.layer, x)
    (slope,) = torch.autograd.grad(hidden.square().sum(), x, create_graph=True)
    slope.square().sum().backward()


def gradient_dropped(way: Way, watched: Watched, x: Tensor) -> None:
    torch.autograd.grad(way(watched.layer, x)[0].square().sum(), x, create_graph=True)


def regions_inside(way: Way, watched: Watched, x: Tensor) -> None:
    def outer(v: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = way(watched.layer, watched.made(v.sin()))
        return way(watched.layer, hidden)

    way(outer, x)[0].sum().backward()


def gradient_of_regions_inside(way: Way, watched: Watched, x: Tensor) -> None:
    def outer(v: Tensor) -> Tensor:
        energy = way(watched.energy, watched.made(v.sin()))
        return torch.autograd.grad(energy, v, create_graph=True)[0]

    way(outer, x).square().sum().backward()


def error_in_the_forward(way: Way, watched: Watched, x: Tensor) -> None:
    def fails(v: Tensor) -> Tensor:
        watched.layer(v)
        raise StopsItError

    with contextlib.suppress(StopsItError):
        way(fails, x)


def error_in_the_recomputation(way: Way, watched: Watched, x: Tensor) -> None:
    runs: list[int] = []

    def fails(v: Tensor) -> Tensor:
        runs.append(1)
        hidden, _ = watched.layer(v)
        if len(runs) > 1:
            raise StopsItError
        return hidden.exp().exp()

    with contextlib.suppress(StopsItError):
        way(fails, x).sum().backward()


def error_in_the_backward(way: Way, watched: Watched, x: Tensor) -> None:
    def fails(v: Tensor) -> Tensor:
        return watched.made(FailingBackward.apply(watched.layer(v)[0]).exp()).exp()

    with contextlib.suppress(StopsItError):
        way(fails, x).sum().backward()


def other_values_in_the_recomputation(way: Way, watched: Watched, x: Tensor) -> None:
    runs: list[int] = []

    def differs(v: Tensor) -> Tensor:
        runs.append(1)
        hidden = watched.layer(v)[1]
        return (hidden if len(runs) == 1 else hidden.double()).exp()

    with contextlib.suppress(RuntimeError):
        way(differs, x).sum().backward()


#: What asks for values more than once.
ASKS_TWICE = (
    *(one_backward_after_the_other, gradient_inside, step_inside, gradient_of_a_gradient),
    gradient_of_regions_inside,
)
USES = (
    *(everything_used, one_output_unused, never_a_backward, output_aside),
    *(one_input_of_the_backward, one_backward_after_the_other, graph_retained),
    *(gradient_inside, gradient_inside_alone, step_inside, gradient_of_a_gradient),
    *(gradient_dropped, regions_inside, gradient_of_regions_inside, error_in_the_forward),
    *(error_in_the_recomputation, error_in_the_backward, other_values_in_the_recomputation),
)


@pytest.fixture(autouse=True, scope="module")
def reference_counts_alone() -> Iterator[None]:
    """Without the collector: memory must not wait for it either."""
    with no_collector():
        yield


def result(use: Callable[..., None], way: Way) -> tuple[Gradients | None, Watched]:
    for weight in WEIGHTS:
        weight.grad = None
    watched = Watched()
    x = watched.input()
    with contextlib.suppress(ckpt_pass.BackwardTwiceError):
        use(way, watched, x)
        return gradients(x), watched
    return None, watched


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_nothing_stays(use: Callable[..., None], way: Way) -> None:
    wanted, _ = result(use, plain)
    got, watched = result(use, way)
    assert watched.alive() == (0, 0)
    if got is None:
        assert use in ASKS_TWICE and way in KEEPING
    elif "recomputation" not in use.__name__:
        assert wanted is not None
        assert all(a is b or torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


# The eager plan here says that nothing is drawn.
DRAWING = {name: way for name, way in WAYS.items() if name != "eager-plan"}


@pytest.mark.parametrize("way", DRAWING.values(), ids=list(DRAWING))
def test_a_gradient_inside_draws_what_the_forward_drew(way: Way) -> None:
    """Its values are made again while the forward still runs."""

    def forces(x: Tensor) -> Tensor:
        hidden = torch.dropout(torch.tanh(x @ WEIGHTS[0]), 0.5, True)
        return torch.autograd.grad((hidden @ WEIGHTS[1]).square().sum(), x, create_graph=True)[0]

    found = []
    for each in (plain, way):
        torch.manual_seed(0)
        x = Watched().input()
        with contextlib.suppress(ckpt_pass.BackwardTwiceError):
            found.append(torch.autograd.grad(each(forces, x).square().sum(), [x, *WEIGHTS[:2]]))
    if len(found) == 1:
        assert way in KEEPING
    else:
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_nothing_is_kept_between_forward_and_backward(way: Way) -> None:
    """Not what a gradient inside has made again either."""
    kept: dict[Way, int] = {}
    for each in (plain, way):
        watched = Watched()
        out = each(watched.forces, watched.input())
        kept[each] = watched.alive()[1]
        del out
    assert kept[plain] == 1
    assert kept[way] == (2 if way in KEEPING else 0)  # its two products


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_a_tensor_that_a_module_puts_away_keeps_no_other_alive(way: Way) -> None:
    """As for statistics: the one of the recomputation has a graph of its own, which stays."""
    watched = Watched()
    put_away: list[Tensor] = []

    def layer(x: Tensor) -> Tensor:
        hidden, extra = watched.layer(x)
        put_away[:] = [extra]
        return (hidden + extra).exp()

    way(layer, watched.input()).sum().backward()
    assert watched.alive()[1] <= 1
    assert put_away[0].grad_fn is not None


def test_a_backward_through_what_a_recomputation_left() -> None:
    """Plain torch has let go of the values by then, too."""
    put_away = Told()  # not put back after the recomputation, as a list would be

    def layer(x: Tensor) -> Tensor:
        put_away.value = x.exp().sin()
        return put_away.value.exp()

    for way in (ours, hooked):
        way(layer, torch.ones(3, requires_grad=True)).sum().backward()
        with pytest.raises(ckpt_pass.EndedRecomputationError, match="that has ended"):
            put_away.value.sum().backward()


class Layer(nn.Module):
    """Two products and a second output."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.watched.made(torch.tanh(self.up(x)))
        return x + self.down(hidden), hidden.exp()


class Stack(nn.Module):
    """Layers whose second outputs go unused."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(watched) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return x.square().mean()


@pytest.mark.parametrize("policy", [None, "save-matmul"])
@pytest.mark.parametrize("placement", [ckpt_pass.AllLayers(), ckpt_pass.Segments(2)])
def test_nothing_stays_of_a_placement(placement: Any, policy: str | None) -> None:
    watched = Watched()
    model = Stack(watched)
    with ckpt_pass.applied(model, placement, policy=policy):
        model(watched.input()).backward()
    assert watched.alive() == (0, 0)


def test_nothing_stays_of_a_plan() -> None:
    model = Stack(Watched())
    plan = ckpt_pass.plan(model, torch.randn(64, 6), budget=0.75, mode="eager")
    watched = Watched()
    for layer in model.layers:
        layer.watched = watched
    with plan.applied(model):
        x = torch.randn(64, 6, requires_grad=True)
        watched.inputs.append(weakref.ref(x))
        model(x).backward()
    del x
    assert any(d.fate == "recomputed" for d in plan.decisions)
    assert watched.alive() == (0, 0)
