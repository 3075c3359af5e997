"""The link to where values are moved, for the planner: measured once, remembered with the kernels.

Two runs on one machine plan with the same rates, and so make the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ckpt_pass._torch import functorch
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.kernel_cache import KernelCache, KernelFacts
from ckpt_pass.graph.kernels import environment
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.rates import measured_rates, rates_of, sample_bytes
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.planner.device import Device
from ckpt_pass.planner.link import Link
from ckpt_pass.policy.sites import output_tensors


def link_of(offload: OffloadLike, device: torch.device, cache: KernelCache | None = None) -> Link:
    """What may move values of a device.

    Rates that the options do not name are those of the cache, or are measured now and put there. A
    user's own store is measured each time.

    Args:
        offload: where values go.
        device: where they are.
        cache: what was measured of kernels; the user's file where ``None``.

    Raises:
        InvalidOffloadError: values of such a device cannot be moved.
        StoreFolderError, StoreFullError: nothing can be kept there.
    """
    if not isinstance(offload, Offload):
        with functorch.real_tensors():
            return Link(*rates_of(offload, device))
    if offload.d2h_bytes_per_s is None or offload.h2d_bytes_per_s is None:
        known = _remembered(offload, device, cache or KernelCache())
        out, back = offload.d2h_bytes_per_s or known[0], offload.h2d_bytes_per_s or known[1]
    else:
        out, back = offload.d2h_bytes_per_s, offload.h2d_bytes_per_s
    return Link(out, back, host_bytes=offload.host_budget_bytes)


def link_for(cost: str | Device, offload: OffloadLike, device: torch.device) -> Link:
    """The link of a device that is here, or of one on paper, whose rates are then not measured.

    Args:
        cost: how times are found: by a device on paper, where it is one.
        offload, device: as for :func:`link_of`.

    Raises:
        InvalidOffloadError, StoreFolderError, StoreFullError: see :func:`link_of`.
    """
    if isinstance(cost, Device) and isinstance(offload, Offload) and offload.to == "host":
        rate = cost.attained * cost.host_bytes_per_s
        offload = replace(
            offload,
            d2h_bytes_per_s=offload.d2h_bytes_per_s or rate,
            h2d_bytes_per_s=offload.h2d_bytes_per_s or rate,
        )
    return link_of(offload, device)


def _remembered(offload: Offload, device: torch.device, cache: KernelCache) -> tuple[float, float]:
    place, nbytes = environment(device), sample_bytes(device)
    where = offload.to if offload.folder is None else f"{offload.to} {offload.folder}"
    calls = [f"ckpt_pass::{way} {nbytes} bytes, {where}" for way in ("put", "take")]
    known = [cache.get(place, call) for call in calls]
    times = [facts.time_s for facts in known if facts is not None and facts.time_s]
    if len(times) != len(calls):
        asked = replace(offload, d2h_bytes_per_s=None, h2d_bytes_per_s=None)
        with functorch.real_tensors():
            times = [nbytes / rate for rate in measured_rates(asked, device)]
        facts = (KernelFacts(time_s=time_s) for time_s in times)
        cache.add(place, dict(zip(calls, facts, strict=True)))
    return nbytes / times[0], nbytes / times[1]


def device_of_graph(joint: JointGraph) -> torch.device:
    """Where the values of a graph are (:func:`device_of`)."""
    return device_of(t for node in joint.forward for t in output_tensors(node.meta.get("val")))


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Where a step's tensors are: the first device that is not the host, if there is one."""
    devices = dict.fromkeys(tensor.device for tensor in tensors)
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
