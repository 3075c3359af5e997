"""How torch calls a module that has hooks, and how it converts one."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules import module as nn_module

_CALL = nn.Module._call_impl.__code__
#: What runs a module with hooks: a function inside of ``_call_impl``, where there is one.
_HOOKED_CALL = next((code for code in _CALL.co_consts if isinstance(code, CodeType)), _CALL)


def hooks_wait_for_errors(until: CodeType) -> bool:
    """Whether a module whose call is under way has forward hooks with ``always_call=True``.

    Args:
        until: the code of the caller up to which calls are looked at.
    """
    if nn_module._global_forward_hooks_always_called:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (code := frame.f_code) is not until:
        if code is _HOOKED_CALL and frame.f_locals["self"]._forward_hooks_always_called:
            return True
        frame = frame.f_back
    return False


def is_fsdp1(module: nn.Module) -> bool:
    """Whether a module is a unit of FSDP1; by name: torch.distributed is not imported for this."""
    return any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)


def runs_on_values_alone(module: nn.Module) -> str:
    """The wrapper of torch.distributed that a module is or has, if tensors without values break it.

    Empty for other modules: FSDP2's and DistributedDataParallel are fine.
    """
    if is_fsdp1(module):
        return "FullyShardedDataParallel (FSDP1)"
    composed = "torch.distributed._composable.replicate"
    return "replicate()" if any(b.__module__ == composed for b in type(module).__mro__) else ""


@contextlib.contextmanager
def converted_by_replacement(model: nn.Module) -> Iterator[None]:
    """Let ``Module.to`` and its like run on fake parameters.

    Torch swaps the insides of these, which fails as long as anything knows them. Here a parameter
    that is converted is replaced; most conversions in a forward find that there is nothing to do.
    """
    changed = [module for module in model.modules() if "_apply" not in vars(module)]
    for module in changed:
        vars(module)["_apply"] = functools.partial(_replace_converted, module)
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("_apply", None)


def _replace_converted(
    module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    if recurse:
        for child in module.children():
            child._apply(convert)
    owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for held in owned:
        for name, tensor in held.items():
            if tensor is None:
                continue
            with torch.no_grad():
                found = convert(tensor)
            if found is not tensor:
                is_parameter = isinstance(tensor, nn.Parameter)
                held[name] = nn.Parameter(found, tensor.requires_grad) if is_parameter else found
    return module


def script_attributes(module: nn.Module) -> tuple[str, ...]:
    """The attributes of one of TorchScript's modules, parameters and buffers among them."""
    described = getattr(module, "_concrete_type", None)
    names = () if described is None else described.get_attributes()
    return tuple(name for name in names if not name.startswith("_"))


def script_forward(module: nn.Module) -> Callable[..., Any]:
    """The ``forward`` of one of TorchScript's modules, whatever ``forward`` the instance has.

    Its class has none that can be called, and asking the module puts it on the instance.
    """
    found: Callable[..., Any] = module._c._get_method("forward")  # type: ignore[union-attr, operator]
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` returned, or has been compiled in place."""
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
