"""Planning leaves a model, its arguments and the random state as they were, also when it fails."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.state.untouched import untouched


class Notes:
    """An object of the user's that a module writes to."""

    def __init__(self) -> None:
        self.calls = 0
        self.last: Tensor | None = None


class Busy(nn.Module):
    """Changes whatever it can reach in every call."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.alias = self.fc.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("late", None)
        self.plain = torch.ones(width)
        self.made: Tensor | None = None
        self.cache: OrderedDict[str, Any] = OrderedDict(first=1, second=2)
        self.seen: list[Any] = []
        self.recent: deque[Any] = deque(maxlen=2)
        self.notes, self.space = Notes(), SimpleNamespace(pair=(torch.ones(1), 0))

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = torch.linspace(0, 1, x.shape[-1])
        self.late = x.detach() * 2
        self.steps += 1
        self.plain.mul_(0.5)
        self.seen.append(x)
        self.notes.calls += 1
        self.notes.last = x
        self.extra = x
        noise = torch.rand(x.shape[-1])
        return x + torch.tanh(self.fc(x * self.plain) + self.made * noise)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Busy() for _ in range(3))

    def forward(self, x: Tensor, memory: list[Tensor] | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if memory is not None:
                memory.append(x)
        return x.square().mean()


class Cut(Net):
    """Code that runs between two graphs, and changes things there."""

    def forward(self, x: Tensor, memory: list[Tensor] | None = None) -> Tensor:
        torch._dynamo.graph_break()
        layer = self.layers[0]
        layer.cache["third"] = x
        layer.cache.move_to_end("first")
        layer.recent.append(random.random())
        layer.space.pair = (x, layer.space.pair[1] + 1)
        self.eval()
        return super().forward(x, memory)


class Fails(Cut):
    def forward(self, x: Tensor, memory: list[Tensor] | None = None) -> Tensor:
        super().forward(x, memory)
        raise RuntimeError("after the last layer")


def state_of(model: nn.Module) -> list[Any]:
    """Identities of everything that a layer holds, contents of what may be overwritten."""
    found: list[Any] = [model.training, torch.get_rng_state().tolist(), random.getstate()]
    for module in model.modules():
        own = [(name, id(value)) for name, value in vars(module).items()]
        tensors = {**module._parameters, **module._buffers}
        found += [own, [(name, id(value)) for name, value in tensors.items()]]
        found.append([parameter.grad for parameter in module.parameters()])
        if isinstance(module, Busy):
            notes = (module.notes.calls, module.notes.last)
            found += [list(module.cache.items()), list(module.seen), list(module.recent), notes]
            found += [id(module.space.pair), module.plain.tolist(), int(module.steps)]
    return found


WAYS: dict[str, Callable[..., Any]] = {
    "plan": lambda net, x: ckpt_pass.plan(net, x, policy="save-matmul"),
    "eager plan": lambda net, x: ckpt_pass.plan(net, x, budget=1.0, mode="eager"),
    "explain": lambda net, x: ckpt_pass.explain(net, x),
    "fit": lambda net, x: ckpt_pass.fit(net, x, budget="1MiB"),
    "profile": lambda net, x: ckpt_pass.profile_layers(net, x, rounds=1),
    "saved": lambda net, x: ckpt_pass.saved_activations(net, x),
    "skips": lambda net, x: ckpt_pass.skip_values(net, x),
    "verify": lambda net, x: ckpt_pass.verify(net, x, policy="save-matmul"),
}


#: Where a step that is cut takes long.
LONG = ("explain", "fit", "verify")
EACH = [
    pytest.param(program, way, marks=[pytest.mark.slow] if program is Cut and way in LONG else [])
    for way in WAYS
    for program in (Net, Cut, Fails)
]


@pytest.mark.parametrize(("program", "way"), EACH)
def test_everything_is_as_it_was(program: type[nn.Module], way: str) -> None:
    torch.manual_seed(0)
    net, x, memory = program(), torch.randn(4, 8), []
    before = state_of(net)
    try:
        WAYS[way](net, x)
    except ckpt_pass.CkptPassError:
        assert program is not Net
    except RuntimeError:
        assert program is Fails
    assert state_of(net) == before
    assert memory == []
    if program is Net:  # the next real step trains
        net(x).backward()
        assert all(type(p.grad) is Tensor for p in net.parameters())
        assert type(net.layers[0].made) is Tensor


def test_containers_among_the_arguments() -> None:
    net, x, memory = Net(), torch.randn(4, 8), [torch.zeros(1)]
    before = list(memory)
    for options in ({}, {"budget": 1.0, "mode": "eager"}):
        ckpt_pass.plan(net, x, memory, **options)
        assert len(memory) == 1
        assert memory[0] is before[0]


def test_hooks_do_not_fire_on_a_whole_graph() -> None:
    net, x, fired = Net(), torch.randn(4, 8), []
    net.layers[1].register_forward_hook(lambda module, args, output: fired.append(type(output)))
    net.layers[1].fc.weight.register_hook(fired.append)
    ckpt_pass.plan(net, x)
    assert fired == []


def test_stand_ins_are_tied_and_taken_away() -> None:
    net = Net()
    weight, plain = net.layers[0].fc.weight, net.layers[0].plain
    with untouched(net, stand_in=lambda tensor: tensor.detach().clone()):
        layer = net.layers[0]
        assert layer.fc.weight is layer.alias
        assert layer.fc.weight is not weight
        assert layer.space.pair[0] is not None
        assert layer.plain is not plain
    assert (net.layers[0].fc.weight, net.layers[0].plain) == (weight, plain)
    assert net.layers[0].alias is weight


def test_values_come_back_too() -> None:
    net, x = Net(), torch.randn(4, 8)
    before = state_of(net)
    with untouched(net, x, values=True):
        net(x).backward()
        x.zero_()
        net.train(False)
    assert state_of(net) == before
    assert bool(x.any())
