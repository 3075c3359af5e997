"""What torch's own selective checkpointing passes through, counts by, and tells policies."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint


def ignored_ops() -> frozenset[Any]:
    """Ops that selective checkpointing passes through uncounted.

    ``detach`` appears in different numbers in forward and recompute, and the metadata ops of
    tensor subclasses are run by the determinism check (``torch.utils.checkpoint``; that for the
    layout is not among torch's). So do the marks of ``record_function``: FSDP2 sets others where
    its units are gathered for a recomputation.
    """
    marks = (
        torch.ops.prim.layout.default,
        torch.ops.profiler._record_function_enter.default,
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    )
    return frozenset((*torch.utils.checkpoint.SAC_IGNORED_OPS, *marks))


def context_of(output: Any) -> torch.utils.checkpoint.SelectiveCheckpointContext:
    """What torch's selective checkpointing gives a policy function in the forward."""
    context = torch.utils.checkpoint.SelectiveCheckpointContext(is_recompute=False)
    context.op_output = output  # torch 2.11 takes no such argument
    return context


def key_of(op: Any, args: tuple[Any, ...]) -> Any:
    """What occurrences are counted by: the op; of inductor's compiled regions, the region."""
    if isinstance(op, torch._ops.OpOverload):
        return op
    probe = getattr(torch.utils.checkpoint, "_sac_storage_key", None)
    return probe(op, args) if probe is not None else op
