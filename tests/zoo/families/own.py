"""Models written here: recurrent, on graphs, differential equations, and what torch brings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.families import HEADS, LABELS, VOCAB, WIDTH, Batch, Family, pictures, tokens


class Lstm(nn.Module):
    """A two-way LSTM over embedded tokens, two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(2 * WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


class GruCell(nn.Module):
    """A GRU cell in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state).square().mean()


class _GraphLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(2 * WIDTH, WIDTH)
        self.update = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        sent = F.silu(self.message(torch.cat([nodes[source], nodes[target]], -1)))
        got = torch.zeros_like(nodes).index_add(0, target, sent)
        found: Tensor = self.norm(nodes + self.update(torch.cat([nodes, got], -1)))
        return found


class GraphNet(nn.Module):
    """Messages along the edges of a graph; the edges of a node to itself are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_GraphLayer() for _ in range(4))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        edges = edges[:, edges[0] != edges[1]]
        for layer in self.layers:
            nodes = layer(nodes, edges)
        return nodes.square().mean()


class NeuralOde(nn.Module):
    """A field integrated by Runge-Kutta's method: one module runs 32 times."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = 1.0 / 8
        for _ in range(8):
            k1 = self.field(x)
            k2 = self.field(x + h / 2 * k1)
            k3 = self.field(x + h / 2 * k2)
            k4 = self.field(x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x.square().mean()


class Pinn(nn.Module):
    """Burgers' equation: the loss holds second derivatives by the inputs."""

    def __init__(self) -> None:
        super().__init__()
        width = [2, WIDTH, WIDTH, WIDTH]
        pairs = itertools.pairwise(width)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairs), nn.Linear(WIDTH, 1)
        )

    def forward(self, points: Tensor) -> Tensor:
        points = points.requires_grad_()
        u = self.layers(points)
        (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        u_t, u_x = first.unbind(-1)
        (second,) = torch.autograd.grad(u_x.sum(), points, create_graph=True)
        return (u_t + u[:, 0] * u_x - 0.01 * second[:, 1]).square().mean()


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with the mask that is asked for."""

    def __init__(self, masks: Callable[[int, int], dict[str, Any]]) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.encoder(x, **self.masks(*x.shape[:2]))
        return found.square().mean()


def causal_and_padded(rows: int, length: int) -> dict[str, Any]:
    """A causal mask, and one that leaves out the end of the first row."""
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    padded = torch.zeros(rows, length)
    padded[0, length // 2 :] = float("-inf")
    return {"mask": causal, "src_key_padding_mask": padded}


def causal_bool(rows: int, length: int) -> dict[str, Any]:
    """A causal mask of booleans, said to be one."""
    return {"mask": torch.ones(length, length).triu(1).bool(), "is_causal": True}


class Translator(nn.Module):
    """``nn.Transformer``, encoder and decoder, with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(WIDTH, HEADS, 2, 2, 2 * WIDTH, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        found: Tensor = self.body(x, y, tgt_mask=mask, tgt_is_causal=True)
        return found.square().mean()


class _Dense(nn.Module):
    """A layer of a DenseNet: it gets the outputs of all layers before it, as a list."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, 8, 3, padding=1, bias=False)

    def forward(self, found: list[Tensor]) -> Tensor:
        out: Tensor = self.conv(F.relu(self.norm(torch.cat(found, 1)), inplace=True))
        return F.dropout(out, 0.1)


class DenseNet(nn.Module):
    """A dense block, with batch normalisation and ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(_Dense(8 * (i + 1)) for i in range(5))
        self.head = nn.Linear(48, LABELS)

    def forward(self, images: Tensor) -> Tensor:
        found = [self.stem(images)]
        for layer in self.layers:
            found.append(layer(found))
        return F.cross_entropy(self.head(torch.cat(found, 1).mean((2, 3))), torch.arange(2))


def _block(a: int, b: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
        nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Down, up, and across."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(3, 8), _block(8, 16), _block(16, 32)])
        self.up = nn.ModuleList([_block(48, 16), _block(24, 8)])
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        across: list[Tensor] = []
        x = images
        for block in self.down:
            x = block(x)
            across.append(x)
            x = F.max_pool2d(x, 2)
        x = across.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = block(torch.cat([x, across.pop()], 1))
        targets = (images[:, 0] > 0).long()
        return F.cross_entropy(self.head(x), targets)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = _block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class ResNet(nn.Module):
    """Residual blocks, written as in a tutorial; the forward counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(_Residual(16) for _ in range(4))
        self.head = nn.Linear(16, LABELS)

    def forward(self, images: Tensor) -> Tensor:
        self.seen += 1
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), torch.arange(2))


class Mlp(nn.Module):
    """Autocast to bfloat16, a one-hot mask, and a graph break as the first statement."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.broken:
            torch._dynamo.graph_break()
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                x = x + layer(x)
            scores = self.head(x)
        hit = F.one_hot(ids, VOCAB)
        return -(scores.float().log_softmax(-1) * hit).sum(-1).mean()


class Spectral(nn.Module):
    """A Fourier neural operator in one dimension: real transforms and complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(WIDTH, WIDTH, 8, dtype=torch.complex64) / WIDTH)
            for _ in range(3)
        )
        self.mixes = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for weight, mix in zip(self.weights, self.mixes, strict=True):
            modes = torch.fft.rfft(x)
            kept = torch.einsum("bim,iom->bom", modes[..., :8], weight)
            x = F.gelu(torch.fft.irfft(kept, n=x.shape[-1]) + mix(x))
        return x.square().mean()


def _sequence() -> Tensor:
    return torch.randn(4, 16, WIDTH)


def _own(
    name: str, build: Callable[[], nn.Module], batch: Callable[[], Batch], odd: str = ""
) -> Family:
    return Family(name, "own", "torch", lambda: (build(), batch()), odd)


def _graph() -> Batch:
    return {"nodes": torch.randn(24, WIDTH), "edges": torch.randint(0, 24, (2, 80))}


FAMILIES = (
    _own("lstm", Lstm, lambda: {"ids": tokens()}, "dynamo compiles no RNN"),
    _own("gru-cell", GruCell, lambda: {"x": _sequence()}),
    _own("graph-net", GraphNet, _graph, "boolean indexing"),
    _own("neural-ode", NeuralOde, lambda: {"x": torch.randn(64, WIDTH)}, "one module, 32 runs"),
    _own("pinn", Pinn, lambda: {"points": torch.rand(64, 2)}, "gradients within the forward"),
    _own("encoder-masks", lambda: Encoder(causal_and_padded), lambda: {"x": _sequence()},
         "masks made in the forward"),
    _own("encoder-causal", lambda: Encoder(causal_bool), lambda: {"x": _sequence()}),
    _own("translator", Translator, lambda: {"x": _sequence(), "y": torch.randn(4, 8, WIDTH)}),
    _own("own-densenet", DenseNet, lambda: {"images": pictures(16)}, "lists as arguments"),
    _own("own-unet", UNet, lambda: {"images": pictures(32)}),
    _own("own-resnet", ResNet, lambda: {"images": pictures(16)}),
    _own("autocast-mlp", Mlp,
         lambda: {"x": torch.randn(64, WIDTH), "ids": torch.randint(0, VOCAB, (64,))}),
    _own("broken-mlp", lambda: Mlp(broken=True),
         lambda: {"x": torch.randn(64, WIDTH), "ids": torch.randint(0, VOCAB, (64,))},
         "a graph break as the first statement"),
    _own("spectral", Spectral, lambda: {"x": torch.randn(2, WIDTH, 64)}),
)  # fmt: skip
