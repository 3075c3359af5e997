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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: Written into the file; a file of another layout is replaced.
FORMAT = "ckpt_pass kernels 2"
FILE_NAME = "kernels.json"
#: Names another folder.
ENVIRONMENT_VARIABLE = "CKPT_PASS_CACHE"


class KernelCacheWarning(UserWarning):
    """The file of measured kernels cannot be read or written; what it lacks is measured again."""


@dataclass(frozen=True, slots=True)
class OutputFacts:
    """A tensor that a kernel returned, as it really is.

    Attributes:
        dtype: its name, without ``torch.``.
        storage_bytes: of the memory behind it, which may be more than its elements need; ``None``
            where that is an argument's.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    storage_bytes: int | None


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """What was measured of one call of a kernel; ``None`` where it was not asked for.

    Attributes:
        workspace_bytes: allocated while it runs, besides its outputs, at the worst moment.
        time_s: seconds of a call, undisturbed.
        outputs: the tensors that it returns, measured together with the workspace.
    """

    workspace_bytes: int | None = None
    time_s: float | None = None
    outputs: tuple[OutputFacts, ...] | None = None

    def knows(self, what: frozenset[str]) -> bool:
        """Whether it answers all of ``what`` (``"workspace"``, ``"time"``)."""
        lacks_workspace = "workspace" in what and None in (self.workspace_bytes, self.outputs)
        return not (lacks_workspace or ("time" in what and self.time_s is None))

    def only(self, what: frozenset[str]) -> KernelFacts:
        """What answers ``what``, and nothing else."""
        memory = "workspace" in what
        return KernelFacts(
            self.workspace_bytes if memory else None,
            self.time_s if "time" in what else None,
            self.outputs if memory else None,
        )

    def joined(self, other: KernelFacts) -> KernelFacts:
        """Both; where both know, ``other`` counts."""
        return KernelFacts(
            self.workspace_bytes if other.workspace_bytes is None else other.workspace_bytes,
            self.time_s if other.time_s is None else other.time_s,
            self.outputs if other.outputs is None else other.outputs,
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

    It is read when made, unless it is as this process has seen it last; :meth:`add` writes. A file
    that is not one of these is warned of once, and replaced.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (default_folder() if folder is None else folder) / FILE_NAME
        self._entries, wrong = _FILES.read(self.path)
        if wrong:
            _warn(f"{self.path} holds no measured kernels ({wrong}). It is ignored and replaced.")

    def get(self, environment: str, call: str) -> KernelFacts | None:
        """What is known of a call."""
        return self._entries.get(environment, {}).get(call)

    def add(self, environment: str, found: Mapping[str, KernelFacts]) -> None:
        """Remember facts, and write them beside what the file holds by now."""
        if not found:
            return
        there, _ = _FILES.read(self.path)
        added = {environment: dict(found)}
        more = (added,) if there is self._entries else (self._entries, added)
        entries = {place: dict(calls) for place, calls in there.items()}
        for known in more:
            for place, calls in known.items():
                _merge(entries.setdefault(place, {}), calls)
        self._entries = entries
        try:
            _FILES.write(self.path, entries)
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


class _Files:
    """Files as they were read or written last: a graph after the other asks for the same one.

    Entries are not changed once they are here.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], Entries]] = {}

    def read(self, path: Path) -> tuple[Entries, str]:
        """The file's entries, and what is wrong with it."""
        version = _version(path)
        known = self._known.get(path)
        if known is not None and known[0] == version:
            return known[1], ""
        entries, wrong = _read(path)
        if version and not wrong:  # what is wrong is told of every time
            self._known[path] = version, entries
        return entries, wrong

    def write(self, path: Path, entries: Entries) -> None:
        """Put a file in the place of the one that is there."""
        version = _write(path, entries)
        self._known[path] = version, entries


_FILES = _Files()


def _version(path: Path) -> tuple[int, ...]:
    """What changes with a file that is replaced; nothing without one."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


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
    if not isinstance(value, dict) or not value.keys() <= {"workspace_bytes", "time_s", "outputs"}:
        raise ValueError(f"unknown entry {value!r}")
    workspace, time_s = value.get("workspace_bytes"), value.get("time_s")
    if workspace is not None and (type(workspace) is not int or workspace < 0):
        raise ValueError(f"workspace_bytes {workspace!r}")
    if time_s is not None:
        if type(time_s) not in (int, float) or not math.isfinite(time_s) or time_s < 0:
            raise ValueError(f"time_s {time_s!r}")
        time_s = float(time_s)
    outputs = value.get("outputs")
    return KernelFacts(workspace, time_s, None if outputs is None else outputs_of_json(outputs))


def outputs_as_json(outputs: tuple[OutputFacts, ...]) -> list[list[Any]]:
    """Outputs as plain lists: of whole numbers, a name, and a whole number or nothing."""
    return [[list(o.size), list(o.stride), o.dtype, o.storage_bytes] for o in outputs]


def outputs_of_json(value: Any) -> tuple[OutputFacts, ...]:
    """The outputs that :func:`outputs_as_json` wrote.

    Raises:
        ValueError: it did not.
    """
    if not isinstance(value, list):
        raise ValueError(f"outputs {value!r}")
    return tuple(map(_output, value))


def _output(value: Any) -> OutputFacts:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"output {value!r}")
    size, stride, dtype, nbytes = value
    numbers = [*size, *stride] if isinstance(size, list) and isinstance(stride, list) else [None]
    numbers += [] if nbytes is None else [nbytes]
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    if not known or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"output {value!r}")
    return OutputFacts(tuple(size), tuple(stride), dtype, nbytes)


def _as_json(facts: KernelFacts) -> dict[str, Any]:
    known = {"workspace_bytes": facts.workspace_bytes, "time_s": facts.time_s}
    found: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
    return found if facts.outputs is None else found | {"outputs": outputs_as_json(facts.outputs)}


def _write(path: Path, entries: Entries) -> tuple[int, ...]:
    """Write a file beside the old one and put it in its place; return its version."""
    data = {
        "format": FORMAT,
        "environments": {
            place: {call: _as_json(facts) for call, facts in sorted(calls.items())}
            for place, calls in sorted(entries.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(data, separators=(",", ":")))  # faster than json.dump
        version = _version(Path(name))
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    return version
