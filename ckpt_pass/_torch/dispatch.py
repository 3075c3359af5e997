"""Dispatch modes that cost little an op."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

#: Dynamo's own switch for a code object and all that it calls; torch might rename it.
_STRATEGY: Any = getattr(torch._C._dynamo.eval_frame, "_FrameExecStrategy", None)
_ACTION: Any = getattr(torch._C._dynamo.eval_frame, "_FrameAction", None)
_MARK: Any = getattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy", None)
_CAN_MARK = _STRATEGY is not None and _ACTION is not None and _MARK is not None


def caller(op: Any) -> Callable[..., Any]:
    """What calls an operator with no Python in between (``OpOverload.__call__``)."""
    found: Callable[..., Any] = op._op if type(op) is OpOverload else op
    return found


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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        dispatch = cls.__dict__.get("__torch_dispatch__")
        if _CAN_MARK and isinstance(dispatch, FunctionType):
            _MARK(dispatch.__code__, _STRATEGY(_ACTION.SKIP, _ACTION.SKIP))
