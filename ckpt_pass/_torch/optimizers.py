"""torch's optimizers on fake tensors: the way that they take on plain ones, and nobody told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes

#: Where torch writes down which classes of tensors its multi-tensor kernels take.
_SUPPORTED: tuple[list[Any], ...] = (
    torch_optimizer._foreach_supported_types,
    _foreach_utils._foreach_supported_types,
)
#: Hooks on the steps of all optimizers.
_GLOBAL_HOOKS: tuple[dict[Any, Any], ...] = (
    torch_optimizer._global_optimizer_pre_hooks,
    torch_optimizer._global_optimizer_post_hooks,
)
#: Where an optimizer keeps the hooks on its own steps.
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@contextlib.contextmanager
def as_on_plain_tensors() -> Iterator[None]:
    """Inside, optimizers choose their kernels for fake tensors as for plain ones, hooks rest.

    torch takes its multi-tensor kernels for two classes of tensors alone, and one loop for others;
    and while anything is compiled, what can be captured in a graph. A step that compiles parts of
    itself runs them as they are, op by op: nothing is compiled beneath the modes that count.
    """
    added = [names for names in _SUPPORTED if FakeTensor not in names]
    compiling = torch.compiler._is_compiling_flag
    hooks = [(place, dict(place)) for place in _GLOBAL_HOOKS]
    for names in added:
        names.append(FakeTensor)
    for place, _ in hooks:
        place.clear()
    torch.compiler._is_compiling_flag = False
    stance = contextlib.ExitStack()
    with contextlib.suppress(RuntimeError):  # there is no other one while dynamo compiles
        stance.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        with stance:
            yield
    finally:
        torch.compiler._is_compiling_flag = compiling
        for names in added:
            names.remove(FakeTensor)
        for place, before in hooks:
            place.update(before)


#: Inside, ops run as without any mode.
outside_modes = _disable_current_modes


def is_fused_or_foreach(func: Any) -> bool:
    """Whether an op is one kernel over lists of tensors."""
    name = getattr(func, "__name__", "")
    return name.startswith(("_foreach_", "_fused_", "_amp_foreach_"))


def reads_a_number(func: Any) -> bool:
    """Whether an op gives Python a tensor's number."""
    return func is torch.ops.aten._local_scalar_dense.default
