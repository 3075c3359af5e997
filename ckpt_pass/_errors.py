"""The exceptions of this library: one class each, one message each.

Every message says what happened, on which op or module, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CkptPassError(Exception):
    """Base class of every error that this library raises on purpose."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or an empty string.

    Capitals do not count.
    """
    names = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f" Did you mean {names[close[0]]!r}?" if close else ""
