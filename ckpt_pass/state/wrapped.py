"""Wrappers of torch.distributed that break for good where they run on tensors without values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch.modules import runs_on_values_alone


class WrapperError(CkptPassError):
    """A wrapper of torch.distributed that would not train on after it was looked at."""


def check_wrappers(values: Iterable[Any]) -> None:
    """Raise where a module among some values must not run on tensors without values.

    FSDP1 notes in its flat parameters where they lie, and DDP's reducer, which ``replicate`` has
    called from hooks, counts the gradients that come: both are another's state after such a run.

    Raises:
        WrapperError: one must not.
    """
    for value in values:
        if isinstance(value, nn.Module) and (what := runs_on_values_alone(value)):
            raise WrapperError(
                f"A {type(value).__name__} is sharded or replicated by {what}, which counts on the "
                "tensors of real steps and would break if it ran on any without values. Expected "
                "fully_shard (FSDP2), DistributedDataParallel, or the module before it is wrapped: "
                "plan that, and leave room for what the wrapper gathers."
            )
