"""The door to the states of random numbers that code under ours reads, and keeps."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._prims.rng_prims import (
    graphsafe_run_with_rng_state,
    run_and_save_rng_state,
    run_with_rng_state,
)


def _find_memcmp() -> Callable[[int, int, int], int] | None:
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    try:
        return prototype(("memcmp", ctypes.pythonapi))
    except AttributeError:  # Windows has it elsewhere
        return None


_memcmp = _find_memcmp()


def same_states(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two states, as generators give them (bytes in a row on the host), are the same.

    A mode of dispatch is to see that this is asked: where a step is recorded on fake tensors, which
    draw nothing, the answer is that of the step as it is run for real. Where there is none the
    bytes are compared, for the op takes longer than to read both states.
    """
    nbytes = one.nbytes
    if _memcmp is None or nbytes != other.nbytes or torch._C._len_torch_dispatch_stack():
        return torch.equal(one, other)
    return _memcmp(one.data_ptr(), other.data_ptr(), nbytes) == 0


@contextlib.contextmanager
def told_of_states(told: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Inside, be told of each state of the CPU's random numbers that this thread reads.

    No mode sees such tensors. ``torch.utils.checkpoint`` keeps one for each region until that has
    run again, and ``torch.random.fork_rng`` one as long as it lasts; both ask
    ``torch.get_rng_state``, which is another function meanwhile.
    """
    read, thread = torch.random.get_rng_state, threading.get_ident()

    def get_rng_state() -> torch.Tensor:
        state = read()
        if threading.get_ident() == thread:
            told(state)
        return state

    torch.get_rng_state = torch.random.get_rng_state = get_rng_state
    try:
        yield
    finally:
        torch.get_rng_state = torch.random.get_rng_state = read


def in_parts(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an op that saves a state of random numbers, or draws from one, as the ops it comes to.

    On fake tensors (``torch._prims.rng_prims``): the states are uninitialised memory of their size.

    Raises:
        NotImplementedError: it is another op that runs ops.
    """
    if func is run_and_save_rng_state:
        op, *rest = args
        return _state(), op(*rest, **kwargs)
    if func is run_with_rng_state:
        _, op, *rest = args
        present = _state()  # put back afterwards
        drawn = op(*rest, **kwargs)
        del present
        return drawn
    if func is graphsafe_run_with_rng_state:  # a generator, which is there anyway
        op, *rest = args
        return op(*rest, **{key: value for key, value in kwargs.items() if key != "rng_state"})
    raise NotImplementedError(f"{func.name()} runs what is not followed")


def _state() -> torch.Tensor:
    nbytes = torch.default_generator.get_state().nbytes
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
