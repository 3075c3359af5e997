"""The model zoo: what a case is, what cases are made with, and what tests do with one.

A case builds a training step from nothing: a module whose forward returns the loss, and
inputs for it. ``tests.zoo.hf`` holds Hugging Face models, ``tests.zoo.programs`` small
programs, each made for one difficulty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Built: TypeAlias = tuple[nn.Module, tuple[Tensor, ...]]

SEED = 20  # any fixed number


@dataclass(frozen=True)
class Case:
    """One training step of the zoo.

    ``make()`` gives ``(module in train mode, inputs)``: the same values at every call, and
    torch's global random state is left as it was. ``block_names(module)`` gives the fully
    qualified names of the blocks that are natural checkpoint regions, perhaps none.
    """

    name: str
    make: Callable[[], Built]
    block_names: Callable[[nn.Module], list[str]]
    bitwise_vs_eager: bool = True
    """Compiled (no fusion, right gradients), loss and gradients equal eager's to the last bit."""
    bitwise_repeats: bool = True
    """Eager repeats itself to the last bit (sums scattered by several threads do not)."""
    aot_eager_right: bool = True
    """The gradients of torch's ``aot_eager`` are right: see ``programs.BufferMutation``."""
    draws_random: bool = False
    """Forward draws random numbers: seed before each step that is to be compared."""
    mutates_buffers: bool = False
    """Forward changes buffers of the module: a second step starts from another state."""
    gradless: frozenset[str] = frozenset()
    """Names of the parameters that get no gradient (unused or frozen)."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class StepResult:
    """What one forward and backward left behind (tensors are copies)."""

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def seeded(build: Callable[[], Built], seed: int = SEED) -> Callable[[], Built]:
    """``build`` under a random seed of its own, with the module put into train mode."""

    def make() -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module, inputs = build()
        return module.train(), inputs

    return make


def children_of(*containers: str) -> Callable[[nn.Module], list[str]]:
    """A ``block_names`` that lists the direct children of the containers named, in order."""

    def block_names(module: nn.Module) -> list[str]:
        return [
            f"{container}.{child}"
            for container in containers
            for child, _ in module.get_submodule(container).named_children()
        ]

    return block_names


def no_blocks(module: nn.Module) -> list[str]:
    """The ``block_names`` of a module without natural checkpoint regions."""
    return []


def scalar(value: Tensor) -> Tensor:
    """The loss of most programs: the mean square."""
    return value.square().mean()


class Stack(nn.Module):
    """A sequence of blocks ``layers.N``; the loss is its output's mean square."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return scalar(self.layers(x))


def stack(*blocks: Callable[[], nn.Module]) -> Callable[[], Stack]:
    """What makes a ``Stack`` of newly made blocks."""
    return lambda: Stack(*(block() for block in blocks))


def loss_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The scalar loss in what a case's forward returned (the first of several outputs)."""
    return output[0] if isinstance(output, tuple) else output


def run_step(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    forward: Callable[..., Any] | None = None,
    seed: int = SEED,
) -> StepResult:
    """Seed torch's global random state, then forward and backward once.

    ``forward`` is what is called instead of ``module``, say its compiled form; gradients
    and buffers are read from ``module``. Gradients of earlier steps are dropped.
    """
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = loss_of((module if forward is None else forward)(*inputs))
    loss.backward()
    return StepResult(
        loss=loss.detach().clone(),
        gradients={n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None},
        buffers={n: b.clone() for n, b in module.named_buffers()},
    )


def assert_same_step(ours: StepResult, plain: StepResult, bitwise: bool = True) -> None:
    """The same loss to the last bit; gradients and buffers too, unless told."""
    assert torch.equal(ours.loss, plain.loss)
    for found, expected in ((ours.gradients, plain.gradients), (ours.buffers, plain.buffers)):
        assert found.keys() == expected.keys()
        if bitwise:
            different = [name for name in expected if not torch.equal(found[name], expected[name])]
            assert different == []
        else:
            torch.testing.assert_close(found, expected)


def checkpoint_blocks(
    model: nn.Module,
    block_names: list[str],
    context_fn: Callable[[], Any] | None = None,
    **kw: Any,
) -> Callable[[], None]:
    """Make every block named a non-reentrant checkpoint region; returns the undo.

    The forward of each block *instance* is replaced, so names and state dict stay as they
    were; it works eager and under ``torch.compile(fullgraph=True)``. Further keywords go to
    ``torch.utils.checkpoint.checkpoint``. Undo before wrapping the same block again.
    An unknown name raises torch's ``AttributeError``.
    """
    if context_fn is not None:
        kw["context_fn"] = context_fn
    blocks = [model.get_submodule(name) for name in block_names]
    for block in blocks:
        block.forward = _checkpointed(block.forward, kw)

    def undo() -> None:
        for block in blocks:
            del block.forward

    return undo


def _checkpointed(forward: Callable[..., Any], kw: dict[str, Any]) -> Callable[..., Any]:
    # A partial, because Dynamo takes a context_fn from one and not from a closure's cell.
    run = partial(checkpoint, forward, use_reentrant=False, **kw)

    def region(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return region
