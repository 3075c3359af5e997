"""Numbers of a recorded step that no parameter goes into: fake, and their values beside them.

Floating tensors are fake in a recording. But models make masks of such: ``torch.ones(2, 8)`` is
cast to ``bool``, a row of zeros and infinities is compared with 0, and the mask is looked at, or is
left as it is where it is seen to be fake. So the values of small constants, and of small arguments,
are computed beside the record. What is whole or a mask and made of these alone is real then, as
what is made of whole numbers is (:mod:`ckpt_pass.eager.real_numbers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ckpt_pass._torch import autograd
from ckpt_pass._torch.operators import OpOverload
from ckpt_pass._torch.storages import has_memory
from ckpt_pass.eager.answers import asks
from ckpt_pass.eager.real_numbers import is_number
from ckpt_pass.eager.trace_ops import changed_tensors, with_known_shape
from ckpt_pass.ops.taxonomy import draws_random
from ckpt_pass.policy.sites import output_tensors

#: What is larger has no values here: no mask that a model looks at, and slow to compute.
MOST_ELEMENTS = 1 << 20
#: What is larger among a step's arguments and buffers is data.
MOST_GIVEN_ELEMENTS = 1 << 16

_aten = torch.ops.aten
#: Ops that take the look of a tensor alone.
_OF_LOOKS = frozenset(
    {
        _aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default,
        _aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default,
    }
)  # fmt: skip
#: Ops that give memory as it is found.
_WITHOUT_VALUES = ("empty", "new_empty", "_efficientzerotensor", "resize", "set")


class Constants:
    """The values of some fake tensors."""

    def __init__(self) -> None:
        self._values = WeakTensorKeyDictionary()

    def give(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        """Say which values an argument or a buffer has, if it is small."""
        learns = real.requires_grad or isinstance(real, nn.Parameter)
        small = _is_strided(real) and real.numel() <= MOST_GIVEN_ELEMENTS
        if small and not learns and has_memory(real):
            self._values[fake] = real.detach().clone(memory_format=torch.preserve_format)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the values of a fake tensor are known."""
        return tensor in self._values

    def of_nothing(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """An op has made fake numbers of no tensor."""
        if self._is_computed(func, args, kwargs) and _are_small(output):
            self._note(output, func(*args, **kwargs))

    def run(self, func: Any, args: Any, kwargs: Any, given: Sequence[torch.Tensor]) -> Any:
        """Run an op on fake tensors, and beside it on the values of those that have some.

        Args:
            func, args, kwargs: the call.
            given: the tensors that it gets, some of them fake.

        Returns:
            The output, real where it is whole and its values are known.
        """
        known = self._knows_all(func, given) and self._is_computed(func, args, kwargs)
        if known and asks(func):
            return self._computed(func, args, kwargs)
        output = with_known_shape(func, args, kwargs)
        changed = changed_tensors(func, args, kwargs)
        if not known or not _are_small(output):
            self._forget(changed)
            return output
        found = self._computed(func, args, kwargs)
        if changed or _returns_views(func):
            self._note(output, found)
            return output
        return tree_map(self._chosen, output, found)

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self._value, (args, kwargs))
        return func(*args, **kwargs)

    def _chosen(self, fake: Any, real: Any) -> Any:
        if isinstance(real, torch.Tensor) and is_number(real):
            self._note(fake, real)
            return fake
        return real

    def _is_computed(self, func: Any, args: Any, kwargs: Any) -> bool:
        if not isinstance(func, OpOverload) or func.namespace != "aten":
            return False
        name = str(func._schema.name).partition("::")[2]
        return not (name.startswith(_WITHOUT_VALUES) or draws_random(func, args, kwargs))

    def _knows_all(self, func: Any, given: Sequence[torch.Tensor]) -> bool:
        return func in _OF_LOOKS or all(not autograd.is_fake(t) or self.knows(t) for t in given)

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        if not autograd.is_fake(tensor):
            return tensor
        found: torch.Tensor | None = self._values.get(tensor)
        if found is not None:
            return found
        size, stride = tuple(tensor.shape), tensor.stride()  # its look is all that is asked for
        return torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)

    def _note(self, output: Any, real: Any) -> None:
        for fake, value in zip(tree_leaves(output), tree_leaves(real), strict=True):
            if isinstance(fake, torch.Tensor) and autograd.is_fake(fake):
                self._values[fake] = value

    def _forget(self, changed: Sequence[torch.Tensor]) -> None:
        """Other values have been written into some tensors, so into what shares their memory."""
        if changed and self._values:
            memory = {tensor.untyped_storage()._cdata for tensor in changed if _is_strided(tensor)}
            for fake in list(self._values):
                if fake.untyped_storage()._cdata in memory:
                    del self._values[fake]


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _are_small(output: Any) -> bool:
    tensors = list(output_tensors(output))
    return all(_is_strided(t) and t.numel() <= MOST_ELEMENTS for t in tensors)


def _returns_views(func: Any) -> bool:
    return any(returned.alias_info is not None for returned in func._schema.returns)
