"""How fast an accelerator computes: two of its kernels are timed once, and remembered.

Without a link, plans depend on the ratios between ops alone, and orders of magnitude do. With one,
seconds of copies stand beside seconds of ops. On an H100 a step was over in a third of the time
that an A100-like roofline gives it, so that copies that were to hide stood out: the step took 1.85
times as long (``benchmarks/results/gpu-offload-h100.txt``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import fx

from ckpt_pass._torch import functorch
from ckpt_pass.graph.cost import ROOFLINES, Roofline, device_type, moved_bytes, node_flops
from ckpt_pass.graph.kernel_cache import KernelFacts
from ckpt_pass.graph.kernels import TIME, Kernels
from ckpt_pass.graph.problem import NOT_MEASURED
from ckpt_pass.policy.sites import output_tensors

#: Rows and columns of the matrices: 0.2 ms in bf16 on an H100, far above a launch.
PRODUCT_SIZE = 4096
#: Bytes of the copy: far above the second-level caches (50 to 60 MB).
COPIED_BYTES = 256 * 2**20
#: What there are matrix units for; products of other dtypes are timed in fp32.
_FAST = (torch.bfloat16, torch.float16)


def with_device_times(
    facts: Mapping[fx.Node, KernelFacts], calls: Iterable[fx.Node], kernels: Kernels
) -> dict[fx.Node, KernelFacts]:
    """Facts with the times that this machine's accelerator takes, where no kernel was timed.

    Args:
        facts: what was measured of calls.
        calls: all calls of a step; those of the CPU are left to the modelled times, and so are all
            where there is no such device: planned on fake tensors, for another machine.
        kernels: what measures the rates.
    """
    found = dict(facts)
    rates: dict[tuple[torch.device, torch.dtype], Roofline | None] = {}
    for call in calls if torch.cuda.is_available() else ():
        known = found.get(call, NOT_MEASURED)
        made = next(iter(output_tensors(call.meta.get("val"))), None)
        if known.time_s is not None or made is None or device_type(call) != "cuda":
            continue
        key = made.device, made.dtype
        if key not in rates:
            rates[key] = roofline_of(made, kernels)
        roofline = rates[key]
        if roofline is not None:
            time_s = roofline.time_s(node_flops(call), moved_bytes(call))
            found[call] = replace(known, time_s=time_s)
    return found


def roofline_of(beside: torch.Tensor, kernels: Kernels) -> Roofline | None:
    """The rates of a fake tensor's device for its dtype; ``None`` where kernels cannot be run.

    Flops are those of a product of square matrices, bytes those that a copy reads and writes.
    """
    dtype = beside.dtype if beside.dtype in _FAST else torch.float32
    graph = fx.Graph()

    def fake(*size: int) -> fx.Node:
        node = graph.placeholder("given")
        make = functools.partial(torch.empty, size, dtype=dtype, device=beside.device)
        node.meta["val"] = functorch.fake_like(make, beside)
        return node

    side, data = fake(PRODUCT_SIZE, PRODUCT_SIZE), fake(COPIED_BYTES // dtype.itemsize)
    product = graph.call_function(torch.ops.aten.mm.default, (side, side))
    copy = graph.call_function(torch.ops.aten.clone.default, (data,))
    product.meta["val"], copy.meta["val"] = side.meta["val"], data.meta["val"]
    times = kernels.facts([product, copy], TIME)
    product_s, copy_s = times[product].time_s, times[copy].time_s
    if not product_s or not copy_s:
        return None
    flops_per_s, bytes_per_s = node_flops(product) / product_s, 2 * COPIED_BYTES / copy_s
    return Roofline(flops_per_s, bytes_per_s, ROOFLINES["cuda"].launch_s)
