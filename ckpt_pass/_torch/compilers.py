"""The door to torch's compilers: dynamo's backends, ``aot_eager`` and Inductor."""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import pgo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.utils._ordered_set import OrderedSet

__all__ = ["CustomPartitionerFn"]

CompiledFn = Callable[..., Any]


@dataclass(frozen=True)
class HalfPeak:
    """Memory of one half of a step, by inductor's own schedule.

    Attributes:
        peak_bytes: its peak, with what it is given of the other half.
        given_bytes: what it is given and may free: saved activations that go by that name.
        left_bytes: what is there when it ends: its outputs, saved activations among them.
        is_backward: which half it is.
    """

    peak_bytes: int
    given_bytes: int
    left_bytes: int
    is_backward: bool


#: The bytes that kernels of ops allocate besides their outputs, where that is any.
WorkspacesOf = Callable[[Sequence[fx.Node]], Mapping[fx.Node, int]]


def compile_eager(
    module: fx.GraphModule, inputs: Sequence[Any], partition: Callable[..., Any]
) -> CompiledFn:
    """Compile as torch's ``aot_eager`` does, with our partition function."""
    backend = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return backend(module, inputs)


def compile_inductor(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    partition: CustomPartitionerFn,
    options: dict[str, Any],
    mode: str | None,
    on_peak: Callable[[HalfPeak], None] | None = None,
    workspaces_of: WorkspacesOf | None = None,
) -> CompiledFn:
    """Compile with inductor; its joint-graph passes run first, then our partition function.

    The configuration is patched for this compilation alone (``compile_fx``'s config_patches).

    Args:
        module, inputs: dynamo's graph and its example inputs.
        partition: our partition function.
        options, mode: inductor's, as ``torch.compile`` takes them.
        on_peak: told the peak of inductor's own schedule of each half. With it no cache is
            used: a schedule that comes from a cache tells nothing.
        workspaces_of: what the kernels of ops that inductor does not generate allocate besides
            their outputs; inductor's own estimate leaves it out.
    """
    import torch._inductor as inductor
    from torch._inductor.compile_fx import compile_fx

    chosen = {**(inductor.list_mode_options(mode) if mode else {}), **options}
    patches = {key.replace("-", "_"): value for key, value in chosen.items()}
    patches["custom_partitioner_fn"] = partition
    if on_peak is None:
        return cast(CompiledFn, compile_fx(module, list(inputs), config_patches=patches))
    patches["_post_fusion_custom_pass"] = _peak_reporter(
        on_peak, workspaces_of, patches.get("_post_fusion_custom_pass")
    )
    patches["fx_graph_cache"] = False
    # Otherwise the backward is lowered when it first runs, too late to plan again.
    eager_lowering = functorch_config.patch(force_non_lazy_backward_lowering=True)
    with functorch_config.patch(enable_autograd_cache=False), eager_lowering:
        return cast(CompiledFn, compile_fx(module, list(inputs), config_patches=patches))


def _peak_reporter(
    on_peak: Callable[[HalfPeak], None],
    workspaces_of: WorkspacesOf | None,
    users: Callable[[Any], Any] | None,
) -> Callable[[list[Any]], list[Any]]:
    """A pass over inductor's schedule that changes nothing and tells its peak.

    The estimate is inductor's own (``torch/_inductor/memory.py``): what is freed goes after its
    last use; parameters and inputs are not counted, saved activations are. Workspaces of kernels
    that are called, not generated, come on top.
    """

    def report(nodes: list[Any]) -> list[Any]:
        import torch._inductor.memory as memory
        from torch._inductor.virtualized import V

        scheduled = users(nodes) if users is not None else nodes
        if scheduled:
            scheduler, graph = scheduled[0].scheduler, V.graph
            outputs = OrderedSet(graph.get_output_names())
            _, freeable = memory.prepare_planning_info(
                scheduled,
                scheduler.name_to_buf,
                {node.get_name(): node for node in scheduled} | scheduler.name_to_fused_node,
                OrderedSet(graph.graph_inputs.keys()),
                outputs,
            )
            _, curve, _, _ = memory.estimate_peak_memory_allocfree(scheduled, freeable, outputs)
            called = [_called_ops(node) for node in scheduled]
            sizes = workspaces_of([op for ops in called for op in ops]) if workspaces_of else {}
            peaks = (
                allocated + max((sizes.get(op, 0) for op in ops), default=0)
                for (allocated, _), ops in zip(curve, called, strict=True)
            )
            given = sum(buffer.mpi_buffer.size_free for buffer in freeable.values())
            on_peak(HalfPeak(max(peaks), given, curve[-1][1], bool(graph.is_backward)))
        return scheduled

    return report


def _called_ops(scheduled: Any) -> list[fx.Node]:
    """The ops behind a scheduled node whose kernels are called as they are, not generated."""
    found = []
    for part in scheduled.get_nodes():
        packet = getattr(getattr(part.node, "op_overload", None), "overloadpacket", None)
        for origin in getattr(part.node, "origins", ()):
            if packet is not None and getattr(origin.target, "overloadpacket", None) is packet:
                found.append(origin)
    return found


def inductor_option_names() -> frozenset[str]:
    """The names that ``torch.compile(options=...)`` accepts for inductor."""
    import torch._inductor.config as config

    return frozenset(name.replace("_", "-") for name in config.get_config_copy()) | frozenset(
        config.get_config_copy()
    )


def stock_backend(inner: str, memory_budget: float) -> Callable[..., CompiledFn]:
    """Torch's own backend; ``activation_memory_budget`` is set only while it compiles."""
    patched = functorch_config.patch(activation_memory_budget=memory_budget)
    return cast(Callable[..., CompiledFn], patched(torch._dynamo.lookup_backend(inner)))


def compile_apart(
    step: Callable[..., Any], backend: Any, dynamic: bool | None
) -> Callable[..., Any]:
    """``torch.compile``, whose compilations do not count among the user's own of the same code.

    Dynamo gives a function up after so many of them. Torch before 2.13 counts them all.
    """
    options: dict[str, Any] = {"backend": backend, "dynamic": dynamic}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    compiled: Callable[..., Any] = torch.compile(step, **options)
    return compiled


@contextlib.contextmanager
def own_profile() -> Iterator[None]:
    """Let dynamo neither read nor write what it remembers of shapes between compilations."""
    before = pgo._CODE_STATE, pgo._INIT_CODE_STATE
    pgo._CODE_STATE, pgo._INIT_CODE_STATE = defaultdict(pgo.CodeState), None
    try:
        yield
    finally:
        pgo._CODE_STATE, pgo._INIT_CODE_STATE = before


def placeholder_source(node: fx.Node) -> str:
    """Where dynamo got a graph input from, as ``L['self'].layers.0.weight``; may be empty."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def compiled_backend(compiled: Any) -> Any:
    """The backend value behind what ``torch.compile`` returned, or ``None``."""
    context = getattr(compiled, "dynamo_ctx", None)
    callback = getattr(context, "callback", None) or getattr(
        compiled, "_torchdynamo_orig_backend", None
    )
    return innermost_backend(callback)[0]


def innermost_backend(callback: Any) -> tuple[Any, Mapping[str, Any]]:
    """The backend value inside torch's wrappers, and the options that one of them holds."""
    options: Mapping[str, Any] = {}
    seen = 0
    while callback is not None and seen < 8:  # a handful of torch's own wrappers
        if hasattr(callback, "compiler_fn"):
            options = (getattr(callback, "kwargs", None) or {}).get("options") or options
            callback = callback.compiler_fn
        elif hasattr(callback, "_torchdynamo_orig_backend"):
            callback = callback._torchdynamo_orig_backend
        elif hasattr(callback, "_torchdynamo_orig_callable"):
            callback = callback._torchdynamo_orig_callable
        else:
            break
        seen += 1
    return callback, options
