"""Code that looks for torch's errors finds ours: torch's class, and torch's words to begin with."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointError,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from tests.told import Told
from tests.zoo.surroundings import SINCE_2_13

aten = torch.ops.aten
Region = Callable[..., Any]
ALL = "save-nothing"
SINES = [aten.sin.default]


def bare(fn: Region, x: Tensor, policy: Any) -> Any:
    return ckpt_pass.checkpoint(fn, x, policy=None if policy is ALL else policy)


def region(fn: Region, x: Tensor, policy: Any) -> Any:
    return ckpt_pass.checkpoint(fn, x, policy=policy)


def hooked(fn: Region, x: Tensor, policy: Any) -> Any:
    contexts = ckpt_pass.context_fn(policy)
    return torch_checkpoint(fn, x, use_reentrant=False, context_fn=contexts)


def torchs(fn: Region, x: Tensor, policy: Any) -> Any:
    if policy is ALL:
        return torch_checkpoint(fn, x, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return torch_checkpoint(fn, x, use_reentrant=False, context_fn=contexts)


def changing(first: Region, then: Region) -> Region:
    """A function that does something else when it runs again."""
    runs = Told()  # not put back for the recomputation, as a list would be

    def fn(x: Tensor) -> Any:
        runs.count = getattr(runs, "count", 0) + 1
        return (first if runs.count == 1 else then)(x)

    return fn


def three_values(x: Tensor) -> Tensor:
    return x.sin().exp().sin()


def two_values(x: Tensor) -> Tensor:
    return x.sin().exp()


def two_others(x: Tensor) -> Tensor:
    return x.sin() * torch.tensor([1.0, 2.0])


def twice(fn: Region, way: Region, policy: Any) -> None:
    out = way(fn, torch.ones((), requires_grad=True), policy)
    for _ in range(2):
        out.sum().backward(retain_graph=True)


def once(fn: Region, way: Region, policy: Any) -> None:
    way(fn, torch.ones((), requires_grad=True), policy).sum().backward()


def to_the_end(fn: Region, way: Region, policy: Any) -> None:
    with set_checkpoint_early_stop(False):
        once(fn, way, policy)


def mutated(fn: Region, way: Region, policy: Any) -> None:
    out = way(fn, torch.ones((), requires_grad=True), policy)
    with torch.no_grad():
        out[0].mul_(2)
    out[1].backward()


FEWER = partial(changing, three_values, two_values)
MORE = partial(changing, two_values, three_values)
OTHERS = partial(changing, two_values, two_others)
MORE_SINES = partial(changing, lambda x: x.sin().cos().exp(), lambda x: x.sin().sin().cos().exp())
CASES = [
    pytest.param(
        *(FEWER, once, ALL, ckpt_pass.RecomputeMismatchError),
        "torch.utils.checkpoint: A different number of tensors was saved during the original "
        "forward and recomputation.\nNumber of tensors saved during forward: 3\nNumber of tensors "
        "saved during recomputation: 2",
        id="fewer",
    ),
    pytest.param(
        *(MORE, to_the_end, ALL, ckpt_pass.RecomputeMismatchError),
        "torch.utils.checkpoint: trying to save more tensors during recomputation than during the "
        "original forward pass.\n",
        id="more",
    ),
    pytest.param(
        *(OTHERS, once, ALL, ckpt_pass.RecomputeMismatchError),
        "torch.utils.checkpoint: Recomputed values for the following tensors have different "
        "metadata than during the forward pass.\ntensor at position 1",
        id="metadata",
    ),
    pytest.param(
        *(lambda: lambda x: x.sin().cos().exp(), twice, SINES, ckpt_pass.BackwardTwiceError),
        "Trying to backward an extra time. You are only allowed to backward once on any region "
        "computed under selective activation checkpoint.",
        id="twice",
    ),
    pytest.param(
        *(lambda: lambda x: (h := x.sin(), h.exp()), mutated),
        *(SINES, ckpt_pass.MutatedActivationError),
        "Tensor cached during selective activation checkpoint has been mutated",
        id="mutated",
    ),
    pytest.param(
        *(MORE_SINES, once, SINES, ckpt_pass.RecomputeMismatchError),
        "aten.sin.default invocation index 1 encountered during backward but not found in storage.",
        id="one-more-op",
    ),
]


@pytest.mark.parametrize(("function", "use", "policy", "kind", "words"), CASES)
def test_words_and_classes(
    function: Callable[[], Region], use: Region, policy: Any, kind: type[Exception], words: str
) -> None:
    for way in (bare, region, hooked):
        with pytest.raises(kind, match=f"^{re.escape(words)}") as caught:
            use(function(), way, policy)
        assert isinstance(caught.value, CheckpointError)
    if SINCE_2_13:  # these are torch's words
        with pytest.raises(RuntimeError, match=f"^{re.escape(words)}"):
            use(function(), torchs, policy)


def test_more_values_do_no_harm_with_early_stop() -> None:
    for way in (bare, region, hooked):
        once(MORE(), way, ALL)
