"""Dispatch modes that cost little an op, and code that dynamo leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Self, TypeVar

import torch
from torch._ops import OpOverload
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

F = TypeVar("F", bound=Callable[..., Any])

#: Dynamo's own switch for a code object and all that it calls; torch might rename it.
_STRATEGY: Any = getattr(torch._C._dynamo.eval_frame, "_FrameExecStrategy", None)
_ACTION: Any = getattr(torch._C._dynamo.eval_frame, "_FrameAction", None)
_MARK: Any = getattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy", None)
_CAN_MARK = _STRATEGY is not None and _ACTION is not None and _MARK is not None

#: Where torch notes which kinds of modes are around what runs.
_NOTED: dict[str, Any] = vars(_python_dispatch)
_IN_MODE = "_is_in_torch_dispatch_mode"
_IN_USERS_MODE = "_is_in_non_infra_torch_dispatch_mode"
#: Modes that ignore what compiled regions do leave alone whatever else it notes.
_CAN_ENTER = {_IN_MODE, _IN_USERS_MODE} <= _NOTED.keys() and hasattr(
    TorchDispatchMode, "ignore_compile_internals"
)


def left_alone(fn: F) -> F:
    """The function, of which dynamo compiles nothing, nor of what it calls, at no cost in eager.

    ``torch.compiler.disable``, three Python calls more each time, where code cannot be marked.
    """
    if not _CAN_MARK or not isinstance(fn, FunctionType):
        found: F = torch.compiler.disable(fn)
        return found
    _MARK(fn.__code__, _STRATEGY(_ACTION.SKIP, _ACTION.SKIP))
    return fn


_aten = torch.ops.aten
#: Torch's own functions for some operators, which take their arguments and call nothing else. An
#: operator's general call has each argument looked up in its schema: about a microsecond.
_FUNCTIONS: dict[OpOverload, Callable[..., Any]] = {
    _aten.t.default: torch.t,
    _aten.mm.default: torch.mm,
    _aten.bmm.default: torch.bmm,
    _aten.addmm.default: torch.addmm,
    _aten.native_layer_norm.default: torch.native_layer_norm,
    _aten.gelu.default: torch._C._nn.gelu,
    _aten.silu.default: torch._C._nn.silu,
    _aten.relu.default: torch.relu,
    _aten.tanh.default: torch.tanh,
    _aten.sigmoid.default: torch.sigmoid,
}


def caller(op: Any) -> Callable[..., Any]:
    """What calls an operator with no Python in between (``OpOverload.__call__``)."""
    if type(op) is not OpOverload:
        found: Callable[..., Any] = op
        return found
    return _FUNCTIONS.get(op, op._op)


class QuickMode(TorchDispatchMode):
    """A dispatch mode that dynamo leaves alone, at no cost in eager.

    Torch wraps ``__torch_dispatch__`` in ``torch.compiler.disable``, three Python calls an op.
    Here its code is marked instead, which is looked at only where something is compiled.
    """

    #: Higher-order ops are ops to this mode, like any other (read by torch).
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled regions inside are one op to this mode (read by torch)."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return not _CAN_MARK

    def __init__(self) -> None:
        if not _CAN_ENTER:
            super().__init__()  # type: ignore[no-untyped-call]
        #: What torch noted of the modes around, each time when this was entered.
        self._around: list[tuple[bool, bool]] = []

    def __enter__(self) -> Self:
        if not _CAN_ENTER:
            return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]
        # As torch's, of which half would do nothing for a mode of this kind. It is entered twice
        # in each run of a region.
        noted = _NOTED
        self._around.append((noted[_IN_MODE], noted[_IN_USERS_MODE]))
        noted[_IN_MODE] = noted[_IN_USERS_MODE] = True
        torch._C._push_on_torch_dispatch_stack(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        if not _CAN_ENTER:
            super().__exit__(*exc)  # type: ignore[no-untyped-call]
            return
        _NOTED[_IN_MODE], _NOTED[_IN_USERS_MODE] = self._around.pop()
        torch._C._pop_torch_dispatch_stack(None)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        dispatch = cls.__dict__.get("__torch_dispatch__")
        if _CAN_MARK and isinstance(dispatch, FunctionType):
            left_alone(dispatch)
