"""Small random programs: a list of steps on a growing list of values, all [ROWS, WIDTH]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

ROWS, WIDTH = 16, 32

#: (name, first value, second value): values count from the newest one backwards.
Step = tuple[str, int, int]


def _in_place(a: Tensor, b: Tensor) -> Tensor:
    return a.clone().mul_(b).add_(1.0)


def _through_views(a: Tensor, b: Tensor) -> Tensor:
    left, right = a.view(ROWS, 2, WIDTH // 2).unbind(1)
    return torch.cat([right.sin(), left * b[:, : WIDTH // 2]], dim=1)


def _attend(a: Tensor, b: Tensor) -> Tensor:
    heads = [x.view(1, ROWS, 2, WIDTH // 2).transpose(1, 2) for x in (a, b, a)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(ROWS, WIDTH)


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda a, b: a.relu(),
    "gelu": lambda a, b: F.gelu(a, approximate="tanh"),
    "tanh": lambda a, b: a.tanh(),
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b.sigmoid(),
    "normalise": lambda a, b: F.layer_norm(a, (WIDTH,)),
    "softmax": lambda a, b: a.softmax(-1) + b,
    "dropout": lambda a, b: F.dropout(a, 0.3),
    "product": lambda a, b: (a @ b.t()).softmax(-1) @ a,
    "mean": lambda a, b: a - b.mean(0, keepdim=True),
    "sorted": lambda a, b: torch.sort(a, dim=1).values * b,
    "in-place": _in_place,
    "views": _through_views,
    "attend": _attend,
}
#: Those with weights: a module of their own, used once or shared.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "batch-norm": lambda: nn.BatchNorm1d(WIDTH),
    "perceptron": lambda: nn.Sequential(
        nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    ),
}


class Program(nn.Module):
    """Runs its steps; the loss is the mean square of the last value."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict(
            {str(k): MODULES[name]() for k, (name, _, _) in enumerate(steps) if name in MODULES}
        )
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Scalar loss of ``x`` [ROWS, WIDTH]."""
        values = [self.first(x)]
        for k, (name, i, j) in enumerate(self.steps):
            a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(self.layers[str(k)](a) if name in MODULES else STEPS[name](a, b))
        return (values[-1] + values[len(values) // 2]).square().mean()


def programs() -> st.SearchStrategy[tuple[Step, ...]]:
    """From 3 to 14 steps."""
    step: Any = st.tuples(
        st.sampled_from(sorted([*STEPS, *MODULES])), st.integers(0, 5), st.integers(0, 5)
    )
    return st.lists(step, min_size=3, max_size=14).map(tuple)
