"""The ways in which the demo runs its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ckpt_pass._torch import compilers
from ckpt_pass.compile.backend import make_backend
from ckpt_pass.demo.model import RunBlock, direct
from ckpt_pass.policy.named import DEFAULT_POLICY
from ckpt_pass.regions.sac import context_fn
from ckpt_pass.tools.ahead import plan_one

PLAIN = "plain"

Batch: TypeAlias = tuple[Tensor, Tensor]
#: Makes a model ready, with a first batch to look at; returns what a training step calls.
Prepare: TypeAlias = Callable[[nn.Module, Batch], Callable[..., Tensor]]


def as_it_is(model: nn.Module, batch: Batch) -> Callable[..., Tensor]:
    """Nothing to prepare: the model itself."""
    return model


@dataclass(frozen=True)
class Variant:
    """One way to run the model: how each block runs, and what is done to the model before."""

    name: str
    kind: str
    run_block: RunBlock = direct
    prepare: Prepare = as_it_is

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.name}"


def variants(inner: str, budget: float) -> tuple[Variant, ...]:
    """The nine variants; each kind begins with its plain run.

    Args:
        inner: what compiles forward and backward: ``inductor`` or ``aot_eager``.
        budget: ours as a share of the peak; also the setting of torch's own budget.

    Raises:
        UnknownOptionError: there is no such inner compiler.
    """
    kind = f"compiled ({inner})"
    backends = {
        DEFAULT_POLICY: make_backend(DEFAULT_POLICY, inner=inner),
        "save-nothing": make_backend("save-nothing", inner=inner),
        f"budget {budget:g}": make_backend(budget=budget, inner=inner),
        f"torch budget {budget:g}": compilers.stock_backend(inner, budget),
    }
    compiled = {PLAIN: inner, **backends}
    return (
        Variant(PLAIN, "eager"),
        Variant("full checkpointing", "eager", _checkpointed()),
        Variant(DEFAULT_POLICY, "eager", _checkpointed(context_fn=context_fn())),
        Variant(f"budget {budget:g}", "eager", prepare=partial(_planned, budget)),
        *(Variant(name, kind, prepare=partial(_compiled, b)) for name, b in compiled.items()),
    )


def _checkpointed(**options: Any) -> RunBlock:
    def run_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out: Tensor = checkpoint(block, x, cos, sin, use_reentrant=False, **options)
        return out

    return run_block


def _planned(budget: float, model: nn.Module, batch: Batch) -> Callable[..., Tensor]:
    plan_one(model, *batch, budget=budget, mode="eager").apply(model)
    return model


def _compiled(backend: Any, model: nn.Module, batch: Batch) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(model, backend=backend)
    return compiled
