"""A door to torch's private modules: inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch._functorch.config as functorch_config
from torch import fx
from torch.utils._ordered_set import OrderedSet

from ckpt_pass._torch import CompiledFn, CustomPartitionerFn


def compile_inductor(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    partition: CustomPartitionerFn,
    options: dict[str, Any],
    mode: str | None,
    on_peak: Callable[[int], None] | None = None,
) -> CompiledFn:
    """Compile with inductor; its joint-graph passes run first, then our partition function.

    The configuration is patched for this compilation alone (``compile_fx``'s config_patches).

    Args:
        module, inputs: dynamo's graph and its example inputs.
        partition: our partition function.
        options, mode: inductor's, as ``torch.compile`` takes them.
        on_peak: told the peak of inductor's own schedule of each half, in bytes, what the half
            takes from the other included. With it no cache is used: a schedule that comes from
            a cache tells nothing.
    """
    import torch._inductor as inductor
    from torch._inductor.compile_fx import compile_fx

    chosen = {**(inductor.list_mode_options(mode) if mode else {}), **options}
    patches = {key.replace("-", "_"): value for key, value in chosen.items()}
    patches["custom_partitioner_fn"] = partition
    if on_peak is None:
        return cast(CompiledFn, compile_fx(module, list(inputs), config_patches=patches))
    patches["_post_fusion_custom_pass"] = _peak_reporter(
        on_peak, patches.get("_post_fusion_custom_pass")
    )
    patches["fx_graph_cache"] = False
    # Otherwise the backward is lowered when it first runs, too late to plan again.
    eager_lowering = functorch_config.patch(force_non_lazy_backward_lowering=True)
    with functorch_config.patch(enable_autograd_cache=False), eager_lowering:
        return cast(CompiledFn, compile_fx(module, list(inputs), config_patches=patches))


def _peak_reporter(
    on_peak: Callable[[int], None], users: Callable[[Any], Any] | None
) -> Callable[[list[Any]], list[Any]]:
    """A pass over inductor's schedule that changes nothing and tells its peak.

    The estimate is inductor's own (``torch/_inductor/memory.py``): what is freed goes after its
    last use; parameters and inputs are not counted, saved activations are.
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
            on_peak(memory.estimate_peak_memory_allocfree(scheduled, freeable, outputs)[0])
        return scheduled

    return report


def inductor_option_names() -> frozenset[str]:
    """The names that ``torch.compile(options=...)`` accepts for inductor."""
    import torch._inductor.config as config

    return frozenset(name.replace("_", "-") for name in config.get_config_copy()) | frozenset(
        config.get_config_copy()
    )
