"""Exact peaks of compiled steps: policies on the whole model against torch's per-block regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from benchmarks.common import MATMUL_ATTENTION_OPS, Bar, PeakRow, Result
from ckpt_pass import make_backend, measure_step
from tests.zoo import Built, checkpoint_blocks, children_of, hf

PLAIN = "torch, nothing recomputed by the user"
TORCH_CHECKPOINT = "torch, checkpoint on each block"
TORCH_SAC = "torch, SAC on each block"
OURS_NOTHING = "save-nothing"
OURS_SELECTIVE = "save-matmul-attention"


@dataclass(frozen=True)
class Reference:
    """A model, its blocks, and the peak that torch's per-block checkpoints were measured at.

    ``known_bytes`` (torch 2.13 on CPU, ``aot_eager``, rounded to 0.1 MB) is a second bar: it
    stays when torch's own figure moves.
    """

    name: str
    make: Callable[[], Built]
    block_names: Callable[[nn.Module], list[str]]
    known_bytes: int | None = None


REFERENCES = (
    Reference("llama-16L", hf.llama_16l, children_of("model.model.layers"), 78_350_000),
    Reference("gpt2-12L", hf.gpt2_12l, children_of("model.transformer.h"), 72_550_000),
)


def _context_fn() -> Callable[[], Any]:
    return partial(create_selective_checkpoint_contexts, list(MATMUL_ATTENTION_OPS))


def variants() -> dict[str, tuple[Any, dict[str, Any] | None]]:
    """The backend of each variant, and the options of its per-block regions if it has any."""
    return {
        PLAIN: ("aot_eager", None),
        TORCH_CHECKPOINT: ("aot_eager", {}),
        OURS_NOTHING: (make_backend("save-nothing", inner="aot_eager"), None),
        TORCH_SAC: ("aot_eager", {"context_fn": _context_fn()}),
        OURS_SELECTIVE: (make_backend("save-matmul-attention", inner="aot_eager"), None),
    }


def measure(reference: Reference, variant: str) -> PeakRow:
    """Compile one variant of a model's step and measure one run of it."""
    backend, regions = variants()[variant]
    step, args = reference.make()
    if regions is not None:
        checkpoint_blocks(step, reference.block_names(step), **regions)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    # The first call compiles; of the others every one has the same bytes.
    got = measure_step(lambda: compiled(*args), warmup=1, repeats=1, params=step.parameters())
    torch._dynamo.reset()
    assert got.saved_bytes is not None  # the step returns its loss
    return PeakRow(reference.name, variant, got.peak_bytes, got.saved_bytes, got.flops)


def run(references: Sequence[Reference] = REFERENCES) -> Result:
    """Measure every variant of every model."""
    rows = {(r.name, v): measure(r, v) for r in references for v in variants()}
    bars = tuple(bar for reference in references for bar in _bars(reference, rows))
    title = "Peaks: compiled with aot_eager, bytes above the start of the step"
    return Result("peaks", title, tuple(rows.values()), bars)


def _bars(reference: Reference, rows: dict[tuple[str, str], PeakRow]) -> list[Bar]:
    def bar(ours: str, theirs: str) -> Bar:
        value, limit = (rows[reference.name, name].peak_bytes for name in (ours, theirs))
        return Bar(f"{reference.name}: {ours} against {theirs}", value, limit, "bytes")

    found = [bar(OURS_NOTHING, TORCH_CHECKPOINT), bar(OURS_SELECTIVE, TORCH_SAC)]
    if reference.known_bytes is not None:
        value = rows[reference.name, OURS_NOTHING].peak_bytes
        what = f"{reference.name}: {OURS_NOTHING} against the known figure"
        found.append(Bar(what, value, reference.known_bytes, "bytes"))
    return found
