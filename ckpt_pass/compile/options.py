"""What a backend may be asked for, and how it is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass._torch import compilers

INNER = ("inductor", "aot_eager")
OPTIONS = (
    "policy",
    "inner",
    "regions",
    "inner_options",
    "budget",
    "total",
    "optimizer",
    "solver",
    "time_limit_s",
    "cost",
    "offload",
)


class UnknownOptionError(CkptPassError):
    """An option of the backend is unknown, or its value is not one that it takes."""


def as_patterns(regions: Any) -> tuple[str, ...] | None:
    """What was given as ``regions=``.

    Raises:
        UnknownOptionError: it is no list of patterns.
    """
    patterns = (regions,) if isinstance(regions, str) else regions
    if patterns is None:
        return None
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise UnknownOptionError(
            f"Got regions={regions!r}, expected module name patterns such as ['model.layers.*'], "
            "[] for no regions, or None to find the repeated layers."
        )
    return tuple(patterns)


def check_inner(inner: Any, inner_options: Any) -> None:
    """Look at what is to compile, and at the options for it.

    Raises:
        UnknownOptionError: they are none of those.
    """
    if not isinstance(inner_options, Mapping):
        raise UnknownOptionError(
            f"Got inner_options={inner_options!r} of type {type(inner_options).__name__}, expected "
            "a mapping, such as {'max_autotune': True}."
        )
    if inner not in INNER:
        raise UnknownOptionError(
            f"Got inner={inner!r}, expected one of {', '.join(INNER)}.{nearest(str(inner), INNER)}"
        )
    if inner_options and inner != "inductor":
        raise UnknownOptionError(
            f"Got inner_options={dict(inner_options)!r} with inner={inner!r}, which takes none. "
            "Leave them out, or use inner='inductor'."
        )
    known = compilers.inductor_option_names() if inner_options else frozenset()
    for key in inner_options:
        if key not in known:
            raise UnknownOptionError(
                f"Inductor has no option {key!r}.{nearest(key, known)} "
                "torch._inductor.list_options() lists them."
            )
