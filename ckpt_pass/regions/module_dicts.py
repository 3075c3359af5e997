"""What lies in the ``__dict__`` of every module, and what of it a region reads."""

from __future__ import annotations

from typing import Any

from torch import nn

#: What every module has, in this order.
NAMES = list(nn.Module().__dict__)
FIRST = len(NAMES)
INTERNAL = frozenset(NAMES)
FORWARD_HOOKS = tuple(name for name in NAMES if "forward" in name and "hooks" in name)
#: Of that what a run does not read, or what is looked at by its contents: hooks.
_LEFT_OUT = frozenset(n for n in NAMES if "hook" in n) | {"_non_persistent_buffers_set"}
_READ = tuple(name for name in NAMES if name not in _LEFT_OUT)


def read_by_runs(own: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module without hooks, less those that say nothing of a run.

    Most of a module's attributes are empty dicts of its own, and to touch each costs as much as to
    copy all that is read.
    """
    names = list(own)
    if names[:FIRST] == NAMES:  # nearly always
        return {name: own[name] for name in (*_READ, *names[FIRST:])}
    return {name: own[name] for name in names if name not in _LEFT_OUT}
