"""``torch.export`` around regions: the graph of the plain module, which can be saved and loaded."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass

Region = Callable[..., Any]
PRODUCTS = [torch.ops.aten.addmm.default]


def plain(fn: Region, x: Tensor) -> Any:
    return fn(x)


def bare(fn: Region, x: Tensor) -> Any:
    return ckpt_pass.checkpoint(fn, x)


def selective(fn: Region, x: Tensor) -> Any:
    return ckpt_pass.checkpoint(fn, x, policy="save-matmul")


def by_module(fn: Region, x: Tensor) -> Any:
    return ckpt_pass.checkpoint(fn, x, policy=ckpt_pass.save(module="layer"))


def hooked(fn: Region, x: Tensor) -> Any:
    contexts = ckpt_pass.context_fn(PRODUCTS)
    return torch_checkpoint(fn, x, use_reentrant=False, context_fn=contexts)


def to_the_end(fn: Region, x: Tensor) -> Any:
    contexts = ckpt_pass.context_fn("save-nothing")
    return torch_checkpoint(
        *(fn, x),
        use_reentrant=False,
        context_fn=contexts,
        early_stop=False,
        preserve_rng_state=False,
    )


def nested(fn: Region, x: Tensor) -> Any:
    return bare(lambda v: selective(lambda w: hooked(fn, w).sin(), v).cos(), x)


WAYS = [bare, selective, by_module, hooked, to_the_end, nested]


class Net(nn.Module):
    def __init__(self, way: Region) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.layer, x).relu()


def ops_of(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("way", WAYS)
def test_a_region_leaves_nothing_in_the_graph(way: Region) -> None:
    x = torch.ones(2, 4)
    net = Net(way)
    program = torch.export.export(net, (x,))
    wanted = ["aten.linear.default", "aten.tanh.default", "aten.dropout.default"]
    if way is nested:
        wanted += ["aten.sin.default", "aten.cos.default"]
    assert ops_of(program.graph) == [*wanted, "aten.relu.default"]
    again = loaded(program).module()
    found = []
    for module in (net, again):
        torch.manual_seed(0)
        out = module(x)
        found.append((out, *torch.autograd.grad(out.sum(), list(module.parameters()))))
    assert all(map(torch.equal, *found))
    program.run_decompositions()


def test_an_applied_placement_exports() -> None:
    net = Net(plain)
    with ckpt_pass.applied(net, ckpt_pass.ByName("layer"), policy="save-matmul"):
        program = torch.export.export(net, (torch.ones(2, 4),))
    assert ops_of(program.graph) == ops_of(torch.export.export(net, (torch.ones(2, 4),)).graph)
    loaded(program)


@pytest.mark.parametrize("way", WAYS)
def test_a_trace_before_dispatch(way: Region) -> None:
    """``make_fx(pre_dispatch=True)``, which is what export is made of."""
    net = Net(way)
    traced = make_fx(lambda x: net(x), pre_dispatch=True)(torch.ones(2, 4))
    assert not any("grad_enabled" in op for op in ops_of(traced.graph))


@pytest.mark.parametrize("way", [selective, hooked])
def test_exporting_by_dynamo(way: Region) -> None:
    """``strict=True`` keeps a region as a higher-order op, as with torch's selective contexts."""
    program = torch.export.export(Net(way), (torch.ones(2, 4),), strict=True)
    assert "tag_activation_checkpoint" in ops_of(program.graph)
    loaded(program)
