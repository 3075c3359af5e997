"""Kernels of a device that is not here: times by its rates, nothing run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ckpt_pass.graph.cost import moved_bytes, node_flops
from ckpt_pass.graph.kernel_cache import KernelFacts, OutputFacts
from ckpt_pass.graph.kernels import WORKSPACE, Kernels
from ckpt_pass.planner.device import Device
from ckpt_pass.policy.sites import output_tensors


class PaperKernels(Kernels):
    """Tells of kernels what a device's rates say.

    What they allocate besides their outputs is not known, and left out.

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
                found[node] = KernelFacts(None, time_s)
        return found

    def formula_bytes(self, node: fx.Node, needs: tuple[bool, ...]) -> int | None:
        """Not known."""
        return None

    def outputs(self, node: fx.Node) -> tuple[OutputFacts, ...] | None:
        """As the rules for fake tensors say."""
        return None


def kernels_for(cost: str | Device) -> Kernels:
    """What tells of kernels: those that are here, or those of a device on paper."""
    return PaperKernels(cost) if isinstance(cost, Device) else Kernels()
