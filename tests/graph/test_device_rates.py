"""Seconds of ops on an accelerator, where seconds of copies stand beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from ckpt_pass.graph import device_rates
from ckpt_pass.graph.cost import Roofline
from ckpt_pass.graph.kernel_cache import KernelCache, KernelFacts
from ckpt_pass.graph.kernels import Kernels


def product(device: str) -> fx.Node:
    """A product of [64, 64] in bf16: 524,288 flops, 24,576 bytes."""
    graph = fx.Graph()
    side, other = graph.placeholder("side"), graph.placeholder("other")
    node = graph.call_function(torch.ops.aten.mm.default, (side, other))
    with FakeTensorMode():
        for one in (side, other, node):
            one.meta["val"] = torch.empty(64, 64, device=device, dtype=torch.bfloat16)
    return node


def test_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rates, "PRODUCT_SIZE", 64)
    monkeypatch.setattr(device_rates, "COPIED_BYTES", 2**16)
    value = product("cpu").meta["val"]
    first = device_rates.roofline_of(value, Kernels(KernelCache(tmp_path)))
    assert first is not None and first.flops_per_s > 0 and first.bytes_per_s > 0
    again = device_rates.roofline_of(value, Kernels(KernelCache(tmp_path)))
    assert again == first, "read from the file"


def test_times_of_an_accelerators_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    node, timed, host = product("cuda"), product("cuda"), product("cpu")
    facts = {timed: KernelFacts(time_s=2.0), node: KernelFacts(workspace_bytes=8)}
    kernels = Kernels()
    found = device_rates.with_device_times(facts, [node, timed, host], kernels)
    assert found == facts or torch.cuda.is_available(), "no device here"

    asked = []

    def rates(beside: Tensor, kernels: Kernels) -> Roofline:
        asked.append((beside.device.type, beside.dtype))
        return Roofline(524_288.0, 1e9, 0.5)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_rates, "roofline_of", rates)
    found = device_rates.with_device_times(facts, [node, timed, host], kernels)
    assert asked == [("cuda", torch.bfloat16)]
    assert found == {timed: KernelFacts(time_s=2.0), node: KernelFacts(8, 1.5)}
