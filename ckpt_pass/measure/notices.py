"""Keep the profiler's notices off the terminal.

From torch 2.13 on the profiler writes two lines to the process's standard error whenever a
session starts and stops (pytorch/kineto#1325): ``USDT:... profiler_start``. Its only switch is an
environment variable that is read once and silences its warnings as well.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

_STANDARD_ERROR = 2
_NOTICE = re.compile(rb"^USDT:.*\bprofiler_(?:start|stop)\n", re.MULTILINE)


@contextmanager
def without_notices() -> Iterator[None]:
    """Let whatever is written to standard error inside come afterwards, the notices left out.

    Where the process has no standard error nothing is changed.
    """
    try:
        kept = os.dup(_STANDARD_ERROR)
    except OSError:
        yield
        return
    with open(kept, "wb", buffering=0) as real, tempfile.TemporaryFile() as held:
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(held.fileno(), _STANDARD_ERROR)
        try:
            yield
        finally:
            os.dup2(real.fileno(), _STANDARD_ERROR)
            _hand_on(held, real)


def _hand_on(held: BinaryIO, real: BinaryIO) -> None:
    held.seek(0)
    rest = _NOTICE.sub(b"", held.read())
    while rest:
        rest = rest[real.write(rest) :]
