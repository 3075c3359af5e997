"""Whether random numbers were drawn is told by the generators' states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
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

    module, x = nn.Dropout(0.5), torch.ones(2, 4, requires_grad=True)
    with Seeing():
        ckpt_pass.checkpoint(module, x).sum().backward()
    assert torch.ops.aten.equal.default in seen
