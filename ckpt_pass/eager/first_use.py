"""What an eager step makes and keeps, so that the next one is another: said when it is planned."""

from __future__ import annotations

import warnings

from torch import nn

from ckpt_pass.eager.step_record import EagerTrace
from ckpt_pass.graph.capture import FirstUseWarning


def warn_if_another(
    model: nn.Module, first: EagerTrace, kept: tuple[int, ...], second: EagerTrace
) -> None:
    """Say that the step after the first one is another, and what it finds.

    Args:
        model: whose step it is.
        first: the step that is planned.
        kept: the storages that are still there after it, besides gradients.
        second: the forward of the step that finds them.
    """
    if _forward(first) == _forward(second):
        return
    sites = [op.site for op in first.ops if not set(kept).isdisjoint(op.makes)]
    made = f"{sites[0] or 'in its backward'}" if sites else "by autograd"
    more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    nbytes = sum(first.storages[number].nbytes for number in kept)
    warnings.warn(
        f"{type(model).__name__} keeps {nbytes:,} bytes that its step makes ({made}{more}), and "
        "the next step, which finds them, runs other ops: this plan is not for that one. Run the "
        "model once before you plan it.",
        FirstUseWarning,
        stacklevel=2,
    )


def _forward(trace: EagerTrace) -> list[tuple[object, ...]]:
    sizes = [storage.nbytes for storage in trace.storages]
    ops = trace.ops[: trace.forward_length]
    return [(op.site, *(sizes[number] for number in op.makes)) for op in ops]
