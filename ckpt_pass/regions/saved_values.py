"""What autograd saves inside a region: counted in its forward, collected in its rerun."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import autograd
from ckpt_pass.regions.region import (
    MORE_SAVED,
    OTHER_METADATA,
    OTHER_NUMBER,
    RecomputeMismatchError,
)


class EndedRecomputationError(CkptPassError, RuntimeError):
    """A backward goes through a graph that a recomputation has left behind."""


Looks = tuple[torch.Size, torch.dtype]


def _looks(value: torch.Tensor) -> Looks:
    return value.shape, value.dtype


class SavedLooks:
    """Describes the values that autograd saves in a region's forward, and keeps none.

    By shape and dtype; an op whose arguments are on another device than before fails by itself.
    """

    __slots__ = ("looks",)

    def __init__(self) -> None:
        self.looks: list[Looks] = []

    def pack(self, value: torch.Tensor) -> int:
        """Number a value; a hook for autograd."""
        looks = self.looks
        number = len(looks)
        looks.append((value.shape, value.dtype))
        return number


class Recomputation:
    """Collects what autograd saves while a region runs again, and compares it with the forward.

    Values are handed over without their history. Autograd gives a value that it asks for the
    history which the forward's graph has of it, and a value that led to the recomputation's graph,
    whose hooks lead to where values are kept, would hold itself: no collector sees through
    autograd's nodes. All are cut off at the end, where no mode looks on: alone each would cost more
    than all else that is done with it.

    Args:
        name: of the region.
        expected: what the forward saved looked like.
        complete: called when all of them are there; may end the run by raising.
        checked: whether looks are compared.
    """

    __slots__ = (
        "_checked",
        "_count",
        "_expected",
        "_name",
        "_seen",
        "_store",
        "complete",
        "refused",
    )

    def __init__(
        self,
        name: str,
        expected: list[Looks],
        complete: Callable[[], None],
        checked: bool = True,
    ) -> None:
        self._store: list[torch.Tensor] = []
        self._seen = 0
        self._name = name
        self._expected = expected
        self._count = len(expected)
        self.complete = complete
        #: What was said of the value that was refused; the error itself holds frames, which hold
        #: this, and all through autograd's C++ side, where no collector looks.
        self.refused: str | None = None
        self._checked = checked

    def pack(self, value: torch.Tensor) -> int:
        """Keep a value; a hook for autograd.

        Raises:
            RecomputeMismatchError: the forward saved another shape or dtype here.
        """
        store = self._store
        number = len(store)
        # What comes past all that the forward saved is let go in the end.
        if self._checked and number < self._count:
            looks = (value.shape, value.dtype)
            if looks != self._expected[number]:
                self.refused = self._mismatch(number, value)
                raise RecomputeMismatchError(self.refused)
        store.append(value)
        if number + 1 == self._count:
            self.complete()
        return number

    def unpack(self, number: int) -> torch.Tensor:
        """Give a value to a backward inside the region itself; a hook for autograd.

        Raises:
            EndedRecomputationError: such a backward comes after the recomputation.
        """
        if number >= len(self._store):
            raise EndedRecomputationError(
                f"A backward goes through the graph that the recomputation of {self._name} made, "
                "but that has ended, and its values are let go. Expected a backward through what "
                "the forward returned, or inside the region: look for code that puts a tensor of "
                "the region where a later one takes it, and let it keep the forward's."
            )
        return autograd.without_history(self._store[number])

    @property
    def has_all(self) -> bool:
        """Whether all that the forward saved is there, while it is not handed over."""
        return len(self._store) >= self._count

    @property
    def is_complete(self) -> bool:
        """Whether all that the forward saved has come."""
        return self._seen >= self._count

    def handed_over(self) -> list[torch.Tensor | None]:
        """The values that the forward saved, at the end.

        All are let go here: where the region's code has put a tensor away, the graph of the
        recomputation stays with it, and would keep every value.
        """
        store, self._store = self._store, []
        self._seen = len(store)
        if self._seen > self._count:
            del store[self._count :]
        return autograd.without_histories(store)

    def check_count(self, exactly: bool = False) -> None:
        """Raise unless all is there.

        Args:
            exactly: whether more than in the forward is wrong, too: in a run to the end it is.

        Raises:
            RecomputeMismatchError: the recomputation saved less than the forward, or more.
        """
        if not self.is_complete or (exactly and self._seen > self._count):
            raise RecomputeMismatchError(
                f"{OTHER_NUMBER if self._seen < self._count else MORE_SAVED}\n"
                f"Number of tensors saved during forward: {self._count}\n"
                f"Number of tensors saved during recomputation: {self._seen}\n"
                f"The region is {self._name}. Expected the same ops in both: look for code that "
                "depends on global state, on a counter, or on values that changed between forward "
                "and backward."
            )

    def _mismatch(self, number: int, got: torch.Tensor) -> str:
        made_by = f", made by {got.grad_fn.name()}" if got.grad_fn is not None else ""
        return (
            f"{OTHER_METADATA}\n"
            f"tensor at position {number}{made_by}:\n"
            f"saved metadata: {_words(self._expected[number])}\n"
            f"recomputed metadata: {_words(_looks(got))}\n"
            f"The region is {self._name}. Expected the same in both: look for routing or code that "
            "depends on global state, or save what decides it (topk, argmax, counts) with a policy."
        )


def _words(looks: Looks) -> str:
    return str(dict(zip(("shape", "dtype"), looks, strict=True)))
