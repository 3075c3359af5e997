"""Selective activation checkpointing: the dispatch modes behind ``context_fn``.

``torch.utils.checkpoint.checkpoint`` runs a region's forward under one mode and its recomputation
under the other. The first saves what the policy says; the second hands that out instead of running
the op again. Under ``torch.compile`` the same modes tag the traced nodes for torch's partitioner.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._torch import functorch
from ckpt_pass._torch.dispatch import QuickMode
from ckpt_pass._torch.operators import OpOverload
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.policy.module_stack import ModuleStack
from ckpt_pass.policy.named import DEFAULT_POLICY, as_policy
from ckpt_pass.policy.opinion import Opinion, opinion
from ckpt_pass.policy.rules import (
    DEFAULT,
    Policy,
    PolicyLike,
    TorchPolicy,
    check_decision,
    describe,
)
from ckpt_pass.policy.sites import CallNumbers, ModulePath, SiteContext, SiteCounter, module_path
from ckpt_pass.regions.actions import (
    IGNORED,
    Action,
    actions_for,
    is_cached_cast,
    is_free,
    is_mutable,
    overwritten,
    returns_what_it_changes,
    simple_call,
)
from ckpt_pass.regions.draws import Draw, DrawWatch
from ckpt_pass.regions.light_hooks import LightHooks
from ckpt_pass.regions.outside import Outside
from ckpt_pass.regions.region import RegionMemory, Saved
from ckpt_pass.regions.statistics import (
    Owners,
    run_again,
    running_statistics,
    state_addresses,
    with_copies,
)
from ckpt_pass.regions.watch import RegionRecord, new_record
from ckpt_pass.regions.writes import check_reads

Contexts = tuple[TorchDispatchMode, TorchDispatchMode]

NOT_SAVED = Opinion(CheckpointPolicy.PREFER_RECOMPUTE, "made again from what it shows")


def context_fn(policy: PolicyLike = DEFAULT_POLICY) -> Callable[[], Contexts]:
    """Build the ``context_fn`` argument of ``torch.utils.checkpoint.checkpoint``.

    A drop-in for ``functools.partial(create_selective_checkpoint_contexts, policy_fn)``: it takes
    a policy's name or value, a callable, torch's ``policy_fn(ctx, op, *args, **kwargs)``, or a
    list of ops to save, and works in eager and under ``torch.compile`` alike. Use it with
    ``use_reentrant=False``.

    Raises:
        UnknownPolicyError: ``policy`` is none of these.
    """
    # A partial: dynamo accepts it as a context_fn, and guards on the policy's value. Inside code
    # that dynamo traces the policy stays what the user wrote: dynamo takes functions and lists
    # of ops as constants, but not a value that it saw being built.
    if torch.compiler.is_dynamo_compiling():
        return functools.partial(_contexts_for, policy)
    return functools.partial(_light_contexts, as_policy(policy))


def _contexts_for(policy: PolicyLike) -> Contexts:
    return _light_contexts(as_policy(policy))


def _light_contexts(policy: Policy) -> Contexts:
    return selective_contexts(policy, LightHooks())


def selective_contexts(
    policy: Policy,
    hooks: LightHooks | None = None,
    owners: Owners = (),
    outside: Outside | None = None,
) -> Contexts:
    """The two modes for one run of a region: for its forward, and for its recomputation.

    Args:
        policy: what the forward saves.
        hooks: for a region of ``torch.utils.checkpoint``: hooks lighter than torch's.
        owners: the modules that the region runs, where their buffers are to change only once.
        outside: what the region reads besides its arguments, where there are no ``hooks``.
    """
    memory = RegionMemory()
    forward = ForwardMode(policy, memory, hooks, owners, outside)
    return forward, RecomputeMode(memory, hooks, owners, forward)


class ForwardMode(QuickMode):
    """Runs a region's forward and saves what the policy says."""

    #: Set by torch when the region is traced under torch.compile.
    ac_graph_id: int | None = None

    # Made anew for every run of a region: what few runs need is made when they do.
    _hooked = False
    _counter: SiteCounter | None = None
    _numbers: CallNumbers | None = None
    _modules: ModuleStack | None = None
    _scopes: contextlib.AbstractContextManager[ModuleStack] | None = None
    _record: RegionRecord | None = None
    _tracing = False
    _by_op_alone = False
    _unsettled: Saved | None = None
    _paused = False
    _state: frozenset[int] | None = None

    def __init__(
        self,
        policy: Policy,
        memory: RegionMemory,
        hooks: LightHooks | None = None,
        owners: Owners = (),
        outside: Outside | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hooks = hooks
        self._owners = owners
        self._outside = outside
        self._policy = policy
        self._memory = memory
        self._actions = actions_for(policy)
        self._quick = self._actions.quick

    def __enter__(self) -> ForwardMode:
        self._tracing = functorch.proxy_graph() is not None
        self._record = new_record(self._tracing)
        self._by_op_alone = not self._tracing and self._record is None
        self._memory.complete = self._tracing
        if not self._tracing and (self._actions.needs_scopes or self._record is not None):
            self._scopes = ModuleStack().followed()
            self._modules = self._scopes.__enter__()
        if self._hooks is not None and not self._tracing:
            self._hooked = self._hooks.enter_forward()
            if self._hooks.watch is not None:
                self._by_op_alone = False
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        self._settle()
        self._memory.complete = True
        try:
            if self._hooked and self._hooks is not None:
                self._hooks.exit_forward()
        finally:
            if self._scopes is not None:
                self._scopes.__exit__(None, None, None)
            super().__exit__(*exc)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let ops pass: a backward inside the forward has the region run again meanwhile."""
        self._settle()
        by_op_alone, self._by_op_alone, self._paused = self._by_op_alone, False, True
        try:
            with self._modules.aside() if self._modules is not None else contextlib.nullcontext():
                yield
        finally:
            self._by_op_alone, self._paused = by_op_alone, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._by_op_alone and self._unsettled is None:
            found = self._quick.get(id(func))
            if found is not None:
                call, stored = found
                output = call(*args, **kwargs) if kwargs else call(*args)
                if stored:
                    self._memory.keep(id(func), output)
                return output
        return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything but the two cases that need nothing more than the op."""
        if self._paused:
            return func(*args, **kwargs)
        if self._unsettled is not None:
            self._settle()
        if self._hooks is not None and self._hooks.watch is not None:
            self._hooks.watch.look(func, args, kwargs)
        if self._tracing:
            graph = functorch.proxy_graph()
            if graph is not None:
                return self._trace(graph, func, args, kwargs)
        action = self._actions.known.get(id(func))
        if action is None:
            action = self._actions.learn(func)
        if action is Action.PASS and self._record is None:
            return func(*args, **kwargs)
        if action is Action.CHANGE:
            self._memory.about_to_change(overwritten(func, args, kwargs))
        watch = DrawWatch(func, args, kwargs) if func in self._actions.drawing else None
        output = func(*args, **kwargs)
        if func in IGNORED:
            return output
        self._keep(action, func, args, kwargs, output, watch)
        return output

    def _settle(self) -> None:
        if self._unsettled is not None:
            self._unsettled.settle()
            self._unsettled = None

    def _keep(
        self,
        action: Action,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        output: Any,
        watch: DrawWatch | None,
    ) -> None:
        """Save or count one execution, as the policy says."""
        if action in (Action.SAVE, Action.STORE) and self._record is None:
            saves = True
        else:
            saves = self._ask(func, args, kwargs, output).saves
        if action is Action.PASS or is_cached_cast(func, args):
            return
        if action is Action.CHANGE and not returns_what_it_changes(func, args, output):
            return
        key = _key(func, args)
        if not saves or (action is Action.CHANGE and self._is_state(output)):
            self._memory.skip(key)
            return
        draw: Draw | None = watch.finished() if watch is not None else None
        entry = self._memory.keep(key, output, draw)
        self._unsettled = entry if action is Action.CHANGE else None

    def _is_state(self, output: Any) -> bool:
        """Whether an op's output is memory from around the region, which others move on as well.

        What it held is kept as all state is: a counter goes on before the backward comes.
        """
        if self._state is None:
            outside = self._outside if self._hooks is None else self._hooks.outside
            self._state = state_addresses(outside, self._owners)
        return bool(self._state) and output.untyped_storage()._cdata in self._state

    def _ask(self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> Opinion:
        """What the policy says of this execution; also told to whoever is watching."""
        if isinstance(self._policy, TorchPolicy) and self._record is None:
            decision = self._policy.ask(func, output, args, kwargs)
            if decision is None:  # no opinion; torch takes it so, too
                decision = DEFAULT
            checked = check_decision(decision, describe(self._policy), op_name(func))
            return Opinion(checked, "policy_fn")
        path: ModulePath = self._modules.path if self._modules is not None else ()
        return self._decide(self._visit(func, path, None, output, args, kwargs))

    def _visit(self, *execution: Any) -> SiteContext:
        if self._counter is None:
            self._counter = SiteCounter()
        return self._counter.visit(*execution)

    def _decide(self, context: SiteContext) -> Opinion:
        cached = not self._tracing and is_cached_cast(context.op, context.args)
        free = cached or is_free(context.op)
        found = NOT_SAVED if free else opinion(self._policy, context)
        if self._record is not None:
            self._record.decisions.append((context.site, found))
        return found

    def _trace(self, graph: Any, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Tag the nodes that ``func`` leaves in the graph; keep every output.

        The recomputation is traced too, but torch's partitioner makes it: with every output at
        hand, tracing it adds no node. torch's own modes do the same.
        """
        meta = fx_traceback.current_meta
        if self.ac_graph_id is not None:
            meta["ac_graph_id"] = self.ac_graph_id
        meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        if func in IGNORED:
            return func(*args, **kwargs)
        before = len(graph.nodes)
        output = func(*args, **kwargs)
        if self._numbers is None:
            self._numbers = CallNumbers()
        path = self._numbers.numbered(module_path(meta.get("nn_module_stack")))
        found = self._decide(self._visit(func, path, None, output, args, kwargs))
        for node in itertools.islice(reversed(graph.nodes), len(graph.nodes) - before):
            node.meta["recompute"] = found.decision
        self._memory.keep(_key(func, args), output)
        return output


def _key(op: Any, args: tuple[Any, ...]) -> Any:
    """What occurrences of an op are counted by; to hash an op itself is a call into Python."""
    return id(op) if isinstance(op, OpOverload) else functorch.selective_key(op, args)


class RecomputeMode(QuickMode):
    """Runs a region again and hands out what its forward saved."""

    _buffers: frozenset[int] = frozenset()
    _collects = False

    def __init__(
        self,
        memory: RegionMemory,
        hooks: LightHooks | None = None,
        owners: Owners = (),
        forward: ForwardMode | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = owners
        self._forward = forward
        self._memory = memory
        self._counted = memory.entries
        self._hooks = hooks
        self._outside: Outside | None = None

    def __enter__(self) -> RecomputeMode:
        self._memory.start_recompute()
        self._cleanup = contextlib.ExitStack()
        outside = self._outside = None if self._hooks is None else self._hooks.outside
        if outside is not None:
            outside.put_in()
            self._cleanup.callback(outside.put_back)
            self._owners = outside.owners_of_statistics()
        if self._forward is not None and not self._memory.complete:
            self._cleanup.enter_context(self._forward.paused())
        if self._owners:
            self._buffers = frozenset(running_statistics(self._owners))
        self._collects = self._hooks is not None and self._hooks.enter_recompute()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        with self._cleanup:
            if self._hooks is not None and self._collects:
                self._hooks.exit_recompute(failed=exc[0] is not None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._outside is not None and self._outside.suspects:
            check_reads(self._outside, func, args, kwargs or {})
        call = simple_call(func)
        if call is None:
            return self._dispatch(func, args, kwargs or {})
        if id(func) in self._counted:
            entry = self._memory.next(id(func), func)
            if entry is not None:
                return entry.take(func, again=not self._memory.complete)
        return call(*args, **kwargs) if kwargs else call(*args)

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything else: what overwrites tensors, moves statistics, or may not be counted."""
        if func not in IGNORED and is_mutable(func):
            if not self._memory.complete:
                self._memory.about_to_change(overwritten(func, args, kwargs))
            if self._buffers:
                args = with_copies(func, args, kwargs, self._buffers)
        # What is ignored is never counted.
        if func in IGNORED or is_cached_cast(func, args):
            return run_again(func, args, kwargs)
        entry = self._memory.next(_key(func, args), func)
        if entry is None:
            return run_again(func, args, kwargs)
        value = entry.take(func, again=not self._memory.complete)
        if is_mutable(func) and functorch.proxy_graph() is None:
            with torch.no_grad():
                args[0].copy_(value)
            return args[0]
        return value
