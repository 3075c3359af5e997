"""Where each call of a module begins and ends in a recorded step, with what it is given.

A call of a module's ``forward`` alone is one, too: a region stands in the ``forward``, and runs
however that is called.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from ckpt_pass.eager.held_objects import HeldObjects
from ckpt_pass.eager.step_record import CallRecord, EagerTrace
from ckpt_pass.eager.trace_ops import is_plain, tensors_in
from ckpt_pass.policy.module_stack import ModuleStack
from ckpt_pass.regions.wrapping import RegionForward


@dataclass
class ModuleCalls:
    """Notes the calls of modules in a record, while it is made.

    Attributes:
        model: the modules are its own.
        trace: the record.
        stack: the modules that run.
        storages: the storages of the step among the tensors of a value.
        number_of: the one behind a tensor; -1 for what existed before.
        buffers: the buffers among some tensors, running statistics apart.
    """

    model: nn.Module
    trace: EagerTrace
    stack: ModuleStack
    storages: Callable[[Any], tuple[int, ...]]
    number_of: Callable[[Tensor], int]
    buffers: Callable[[list[Tensor]], frozenset[int]]
    _open: list[int] = field(default_factory=list)
    _ready: nn.Module | None = None  # whose forward is what runs next

    @cached_property
    def objects(self) -> HeldObjects:
        """What objects among the arguments hold."""
        return HeldObjects(self.storages)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Note the calls that are made inside."""
        parts = list(self.model.modules())
        with contextlib.ExitStack() as stack:

            def add(handle: RemovableHandle) -> None:
                stack.callback(handle.remove)

            add(register_module_forward_pre_hook(self._enter))
            add(register_module_forward_hook(self._leave, always_call=True))
            # A region is the forward alone: what hooks before it do, FSDP's say, happens once, and
            # it is given what they return.
            for part in parts:
                add(part.register_forward_pre_hook(self._begin, with_kwargs=True))
            for part in parts:
                stack.enter_context(self._forward_followed(part))
            yield

    @contextlib.contextmanager
    def _forward_followed(self, module: nn.Module) -> Iterator[None]:
        """Note the calls of a module's ``forward`` that are no part of a call of the module."""
        before = vars(module).get("forward")
        if isinstance(module, torch.jit.ScriptModule) or isinstance(before, RegionForward):
            yield
            return
        followed = vars(module)["forward"] = _Forward(self, module)
        try:
            yield
        finally:
            if vars(module).get("forward") is followed:  # the model may have put another one there
                del vars(module)["forward"]
                vars(module).update({} if before is None else {"forward": before})

    def forward(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module's ``forward``, which is a call of the module if none has just begun."""
        if self._ready is module:
            self._ready = None
            return run(*args, **kwargs)
        with self.stack.inside(module):
            self._enter(module, args)
            self._begin(module, args, kwargs)
            self._ready = None
            output = None
            try:
                output = run(*args, **kwargs)
            finally:
                self._leave(module, args, output)
            return output

    @property
    def _here(self) -> tuple[tuple[int, int], tuple[int, int]]:
        ops, values = len(self.trace.ops), len(self.trace.saved)
        return (ops, ops), (values, values)

    def _enter(self, module: nn.Module, _args: Any) -> None:
        parent = self._open[-1] if self._open else -1
        self._open.append(len(self.trace.calls))
        self._ready = None
        trains = all(part.training for part in module.modules())
        self.trace.calls.append(CallRecord(self.stack.running, parent, *self._here, trains))
        self.objects.enter()

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = self.trace.calls[self._open[-1]]
        call.given = self.storages((args, kwargs))
        tensors = list(tensors_in((args, kwargs)))
        goes = (tensor.grad_fn is not None and is_plain(tensor) for tensor in tensors)
        call.tensors = tuple(zip(map(self.number_of, tensors), goes, strict=True))
        call.buffers = self.buffers(tensors)
        self.objects.note(module, call, (args, kwargs))

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._note(module, args, kwargs)
        self._ready = module
        call = self.trace.calls[self._open[-1]]
        call.ops, call.values = self._here
        call.differentiable = torch.is_grad_enabled()

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        call = self.trace.calls[self._open.pop()]
        (ops, _), (values, _) = self._here
        call.ops, call.values = (call.ops[0], ops), (call.values[0], values)
        call.outputs = self.storages(output)
        call.dropped = self._own(call, self.objects.leave())

    def _own(self, call: CallRecord, storages: tuple[int, ...]) -> tuple[int, ...]:
        """Those of some storages that a call has made, and does not return."""
        born = call.ops[0]
        own = (s for s in storages if self.trace.storages[s].born >= born)
        return tuple(s for s in own if s not in call.outputs)


class _Forward:
    """A ``forward`` whose calls are noted; regions do not look into objects of ours."""

    def __init__(self, calls: ModuleCalls, module: nn.Module) -> None:
        self._calls, self._module, self._run = calls, module, module.forward
        functools.update_wrapper(self, self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._calls.forward(self._module, self._run, args, kwargs)
