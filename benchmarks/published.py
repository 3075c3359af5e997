"""Step times that plans on paper have, beside training speeds that others published.

Each is planned on ``meta`` tensors for a device of the table, with what the source says of its
checkpointing, and its tokens a second are compared. Exchange between devices, the optimizer's step
and the data loader are in what was published, and not in what is planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ckpt_pass
from benchmarks.common import Bar, PublishedRow, Result
from ckpt_pass.planner.device import Device
from ckpt_pass.planner.devices import as_device
from ckpt_pass.policy.rules import PolicyLike

#: How far a planned time may lie from a published one.
CLOSE = 0.25
_LLAMA_8B: dict[str, int] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_NOTHING = ckpt_pass.first_match(ckpt_pass.recompute(), name="full")


@dataclass(frozen=True)
class Published:
    """A training speed that others measured.

    Attributes:
        what: model, devices and checkpointing, in words.
        source: where it stands.
        tokens_per_s: of one device.
        batch, length: of one device's microbatch.
        policy: ours that comes closest to what was checkpointed.
        config: of the model, as Hugging Face's Llama has it.
    """

    what: str
    source: str
    device: Device
    tokens_per_s: float
    batch: int
    length: int
    policy: PolicyLike
    config: dict[str, Any] = field(default_factory=lambda: _LLAMA_8B)


_TITAN = "torchtitan"
#: Their H100s have 96 GB of HBM2e, 2.4 TB/s (and 500 W instead of 700, which no figure here knows).
_H100_OF_TITAN = replace(
    as_device("h100"), name="h100 (HBM2e)", memory_bytes=96 * 10**9, bytes_per_s=2.4e12
)
PUBLISHED = (
    Published(
        "Llama 3 8B, FSDP on 64 A100, products and attention saved",
        f"{_TITAN}, docs/performance.md (2024-06)",
        as_device("a100-80gb"),
        2973.0,
        1,
        8192,
        "save-matmul-attention",
    ),
    Published(
        "Llama 3.1 8B, FSDP on 8 H100, products and attention saved",
        f"{_TITAN}, benchmarks/llama3_h100_202412_torchtitan.md (2024-12)",
        _H100_OF_TITAN,
        5762.0,
        2,
        8192,
        "save-matmul-attention",
    ),
    Published(
        "2.8B, DDP on 8 A100, full checkpointing, torch.compile",
        "GPT-Simple, docs: performance",
        as_device("a100-80gb"),
        8100.0,
        4,
        2048,
        _NOTHING,
        # The page names width and depth; this feed-forward and vocabulary make its 2.8 billion.
        {
            "hidden_size": 2560,
            "intermediate_size": 6827,
            "num_hidden_layers": 34,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "vocab_size": 50257,
            "tie_word_embeddings": True,
        },
    ),
)


class _Step(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def run(published: Sequence[Published] = PUBLISHED) -> Result:
    """Plan each step on paper; nothing is allocated."""
    rows = tuple(map(_row, published))
    bars = [Bar(f"{row.what}: planned time / published, off", row.off, CLOSE) for row in rows]
    title = "tokens a second of one device: planned on paper, and published"
    return Result("published", title, rows, tuple(bars))


def _row(one: Published) -> PublishedRow:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**one.config, use_cache=False))
        ids = torch.empty(one.batch, one.length, dtype=torch.long)
    step = _Step(model.to(torch.bfloat16))
    plan = ckpt_pass.plan(step, ids, ids, policy=one.policy, device=one.device)
    return PublishedRow(
        what=one.what,
        device=one.device.name,
        source=one.source,
        published_tokens_per_s=one.tokens_per_s,
        planned_tokens_per_s=ids.numel() / (plan.step_time_s + plan.recompute_time_s),
    )
