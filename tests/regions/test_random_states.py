"""Whether random numbers were drawn is told by the generators' states."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ckpt_pass
from ckpt_pass._torch import random_states


@pytest.fixture(params=["C", "op"])
def compared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compare states."""
    if request.param == "op":
        monkeypatch.setattr(random_states, "_memcmp", None)
    elif random_states._memcmp is None:
        pytest.skip("this library of C is linked otherwise")


def test_states_are_the_same_until_a_number_is_drawn(compared: None) -> None:
    before = torch.get_rng_state()
    assert random_states.same_states(before, torch.get_rng_state())
    torch.randn(1)
    assert not random_states.same_states(before, torch.get_rng_state())
    torch.set_rng_state(before)
    assert random_states.same_states(before, torch.get_rng_state())


def test_each_byte_counts_and_the_length(compared: None) -> None:
    state = torch.get_rng_state()
    for place in (0, len(state) // 2, len(state) - 1):
        other = state.clone()
        other[place] += 1
        assert not random_states.same_states(state, other)
    assert not random_states.same_states(state, state[:-1])


def test_a_whole_round_of_the_generator_is_seen(compared: None) -> None:
    """A round's numbers lead to where it began but for the numbers themselves."""
    torch.rand(1)
    before = torch.get_rng_state()
    torch.rand(624)
    assert not random_states.same_states(before, torch.get_rng_state())


def test_fake_tensors_draw_nothing_and_do_not_tell() -> None:
    state, other = torch.get_rng_state(), torch.get_rng_state()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        random_states.same_states(state, other)


def test_a_mode_sees_what_is_asked() -> None:
    seen: list[Any] = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kw or {}))

    module, x = nn.Tanh(), torch.ones(2, 4, requires_grad=True)
    with Seeing():
        ckpt_pass.checkpoint(module, x).sum().backward()
    assert torch.ops.aten.equal.default in seen


class Seeding(nn.Module):
    """Draws, and leaves the generator as every run of it leaves it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "forked":
            with torch.random.fork_rng(devices=[]):
                return torch.tanh(self.fc(x) * torch.rand(8))
        if self.how == "python":
            random.seed(3)
            return torch.tanh(self.fc(x)) * random.random()
        noise = torch.rand(8)
        torch.manual_seed(3)
        return torch.tanh(self.fc(x) * noise)


@pytest.mark.parametrize("how", ["seeded", "forked", "python"])
def test_a_region_that_sets_the_state(how: str) -> None:
    def run(around: Callable[..., Any]) -> tuple[list[Tensor], Tensor, float]:
        torch.manual_seed(0)
        random.seed(0)
        layers, x = [Seeding(how) for _ in range(3)], torch.randn(4, 8)
        for _ in range(2):
            h = x
            for layer in layers:
                h = around(layer, h)
            torch.rand(1)
            h.square().sum().backward()
        gradients = [p.grad for layer in layers for p in layer.parameters()]
        return gradients, torch.rand(1), random.random()

    (found, *drawn), (expected, *plainly) = run(ckpt_pass.checkpoint), run(lambda f, x: f(x))
    assert all(map(torch.equal, found, expected))
    assert drawn == plainly
