"""What a test puts around a step: no garbage collector, several threads; which torch it is."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

#: Tests that also say what torch itself does say it of torch 2.13.
SINCE_2_13 = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Let nothing be freed but what nobody refers to: the collector of cyclic garbage rests."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def on_threads(work: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Call ``work`` with each tuple of arguments, all at once, and wait for all."""
    threads = [threading.Thread(target=work, args=args) for args in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
