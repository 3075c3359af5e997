"""Copies by a thread of their own, one after another, at a limited rate where one is given."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from ckpt_pass._errors import CkptPassError

#: What a job does with the bytes of a tensor.
Copy = Callable[[torch.Tensor], None]


class ForkedStoreError(CkptPassError, RuntimeError):
    """A value was put away before a fork, and its store belongs to the other process."""


class Job:
    """A copy that a worker makes."""

    __slots__ = ("_future", "_held", "_process", "_worker")

    def __init__(self, future: Future[None], held: list[torch.Tensor], worker: Worker) -> None:
        self._future = future
        self._held = held
        self._worker = worker
        self._process = os.getpid()

    def wait(self) -> None:
        """Until it is finished; raises what it raised, but without the tensors in its frames.

        Raises:
            ForkedStoreError: a process that was forked waits for a thread that it does not have.
        """
        if os.getpid() != self._process:
            raise ForkedStoreError(
                f"A copy that process {self._process} has begun is waited for by process "
                f"{os.getpid()}, which was forked from it. Expected forward and backward in one "
                "process. Fork before the forward."
            )
        error = self._future.exception()
        if error is not None:
            raise type(error)(*error.args)

    def abandon(self) -> None:
        """Do not make it, if it has not begun: later ones use its slot, and come after it.

        Its tensor is let go of: that is waited for, as long as one copy takes at most.
        """
        if os.getpid() != self._process:
            return
        if self._future.cancel():
            self._held.clear()
        elif not self._worker.is_this_thread:  # a finalizer may run anywhere
            wait([self._future])


class Worker:
    """A thread that makes copies in the order in which they are asked for.

    It holds a tensor no longer than its copy takes: whoever waits for a copy is the last to let go
    of the tensor.

    Args:
        name: of the thread.
        bytes_per_s: no faster than that; for tests, which need a link of a known rate.
    """

    def __init__(self, name: str, bytes_per_s: float | None = None) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._thread = 0

    @property
    def is_this_thread(self) -> bool:
        """Whether it is the worker that asks."""
        return threading.get_ident() == self._thread

    def begin(self, copy: Copy, data: torch.Tensor, after: Job | None = None) -> Job:
        """Make a copy when its turn comes, and ``after`` is finished.

        Args:
            copy: what makes it.
            data: the tensor of bytes that it reads or fills.
            after: another worker's job.
        """
        held = [data]
        return Job(self._threads.submit(self._run, copy, held, after), held, self)

    def _run(self, copy: Copy, held: list[torch.Tensor], after: Job | None) -> None:
        self._thread = threading.get_ident()
        if after is not None:
            after.wait()
        began = time.perf_counter()
        nbytes = held[0].numel()
        copy(held.pop())
        if self._bytes_per_s is not None:
            # From the moment at which the link was free, so that what a sleep takes too long, and
            # what lies between two jobs that wait in line, does not add up.
            late = began - self._free_at > 0.001
            self._free_at = (began if late else self._free_at) + nbytes / self._bytes_per_s
            time.sleep(max(self._free_at - time.perf_counter(), 0.0))
