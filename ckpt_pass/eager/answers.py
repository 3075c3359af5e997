"""What a step answers when its own Python looks at values: found by running its forward for real.

Fake tensors have no values. Where a model branches on one (``if x.isfinite().all()``, a mask that
is looked at, a layer that is dropped by chance) or makes a tensor whose size depends on values
(``x[x > 0]``), the forward is run once on real tensors, and a recording on fake ones is given the
same answers in the same order. The forward's values are let go as soon as Python does, so that it
takes the memory of a forward without gradients.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from ckpt_pass._errors import CkptPassError
from ckpt_pass.ops.taxonomy import op_name

_aten = torch.ops.aten
_WRITES_BY_INDEX = frozenset(
    {_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
)
_WRITES_BY_MASK = frozenset({_aten.masked_scatter.default, _aten.masked_scatter_.default})
_ASKING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class OtherPathError(CkptPassError):
    """A recording on fake tensors did not follow the forward that was run for real."""


@dataclass(frozen=True)
class _Look:
    """What a tensor looks like, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def asks(func: Any) -> bool:
    """Whether what an op returns, or the size of it, depends on values."""
    return any(tag in getattr(func, "tags", ()) for tag in _ASKING)


def is_mask(index: torch.Tensor | None) -> bool:
    """Whether an index chooses by truth, not by number."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def written_by_masks(func: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The masks by which an op writes: its backward chooses by them again."""
    if func in _WRITES_BY_INDEX:
        return [index for index in args[1] if is_mask(index)]
    return [args[1]] if func in _WRITES_BY_MASK else []


class Answers:
    """What the ops that ask answered, in order; given out once each."""

    def __init__(self, given: Iterable[tuple[Any, Any]] = ()) -> None:
        self._given: deque[tuple[Any, Any]] = deque(given)
        self._counts: deque[tuple[Any, tuple[int, ...]]] = deque()

    def anew(self) -> Answers:
        """The same answers, to be given out from the first one on."""
        again = Answers(self._given)
        again._counts.extend(self._counts)
        return again

    def note_counts(self, func: Any, counts: tuple[int, ...]) -> None:
        """Keep how much an op chose by masks."""
        self._counts.append((func, counts))

    def next_counts(self, func: Any) -> tuple[int, ...]:
        """How much an op chooses by masks; nothing where that was not counted."""
        if not self._counts or self._counts[0][0] is not func:
            return ()
        return self._counts.popleft()[1]

    def note(self, func: Any, output: Any) -> None:
        """Keep an answer: numbers as they are, tensors by their look."""
        look = tree_map_only(
            torch.Tensor,
            lambda t: _Look(tuple(t.shape), t.stride(), t.dtype, t.device),
            output,
        )
        self._given.append((func, look))

    def next(self, func: Any) -> Any:
        """The answer to an op, tensors as new ones.

        Raises:
            OtherPathError: it is not the op that was asked next in the real forward.
        """
        expected, look = self._given.popleft() if self._given else (None, None)
        if expected is not func:
            there = op_name(expected) if expected is not None else "the end of the forward"
            raise OtherPathError(
                f"On fake tensors the forward came to {op_name(func)}, where it came to {there} on "
                "real ones. Expected a forward that takes the same way twice with the same inputs "
                "and random state: no counters or caches of its own may turn it."
            )
        return tree_map(lambda found: found.made() if isinstance(found, _Look) else found, look)


class _Asked(TorchDispatchMode):
    """Notes the answers of a real forward."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled regions are no part of what is asked by Python (read by torch)."""
        return True

    def __init__(self, answers: Answers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answers = answers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if masks := written_by_masks(func, args):
            self._answers.note_counts(func, tuple(_chosen_by(mask, args[0]) for mask in masks))
        output = func(*args, **(kwargs or {}))
        if asks(func):
            self._answers.note(func, output)
        return output


class _OneByOne(TorchFunctionMode):
    """Has ``tolist`` ask for each value: of real tensors it reads their memory, unseen by ops.

    Of fake ones it asks so by itself (``FakeTensor.tolist``).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.tolist:
            for value in args[0].detach().flatten():
                value.item()
        return func(*args, **(kwargs or {}))


def _chosen_by(mask: torch.Tensor, values: torch.Tensor) -> int:
    if mask.dim() != values.dim():
        return int(mask.count_nonzero())
    return int(mask.expand_as(values).count_nonzero())  # ``masked_scatter`` takes smaller ones


class _HeldNoneError(BaseException):
    """A backward inside the forward has asked for a value; no handler of the user's takes it."""


def _none(_: torch.Tensor) -> None:
    return None


def _not_held(_: None) -> torch.Tensor:
    raise _HeldNoneError


def real_answers(forward: Callable[[], Any]) -> Answers:
    """Run a forward on real tensors and note what it was told of their values.

    Autograd records as in a step, but holds no values: there is no backward. Where there is one
    inside the forward, that runs again and values are held. The random state is afterwards what it
    was before.

    Args:
        forward: runs it, and leaves everything as it was.
    """
    try:
        return _noted(forward, torch.autograd.graph.saved_tensors_hooks(_none, _not_held))
    except _HeldNoneError:
        return _noted(forward, contextlib.nullcontext())


def _noted(forward: Callable[[], Any], hooks: contextlib.AbstractContextManager[Any]) -> Answers:
    answers = Answers()
    with torch.random.fork_rng(), _Asked(answers), _OneByOne(), hooks:
        forward()
    return answers
