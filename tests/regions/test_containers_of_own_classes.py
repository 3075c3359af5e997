"""Containers whose classes give something else than what they hold."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass


class Makes(OrderedDict[str, Any]):
    """As transformers' table of activations: ``[]`` makes one of the class that it holds."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class MakesPlainly(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class MakesAll(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (kind() for kind in list.__iter__(self))


class MakesAllInTurn(deque[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (kind() for kind in deque.__iter__(self))


TABLES: dict[str, Any] = {
    "ordered": Makes(tanh=nn.Tanh),
    "dict": MakesPlainly(tanh=nn.Tanh),
    "list": MakesAll([nn.Tanh]),
    "deque": MakesAllInTurn([nn.Tanh]),
}


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind = nn.Linear(8, 16), nn.Linear(16, 8), kind
        self.table = TABLES[kind]

    def forward(self, x: Tensor) -> Tensor:
        table: Any = TABLES[self.kind]
        act = table["tanh"] if isinstance(table, dict) else next(iter(table))
        return x + self.down(act(self.up(x)))


WAYS = {
    "region": ckpt_pass.checkpoint,
    "context_fn": partial(
        torch_checkpoint, use_reentrant=False, context_fn=ckpt_pass.context_fn("save-nothing")
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TABLES)
def test_they_hold_what_they_held(kind: str, way: str) -> None:
    layer, x = Layer(kind), torch.randn(4, 8)
    layer(x).sum().backward()
    expected = [p.grad for p in layer.parameters()]
    for _ in range(2):
        layer.zero_grad()
        WAYS[way](layer, x).sum().backward()
        found = [p.grad for p in layer.parameters()]
        assert all(map(torch.equal, found, expected))
    table = TABLES[kind]
    base = next(c for c in (OrderedDict, dict, list, deque) if isinstance(table, c))
    held = base.values(table) if issubclass(base, dict) else base.__iter__(table)
    assert list(held) == [nn.Tanh]
