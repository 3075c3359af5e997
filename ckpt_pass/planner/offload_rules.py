"""Fixed rules that others offload by, and plans that only move: what joint plans are held against.

All of them recompute nothing. When what they move goes and comes back is decided for them as it is
for joint plans, which is more than the fixed rules have where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckpt_pass.planner.covering import Cover, by_idle_time
from ckpt_pass.planner.ground import Ground, Mask


def largest_first(ground: Ground, budget_bytes: int) -> Mask | None:
    """The largest storages, until the plan fits or the other side is full (torchtitan's rule)."""
    rows, link = ground.rows, ground.link
    mask = ground.must.copy()
    away = int(rows.nbytes[mask].sum())
    order = np.argsort(-rows.nbytes, kind="stable")
    for row in order[~mask[order]].tolist():
        if ground.covers(mask, budget_bytes):
            break
        if link.may_hold(away + int(rows.nbytes[row])):
            mask[row] = True
            away += int(rows.nbytes[row])
    return mask if ground.covers(mask, budget_bytes) else None


def layers_but_the_last(ground: Ground, budget_bytes: int) -> Mask | None:
    """Whatever the layers save, but for the last one's; what belongs to no layer stays."""
    problem, rows = ground.problem, ground.rows
    makers = [problem.ops[problem.makers[storage]] for storage in rows.storage.tolist()]
    regions = np.array([op.region for op in makers], dtype=np.int64)
    last = max((op.region for op in problem.ops if op.forward), default=-1)
    mask = ((regions >= 0) & (regions != last)) | ground.must
    return mask if ground.covers(mask, budget_bytes) else None


def everything(ground: Ground, budget_bytes: int) -> Mask | None:
    """All that may be moved, and is away at some time."""
    mask = np.ones(len(ground.rows), dtype=bool)
    return mask if ground.covers(mask, budget_bytes) else None


def choices(ground: Ground, budget_bytes: int) -> Iterator[Mask]:
    """Sets that make a plan fit: by idle time, in the order of the forward, and the largest first.

    The set that costs least is not known without the clock: what is away for long hides best, what
    is made first is copied first, and what is large takes few copies.
    """
    cover = Cover(ground, budget_bytes)
    rows = ground.rows
    size = -rows.nbytes
    orders = (
        by_idle_time(ground, budget_bytes),
        np.arange(len(rows)).tolist(),
        np.argsort(size, kind="stable").tolist(),
    )
    for order in orders:
        mask = cover.chosen(order)
        if mask is None:  # whatever the order, unless the other side is too small
            if ground.link.host_bytes is None:
                return
            continue
        yield mask
