"""Random programs that do more than compute: blocks with state, odd functions and odd outputs.

A program is a row of blocks, each a row of steps on one value [ROWS, WIDTH]. What a block is called
with, and what becomes of its second output, belongs to the program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

ROWS, WIDTH = 4, 8

Around = Callable[..., Any]


@dataclass
class Notes:
    """State in a dataclass."""

    mean: Any = 1.0
    calls: int = 0
    seen: list[Any] = field(default_factory=list)


class Pair(torch.autograd.Function):
    """Two outputs that need gradients, and one that has none."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positive = a > 0
        ctx.mark_non_differentiable(positive)
        ctx.save_for_backward(a, b)
        ctx.set_materialize_grads(False)
        return a * b, a + b, positive

    @staticmethod
    def backward(ctx: Any, product: Any, total: Any, _: Any) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        one, other = torch.zeros_like(a), torch.zeros_like(b)
        if product is not None:
            one, other = one + product * b, other + product * a
        if total is not None:
            one, other = one + total, other + total
        return one, other


class MovesInBackward(torch.autograd.Function):
    """Scales by a buffer, which its backward moves on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        made = gradient * 2
        ctx.scale.mul_(1.1)
        return made, None


class Step(nn.Module):
    """One step of a block; a subclass has what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.build()

    def build(self) -> None:
        """What a subclass has besides."""


class Attribute(Step):
    def build(self) -> None:
        self.calls, self.last = 0, torch.ones(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        made = h * self.last * self.calls
        self.last = self.last * 0.5 + h.detach().mean(0)
        return made.tanh()


class Containers(Step):
    def build(self) -> None:
        self.notes = Notes()
        self.by_name: dict[str, Any] = {"moved": torch.ones(WIDTH)}

    def forward(self, h: Tensor) -> Tensor:
        self.notes.calls += 1
        self.notes.mean = 0.5 * self.notes.mean + float(h.detach().mean())
        self.notes.seen.append(self.notes.calls)
        self.by_name["moved"].mul_(0.9)
        self.by_name[f"step {self.notes.calls % 2}"] = h.detach().mean(0)
        return self.fc(h) * self.notes.mean + self.by_name["moved"].clone() * len(self.by_name)


class Objects(Step):
    def build(self) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.numbers = itertools.count(1)

    def forward(self, h: Tensor) -> Tensor:
        noise = torch.rand(h.shape, generator=self.generator)
        return (self.fc(h) * noise).tanh() / next(self.numbers)


class Buffer(Step):
    def build(self) -> None:
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("recent", torch.zeros(3, WIDTH))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def forward(self, h: Tensor) -> Tensor:
        made = self.fc(h) / self.scale.clone() + self.recent.mean(0)
        with torch.no_grad():
            self.scale.copy_(0.5 * self.scale + made.abs().max())
            self.recent[self.place] = made.mean(0)
            self.place.add_(1).remainder_(3)
        return made.tanh()


class BackwardBuffer(Step):
    def build(self) -> None:
        self.register_buffer("scale", torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        return MovesInBackward.apply(self.fc(h), self.scale).tanh()  # type: ignore[no-any-return]


class FunctionalCall(Step):
    def forward(self, h: Tensor) -> Tensor:
        fast = {name: p * (1 + h.mean()) for name, p in self.fc.named_parameters()}
        return functional_call(self.fc, fast, (h,)).tanh()


class Cache(Step):
    def build(self) -> None:
        self.cache: dict[str, Tensor] = {}

    def forward(self, h: Tensor) -> Tensor:
        keys = self.fc(h)
        if "keys" in self.cache:
            keys = torch.cat([self.cache["keys"], keys])
        self.cache["keys"] = keys.detach()[-2 * ROWS :].clone()
        return (h @ keys.t()).softmax(-1) @ keys


class Outputs(Step):
    def forward(self, h: Tensor) -> Tensor:
        product, total, positive = Pair.apply(self.fc(h), h.sin())
        return product * positive + total.tanh()


class UnusedOutputs(Step):
    def forward(self, h: Tensor) -> Tensor:
        product, _, _ = Pair.apply(self.fc(h), h.sin())
        return product.tanh()


class Sparse(Step):
    def build(self) -> None:
        self.table = nn.Embedding(5, WIDTH, sparse=True)

    def forward(self, h: Tensor) -> Tensor:
        return (h + self.table(torch.tensor([0, 1, 1, 4]))).tanh()


class Gradient(Step):
    def forward(self, h: Tensor) -> Tensor:
        energy = self.fc(h).tanh().square().sum()
        (slope,) = torch.autograd.grad(energy, h, create_graph=True)
        return h - 0.1 * slope


class Norm(Step):
    def build(self) -> None:
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(self.norm(self.fc(h)).relu(), 0.2)


class InPlace(Step):
    def forward(self, h: Tensor) -> Tensor:
        made = self.fc(h).clone()
        made[:, 0] = 1.0
        made[:, 1:3].mul_(2)
        return made.add_(h).sigmoid_()


class Break(Step):
    """A graph break, where it is compiled."""

    def forward(self, h: Tensor) -> Tensor:
        made = self.fc(h).tanh()
        torch._dynamo.graph_break()
        return made.sin()


STEPS: dict[str, type[Step]] = {
    "attribute": Attribute,
    "containers": Containers,
    "objects": Objects,
    "buffer": Buffer,
    "backward buffer": BackwardBuffer,
    "functional call": FunctionalCall,
    "cache": Cache,
    "outputs": Outputs,
    "unused outputs": UnusedOutputs,
    "sparse": Sparse,
    "gradient": Gradient,
    "norm": Norm,
    "in place": InPlace,
    "break": Break,
}


@dataclass(frozen=True)
class OddProgram:
    """What to build.

    Attributes:
        blocks: the steps of each block.
        keywords: whether blocks get keyword arguments, and a container that they write to.
        second: what becomes of their second output: used, unused (but held), dropped.
    """

    blocks: tuple[tuple[str, ...], ...]
    keywords: bool = False
    second: str = "used"

    @property
    def steps(self) -> frozenset[str]:
        """The steps that occur."""
        return frozenset(itertools.chain.from_iterable(self.blocks))


class Block(nn.Module):
    def __init__(self, steps: tuple[str, ...]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(STEPS[name]() for name in steps)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shared: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x`` [ROWS, WIDTH] after the steps, and a second value of the same shape."""
        h = x
        for step in self.steps:
            h = step(h)
        if scale is not None and shared is not None:
            h = h * scale + shared.get("bias", 0.0)
            shared["bias"] = h.detach().mean()
        return x + h, h.exp()


class OddModel(nn.Module):
    """A program; the loss is a mean square."""

    def __init__(self, program: OddProgram, around: Around | None = None) -> None:
        super().__init__()
        self.program = program
        self.around = around
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block(steps) for steps in program.blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Scalar loss of ``x`` [ROWS, WIDTH]."""
        h, extra = self.first(x), 0.0
        named: dict[str, Any] = {}
        if self.program.keywords:
            named = {"scale": h.mean(0), "shared": {"bias": 0.5}}
        held = []
        for layer in self.layers:
            h, second = self._call(layer, h, **named)
            if self.program.second == "used":
                extra = extra + second.mean()
            elif self.program.second == "unused":
                held.append(second)
            del second
        return h.square().mean() + extra

    def _call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (
            layer(*args, **kwargs) if self.around is None else self.around(layer, *args, **kwargs)
        )


def odd_programs() -> st.SearchStrategy[OddProgram]:
    """One to three blocks of one to three steps."""
    steps: Any = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=3).map(tuple)
    return st.builds(
        OddProgram,
        blocks=st.lists(steps, min_size=1, max_size=3).map(tuple),
        keywords=st.booleans(),
        second=st.sampled_from(["used", "unused", "dropped"]),
    )
