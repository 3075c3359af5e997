"""Chains of like layers, described to the planner without being run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ckpt_pass.compile.dedupe import merge_equal
from ckpt_pass.compile.engine import OPEN
from ckpt_pass.compile.tagging import tag
from ckpt_pass.graph.capture import capture
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.problem import borders_of, build_problem
from ckpt_pass.planner.problem import Problem
from tests.zoo import Built, hf, seeded

VOCAB, HIDDEN, INTERMEDIATE, HEADS = 100, 64, 176, 2


def llama_chain(layers: int, batch: int, length: int) -> Built:
    """A narrow Llama: many layers, little in each; fp32, no dropout."""
    options: dict[str, Any] = {"attn_implementation": "sdpa", **hf.SPECIAL_TOKENS}
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=length, use_cache=False, **options,
    )  # fmt: skip
    # Token ids are characters of a source text (codes below 128): those beyond the vocabulary wrap.
    ids = hf.text_ids(batch, length) % VOCAB
    model = seeded(lambda: (hf.TrainStep(LlamaForCausalLM(config), hf.next_token_loss), (ids,)))
    return model()


@dataclass(frozen=True)
class Traced:
    """A joint graph that is open to the solver.

    Attributes:
        joint: valid while the ``with`` block of :func:`traced` runs.
        capture_s: CPU seconds that the trace took.
    """

    joint: JointGraph
    capture_s: float

    def described(self) -> tuple[Problem, tuple[int, ...]]:
        """The graph as the planner sees it, and the ops whose results are borders."""
        found = build_problem(self.joint)
        return found.problem, borders_of(self.joint, found)


@contextlib.contextmanager
def traced(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[Traced]:
    """Trace a step and tag it as a backend with a budget and no policy does."""
    start = time.process_time()
    with capture(module, *inputs) as joint:
        capture_s = time.process_time() - start
        merge_equal(joint, tag(joint, OPEN))
        yield Traced(joint, capture_s)
