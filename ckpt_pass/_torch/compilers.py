"""The door to torch's compilers: dynamo's backends, ``aot_eager`` and Inductor."""

from __future__ import annotations

import contextlib
import copy
import inspect
import secrets
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import fx
from torch._dynamo import eval_frame, pgo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from ckpt_pass._torch.batched import or_batched
from ckpt_pass._torch.fusion import end_kernels_early, fusion_between_calls
from ckpt_pass._torch.generated import GeneratedHalf, catch_generated
from ckpt_pass._torch.moments import keep_moments

CompiledFn = Callable[..., Any]
#: What inductor's caches take as a pass over the schedule; torch 2.11 has no such class.
_SchedulerPass: Any = getattr(custom_graph_pass, "CustomSchedulerPass", object)


class NamedPartitioner(CustomPartitionerFn):
    """A partition function of which inductor's caches see the ``uuid()`` alone.

    Their keys are made of the configuration's values too, pickled. What has no name has another
    key every time.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.uuid() or secrets.token_hex(16),)

    def __deepcopy__(self, memo: object) -> Self:
        return self


#: Runs a half on the list of what it is given, which it empties.
RunHalf = Callable[[list[Any]], Any]
#: Called for each run of a half: ``around(is_backward, run, args)`` returns what that returns.
Around = Callable[[bool, RunHalf, list[Any]], Any]


def compile_eager(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    partition: Callable[..., Any],
    around: Around | None = None,
) -> CompiledFn:
    """Compile as torch's ``aot_eager`` does, with our partition function.

    Args:
        module, inputs: dynamo's graph and its example inputs.
        partition: our partition function.
        around: called around each run of forward and backward, if anybody is to know.
    """
    backend = aot_autograd(
        fw_compiler=_half(False, around),
        bw_compiler=_half(True, around),
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return backend(module, inputs)


def _half(is_backward: bool, around: Around | None) -> Callable[..., CompiledFn]:
    def compiler(half: fx.GraphModule, inputs: Sequence[Any]) -> CompiledFn:
        run: RunHalf = boxed_nop(half, list(inputs))
        if is_backward:
            run = or_batched(half, run)
        if around is None:
            return run
        told = around

        def run_told(args: list[Any]) -> Any:
            return told(is_backward, run, args)

        run_told._boxed_call = True  # type: ignore[attr-defined]  # it may empty the list
        return run_told

    return compiler


def half_as_it_is(half: fx.GraphModule) -> RunHalf:
    """What runs a half op by op, as ``aot_eager`` does."""
    run: RunHalf = boxed_nop(half, [])
    return run


def compile_inductor(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    partition: NamedPartitioner,
    options: dict[str, Any],
    mode: str | None,
    on_half: Callable[[GeneratedHalf], None] | None = None,
    careful: bool = False,
    kept: bool = False,
) -> CompiledFn:
    """Compile with inductor; its joint-graph passes run first, then our partition function.

    The configuration is patched for this compilation alone (``compile_fx``'s config_patches).

    Args:
        module, inputs: dynamo's graph and its example inputs.
        partition: our partition function.
        options, mode: inductor's, as ``torch.compile`` takes them.
        on_half: told the code of each half before its kernels are compiled, which is left to it
            (:attr:`GeneratedHalf.compile_kernels`). What comes from a cache is not generated: see
            ``kept``.
        careful: with ``on_half``, whether kernels keep to the order of the graphs that the
            partition function returns (:mod:`ckpt_pass._torch.fusion`).
        kept: with ``on_half``, whether torch's caches are used all the same. Entries belong to
            the ``uuid()`` of the partition function.
    """
    import torch._inductor as inductor
    from torch._inductor.compile_fx import compile_fx

    chosen = {**(inductor.list_mode_options(mode) if mode else {}), **options}
    patches = {key.replace("-", "_"): value for key, value in chosen.items()}
    patches["custom_partitioner_fn"] = partition
    if partition.uuid() is None or (on_half is not None and not kept):
        patches["fx_graph_cache"] = False
    users = patches.get("_post_fusion_custom_pass", inductor.config._post_fusion_custom_pass)
    if users is not None:  # a key of torch's caches would say nothing of it
        patches["fx_graph_cache"] = False
    hooked = {**patches, "_post_fusion_custom_pass": _OurPass(patches, on_half, users, careful)}
    if on_half is None:
        return cast(CompiledFn, compile_fx(module, list(inputs), config_patches=hooked))
    # Of the plans that are tried one is taken: the others are no use to other machines.
    hooked["fx_graph_remote_cache"] = False
    # Otherwise the backward is lowered when it first runs, too late to plan again.
    eager_lowering = functorch_config.patch(force_non_lazy_backward_lowering=True)
    fusion = fusion_between_calls() if careful else contextlib.nullcontext()
    cache = functorch_config.patch(
        {"enable_remote_autograd_cache": False} | ({} if kept else {"enable_autograd_cache": False})
    )
    with cache, eager_lowering, fusion:
        return cast(CompiledFn, compile_fx(module, list(inputs), config_patches=hooked))


class _OurPass(_SchedulerPass):  # type: ignore[misc]
    """A pass over inductor's schedule: moments are kept, and the graph hands over its code.

    With care it has kernels end early, too (:func:`ckpt_pass._torch.fusion.end_kernels_early`).
    """

    def __init__(
        self,
        patches: Mapping[str, Any],
        on_half: Callable[[GeneratedHalf], None] | None,
        users: Callable[[Any], Any] | None,
        careful: bool,
    ) -> None:
        self._patches, self._on_half, self._users = patches, on_half, users
        self._careful = careful

    def __call__(self, nodes: list[Any]) -> list[Any]:
        from torch._inductor.virtualized import V

        if self._on_half is not None:
            catch_generated(V.graph, self._patches, self._on_half)
        if self._careful and nodes:
            end_kernels_early(nodes)
        found = self._users(nodes) if self._users is not None else nodes
        keep_moments(found)
        return found

    def uuid(self) -> str:
        return "ckpt_pass, moments kept"

    def __reduce__(self) -> tuple[Any, ...]:
        """Keys of caches are made of configurations too: it is the same in all of them."""
        return str, (self.uuid(),)


def keeps_artefacts(options: Mapping[str, Any]) -> bool:
    """Whether torch keeps what it compiles with these options of inductor's."""
    from torch._inductor import config

    def chosen(name: str) -> Any:
        return options.get(name, options.get(name.replace("_", "-"), getattr(config, name)))

    if chosen("force_disable_caches") or not chosen("fx_graph_cache"):
        return False
    # A pass of the user's is not known to torch by ours, and code that is tuned is changed later.
    if chosen("_post_fusion_custom_pass") is not None or chosen("triton.autotune_at_compile_time"):
        return False
    return bool(functorch_config.enable_autograd_cache)


def cache_bypasses() -> int:
    """How often AOTAutograd has taken a graph as one that its cache cannot hold."""
    from torch._dynamo.utils import counters

    return int(counters["aot_autograd"]["autograd_cache_bypass"])


def inductor_cache_folder() -> Path:
    """Where inductor keeps its caches."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def inductor_option_names() -> frozenset[str]:
    """The names that ``torch.compile(options=...)`` accepts for inductor."""
    import torch._inductor.config as config

    return frozenset(name.replace("_", "-") for name in config.get_config_copy()) | frozenset(
        config.get_config_copy()
    )


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph and what belongs to it; tensors are shared where torch shares them."""
    with _quiet_copies():
        return copy.deepcopy(module)


def with_copied_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A module with a graph of its own; what the graph reads is shared, fake constants among it."""
    with _quiet_copies():
        found = fx.GraphModule(module, copy.deepcopy(module.graph))
    found.meta = dict(module.meta)
    return found


@contextlib.contextmanager
def _quiet_copies() -> Iterator[None]:
    """Torch 2.13 copies its own tree specs in a way that it warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        yield


def run_graphs(module: fx.GraphModule, _inputs: Sequence[Any]) -> CompiledFn:
    """A backend that runs dynamo's graphs as they are."""
    return module.forward


def stock_backend(inner: str, memory_budget: float) -> Callable[..., CompiledFn]:
    """Torch's own backend; ``activation_memory_budget`` is set only while it compiles."""
    patched = functorch_config.patch(activation_memory_budget=memory_budget)
    return cast(Callable[..., CompiledFn], patched(torch._dynamo.lookup_backend(inner)))


#: What torch says of a compiled function by (torch 2.13).
_MARK = "_is_torch_compile"


def compile_apart(
    step: Callable[..., Any], backend: Any, dynamic: bool | None
) -> Callable[..., Any]:
    """``torch.compile``, whose compilations do not count among the user's own of the same code.

    Dynamo gives a function up after so many of them. Torch before 2.13 counts them all. It also
    keeps every backend, with all that it holds, until ``torch._dynamo.reset()``: not this one.
    """
    options: dict[str, Any] = {"backend": backend, "dynamic": dynamic}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    marked = _MARK in vars(step)
    compiled: Callable[..., Any] = torch.compile(step, **options)
    if isinstance(step, torch.nn.Module) and not marked:
        vars(step).pop(_MARK, None)  # by way of its wrapper, torch writes on the user's module

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        finally:
            for number, kept in list(eval_frame.cached_backends.items()):
                if kept is backend or getattr(kept, "compiler_fn", None) is backend:
                    del eval_frame.cached_backends[number]

    return run


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


def traced_input(node: fx.Node) -> Any:
    """What dynamo traced an input of its graph as, open sizes as symbols; ``None`` of others."""
    return node.meta.get("example_value") if node.op == "placeholder" else None


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
