"""Files that nobody else can open and that are gone when their process is, also when killed."""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from pathlib import Path

from ckpt_pass._errors import CkptPassError

_PREFIX = "ckpt_pass"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-[0-9a-f]+\.slab")


class StoreFolderError(CkptPassError, OSError):
    """A folder in which no values can be kept."""


def open_unnamed(folder: str | Path | None) -> int:
    """Open a new file without a name, for reading and writing.

    Where the system has no such files it has a name for a moment. What is left of that when the
    process is killed just then is removed by the next one.

    Args:
        folder: where; made with mode 0700 if it is not there. One of the user's own in the system's
            folder for temporary files where ``None``.

    Returns:
        Its descriptor.

    Raises:
        StoreFolderError: it cannot be opened there.
    """
    place = _own_folder() if folder is None else Path(folder)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder is None:
            _check_owned(place)
        _remove_left_over(place)
        return _open(place)
    except OSError as error:
        if isinstance(error, StoreFolderError):
            raise
        raise StoreFolderError(
            f"No file for offloaded values can be opened in {place}: {error.strerror or error}. "
            "Expected a folder that this user can write to. Name another: Offload(folder=...)."
        ) from error


def _own_folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"{_PREFIX}-{user}"


def _check_owned(folder: Path) -> None:
    """Refuse a folder of a known name that another user has made, or can write to."""
    found = folder.lstat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if not mine or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise StoreFolderError(
            f"{folder} is not a folder of this user alone (owner {found.st_uid}, mode "
            f"{stat.S_IMODE(found.st_mode):o}), expected one with mode 700. Name another: "
            "Offload(folder=...)."
        )


def _open(folder: Path) -> int:
    unnamed = getattr(os, "O_TMPFILE", 0)
    if unnamed:
        try:
            return os.open(folder, unnamed | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            pass  # not every file system has them (overlayfs, NFS); the other way tells why
    path = folder / f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(8)}.slab"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        path.unlink()
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove_left_over(folder: Path) -> None:
    """Remove files of processes that are gone."""
    for path in folder.glob(f"{_PREFIX}-*.slab"):
        match = _NAME.fullmatch(path.name)
        if match is not None and not _is_running(int(match[1])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
