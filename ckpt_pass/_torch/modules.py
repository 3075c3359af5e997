"""How torch calls a module that has hooks."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from torch import nn
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
