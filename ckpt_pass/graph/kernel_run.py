"""Runs kernels, each alone, and measures what they allocate and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from ckpt_pass._torch import functorch
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.graph.cost import allocated_bytes
from ckpt_pass.graph.kernel_cache import KernelFacts, OutputFacts
from ckpt_pass.graph.kernel_call import Call, Run
from ckpt_pass.measure.allocations import profiled, read_recording
from ckpt_pass.policy.sites import output_tensors

#: What a kernel may raise that is given made-up data, or a device that is missing or full.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    MemoryError,
    OSError,
)

#: The least of so many calls: what else runs on the machine only adds, and times are remembered
#: (with medians, one busy moment made a forward 1.4 times as long for good). Of one call alone
#: where it takes longer than LONG_S: the noise of clock and scheduler no longer matters there.
REPEATS = 5
LONG_S = 0.1

Facts = dict[str, KernelFacts]
#: Call -> why it has no facts.
Reasons = dict[str, str]
Outputs = tuple[OutputFacts, ...]
Measure = Callable[[Mapping[str, Call], frozenset[str]], tuple[Facts, Reasons]]


def measure(calls: Mapping[str, Call], what: frozenset[str]) -> tuple[Facts, Reasons]:
    """Measure calls on one kind of device, here; return the facts, and why others have none.

    The random state is left as it was, and no mode that is active sees the calls.

    Args:
        calls: by any key.
        what: ``"outputs"`` alone, or of ``"workspace"`` (outputs with it) and ``"time"`` one
            or both.
    """
    if "workspace" in what and functorch.profiler_is_running():
        reason = "a profiler is running already; torch has one at a time"
        return {}, dict.fromkeys(calls, reason)
    failed: Reasons = {}
    with (
        functorch.real_tensors(),
        quiet_collector(collect_first=False),
        torch.random.fork_rng(devices=_devices(calls.values())),
    ):
        outputs = _outputs(calls, failed) if "outputs" in what else {}
        memory = _memory(calls, failed) if "workspace" in what else {}
        times = _times(calls, failed) if "time" in what else {}
    if any(call.device.type == "cuda" for call in calls.values()):
        torch.cuda.empty_cache()  # blocks of sizes that the step does not ask for would be used
    found = {}
    for key in calls.keys() - failed.keys():
        workspace_bytes, looks = memory.get(key, (None, outputs.get(key)))
        found[key] = KernelFacts(workspace_bytes, times.get(key), looks)
    return found, failed


def _devices(calls: Iterable[Call]) -> list[int]:
    devices = {call.device for call in calls if call.device.type == "cuda"}
    return [torch.cuda.current_device() if d.index is None else d.index for d in devices]


@contextmanager
def _noted(key: str, failed: Reasons) -> Iterator[None]:
    """Note what goes wrong inside under ``key``, and go on."""
    try:
        yield
    except FAILURES as error:
        failed[key] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _warmed_up(call: Call) -> Run:
    """What runs the kernel, once it has run: libraries prepare themselves in the first call."""
    try:
        run = call.prepared()
        run()
    except FAILURES:
        wide = call.with_wide_statistics()
        if str(wide) == str(call):
            raise
        run = wide.prepared()
        run()
    return run


def _outputs(calls: Mapping[str, Call], failed: Reasons) -> dict[str, Outputs]:
    found = {}
    for key, call in calls.items():
        with _noted(key, failed):
            found[key] = _looks(*call.prepared()())
    return found


def _looks(output: Any, given: set[int]) -> Outputs:
    """The tensors of an output; memory that is behind several is the first one's.

    Nothing where one is sparse, say, and has no strides.
    """
    found, known = [], set(given)
    for tensor in output_tensors(output):
        if tensor.layout is not torch.strided:
            return ()
        storage = tensor.untyped_storage()
        new = storage._cdata not in known
        known.add(storage._cdata)
        dtype = str(tensor.dtype).removeprefix("torch.")
        nbytes = storage.nbytes() if new else None
        found.append(OutputFacts(tuple(tensor.shape), tuple(tensor.stride()), dtype, nbytes))
    return tuple(found)


def _memory(calls: Mapping[str, Call], failed: Reasons) -> dict[str, tuple[int, Outputs]]:
    """Bytes beyond the outputs, at the peak of each call, and the outputs.

    The CPU's kernels are measured in one profiler session.
    """
    found: dict[str, tuple[int, Outputs]] = {}
    on_cpu = {key: call for key, call in calls.items() if call.device.type == "cpu"}
    for key, call in calls.items():
        if key not in on_cpu:
            with _noted(key, failed):
                found[key] = _cuda_memory(call)
    if not on_cpu:
        return found
    names = {f"ckpt_pass::kernel {number}": key for number, key in enumerate(on_cpu)}
    looks: dict[str, Outputs] = {}
    output_bytes: dict[str, int] = {}
    with profiled() as session:
        for name, key in names.items():
            with _noted(key, failed):
                run = _warmed_up(on_cpu[key])
                with record_function(name):
                    result = run()
                looks[name], output_bytes[name] = _looks(*result), _new_bytes(*result)
                del result, run  # before the next call's inputs are made
    peaks = read_recording(session, torch.device("cpu"), looks.__contains__).peaks()
    for name, outputs in looks.items():
        found[names[name]] = (max(0, peaks[name] - output_bytes[name]), outputs)
    return found


def _new_bytes(output: Any, given: set[int]) -> int:
    """Bytes of the storages of an output that are not those of an input."""
    tensors = output_tensors(output)
    storages = [storage for tensor in tensors for storage in functorch.storages_of(tensor)]
    return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in given}.values())


def _cuda_memory(call: Call) -> tuple[int, Outputs]:
    """The same on a CUDA device, by the statistics of its allocator, whose peak is reset.

    Requested bytes are counted, not the blocks that they are rounded up to: outputs are too.
    """
    run = _warmed_up(call)
    torch.cuda.synchronize(call.device)
    torch.cuda.reset_peak_memory_stats(call.device)
    before = torch.cuda.memory_stats(call.device)
    result = run()
    torch.cuda.synchronize(call.device)
    after = torch.cuda.memory_stats(call.device)
    # An allocator that does not know what was requested says 0.
    kind = "requested_bytes" if after["requested_bytes.all.peak"] else "allocated_bytes"
    peak = after[f"{kind}.all.peak"] - before[f"{kind}.all.current"]
    workspace = max(0, int(peak) - _new_bytes(*result))
    return allocated_bytes(workspace, call.device.type), _looks(*result)


def _times(calls: Mapping[str, Call], failed: Reasons) -> dict[str, float]:
    """Seconds of each call that has not failed before, undisturbed."""
    found: dict[str, float] = {}
    for key, call in calls.items():
        if key not in failed:
            with _noted(key, failed):
                run = _warmed_up(call)
                clock = _cuda_seconds if call.device.type == "cuda" else _seconds
                first = clock(run)
                more = [] if first > LONG_S else [clock(run) for _ in range(REPEATS - 1)]
                found[key] = min([first, *more])
    return found


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result  # freeing is not part of the call
    return seconds


def _cuda_seconds(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3
