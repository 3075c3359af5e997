"""Seconds of ops on an accelerator, where seconds of copies stand beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from ckpt_pass.graph import device_rates
from ckpt_pass.graph.cost import Roofline
from ckpt_pass.graph.kernel_cache import KernelCache, KernelFacts


def product(device: str) -> fx.Node:
    """A product of [64, 64] in bf16: 524,288 flops, 24,576 bytes."""
    graph = fx.Graph()
    side = graph.placeholder("side")
    node = graph.call_function(torch.ops.aten.mm.default, (side, side))
    other = graph.placeholder("other")
    node.args = (side, other)
    with FakeTensorMode():
        for one in (side, other, node):
            one.meta["val"] = torch.empty(64, 64, device=device, dtype=torch.bfloat16)
    return node


def test_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rates, "PRODUCT_SIZE", 64)
    monkeypatch.setattr(device_rates, "COPIED_BYTES", 2**16)
    cpu = torch.device("cpu")
    first = device_rates.roofline_of(cpu, torch.float32, KernelCache(tmp_path / "k.json"))
    assert first.flops_per_s > 0 and first.bytes_per_s > 0
    again = device_rates.roofline_of(cpu, torch.float64, KernelCache(tmp_path / "k.json"))
    assert again == first, "other dtypes take the rates of fp32, read from the file"


def test_times_of_an_accelerators_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    node, timed, host = product("cuda"), product("cuda"), product("cpu")
    facts = {timed: KernelFacts(time_s=2.0), node: KernelFacts(workspace_bytes=8)}
    assert device_rates.with_device_times(facts, [node, timed, host]) == facts, "no device here"

    asked = []

    def rates(device: torch.device, dtype: torch.dtype, cache: KernelCache) -> Roofline:
        asked.append((device.type, dtype))
        return Roofline(524_288.0, 1e9, 0.5)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_rates, "roofline_of", rates)
    found = device_rates.with_device_times(facts, [node, timed, host])
    assert asked == [("cuda", torch.bfloat16)]
    assert found == {timed: KernelFacts(time_s=2.0), node: KernelFacts(8, 1.5)}
