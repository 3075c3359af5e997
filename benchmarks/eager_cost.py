"""What a checkpoint region costs in eager mode where dispatch is nearly all of the time.

Sixteen blocks so small that their kernels hardly count, forward and backward, on one thread. Each
block is a region of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import ckpt_pass
from benchmarks.common import (
    MATMUL_OPS,
    Bar,
    Result,
    TimingRow,
    Variant,
    interleave,
    torch_threads,
)
from ckpt_pass import CkptPassError
from ckpt_pass.regions.wrapping import regions_of

BLOCKS = 16
WIDTH = 32  # features: 4 kflop a matmul row, so that a kernel takes a few microseconds
TOKENS = 8
LARGER_TOKENS = 64  # activations outweigh gradients: a plan for torch SAC's peak must recompute
ROUNDS = 100
WARMUP = 5  # rounds: first calls fill torch's dispatch caches and ours

PLAIN = "plain"
REENTRANT = "reentrant"
NON_REENTRANT = "non-reentrant"
TORCH_LIST = "torch SAC, list"
TORCH_FN = "torch SAC, policy_fn"
OURS = "ours, save-matmul"
OURS_DEFAULT = "ours, save-matmul-attention"
OURS_MODULES = "ours, rule with a module name"
OURS_FN = "ours, torch's policy_fn"
OURS_REGION = "ours, checkpoint()"
OURS_REGION_POLICY = "ours, checkpoint(), save-matmul"
OURS_PLAN = "ours, a plan for torch SAC's peak"
OURS_LEAST = "ours, the plan of least peak"

_SAVED = frozenset(MATMUL_OPS)


class GradientsDifferError(CkptPassError):
    """A variant computes other gradients than the plain step, so its time means nothing."""


class Block(nn.Module):
    """Norm, up, gelu, down, residual: [B, D] to [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        return x + self.down(hidden)  # type: ignore[no-any-return]


Around = Callable[[nn.Module, Tensor], Tensor]


class Blocks(nn.Module):
    """A chain of blocks, each called by ``around``; the loss is the output's sum."""

    def __init__(self, count: int, width: int, around: Around) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(count))
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.around(layer, x)
        return x.sum()


def matmul_policy_fn(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save matmuls: a policy as torch's documentation writes one."""
    return CheckpointPolicy.MUST_SAVE if op in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def _plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)  # type: ignore[no-any-return]


def _reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)  # type: ignore[no-any-return]


def _region(block: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return checkpoint(block, x, use_reentrant=False, **options)  # type: ignore[no-any-return]


def _fast_region(block: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return ckpt_pass.checkpoint(block, x, **options)  # type: ignore[no-any-return]


def _selective(context_fn: Callable[[], Any]) -> Around:
    return partial(_region, context_fn=context_fn)


def ways() -> dict[str, Around]:
    """Each variant's way to call a block."""
    torch_sac = create_selective_checkpoint_contexts
    up = ckpt_pass.save(op_class="matmul", module="*.up", nth=1)
    return {
        PLAIN: _plain,
        REENTRANT: _reentrant,
        NON_REENTRANT: _region,
        TORCH_LIST: _selective(partial(torch_sac, list(MATMUL_OPS))),
        TORCH_FN: _selective(partial(torch_sac, matmul_policy_fn)),
        OURS: _selective(ckpt_pass.context_fn("save-matmul")),
        OURS_DEFAULT: _selective(ckpt_pass.context_fn("save-matmul-attention")),
        OURS_MODULES: _selective(ckpt_pass.context_fn(up)),
        OURS_FN: _selective(ckpt_pass.context_fn(matmul_policy_fn)),
        OURS_REGION: _fast_region,
        OURS_REGION_POLICY: partial(_fast_region, policy="save-matmul"),
        OURS_PLAN: _plain,
        OURS_LEAST: _plain,
    }


@dataclass(frozen=True)
class Step:
    """One variant's forward and backward; every variant has weights of its own, but the same."""

    model: Blocks
    x: Tensor

    def __call__(self, _prepared: object = None) -> None:
        self.model(self.x).backward()

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None

    def gradients(self) -> list[Tensor | None]:
        """The gradients of one step, and none left behind."""
        self.clear()
        self()
        found = [self.x.grad, *(parameter.grad for parameter in self.model.parameters())]
        self.clear()
        return found


def steps(blocks: int = BLOCKS, width: int = WIDTH, tokens: int = TOKENS) -> dict[str, Step]:
    """One step for each variant."""
    found = {}
    for name, around in ways().items():
        generator = torch.Generator().manual_seed(0)
        model = Blocks(blocks, width, around)
        for parameter in model.parameters():
            # A matmul then keeps the size of what goes through it.
            parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5
        x = torch.randn(tokens, width, generator=generator, requires_grad=True)
        found[name] = Step(model, x)
    _apply_plan(found[OURS_PLAN], _peak(found[TORCH_LIST]))
    _apply_plan(found[OURS_LEAST], _least_peak(found[OURS_LEAST]))
    return found


def _peak(step: Step) -> int:
    leaves = [step.x, *step.model.parameters()]
    measured = ckpt_pass.measure_step(lambda: step.model(step.x), params=leaves)
    step.clear()
    return measured.peak_bytes


def _least_peak(step: Step) -> int:
    try:
        ckpt_pass.plan(step.model, step.x, budget=1, mode="eager", cost="measured")
    except ckpt_pass.InfeasibleBudgetError as error:
        return error.least_feasible_bytes
    raise AssertionError("a step needs more than one byte")


def _apply_plan(step: Step, budget_bytes: int) -> None:
    """Plan a step for a peak (these steps' are mostly gradients: little can be recomputed).

    With measured times, as steps so small want it: flops are not what costs here.
    """
    plan = ckpt_pass.plan(step.model, step.x, budget=budget_bytes, mode="eager", cost="measured")
    plan.apply(step.model)


def check_gradients(found: dict[str, Step]) -> None:
    """Raise :class:`GradientsDifferError` unless all variants give the same, to the last bit."""
    wanted = found[PLAIN].gradients()
    for name, step in found.items():
        for index, (got, expected) in enumerate(zip(step.gradients(), wanted, strict=True)):
            if got is None or expected is None or not torch.equal(got, expected):
                raise GradientsDifferError(
                    f"{name!r} gives another gradient than {PLAIN!r} for tensor {index}; expected "
                    "bitwise equality. Look at the region's saved values before timing anything."
                )


def run(
    rounds: int = ROUNDS, warmup: int = WARMUP, blocks: int = BLOCKS, tokens: int = TOKENS
) -> Result:
    """Time one step of each variant on one thread.

    Raises:
        GradientsDifferError: a variant computes something else.
    """
    with torch_threads(1):
        found = steps(blocks, tokens=tokens)
        check_gradients(found)
        rows = interleave(
            [Variant(name, step, step.clear) for name, step in found.items()],
            rounds=rounds,
            warmup=warmup,
            references=(PLAIN, REENTRANT, TORCH_LIST, TORCH_FN),
        )
    title = f"Eager: {blocks} tiny blocks [{tokens}, {WIDTH}], each a region, one thread"
    return Result("eager", title, rows, _bars({row.variant: row for row in rows}), _facts(found))


def run_larger(rounds: int = ROUNDS, warmup: int = WARMUP, blocks: int = BLOCKS) -> Result:
    """The same with larger activations, where plans have something to recompute."""
    found = run(rounds, warmup, blocks, LARGER_TOKENS)
    plans = tuple(bar for bar in found.bars if bar.what.startswith((OURS_PLAN, OURS_LEAST)))
    return replace(found, name="eager-larger", bars=plans)


def _facts(found: dict[str, Step]) -> dict[str, object]:
    """What the plans are: how many blocks' modules are regions, and the peaks."""
    names = (TORCH_LIST, OURS_PLAN, OURS_LEAST)
    peaks = {f"peak bytes, {name}": _peak(found[name]) for name in names}
    plans = (OURS_PLAN, OURS_LEAST)
    return peaks | {f"regions, {name}": len(regions_of(found[name].model)) for name in plans}


def _bars(rows: dict[str, TimingRow]) -> tuple[Bar, ...]:
    return (
        Bar(f"{OURS} / {TORCH_LIST}", rows[OURS].ratios[TORCH_LIST], 0.85),
        Bar(f"{OURS_PLAN} / {TORCH_LIST}", rows[OURS_PLAN].ratios[TORCH_LIST], 0.6),
        Bar(f"{OURS_LEAST} / {TORCH_LIST}", rows[OURS_LEAST].ratios[TORCH_LIST], 0.6),
        Bar(f"{OURS_PLAN} / {REENTRANT}", rows[OURS_PLAN].ratios[REENTRANT], 1.0),
        Bar(f"{OURS_LEAST} / {REENTRANT}", rows[OURS_LEAST].ratios[REENTRANT], 1.0),
        Bar(f"{OURS_REGION} / {TORCH_LIST}", rows[OURS_REGION].ratios[TORCH_LIST], 0.6),
        Bar(f"{OURS_REGION} / {REENTRANT}", rows[OURS_REGION].ratios[REENTRANT], 1.0),
        Bar(f"{OURS_FN} / {TORCH_FN}", rows[OURS_FN].ratios[TORCH_FN], 1.0),
    )
