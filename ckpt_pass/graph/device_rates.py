"""How fast an accelerator computes: measured once, remembered with the kernels.

Without a link, plans depend on the ratios between ops alone, and orders of magnitude do. With one,
seconds of copies stand beside seconds of ops. On an H100 a step was over in a third of the time
that an A100-like roofline gives it, so that copies that were to hide stood out: the step took 1.85
times as long (``benchmarks/results/gpu-offload-h100.txt``).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import fx

from ckpt_pass._torch import functorch
from ckpt_pass.graph.cost import ROOFLINES, Roofline, device_type, moved_bytes, node_flops
from ckpt_pass.graph.kernel_cache import KernelCache, KernelFacts
from ckpt_pass.graph.kernels import environment
from ckpt_pass.graph.problem import NOT_MEASURED
from ckpt_pass.policy.sites import output_tensors

#: Rows and columns of the matrices: 0.2 ms in bf16 on an H100, far above a launch.
PRODUCT_SIZE = 4096
#: Bytes of the copy: far above the second-level caches (50 to 60 MB).
COPIED_BYTES = 256 * 2**20
SAMPLES = 5
#: What there are matrix units for; products of other dtypes are timed in fp32.
_FAST = (torch.bfloat16, torch.float16)


def with_device_times(
    facts: Mapping[fx.Node, KernelFacts], calls: Iterable[fx.Node], cache: KernelCache | None = None
) -> dict[fx.Node, KernelFacts]:
    """Facts with the times that this machine's accelerator takes, where no kernel was timed.

    Args:
        facts: what was measured of calls.
        calls: all calls of a step; those of the CPU are left to the modelled times.
        cache: what is remembered; the user's file where ``None``.
    """
    found = dict(facts)
    rooflines = functools.cache(functools.partial(roofline_of, cache=cache or KernelCache()))
    for call in calls:
        known = found.get(call, NOT_MEASURED)
        outputs = list(output_tensors(call.meta.get("val")))
        if known.time_s is not None or not outputs or device_type(call) != "cuda":
            continue
        if not torch.cuda.is_available():
            continue  # planned on fake tensors, for another machine
        roofline = rooflines(outputs[0].device, outputs[0].dtype)
        time_s = roofline.time_s(node_flops(call), moved_bytes(call))
        found[call] = replace(known, time_s=time_s)
    return found


def roofline_of(device: torch.device, dtype: torch.dtype, cache: KernelCache) -> Roofline:
    """The rates of a device for values of a dtype, measured once and remembered.

    Flops are those of a product of square matrices, bytes those that a copy reads and writes.
    """
    kind = dtype if dtype in _FAST else torch.float32
    name = str(kind).removeprefix("torch.")
    timed: dict[str, Callable[[], float]] = {
        f"ckpt_pass::product {PRODUCT_SIZE} {name}": lambda: _product_s(device, kind),
        f"ckpt_pass::copy {COPIED_BYTES} bytes": lambda: _copy_s(device),
    }
    place = environment(device)
    seconds = []
    for call, measure in timed.items():
        known = cache.get(place, call)
        if known is None or not known.time_s:
            with functorch.real_tensors():
                known = KernelFacts(time_s=measure())
            cache.add(place, {call: known})
        assert known.time_s is not None
        seconds.append(known.time_s)
    return Roofline(
        2 * PRODUCT_SIZE**3 / seconds[0],
        2 * COPIED_BYTES / seconds[1],
        ROOFLINES["cuda"].launch_s,
    )


def _product_s(device: torch.device, dtype: torch.dtype) -> float:
    side = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=device, dtype=dtype)
    return _median_s(lambda: side @ side, device)


def _copy_s(device: torch.device) -> float:
    source = torch.ones(COPIED_BYTES, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return _median_s(lambda: target.copy_(source), device)


def _median_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run, the first of which is not counted."""
    times = []
    for _ in range(SAMPLES + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
