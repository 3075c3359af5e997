"""Kernels, measured: what they allocate besides their outputs, and how long they take.

A kernel is run alone, on made-up data (:mod:`ckpt_pass.graph.kernel_call`). Calls that are equal
are measured once, and remembered (:mod:`ckpt_pass.graph.kernel_cache`).
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx
from torch.profiler import record_function

from ckpt_pass._torch import functorch
from ckpt_pass.graph.kernel_cache import KernelCache, KernelFacts
from ckpt_pass.graph.kernel_call import Call, KernelError, Run, call_of
from ckpt_pass.measure.allocations import profiled, quiet_collector, read_recording
from ckpt_pass.ops.taxonomy import OpClass, classify, op_name
from ckpt_pass.policy.sites import output_tensors

WORKSPACE = frozenset({"workspace"})
WORKSPACE_AND_TIME = frozenset({"workspace", "time"})

#: Classes with kernels that allocate more than their outputs, and what was seen (joint graphs of
#: ResNet, ViT, BERT, GPT-2, Llama and Mixtral, CPU, torch 2.13; in outputs, where not in bytes).
MAY_HAVE_WORKSPACE: Mapping[OpClass, str] = {
    OpClass.CONVOLUTION: "oneDNN reorders inputs and weights into its own layouts: up to 3.3",
    OpClass.MATMUL: "oneDNN's bf16 products pack both factors and sum in fp32: up to 7; fp32: 0, "
    "or a copy of a factor that is expanded",
    OpClass.BACKWARD: "convolutions 8, batch norms 1 (a contiguous gradient), dropout 1 (the mask "
    "cast), embeddings 4 (sorted indices), layer norms 0.04 (sums per thread)",
    OpClass.ATTENTION: "one buffer of scores per thread",
    OpClass.NORMALISATION: "_safe_softmax 0.3 (a mask of empty rows), batch norm 0.06",
    OpClass.RANDOM: "native_dropout 0.8 (the scaled mask)",
    OpClass.REDUCTION: "mean in bf16 34 (the input cast to fp32)",
    OpClass.SCAN_SORT: "cumsum of booleans 1 (the input cast), sort 0.5 (copies)",
    OpClass.INDEXING: "embedding of non-contiguous indices 0.08 (a copy)",
    OpClass.LOSS: "kernels of the same kind as reductions; 0 was seen",
    OpClass.POOLING: "channels-last copies; no model of these pools with indices",
    OpClass.RECURRENT: "gates of all steps; no model of these has any",
    OpClass.LINALG_FFT: "LAPACK's and FFT's work arrays; no model of these has any",
    OpClass.UNCLASSIFIED: "a custom op may do anything",
}

#: Classes that allocate nothing besides their outputs. On the CPU that is so where all tensors,
#: the output too, have one dtype, and no number is given: others are cast first, and of a Python
#: number a kernel makes a tensor of 8 bytes and then one of the values' dtype.
ELEMENTWISE = frozenset({OpClass.POINTWISE})

#: Classes that are not run on their own: they compute nothing, have effects, or talk to others.
NEVER_RUN = frozenset(
    {
        OpClass.VIEW,
        OpClass.METADATA,
        OpClass.MULTI_OUTPUT_ACCESS,
        OpClass.CONTROL,
        OpClass.COLLECTIVE,
        OpClass.EFFECTFUL,
    }
)

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

#: A median of so many calls; of one alone where it takes longer than LONG_S, where the noise of
#: the clock and the scheduler (some microseconds) no longer matters.
REPEATS = 5
LONG_S = 0.1


@dataclass(frozen=True)
class Unmeasured:
    """An op without facts, and why."""

    name: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.op}): {self.reason}"


def may_have_workspace(node: fx.Node) -> bool:
    """Whether an op's kernel may allocate more than its outputs (:data:`MAY_HAVE_WORKSPACE`)."""
    if node.op != "call_function" or not callable(node.target):
        return False
    op_class = classify(node.target)
    if op_class not in ELEMENTWISE:
        return op_class in MAY_HAVE_WORKSPACE
    return _casts_on_cpu(node)


def _casts_on_cpu(node: fx.Node) -> bool:
    values = [given.meta.get("val") for given in (node, *node.all_input_nodes)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    numbers = any(isinstance(one, (int, float)) for one in (*node.args, *node.kwargs.values()))
    sizes = any(functorch.is_sym_node(given) for given in node.all_input_nodes)
    return numbers or sizes or len({tensor.dtype for tensor in tensors}) > 1


def is_runnable(node: fx.Node) -> bool:
    """Whether an op computes something, and may be run alone without doing anything else."""
    if node.op != "call_function" or not callable(node.target):
        return False
    return classify(node.target) not in NEVER_RUN


class Kernels:
    """Measures the kernels of graphs.

    Attributes:
        cache: what is known from before.
        unmeasured: the ops that were asked for and could not be measured.
    """

    def __init__(self, cache: KernelCache | None = None) -> None:
        self.cache = KernelCache() if cache is None else cache
        self.unmeasured: list[Unmeasured] = []

    def facts(
        self, nodes: Sequence[fx.Node], what: frozenset[str] = WORKSPACE
    ) -> dict[fx.Node, KernelFacts]:
        """Measure the kernels of nodes; those that are equal, or known, are not run again.

        The random state is left as it was. May be called while torch compiles.

        Args:
            nodes: of any kind, with fake tensors in ``meta["val"]``.
            what: ``"workspace"``, ``"time"`` or both. Where the workspace alone is asked for, ops
                that can have none (:func:`may_have_workspace`) are left out.

        Returns:
            The facts of each node that was measured: what was asked for, even where more is known,
            so that a plan of modelled times does not depend on what was timed before.
        """
        calls = self._calls(nodes, what)
        found: dict[str, KernelFacts] = {}
        missing: dict[str, dict[str, Call]] = {}
        places = {node: environment(call.device) for node, call in calls.items()}
        for node, call in calls.items():
            key, place = str(call), places[node]
            known = self.cache.get(place, key)
            if known is not None and known.knows(what):
                found[f"{place} {key}"] = known
            else:
                missing.setdefault(place, {})[key] = call
        reasons: dict[str, str] = {}
        for place, todo in missing.items():
            measured, failed = _measure(todo, what)
            self.cache.add(place, measured)
            found |= {f"{place} {key}": facts for key, facts in measured.items()}
            reasons |= {f"{place} {key}": reason for key, reason in failed.items()}
        result = {}
        for node, call in calls.items():
            name = f"{places[node]} {call}"
            if name in found:
                result[node] = found[name].only(what)
            else:
                self._note(node, reasons[name])
        return result

    def _calls(self, nodes: Sequence[fx.Node], what: frozenset[str]) -> dict[fx.Node, Call]:
        calls = {}
        for node in nodes:
            if is_runnable(node) and ("time" in what or may_have_workspace(node)):
                try:
                    calls[node] = call_of(node)
                except KernelError as error:
                    self._note(node, error.reason)
        return calls

    def _note(self, node: fx.Node, reason: str) -> None:
        assert callable(node.target)
        self.unmeasured.append(Unmeasured(node.name, op_name(node.target), reason))


def measure_kernel(node: fx.Node) -> KernelFacts:
    """Measure workspace and time of one node's kernel, whatever is known of it.

    Raises:
        KernelError: it cannot be run on its own.
    """
    call = call_of(node)
    measured, failed = _measure({"": call}, WORKSPACE_AND_TIME)
    if failed:
        raise KernelError(node, failed[""])
    return measured[""]


def environment(device: torch.device) -> str:
    """Everything besides the call that a kernel's workspace and time depend on."""
    settings = [f"torch {torch.__version__}"]
    if device.type == "cuda":
        cudnn = torch.backends.cudnn
        settings += [
            torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no device",
            f"cuda {torch.version.cuda}, cudnn {cudnn.version()}, benchmark {cudnn.benchmark}",
        ]
    else:
        mkldnn = torch.backends.mkldnn
        settings += [
            cpu_model() if device.type == "cpu" else device.type,
            f"{torch.get_num_threads()} threads",
            f"mkldnn {mkldnn.enabled}",
        ]
    settings += [
        f"deterministic {torch.are_deterministic_algorithms_enabled()}",
        f"matmul precision {torch.get_float32_matmul_precision()}",
    ]
    return ", ".join(settings)


def cpu_model() -> str:
    """The processor's name, as the system tells it, with its instruction set as torch sees it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def _measure(
    calls: Mapping[str, Call], what: frozenset[str]
) -> tuple[dict[str, KernelFacts], dict[str, str]]:
    """Measure calls on one kind of device; return the facts, and why others have none."""
    if "workspace" in what and functorch.profiler_is_running():
        reason = "a profiler is running already; torch has one at a time"
        return {}, dict.fromkeys(calls, reason)
    failed: dict[str, str] = {}
    with functorch.real_tensors(), quiet_collector(collect_first=False):
        devices = {call.device for call in calls.values() if call.device.type == "cuda"}
        indices = [torch.cuda.current_device() if d.index is None else d.index for d in devices]
        with torch.random.fork_rng(devices=indices):
            workspaces = _workspaces(calls, failed) if "workspace" in what else {}
            times = _times(calls, failed) if "time" in what else {}
    done = calls.keys() - failed.keys()
    return {key: KernelFacts(workspaces.get(key), times.get(key)) for key in done}, failed


@contextmanager
def _noted(key: str, failed: dict[str, str]) -> Iterator[None]:
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


def _workspaces(calls: Mapping[str, Call], failed: dict[str, str]) -> dict[str, int]:
    """Bytes beyond the outputs, at the peak of each call; the CPU's in one profiler session."""
    found: dict[str, int] = {}
    on_cpu = {key: call for key, call in calls.items() if call.device.type == "cpu"}
    for key, call in calls.items():
        if key not in on_cpu:
            with _noted(key, failed):
                found[key] = _cuda_workspace(call)
    if not on_cpu:
        return found
    names = {f"ckpt_pass::kernel {number}": key for number, key in enumerate(on_cpu)}
    output_bytes: dict[str, int] = {}
    with profiled() as session:
        for name, key in names.items():
            with _noted(key, failed):
                run = _warmed_up(on_cpu[key])
                with record_function(name):
                    result = run()
                output_bytes[name] = _new_bytes(*result)
                del result, run  # before the next call's inputs are made
    peaks = read_recording(session, torch.device("cpu"), output_bytes.__contains__).peaks()
    for name, nbytes in output_bytes.items():
        found[names[name]] = max(0, peaks[name] - nbytes)
    return found


def _new_bytes(output: object, given: set[int]) -> int:
    """Bytes of the storages of an output that are not those of an input."""
    storages = [tensor.untyped_storage() for tensor in output_tensors(output)]
    return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in given}.values())


def _cuda_workspace(call: Call) -> int:
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
    return max(0, int(peak) - _new_bytes(*result))


def _times(calls: Mapping[str, Call], failed: dict[str, str]) -> dict[str, float]:
    """Median seconds of each call that has not failed before."""
    found: dict[str, float] = {}
    for key, call in calls.items():
        if key not in failed:
            with _noted(key, failed):
                run = _warmed_up(call)
                clock = _cuda_seconds if call.device.type == "cuda" else _seconds
                first = clock(run)
                more = [] if first > LONG_S else [clock(run) for _ in range(REPEATS - 1)]
                found[key] = statistics.median([first, *more])
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
