"""The joint graph as AOTAutograd makes it, and torch's ways to cut it; modes of dispatch.

Whatever differs between torch 2.11 and the newest is settled here, by looking at signatures and
attributes rather than at version numbers. Nothing in this file decides anything.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._functorch._aot_autograd.functional_utils import _is_functional_graph
from torch._functorch.compile_utils import raise_getitems
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, is_sym_node
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import (
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["FakeTensor", "FakeTensorMode", "is_sym_node"]


@contextlib.contextmanager
def as_compiling(module: fx.GraphModule) -> Iterator[None]:
    """Inside, a graph may be cut as while torch compiles it: what makes fakes asks for the mode."""
    values = (node.meta.get("val") for node in module.graph.nodes)
    modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))
    with tracing(TracingContext(next(modes, None))):
        yield


# --- roles of the joint graph's inputs and outputs ------------------------------------------


def is_primal(node: fx.Node) -> bool:
    """An input of the forward: parameter, buffer, argument or RNG offset."""
    return partitioners._is_primal(node) or partitioners._is_fwd_seed_offset(node)


def is_backward_input(node: fx.Node) -> bool:
    """A tangent or a backward RNG offset."""
    return node.op == "placeholder" and (
        partitioners._is_tangent(node) or partitioners._is_bwd_seed_offset(node)
    )


def lets_go_of_tangents() -> bool:
    """Whether a compiled backward alone holds its tangents, and frees them after their last use.

    AOTAutograd's ``Function`` gets them in a list that it empties (``boxed_grads_call``). Before
    there was that, the call's arguments held them to the end.
    """
    return hasattr(torch.autograd.Function, "boxed_grads_call")


def is_opaque(node: fx.Node) -> bool:
    """A value that is no tensor and no number, such as a script object."""
    probe = getattr(partitioners, "is_opaque_node", None)
    return bool(probe is not None and probe(node))


def is_backward_state(node: fx.Node) -> bool:
    """The input through which compiled hooks reach the backward; it is no tensor."""
    return bool(partitioners._is_backward_state(node))


def must_be_in_backward(node: fx.Node) -> bool:
    """A node that AOTAutograd has fixed to the backward, such as a mutation made there."""
    return bool(partitioners._must_be_in_backward(node))


def save_like_any_other(node: fx.Node) -> None:
    """Have AOTAutograd save a value as autograd does, whatever a Function wrote to its ``ctx``.

    Values that a Function keeps on ``ctx``, without ``save_for_backward``, lie on AOTAutograd's own
    ``ctx`` as well, so that their versions are not looked at; there they stay when the backward has
    read them, until the graph goes (``runtime_wrappers.py``, ``_tensors_no_vc_check``).
    """
    node.meta.pop("saved_tensor_with_no_vc_check", None)


def joint_outputs(
    module: fx.GraphModule, num_fwd_outputs: int
) -> tuple[list[Any], list[Any], list[Any]]:
    """Forward outputs, backward outputs, and the descriptors of the forward ones."""
    forward, backward, forward_descs, _ = partitioners._extract_fwd_bwd_outputs(
        module, num_fwd_outputs=num_fwd_outputs
    )
    return list(forward), list(backward), list(forward_descs)


def gradients(module: fx.GraphModule, num_fwd_outputs: int) -> list[tuple[int, fx.Node, fx.Node]]:
    """Each gradient that a joint graph returns: its place among the outputs, its node, its input.

    Only of inputs that torch describes (torch 2.9 and later).
    """
    forward, backward, _, descs = partitioners._extract_fwd_bwd_outputs(
        module, num_fwd_outputs=num_fwd_outputs
    )
    placeholders = module.graph.find_nodes(op="placeholder")
    by_desc = {node.meta["desc"]: node for node in placeholders if "desc" in node.meta}
    primals = [by_desc.get(getattr(desc, "grad_of", None)) for desc in descs]
    return [
        (len(forward) + place, node, primal)
        for place, (node, primal) in enumerate(zip(backward, primals, strict=True))
        if isinstance(node, fx.Node) and primal is not None
    ]


def replace_output(module: fx.GraphModule, place: int, value: fx.Node) -> None:
    """Let a graph return another value at one place; it is to be recompiled then."""
    output = module.graph.output_node()
    leaves, spec = tree_flatten(output.args)
    leaves[place] = value
    output.args = tree_unflatten(leaves, spec)


def mutated_inputs(module: fx.GraphModule, num_fwd_outputs: int) -> list[fx.Node]:
    """Primals whose contents differ after the forward.

    Either the graph ends in ``copy_`` into them, or the forward returns their new contents and
    the runtime copies them (descriptor ``InputMutationAOTOutput``).
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    found = [
        cast(fx.Node, node.args[0])
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        if node.args[0] in placeholders and not must_be_in_backward(node)
    ]
    by_desc = {node.meta["desc"]: node for node in placeholders if "desc" in node.meta}
    for desc in joint_outputs(module, num_fwd_outputs)[2]:
        mutated = getattr(desc, "mutated_input", None)
        if mutated in by_desc:
            found.append(by_desc[mutated])
    return list(dict.fromkeys(found))


# --- the split ------------------------------------------------------------------------------


def non_functional_node(graph: fx.Graph) -> fx.Node | None:
    """The first node that mutates an intermediate value, or ``None`` in a functional graph."""
    node = _is_functional_graph(graph)[0]
    return cast("fx.Node | None", node)


def fake_clone(value: torch.Tensor) -> torch.Tensor:
    """A fake tensor of its own storage, as ``value.clone()`` would be."""
    if not isinstance(value, FakeTensor):
        return torch.empty_like(value, device="meta")
    with value.fake_mode:
        return value.clone()


def fake_like(made: Callable[[], torch.Tensor], beside: torch.Tensor) -> torch.Tensor:
    """What ``made`` makes, as a fake tensor of the mode of another one."""
    if not isinstance(beside, FakeTensor):
        return made()
    with beside.fake_mode:
        return made()


def extract_forward_backward(
    module: fx.GraphModule,
    saved: Sequence[fx.Node],
    saved_symbols: Sequence[fx.Node],
    saved_opaque: Sequence[fx.Node],
    num_fwd_outputs: int,
    static_inputs: Sequence[fx.Node],
) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """Cut the joint graph at ``saved`` (torch's ``_extract_fwd_bwd_modules``).

    Returns:
        The forward, the backward, and how many symbols the forward returns at its end.
    """
    symbols = list(saved_symbols)
    options: dict[str, Any] = {}
    accepted = inspect.signature(partitioners._extract_fwd_bwd_modules).parameters
    if "saved_opaque_nodes" in accepted:
        options["saved_opaque_nodes"] = list(saved_opaque)
    forward, backward = partitioners._extract_fwd_bwd_modules(
        module,
        list(saved),
        saved_sym_nodes=symbols,
        num_fwd_outputs=num_fwd_outputs,
        static_lifetime_input_nodes=OrderedSet(static_inputs),
        **options,
    )
    return forward, backward, len(symbols)


def states_in_generators() -> bool:
    """Whether a GPU's recomputed random ops draw from generators that belong to the graph.

    Those are seeded apart, so that a step draws other numbers than without recomputation, and
    ``torch.manual_seed`` does not set them back. CUDA graphs can replay nothing else.
    """
    return bool(inductor_config.triton.cudagraphs)


def pair_random_state(
    joint: fx.GraphModule,
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    num_symbols: int,
    once: bool,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Give each recomputed random op the random state of its forward (``functionalize_rng_ops``).

    It acts on the nodes whose ``meta["recompute"]`` says recompute and whose op is tagged
    ``nondeterministic_seeded``. States are saved as tensors, on the CPU as on a GPU, except where
    :func:`states_in_generators` holds and each op runs but ``once`` in the backward: a generator
    moves on with every run. Torch leaves graphs with such tensors out of its CUDA graphs.
    """
    apart = states_in_generators() and once
    with functorch_config.patch(graphsafe_rng_functionalization=apart):
        return partitioners.functionalize_rng_ops(joint, forward, backward, num_symbols)


def recomputed_by_default(
    module: fx.GraphModule, num_fwd_outputs: int, static_inputs: Sequence[int]
) -> frozenset[str]:
    """Names of the forward ops that torch's own partitioner lets the backward run again.

    Without a memory budget it recomputes what Inductor fuses into kernels that run anyway, where
    that moves fewer bytes (``min_cut_rematerialization_partition``). What a checkpoint region or a
    budget of torch's asks for is no matter here. The graph is changed.
    """
    forward = {node.name for node in module.graph.nodes if node.op == "call_function"}
    for node in module.graph.nodes:
        for asked in ("recompute", "memory_budget", "custom"):
            node.meta.pop(asked, None)
    with functorch_config.patch(activation_memory_budget=1.0):
        first, second = partitioners.min_cut_rematerialization_partition(
            module,
            (),
            num_fwd_outputs=num_fwd_outputs,
            static_lifetime_input_indices=list(static_inputs),
        )
    runs = [
        {n.name for n in half.graph.nodes if n.op == "call_function"} for half in (first, second)
    ]
    return frozenset(forward & runs[0] & runs[1])


def force_save_effects(module: fx.GraphModule) -> None:
    """Tag what torch's partitioner never recomputes: results of effects, sources of mutations."""
    for name in ("force_save_effectful_ops", "force_save_bw_mutation_src"):
        step = getattr(partitioners, name, None)
        if step is not None:
            step(module)


def finish_partition(
    forward: fx.GraphModule, backward: fx.GraphModule
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The closing steps of torch's partitioners: getitems up, RNG inputs of nested graphs.

    ``raise_getitems`` recompiles both modules.
    """
    forward = raise_getitems(forward)
    backward = raise_getitems(backward)
    thread = getattr(partitioners, "thread_graphsafe_rng_from_hops", None)
    if thread is not None:
        forward = thread(forward, is_backward=False)
        backward = thread(backward, is_backward=True)
    return forward, backward


# --- tracing and dispatch modes -------------------------------------------------------------


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def proxy_graph() -> fx.Graph | None:
    """The FX graph that is being traced now by AOTAutograd, or ``None`` when nothing is."""
    if torch._C._get_dispatch_mode(_PROXY) is None:
        return None
    probe = getattr(torch.compiler, "_is_non_strict_tracing", None)
    if probe is not None and probe():
        return None
    mode = get_proxy_mode()
    return mode.tracer.graph if mode is not None else None


def traces_before_autograd() -> bool:
    """Whether calls are written down before autograd sees them, as ``torch.export`` does.

    Switching gradients off and on is a call that stays in the graph then.
    """
    return torch._ops.mode_stack_state_for_pre_dispatch().get(0) is not None


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Real tensors and kernels, as a compiled graph runs them, whatever is active outside.

    No dispatch mode (fake tensors, tracing, functionalisation), functorch transform, autocast,
    ``__torch_function__`` or autograd sees the calls made inside.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C._DisableFuncTorch())
        stack.enter_context(torch._C._DisableAutocast())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """Inside, no dispatch mode sees what is called, as where a graph is compiled."""
    found: contextlib.AbstractContextManager[Any] = _disable_current_modes()
    return found


@contextlib.contextmanager
def open_sizes(sizes: Sequence[torch.SymInt]) -> Iterator[Any]:
    """What knows some symbolic sizes, for a fake tensor mode; ``None`` where there is none.

    What is asked of the sizes inside is answered as they were traced, and is no condition of what
    was compiled.
    """
    known = next((size.node.shape_env for size in sizes), None)
    with known.suppress_guards() if known is not None else contextlib.nullcontext():
        yield known


def storages_of(tensor: torch.Tensor) -> tuple[torch.UntypedStorage, ...]:
    """The memory behind a tensor: of a sparse one that of its indices and values.

    Of other layouts (``mkldnn``, nested ones) nothing is known. One that wraps others (``DTensor``)
    has theirs.
    """
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        inner = (part for part in parts if isinstance(part, torch.Tensor))
        return tuple(storage for part in inner for storage in storages_of(part))
    if tensor.layout is torch.strided:
        return (tensor.untyped_storage(),)
    return tuple(part.untyped_storage() for part in parts_of(tensor))


def parts_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Indices and values of a sparse tensor; of other layouts nothing."""
    if tensor.layout is not torch.sparse_coo:
        return ()
    with _disable_current_modes(), torch.no_grad():
        return tensor._indices(), tensor._values()


def resize_fake_storage(tensor: torch.Tensor, nbytes: int | torch.SymInt) -> None:
    """Give the storage behind a fake tensor another size; its views see it too."""
    torch.ops.inductor.resize_storage_bytes_(tensor, nbytes)


#: Whether a profiler session is open in this thread; a second one inside would break both.
profiler_is_running: Callable[[], bool] = torch.autograd._profiler_enabled


def default_store() -> Any:
    """The store that the default process group was made with."""
    return torch.distributed.distributed_c10d._get_default_store()


def refused_hooks(error: RuntimeError) -> bool:
    """Whether an error is that of a transform which allows no hooks on saved values."""
    return "support saved tensor hooks" in str(error)


def keep_layouts(node: fx.Node) -> None:
    """Have inductor give an op its tensors laid out as they are said to be, by ``meta["val"]``.

    That is what :class:`torch.Tag.needs_exact_strides` asks for, of ops that were traced:
    ``torch/_inductor/graph.py`` looks for what they were traced with.
    """
    values = fx.map_arg((node.args, node.kwargs), lambda given: given.meta["val"])
    node.meta["eager_input_vals"] = values
