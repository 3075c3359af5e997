"""Bytes and seconds in words."""

from __future__ import annotations

from ckpt_pass.policy.sites import Bytes


def format_bytes(nbytes: Bytes) -> str:
    """Bytes for people: ``2.0 MiB``; an expression as it is."""
    if not isinstance(nbytes, int):
        return f"{nbytes} B"
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{int(size)} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Seconds for people, from microseconds up."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
