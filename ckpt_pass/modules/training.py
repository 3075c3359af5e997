"""Gradient accumulation over torch's own pieces: the loss of uneven batches weighed right.

The gradient is that of one step over all samples (or tokens) of a window of batches, whatever the
sizes of the batches and however they fall on ranks. Dividing by the number of batches instead, as
is often done, gives a sample of a short last batch more weight than the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils._pytree import tree_leaves

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch.modules import is_fsdp1

Batch = TypeVar("Batch")


class AccumulationError(CkptPassError):
    """Batches that no gradient can be accumulated over."""


def accumulation_windows(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Cut what a loader gives into lists of ``size`` batches; the last may be shorter.

    Raises:
        AccumulationError: ``size`` is below 1.
    """
    if size < 1:
        raise AccumulationError(f"Got size={size}; expected at least 1 batch in a window.")
    window: list[Batch] = []
    for batch in loader:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def samples(batch: Any) -> int:
    """How many samples a batch has: the first size of its first tensor.

    Raises:
        AccumulationError: it has no tensor with a size.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise AccumulationError(
        f"A batch of type {type(batch).__name__} has no tensor with a first size to count samples "
        "by. Expected one; pass count=, a function from a batch to its samples or tokens."
    )


def accumulate_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    *,
    count: Callable[[Batch], int | Tensor] = samples,
    scaler: GradScaler | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Add to the gradients those of the mean loss over all samples of several batches.

    A batch's loss is weighed by its share of the counted samples. Where ``model`` averages
    gradients over ranks (``DistributedDataParallel``, FSDP), the shares are of all ranks' samples
    and the gradients are exchanged once, in the last backward: until then ``no_sync()``, or FSDP2's
    ``set_requires_gradient_sync``, holds them back. Under DDP ranks may have different numbers of
    batches; under FSDP, which gathers parameters in every forward, they would wait for ever.

    Args:
        model: what is trained, wrapped or not; checkpoint regions in it need nothing else.
        batches: of one optimizer step; held as a list meanwhile.
        loss_fn: gives a batch's mean loss, ``loss_fn(model, batch)``, a scalar. Autocast belongs
            inside.
        count: what that mean is over. For tokens it must count as the loss does, those with a
            label say: ``lambda batch: (batch["labels"] != -100).sum()``.
        scaler: scales each loss (``torch.amp.GradScaler``); ``scaler.step`` stays yours.
        group: whose ranks are averaged over; the default group where ``None``.

    Returns:
        The mean loss over this rank's samples, a detached scalar, unscaled.

    Raises:
        AccumulationError: no batch, or nothing counted, on some rank; or, under FSDP, ranks with
            different numbers of batches. Every rank raises it.
    """
    held = list(batches)
    counted = [(batch, n) for batch in held if (n := int(count(batch)))]
    total = sum(number for _, number in counted)
    every = _shares(model, total, len(counted), held, group)
    # Ranks' gradients are averaged, not summed: hence their number.
    unit = len(every) / sum(every)
    losses = []
    for index, (batch, number) in enumerate(counted):
        last = index == len(counted) - 1
        with contextlib.nullcontext() if last else _held_back(model):
            loss = loss_fn(model, batch)
            losses.append(loss.detach() * (number / total))
            weighed = loss * (number * unit)
            (weighed if scaler is None else scaler.scale(weighed)).backward()
    return torch.stack(losses).sum()


def _shares(
    model: nn.Module, total: int, batches: int, held: list[Any], group: dist.ProcessGroup | None
) -> list[int]:
    """What every rank counted; this one alone where nothing is averaged."""
    sharded = _is_sharded(model)
    averaged = sharded or hasattr(model, "no_sync")
    every = _gathered([total, batches], held, group) if averaged else [[total, batches]]
    totals, numbers = ([pair[index] for pair in every] for index in range(2))
    by_rank = f" By rank: samples {totals}, batches {numbers}." if averaged else ""
    if min(totals) <= 0:
        raise AccumulationError(
            f"Counted {total} samples in {len(held)} batches.{by_rank} Expected some in every step "
            "and on every rank: drop the step, or give the samples that are left to all ranks."
        )
    if sharded and len(set(numbers)) > 1:
        raise AccumulationError(
            f"Got other numbers of batches on other ranks.{by_rank} Expected the same: FSDP "
            "gathers parameters in every forward, and ranks would wait for each other for ever. "
            "Cut the samples of each rank into as many batches; their sizes may differ."
        )
    return totals


def _is_sharded(model: nn.Module) -> bool:
    """Whether parameters are gathered in the forward: FSDP2's method, or FSDP1's class."""
    return is_fsdp1(model) or hasattr(model, "set_requires_gradient_sync")


def _gathered(
    numbers: list[int], held: list[Any], group: dist.ProcessGroup | None
) -> list[list[int]]:
    """The numbers of every rank, in order."""
    device = next((t.device for t in tree_leaves(held) if isinstance(t, Tensor)), None)
    if dist.get_backend(group) == "gloo":
        device = torch.device("cpu")
    mine = torch.tensor(numbers, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    return [other.tolist() for other in every]


@contextlib.contextmanager
def _held_back(model: Any) -> Iterator[None]:
    """No exchange of gradients inside."""
    if hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield
