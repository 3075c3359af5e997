"""A small Llama-like transformer, as the demo trains it: nothing but ``torch.nn``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckpt_pass._errors import CkptPassError

#: Runs one block on (block, hidden state, cosines, sines): directly, or under checkpointing.
RunBlock: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class ModelSizeError(CkptPassError):
    """The width cannot be split into heads of even width, which rotary positions need."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(
            f"The demo's model got dim={dim} with {heads} heads; expected a multiple of "
            f"{2 * heads}, for rotary positions turn pairs of numbers within a head. "
            f"Pass such a dim, {max(1, dim // (2 * heads)) * 2 * heads} for one."
        )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model.

    Raises:
        ModelSizeError: ``dim`` is no multiple of twice ``heads``.
    """

    layers: int = 8
    dim: int = 128
    length: int = 256
    heads: int = 4
    vocab: int = 128  # ASCII

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ModelSizeError(self.dim, self.heads)

    @property
    def hidden(self) -> int:
        """The width inside the SwiGLU: Llama's 8/3 of ``dim``, rounded up to a whole multiple."""
        return 3 * self.dim


def direct(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run a block without checkpointing."""
    out: Tensor = block(x, cos, sin)
    return out


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.dim, config.dim, bias=False)
        self.k = nn.Linear(config.dim, config.dim, bias=False)
        self.v = nn.Linear(config.dim, config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (self._split(linear(x)) for linear in (self.q, self.k, self.v))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        merged: Tensor = self.out(y.transpose(1, 2).reshape(x.shape))
        return merged

    def _split(self, x: Tensor) -> Tensor:
        """From batch x length x dim to batch x heads x length x (dim / heads)."""
        split: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out: Tensor = x * cos + torch.cat((-second, first), dim=-1) * sin
    return out


class SwiGLU(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return down


class Block(nn.Module):
    """One layer: attention and feed-forward network, each after a norm and on a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Llama(nn.Module):
    """A causal language model whose forward returns the loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, run_block: RunBlock = direct) -> None:
        super().__init__()
        self.run_block = run_block
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        angles = _angles(config.length, config.dim // config.heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats; both arguments are int64, batch x length."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = self.run_block(layer, x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _angles(length: int, width: int) -> Tensor:
    """Rotary angles, length x width; the base of 10,000 is that of the RoFormer paper."""
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.outer(torch.arange(length), torch.cat((frequencies, frequencies)))
