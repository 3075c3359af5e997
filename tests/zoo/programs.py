"""Small programs, each made for one difficulty of planning, tagging or recomputing.

Every forward returns a scalar loss (``SavedOutput`` a pair with the loss first) and works on
float32 [ROWS, WIDTH] unless it says otherwise. All compile without a graph break.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import Case, children_of, no_blocks, scalar, seeded, stack

ROWS, WIDTH = 8, 16
HEADS = 4
CLASSES = 12
DROPOUT = 0.1


class Pair(nn.Module):
    """Two square layers, for the programs that need no others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)


class InPlace(Pair):
    """In-place ops on intermediate values, one of them on a value that is saved."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu_(self.inner(x).add_(0.5))
        out = self.outer(hidden).exp()
        scaled = out.clone().mul_(0.5)
        scaled[:, ::2] += hidden[:, 1::2]
        return scalar(scaled)


class SavedViews(Pair):
    """Saved values used through views: transposed, sliced, expanded, overlapping."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        heads = hidden.view(ROWS, HEADS, -1).transpose(0, 1)
        scores = heads @ heads.transpose(1, 2)
        windows = hidden.unfold(1, 4, 2).sin()
        wide = hidden[:, :1].expand(ROWS, WIDTH) * self.outer(hidden[:, :WIDTH])
        return scalar(scores) + scalar(windows) + scalar(wide.cos())


class MultiOutput(nn.Module):
    """Ops with several outputs, not all of which are used."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.wide(x).split(WIDTH, dim=1)
        left, right = (query * key).chunk(2, dim=1)
        variance, mean = torch.var_mean(value, dim=1, keepdim=True)
        normal, _, _ = torch.native_layer_norm(value, [WIDTH], None, None, 1e-5)
        best, where = torch.topk(normal, 3, dim=1)
        whitened = (value - mean) * (variance + 1e-5).rsqrt()
        return scalar(left.sigmoid() * right) + scalar(best * where) + scalar(whitened - 1)


class LstmCell(nn.Module):
    """A long short-term memory over time: [B, T, W] unbound, gates chunked at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.from_input = nn.Linear(WIDTH, 4 * WIDTH)
        self.from_state = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, sequence: Tensor) -> Tensor:
        state = cell = torch.zeros_like(sequence[:, 0])
        for x in sequence.unbind(1):
            gates = self.from_input(x) + self.from_state(state)
            write, forget, new, read = gates.chunk(4, dim=1)
            cell = forget.sigmoid() * cell + write.sigmoid() * new.tanh()
            state = read.sigmoid() * cell.tanh()
        return scalar(state)


class TiedWeights(nn.Module):
    """The embedding's weight is the head's too; token ids [B, T] are the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(F.gelu(self.middle(self.embedding(ids))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class SharedTwice(Pair):
    """One layer called twice: the same module name at two call sites."""

    def forward(self, x: Tensor) -> Tensor:
        return scalar(self.outer(x + F.gelu(self.inner(x + F.gelu(self.inner(x))))))


class Autocast(Pair):
    """Autocast to bfloat16 with a weight used twice.

    Eager casts the weight once (autocast caches it) and adds up its gradients in bfloat16;
    the compiled graph casts it twice and adds up in float32. Their last bits differ.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = F.silu(self.inner(F.silu(self.inner(x))))
            out = self.outer(F.layer_norm(hidden, [WIDTH]))
        return scalar(out.float())


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return 3 * gradients[0] * ctx.saved_tensors[0].square()


class CustomFunction(Pair):
    """An ``autograd.Function`` between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        cubed: Tensor = _Cube.apply(self.inner(x))  # type: ignore[no-untyped-call]
        return scalar(self.outer(cubed))


@torch.library.custom_op("ckpt_pass_zoo::swish", mutates_args=())
def swish(x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """``x * gate`` and ``gate = sigmoid(slope * x)``, opaque to the compiler."""
    gate = torch.sigmoid(slope * x)
    return x * gate, gate


@swish.register_fake
def _swish_fake(x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _swish_save(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.slope = inputs[1]


def _swish_backward(ctx: Any, grad: Tensor, grad_gate: Tensor) -> tuple[Tensor, None]:
    x, gate = ctx.saved_tensors
    through_gate = (grad * x + grad_gate) * ctx.slope * gate * (1 - gate)
    return grad * gate + through_gate, None


swish.register_autograd(_swish_backward, setup_context=_swish_save)


class CustomOp(Pair):
    """A ``torch.library`` op with a backward of its own, two outputs, both used."""

    def forward(self, x: Tensor) -> Tensor:
        out, gate = swish(self.inner(x), 1.7)
        return scalar(self.outer(out)) + scalar(gate)


class Complex(nn.Module):
    """Complex64 input and weight, the fast Fourier transform, a view as real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.fft.fft(x @ self.weight, dim=1)
        return scalar(torch.view_as_real(turned * turned.conj())) + scalar(turned.abs())


class Integers(nn.Module):
    """Integer inputs: an embedding and a one-hot product with its weight, ids [B, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        dense = F.one_hot(ids, CLASSES).float() @ self.embedding.weight
        shifted = self.embedding((ids + 1) % CLASSES)
        return scalar(torch.tanh(self.embedding(ids)) * dense + shifted)


class SavedOutput(Pair):
    """Returns ``(loss, hidden)``: hidden is an output and saved for the backward as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.inner(x))
        return scalar(self.outer(hidden)), hidden


class NoGradIsland(Pair):
    """Parts of the forward run without gradients, between parts that have them."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        with torch.no_grad():
            scale = self.outer(hidden).abs().amax(dim=1, keepdim=True) + 1
        return scalar(self.outer(hidden / scale) - hidden.detach().cos())


def _dropout_block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(DROPOUT))


def _conv_block(channels_in: int) -> nn.Module:
    conv = nn.Conv2d(channels_in, 8, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())


class _Attention(Pair):
    """Residual self-attention on [B, T, W], dropout on the attention weights."""

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inner(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            heads, heads, heads, dropout_p=DROPOUT, is_causal=True
        )
        out: Tensor = self.outer(mixed.transpose(1, 2).flatten(2))
        return x + out


class BufferMutation(Pair):
    """A counter and a running mean are changed in the forward, and used after the change.

    torch 2.13's ``aot_eager`` and ``inductor`` save the old counter by reference and recompute
    the addition in the backward, when the buffer already holds the new one: the gradients
    come out wrong, silently. A partition that recomputes nothing gets them right.
    """

    count: Tensor
    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        self.count += 1
        self.running.mul_(0.9).add_(hidden.detach().mean(dim=0), alpha=0.1)
        return scalar(self.outer(hidden - self.running) / self.count)


class TwoTowers(Pair):
    """Two towers that share the input alone, each with a loss; the losses are summed."""

    def forward(self, x: Tensor) -> Tensor:
        return scalar(self.inner(x).tanh()) + 0.5 * scalar(self.outer(x).sigmoid().log())


class UnusedParameter(Pair):
    """``outer`` takes no part: its parameters get no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return scalar(self.inner(torch.tanh(self.inner(x))))


class FrozenParameters(Pair):
    """``outer`` takes part, and the gradient passes through it, but it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.outer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return scalar(self.inner(F.gelu(self.outer(F.gelu(self.inner(x))))))


class PointwiseChain(Pair):
    """Forty pointwise ops in a chain, nearly each of which saves a value."""

    def forward(self, x: Tensor) -> Tensor:
        value = self.inner(x)
        for _ in range(10):
            value = torch.sin(torch.sigmoid(torch.cos(torch.tanh(value))))
        return scalar(self.outer(value))


class _Residual(nn.Module):
    """A residual block: a normalised two-layer network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.up(self.norm(x))))
        return x + out


class GatherScatter(Pair):
    """Indexing by fixed indices, with repeats: gather, scatter, index_add, index_select."""

    def forward(self, x: Tensor) -> Tensor:
        columns = (torch.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) * 5) % WIDTH
        rows = torch.arange(2 * ROWS) % ROWS
        hidden = torch.tanh(self.inner(x))
        spread = torch.zeros_like(hidden).scatter_add(1, columns // 2, hidden.gather(1, columns))
        doubled = self.outer(spread).index_select(0, rows)
        return scalar(torch.zeros_like(hidden).index_add(0, rows.flip(0), doubled.sin()))


class DtypeCasts(Pair):
    """A chain through float64, bfloat16 and float16, each with an op of its own."""

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.tanh(self.inner(x).double())
        coarse = torch.sigmoid(precise.to(torch.bfloat16))
        half = (coarse.to(torch.float16) * 2).sin()
        return scalar(self.outer(half.float()))


class ScalarParameters(Pair):
    """Multiplications by scalars that are learnt, and by Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.mix = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gain * torch.tanh(self.inner(x) * 1.5)
        return scalar(self.mix * self.outer(hidden) + (1 - self.mix) * hidden / 3)


_ROWS = partial(torch.randn, ROWS, WIDTH)


def _case(
    name: str,
    module: Callable[[], nn.Module],
    make_input: Callable[[], Tensor] = _ROWS,
    blocks: Callable[[nn.Module], list[str]] = no_blocks,
    **fields: Any,
) -> Case:
    return Case(name, seeded(lambda: (module(), (make_input(),))), blocks, **fields)


_CONV = [partial(_conv_block, channels) for channels in (3, 8, 8)]
_OUTER = frozenset({"outer.weight", "outer.bias"})
_LAYERS = children_of("layers")
_SEQUENCE = partial(torch.randn, 4, 6, WIDTH)
_IMAGES = partial(torch.randn, 4, 3, 8, 8)
_COMPLEX = partial(torch.randn, ROWS, WIDTH, dtype=torch.complex64)
_IDS = partial(torch.randint, 0, CLASSES, (4, 6))

CASES: tuple[Case, ...] = (
    _case("in-place", InPlace),
    _case("saved-views", SavedViews),
    _case("multi-output", MultiOutput),
    _case("lstm", LstmCell, _SEQUENCE),
    _case("tied-weights", TiedWeights, _IDS),
    _case("shared-twice", SharedTwice, blocks=lambda module: ["inner"]),
    _case("autocast", Autocast, bitwise_vs_eager=False),
    _case("custom-function", CustomFunction),
    _case("custom-op", CustomOp),
    _case("complex", Complex, _COMPLEX),
    _case("integers", Integers, _IDS),
    _case("saved-output", SavedOutput),
    _case("no-grad-island", NoGradIsland),
    _case("dropout-mlp", stack(*3 * [_dropout_block]), blocks=_LAYERS, draws_random=True),
    _case("batch-norm-conv", stack(*_CONV), _IMAGES, _LAYERS, mutates_buffers=True),
    _case("attention-dropout", stack(*2 * [_Attention]), _SEQUENCE, _LAYERS, draws_random=True),
    _case("buffer-mutation", BufferMutation, mutates_buffers=True, aot_eager_right=False),
    _case("two-towers", TwoTowers, blocks=lambda module: ["inner", "outer"]),
    _case("unused-parameter", UnusedParameter, gradless=_OUTER),
    _case("frozen-parameters", FrozenParameters, gradless=_OUTER),
    _case("pointwise-chain", PointwiseChain),
    _case("residual-stack", stack(*4 * [_Residual]), blocks=_LAYERS),
    _case("gather-scatter", GatherScatter),
    _case("dtype-casts", DtypeCasts),
    _case("scalar-parameters", ScalarParameters),
)
