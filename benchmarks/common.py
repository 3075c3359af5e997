"""What every benchmark shares: rows, bars, timing in rounds, and torch's lists of ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ckpt_pass.demo import torch_threads as torch_threads
from ckpt_pass.timing import TimingRow as TimingRow
from ckpt_pass.timing import Variant as Variant
from ckpt_pass.timing import interleave as interleave

_aten = torch.ops.aten

#: What ``save-matmul`` saves, for torch's ``create_selective_checkpoint_contexts``.
MATMUL_OPS: tuple[Any, ...] = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
)
#: What ``save-matmul-attention`` saves: these and the fused attentions of every device.
MATMUL_ATTENTION_OPS: tuple[Any, ...] = (
    *MATMUL_OPS,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
)


@dataclass(frozen=True)
class PeakRow:
    """The exact bytes and flops of one variant of one model's step (``measure_step``)."""

    model: str
    variant: str
    peak_bytes: int
    saved_bytes: int
    flops: int


@dataclass(frozen=True)
class BudgetRow:
    """One point: torch's peak and flops, and ours with that peak as the budget."""

    model: str
    torch_budget: float
    torch_peak_bytes: int
    torch_flops: int
    ours_peak_bytes: int
    ours_flops: int
    plain_flops: int

    @property
    def ratio(self) -> float:
        """Recomputed flops, ours by torch's; 0 where ours recomputes none."""
        theirs, ours = self.torch_flops - self.plain_flops, self.ours_flops - self.plain_flops
        if ours == 0:
            return 0.0
        return ours / theirs if theirs else float("inf")


Row: TypeAlias = TimingRow | PeakRow | BudgetRow


@dataclass(frozen=True)
class Bar:
    """Something that must hold: ``value <= limit``."""

    what: str
    value: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Result:
    """What one benchmark found."""

    name: str
    title: str
    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    facts: Mapping[str, object] = field(default_factory=dict)
