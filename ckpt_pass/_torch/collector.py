"""Python's collector of cyclic garbage, kept from running at a moment of its own choice."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_collector(*, collect_first: bool = True) -> Iterator[None]:
    """No collection inside.

    One would free tensors at random where memory is counted; and it takes a fifth of the time of a
    plan, which makes objects by the million, nearly all of which stay until it is made.

    Args:
        collect_first: collect what there is now, before.
    """
    was_enabled = gc.isenabled()
    if collect_first:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
