"""Kernels of a device that is not here: times by its rates, nothing run.

What they allocate besides their outputs is not known, but for two bounds: what products get, once
for all (``Device.product_workspace_bytes``), and what the backward of flash attention allocates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from ckpt_pass.graph.cost import moved_bytes, node_flops
from ckpt_pass.graph.kernel_cache import KernelFacts, OutputFacts
from ckpt_pass.graph.kernels import WORKSPACE, Kernels
from ckpt_pass.planner.device import Device
from ckpt_pass.policy.sites import output_tensors

#: What stands for flash attention's backward where a step is traced as on the CPU.
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class PaperKernels(Kernels):
    """Tells of kernels what a device's rates say.

    Args:
        device: the device.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def facts(
        self, nodes: Sequence[fx.Node], what: frozenset[str] = WORKSPACE
    ) -> dict[fx.Node, KernelFacts]:
        """The time of each node that makes a tensor."""
        found = {}
        for node in nodes:
            made = next(iter(output_tensors(node.meta.get("val"))), None)
            if made is not None:
                dtype = str(made.dtype).removeprefix("torch.")
                time_s = self._device.time_s(dtype, node_flops(node), moved_bytes(node))
                workspace = attention_workspace(node) if self._device.kind == "cuda" else None
                found[node] = KernelFacts(workspace, time_s)
        return found

    def formula_bytes(self, node: fx.Node, needs: tuple[bool, ...]) -> int | None:
        """Not known."""
        return None

    def outputs(self, node: fx.Node) -> tuple[OutputFacts, ...] | None:
        """As the rules for fake tensors say."""
        return None


def attention_workspace(node: fx.Node) -> int | None:
    """The most that the backward of flash attention allocates on a CUDA device; else ``None``.

    Sums of the queries' gradients in fp32 and a row of the same, in blocks of 128 positions and 32
    channels; copies of the others' gradients where queries have more heads (``mha_bwd`` in
    ``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``). It takes halves with
    multiples of 8 channels, 256 at the most, and no mask; other attention is not known here.
    """
    if node.target is not _ATTENTION_BACKWARD or node.kwargs.get("attn_mask") is not None:
        return None
    query: torch.Tensor = cast(fx.Node, node.args[1]).meta["val"]
    key: torch.Tensor = cast(fx.Node, node.args[2]).meta["val"]
    batch, heads, length, channels = map(int, query.shape)
    if query.dtype not in (torch.float16, torch.bfloat16) or channels % 8 or channels > 256:
        return None
    rows = batch * heads * _up_to(length, 128)
    wide = _up_to(channels, 32) if channels <= 192 else 256
    expands = int(key.shape[1]) != heads
    copies = 2 * batch * heads * int(key.shape[2]) * channels if expands else 0
    return rows * (wide + 1) * torch.float32.itemsize + copies * query.dtype.itemsize


def _up_to(count: int, block: int) -> int:
    """The next multiple of a block."""
    return -(-count // block) * block


def kernels_for(cost: str | Device) -> Kernels:
    """What tells of kernels: those that are here, or those of a device on paper."""
    return PaperKernels(cost) if isinstance(cost, Device) else Kernels()
