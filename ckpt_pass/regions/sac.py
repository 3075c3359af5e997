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
from ckpt_pass.offloading.sharding import Sharding
from ckpt_pass.offloading.stores import OffloadLike, as_offload
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
    is_blank,
    is_cached_cast,
    is_free,
    overwritten,
    returns_what_it_changes,
    stays_where_it_is,
)
from ckpt_pass.regions.draws import Draw, DrawWatch
from ckpt_pass.regions.light_hooks import LightHooks
from ckpt_pass.regions.moving import MovedOutput
from ckpt_pass.regions.outside import Outside
from ckpt_pass.regions.region import RegionMemory, Reshaped, Saved
from ckpt_pass.regions.rerun_mode import RecomputeMode, key_of
from ckpt_pass.regions.shards import ShardedOutput
from ckpt_pass.regions.statistics import Owners, state_addresses
from ckpt_pass.regions.traced_reads import TracedReads
from ckpt_pass.regions.watch import RegionRecord, new_record

Contexts = tuple[TorchDispatchMode, TorchDispatchMode]

_NOTHING = as_policy("save-nothing")
_SETTLED = frozenset((Action.SAVE, Action.STORE, Action.MOVE))
_PASSED = frozenset((Action.PASS, Action.RESHAPE))
NOT_SAVED = Opinion(CheckpointPolicy.PREFER_RECOMPUTE, "made again from what it shows")


def context_fn(
    policy: PolicyLike = DEFAULT_POLICY, offload: OffloadLike | bool | None = None
) -> Callable[[], Contexts]:
    """Build the ``context_fn`` argument of ``torch.utils.checkpoint.checkpoint``.

    A drop-in for ``functools.partial(create_selective_checkpoint_contexts, policy_fn)``: it takes
    a policy's name or value, a callable, torch's ``policy_fn(ctx, op, *args, **kwargs)``, or a
    list of ops to save, and works in eager and under ``torch.compile`` alike. Use it with
    ``use_reentrant=False``.

    Args:
        policy: what is saved, recomputed, or offloaded.
        offload: where values go that are offloaded; to the host where ``None`` or ``True``.

    Raises:
        UnknownPolicyError: ``policy`` is none of these.
        InvalidOffloadError: ``offload`` is no place.
    """
    # A partial: dynamo accepts it as a context_fn, and guards on the policy's value. Inside code
    # that dynamo traces the policy stays what the user wrote: dynamo takes functions and lists
    # of ops as constants, but not a value that it saw being built.
    if torch.compiler.is_dynamo_compiling():
        return functools.partial(_contexts_for, policy)
    where = as_offload(offload)
    if where is None:
        return functools.partial(_light_contexts, as_policy(policy))
    return functools.partial(_light_contexts, as_policy(policy), where)


def _contexts_for(policy: PolicyLike) -> Contexts:
    return _light_contexts(as_policy(policy))


def _light_contexts(policy: Policy, offload: OffloadLike | None = None) -> Contexts:
    return selective_contexts(policy, LightHooks(), memory=RegionMemory(offload))


def contexts_of_recomputed() -> Contexts:
    """The modes of a traced region that keeps nothing but what it must."""
    return _light_contexts(_NOTHING)


#: What torch's cache of compiled graphs tells this function by (``autograd_cache.py``).
contexts_of_recomputed.cache_hash = "ckpt_pass: a region that keeps nothing"  # type: ignore[attr-defined]


def selective_contexts(
    policy: Policy,
    hooks: LightHooks | None = None,
    owners: Owners = (),
    memory: RegionMemory | None = None,
    outside: Outside | None = None,
) -> Contexts:
    """The two modes for one run of a region: for its forward, and for its recomputation.

    Args:
        policy: what the forward saves.
        hooks: for a region of ``torch.utils.checkpoint``: hooks lighter than torch's.
        owners: the modules that the region runs, where their buffers are to change only once.
        memory: what holds the values.
        outside: what the region reads besides its arguments, where there are no ``hooks``.
    """
    memory = RegionMemory() if memory is None else memory
    forward = ForwardMode(policy, memory, hooks, owners, outside)
    return forward, RecomputeMode(memory, hooks, owners, forward, outside)


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
    _unsettled: Saved | Reshaped | None = None
    _changed: tuple[Saved | Reshaped, ...] = ()
    _paused = False
    _state: frozenset[int] | None = None
    _reads: TracedReads | None = None

    def __init__(
        self,
        policy: Policy,
        memory: RegionMemory,
        hooks: LightHooks | None = None,
        owners: Owners = (),
        outside: Outside | None = None,
    ) -> None:
        super().__init__()
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
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            if exc[0] is None:
                self._settle()
                self._recount()
                # In other regions this comes after all contexts: an error in the exit of one of
                # several holds itself.
                if self._memory.window is not None and self._hooks is not None:
                    self._memory.window.finish()
        finally:
            self._memory.complete = True
            try:
                if self._hooked and self._hooks is not None:
                    self._hooks.exit_forward()
            finally:
                if self._scopes is not None:
                    self._scopes.__exit__(None, None, None)
                super().__exit__(*exc)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let ops pass: a backward inside the forward has the region run again meanwhile."""
        self._settle()
        self._recount()
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
        if action is Action.RESHAPE:
            self._unsettled = self._memory.reshaped(overwritten(func, args, kwargs))
        return output

    def _settle(self) -> None:
        if self._unsettled is not None:
            self._unsettled.settle()
            self._changed += (self._unsettled,)
            self._unsettled = None

    def _recount(self) -> None:
        """Take the versions of what ops changed in place once more.

        ``ctx.mark_dirty`` of a Function counts all that it names when its forward has ended, which
        is some ops later. What an op of the region changes after it was saved is a copy by then.
        """
        for entry in self._changed:
            entry.recount()
        self._changed = ()

    def _keep(
        self,
        action: Action,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        output: Any,
        watch: DrawWatch | None,
    ) -> None:
        """Save, put away or count one execution, as the policy says."""
        sharding = None
        if action in _SETTLED and self._record is None:
            saves, moves = action is not Action.MOVE, action is Action.MOVE
        else:
            asked = self._ask(func, args, kwargs, output)
            saves, moves, sharding = asked.saves, asked.offloads, asked.sharding
            if sharding is not None and is_blank(func):  # nobody holds the same; nobody needs it
                saves, sharding = False, None
        if action in _PASSED or is_cached_cast(func, args):
            return
        if moves and stays_where_it_is(func):
            saves, moves = True, False
        if action is Action.CHANGE and not returns_what_it_changes(func, args, kwargs, output):
            return
        key = key_of(func, args)
        if not (saves or moves) or (action is Action.CHANGE and self._is_state(output)):
            self._memory.skip(key)
            return
        draw: Draw | None = watch.finished() if watch is not None else None
        if moves or sharding is not None:
            entry = self._move(key, func, action, (args, kwargs), output, draw, sharding)
        else:
            entry = self._memory.keep(key, output, draw)
        self._unsettled = entry if action is Action.CHANGE else None

    def _move(
        self,
        key: Any,
        func: Any,
        action: Action,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        output: Any,
        draw: Draw | None,
        sharding: Sharding | None,
    ) -> Saved:
        memory, changes = self._memory, action is Action.CHANGE
        # What an op changes in place is its argument, and belongs to the region all the same.
        around = () if changes else (*arguments[0], *arguments[1].values())
        if sharding is not None:
            where, seen = memory.next_of(func, key), memory.compared
            part = ShardedOutput(output, draw, sharding, where, seen, around, not changes)
            return memory.add(key, part)
        moved = MovedOutput(output, draw, memory.window_for_more(), around, not changes)
        return memory.add(key, moved)

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
            name = describe(self._policy)
            checked = check_decision(decision, name, op_name(func), shards=True)
            return Opinion.of(checked, "policy_fn")
        path: ModulePath = self._modules.path if self._modules is not None else ()
        return self._decide(self._visit(func, path, None, output, args, kwargs))

    def _visit(self, *execution: Any) -> SiteContext:
        if self._counter is None:
            self._counter = SiteCounter()
        return self._counter.visit(*execution)

    def _decide(self, context: SiteContext) -> Opinion:
        cached = not self._tracing and is_cached_cast(context.op, context.args)
        free = cached or is_free(context.op)
        eager = not self._tracing
        found = NOT_SAVED if free else opinion(self._policy, context, eager, eager)
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
        nodes = list(itertools.islice(reversed(graph.nodes), len(graph.nodes) - before))
        for node in nodes:
            node.meta["recompute"] = found.decision
        if self._reads is None:
            self._reads = TracedReads()
        self._reads.ran(func, args, kwargs, output, nodes)
        self._memory.keep(key_of(func, args), output)
        return output
