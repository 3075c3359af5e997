"""What was measured of kernels, kept on disk: a JSON file in the user's cache folder.

The file maps an environment (device, torch, thread count, settings) to calls (op and arguments) to
numbers. Nothing in it is code. It is replaced as a whole, so that a reader never meets half of it;
of two processes that write at once, one may lose its entries, which are then measured again.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Written into the file; a file of another layout is replaced.
FORMAT = "ckpt_pass kernels 1"
FILE_NAME = "kernels.json"
#: Names another folder.
ENVIRONMENT_VARIABLE = "CKPT_PASS_CACHE"


class KernelCacheWarning(UserWarning):
    """The file of measured kernels cannot be read or written; what it lacks is measured again."""


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """What was measured of one call of a kernel; ``None`` where it was not asked for.

    Attributes:
        workspace_bytes: allocated while it runs, besides its outputs, at the worst moment.
        time_s: median seconds of a call.
    """

    workspace_bytes: int | None = None
    time_s: float | None = None

    def knows(self, what: frozenset[str]) -> bool:
        """Whether it answers all of ``what`` (``"workspace"``, ``"time"``)."""
        lacks_workspace = "workspace" in what and self.workspace_bytes is None
        return not (lacks_workspace or ("time" in what and self.time_s is None))

    def only(self, what: frozenset[str]) -> KernelFacts:
        """What answers ``what``, and nothing else."""
        return KernelFacts(
            self.workspace_bytes if "workspace" in what else None,
            self.time_s if "time" in what else None,
        )

    def joined(self, other: KernelFacts) -> KernelFacts:
        """Both; where both know, ``other`` counts."""
        return KernelFacts(
            self.workspace_bytes if other.workspace_bytes is None else other.workspace_bytes,
            self.time_s if other.time_s is None else other.time_s,
        )


#: Environment -> call -> facts.
Entries = dict[str, dict[str, KernelFacts]]


def default_folder() -> Path:
    """``$CKPT_PASS_CACHE``, else ``ckpt_pass`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    # A relative path there is to be ignored (XDG Base Directory Specification).
    if base and Path(base).is_absolute():
        return Path(base) / "ckpt_pass"
    return Path("~/.cache/ckpt_pass").expanduser()


class KernelCache:
    """Facts by environment and call, with the file behind them.

    It is read when made; :meth:`add` writes. A file that is not one of these is warned of once,
    and replaced.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (default_folder() if folder is None else folder) / FILE_NAME
        self._entries, wrong = _read(self.path)
        if wrong:
            _warn(f"{self.path} holds no measured kernels ({wrong}). It is ignored and replaced.")

    def get(self, environment: str, call: str) -> KernelFacts | None:
        """What is known of a call."""
        return self._entries.get(environment, {}).get(call)

    def add(self, environment: str, found: Mapping[str, KernelFacts]) -> None:
        """Remember facts, and write them beside what the file holds by now."""
        if not found:
            return
        entries, _ = _read(self.path)
        for known in (self._entries, {environment: dict(found)}):
            for place, calls in known.items():
                _merge(entries.setdefault(place, {}), calls)
        self._entries = entries
        try:
            _write(self.path, entries)
        except OSError as error:
            _warn(
                f"Measured kernels cannot be written to {self.path} ({error}), so that they are "
                f"measured again next time. Name another folder in {ENVIRONMENT_VARIABLE}."
            )


def _warn(message: str) -> None:
    warnings.warn(message, KernelCacheWarning, stacklevel=3)


def _merge(known: dict[str, KernelFacts], more: Mapping[str, KernelFacts]) -> None:
    for call, facts in more.items():
        known[call] = known.get(call, KernelFacts()).joined(facts)


def _read(path: Path) -> tuple[Entries, str]:
    """The file's entries, and what is wrong with it; no file is an empty one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        return {}, f"{type(error).__name__}: {error}"
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return {}, f"expected format {FORMAT!r}"
    places = data.get("environments")
    if not isinstance(places, dict) or not all(isinstance(c, dict) for c in places.values()):
        return {}, "expected environments with calls"
    try:
        found = {
            place: {call: _facts(value) for call, value in calls.items()}
            for place, calls in places.items()
        }
    except ValueError as error:
        return {}, str(error)
    return found, ""


def _facts(value: Any) -> KernelFacts:
    """Check the numbers of one entry."""
    if not isinstance(value, dict) or not value.keys() <= {"workspace_bytes", "time_s"}:
        raise ValueError(f"unknown entry {value!r}")
    workspace, time_s = value.get("workspace_bytes"), value.get("time_s")
    if workspace is not None and (type(workspace) is not int or workspace < 0):
        raise ValueError(f"workspace_bytes {workspace!r}")
    if time_s is not None:
        if type(time_s) not in (int, float) or not math.isfinite(time_s) or time_s < 0:
            raise ValueError(f"time_s {time_s!r}")
        time_s = float(time_s)
    return KernelFacts(workspace, time_s)


def _write(path: Path, entries: Entries) -> None:
    """Write a file beside the old one and put it in its place."""
    data = {
        "format": FORMAT,
        "environments": {
            place: {
                call: {name: v for name, v in asdict(facts).items() if v is not None}
                for call, facts in sorted(calls.items())
            }
            for place, calls in sorted(entries.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
