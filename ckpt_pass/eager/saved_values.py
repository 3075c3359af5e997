"""What autograd saves inside a region: counted in its forward, collected in its rerun."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ckpt_pass.eager.region import RecomputeMismatchError


class SavedShapes:
    """Describes the values that autograd saves in a region's forward, and keeps none.

    A shape tells real mismatches at a fifth of what a full description costs; dtype and device
    follow from the region's arguments and from autocast, which are restored.
    """

    __slots__ = ("shapes",)

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def pack(self, value: torch.Tensor) -> int:
        """Number a value; a hook for autograd."""
        shapes = self.shapes
        shapes.append(value.shape)
        return len(shapes) - 1


class Recomputation:
    """Collects what autograd saves while a region runs again, and compares it with the forward.

    Args:
        name: of the region.
        expected: the shapes that the forward saved.
        complete: called when all of them are there; may end the run by raising.
        checked: whether shapes are compared.
    """

    __slots__ = ("_checked", "_complete", "_count", "_expected", "_name", "store")

    def __init__(
        self,
        name: str,
        expected: list[torch.Size],
        complete: Callable[[], None],
        checked: bool = True,
    ) -> None:
        self.store: list[torch.Tensor | None] = []
        self._name = name
        self._expected = expected
        self._count = len(expected)
        self._complete = complete
        self._checked = checked

    def pack(self, value: torch.Tensor) -> int:
        """Keep a value; a hook for autograd.

        The value keeps its own history.

        Raises:
            RecomputeMismatchError: the forward saved another shape here.
        """
        store = self.store
        number = len(store)
        if self._checked and number < self._count and value.shape != self._expected[number]:
            raise self._mismatch(number, value)
        store.append(value)
        if number + 1 == self._count:
            self._complete()
        return number

    def unpack(self, number: int) -> torch.Tensor:
        """Give a value to a backward inside the region itself; a hook for autograd."""
        value = self.store[number]
        assert value is not None
        return value

    def handed_over(self) -> list[torch.Tensor | None]:
        """The values, which are let go here."""
        store, self.store = self.store, []
        return store

    def check_count(self) -> None:
        """Raise unless all is there.

        Raises:
            RecomputeMismatchError: the recomputation saved less than the forward.
        """
        if len(self.store) < self._count:
            raise RecomputeMismatchError(
                f"The recomputation of {self._name} saved a different number of tensors "
                f"({len(self.store)}) than its forward ({self._count}). Expected the same ops in "
                "both: look for code that depends on global state, on a counter, or on values "
                "that changed between forward and backward."
            )

    def _mismatch(self, number: int, got: torch.Tensor) -> RecomputeMismatchError:
        made_by = f", made by {got.grad_fn.name()}" if got.grad_fn is not None else ""
        return RecomputeMismatchError(
            f"The recomputation of {self._name} saved a tensor with different metadata: value "
            f"{number} has shape {list(got.shape)}{made_by}, but in the forward it had "
            f"{list(self._expected[number])}. Expected the same in both: look for routing or code "
            "that depends on global state, or save what decides it (topk, argmax, counts) with a "
            "policy."
        )
