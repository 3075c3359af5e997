"""Flops of operators, and of a step that runs, eager or compiled.

The formulas are torch's registry (``torch.utils.flop_counter``) with the attention and grouped
matmul operators that it lacks. A multiply-add is 2 flops; a causal mask is not taken off, as torch
does not either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ckpt_pass._torch.operators import OpOverloadPacket, is_nested
from ckpt_pass.ops.taxonomy import functional_twin

#: Torch's names of fused attention, each with a backward of the name with this at its end. Torch
#: 2.13 has no formula for those of the CPU, which would count as free, and that of 2.11 raises
#: where several query heads share a key head.
_ATTENTIONS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
_BACKWARD = "_backward"


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Flops of attention of ``query`` [B, H, T, D]: the scores, and the values that they weigh.

    ``key`` [B, K, S, D] and ``value`` [B, K, S, E] may have fewer heads, which are used again.
    """
    batch, heads, rows, inner = query.shape
    return int(2 * batch * heads * rows * key.shape[-2] * (inner + value.shape[-1]))


def _attention_backward_flops(
    _grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    """Flops of the scores made again, and of the two products for each of the two made before."""
    batch, heads, rows, inner = query.shape
    return int(2 * batch * heads * rows * key.shape[-2] * (3 * inner + 2 * value.shape[-1]))


def _grouped_mm_flops(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Flops of ``aten._grouped_mm``, where 3 dimensions are a batch and 2 hold the groups.

    Each row of ``left`` meets the one group that it is in, or each column of ``right`` does: as
    many as in one product of the last two dimensions, and a batch of two has that many of them.
    """
    rows, inner = left.shape[-2:]
    batch = left.shape[0] if left.dim() == right.dim() == 3 else 1
    return int(2 * batch * rows * inner * right.shape[-1])


def _grouped_mm_backward_flops(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Flops of the products for both gradients; each has as many as the forward's."""
    return 2 * _grouped_mm_flops(left, right)


# By the packet's name: an op of another library need not be registered.
_OURS: dict[str, Callable[..., int]] = {
    **{f"aten.{name}": _attention_flops for name in _ATTENTIONS},
    **{f"aten.{name}{_BACKWARD}": _attention_backward_flops for name in _ATTENTIONS},
    "aten._grouped_mm": _grouped_mm_flops,
    "transformers.grouped_mm_fallback_backward": _grouped_mm_backward_flops,
}


def flop_formula(op: Any) -> Callable[..., int] | None:
    """Return the formula of an operator (overload, packet or higher-order); ``None`` if it is free.

    The formula is called as ``formula(*args, **kwargs, out_val=out)`` on the operator's arguments
    and result, real or fake tensors alike. An in-place operator has its functional twin's. Formulas
    that a user registers with torch's ``register_flop_formula`` are found too, and go before ours.
    """
    packet = getattr(functional_twin(op), "overloadpacket", op)
    ours = _OURS.get(str(packet)) if isinstance(packet, OpOverloadPacket) else None
    found = flop_registry.get(packet)
    return ours if found is None or (_is_torchs(found) and ours is not None) else found


def _is_torchs(formula: Callable[..., int]) -> bool:
    return formula.__module__ == flop_counter.__name__


class FlopCounter(TorchDispatchMode):
    """Counts the flops of every operator dispatched inside ``with``, also in compiled graphs.

    ``torch.utils.flop_counter.FlopCounterMode`` keeps Dynamo from compiling the function under it
    (which then runs uncompiled), for it does not say that the compiler may ignore it. This does.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell torch that code may be compiled, and run compiled, under this mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(map(is_nested, types)):
            return NotImplemented  # it calls ops on what it is made of, which come here then
        formula = flop_formula(func)
        inner = _inner_operator(args)
        if formula is None and inner is None and hasattr(func, "decompose"):
            with self:  # composite operators arrive whole in inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        elif inner is not None:
            at, formula = inner
            value = out[1] if at == 0 else out  # (op, ...) -> (state, value); (state, op, ...)
            self.flops += formula(*args[at + 1 :], **kwargs, out_val=value)
        return out


def _inner_operator(args: tuple[Any, ...]) -> tuple[int, Callable[..., int]] | None:
    """Return position and formula of the operator that a higher-order one runs below the mode.

    ``run_and_save_rng_state(op, *args)`` and ``run_with_rng_state(state, op, *args)`` are such.
    """
    for at, arg in enumerate(args[:2]):
        if callable(arg) and (formula := flop_formula(arg)) is not None:
            return at, formula
    return None
