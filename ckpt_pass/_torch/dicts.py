"""Whether dicts hold what they held, without a look at what that is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch._C._dynamo.guards import dict_version

_values = dict.values


def _versions(dicts: Sequence[dict[Any, Any]]) -> list[int]:
    """Python's own numbers: no two states of dicts in a process have the same (PEP 509)."""
    return list(map(dict_version, dicts))


def _identities(dicts: Sequence[dict[Any, Any]]) -> list[int]:
    """Keys, values and their types by ``id``: what has gone may have left its own to another."""
    values = list(chain.from_iterable(map(_values, dicts)))
    keys = chain.from_iterable(dicts)
    return [*map(len, dicts), *map(id, keys), *map(id, values), *map(id, map(type, values))]


#: Numbers that are the same only where plain dicts have the same keys and values, object by object,
#: as long as something holds these; else only where the types of all values are the same.
#:
#: From Python 3.12 on dicts have no versions of their own, and torch's would have each write to
#: them watched.
marks_of: Callable[[Sequence[dict[Any, Any]]], list[int]] = (
    _versions if sys.version_info < (3, 12) else _identities
)
