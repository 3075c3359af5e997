"""What ranks hold alike of what modules are given, found out once, for plans that share it out.

The record of a step is of fake tensors, which cannot be compared. So the forward runs once for
real, without gradients, on each rank of the group, and checksums of what each module is given are
exchanged. A rank's state stays as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import autograd, functorch
from ckpt_pass.eager.step_record import CallRecord, EagerTrace
from ckpt_pass.offloading.gathering import gather, tell
from ckpt_pass.offloading.sharding import Sharding
from ckpt_pass.offloading.shards import checksum_of, is_shardable
from ckpt_pass.planner.eager_parts import EagerRegion, Ranks
from ckpt_pass.state.untouched import untouched

#: What a group's rates are measured with, and how often; the best counts.
_SAMPLE_BYTES, _SAMPLES = 1 << 22, 3


class ShardedStepsDifferError(CkptPassError, RuntimeError):
    """Ranks that were to share out values of one step run different ones."""


class UnknownValuesError(CkptPassError, ValueError):
    """What ranks hold alike was to be found out of tensors that have no values."""


#: Of a tensor among a module's arguments: a checksum, elements and bytes of one; ``None`` where it
#: cannot be shared out.
Given = tuple[int, int, int] | None
#: Of a DTensor, which a region shares out by its placements, and the record does not follow.
_SPREAD = 0, 0, 0


@dataclass(frozen=True)
class Alike:
    """What ranks hold alike.

    Attributes:
        ranks: those that share it out.
        given: by module, what it is given, of each tensor in order.
        least_bytes: smaller values are not shared out.
    """

    ranks: Ranks
    given: Mapping[str, tuple[Given, ...]]
    least_bytes: int

    def with_parts(
        self, trace: EagerTrace, regions: tuple[EagerRegion, ...]
    ) -> tuple[EagerRegion, ...]:
        """The candidates with what of their arguments may be shared out.

        Not of modules that are called several times.
        """
        calls = {call.name: call for call in trace.calls}
        times = Counter(call.name for call in trace.calls)
        return tuple(
            replace(region, parts=self._parts(trace, calls[region.name]))
            if times[region.name] == 1
            else region
            for region in regions
        )

    def _parts(self, trace: EagerTrace, call: CallRecord) -> tuple[tuple[int, int, int], ...]:
        """None where one of the arguments could not be, as a region shares out all of them."""
        found: dict[int, tuple[int, int, int]] = {}
        given = self.given.get(call.name, ())
        if len(given) != len(call.tensors):
            return ()
        for (storage, goes), one in zip(call.tensors, given, strict=True):
            if not goes:
                if one == _SPREAD:
                    return ()
                continue
            nbytes = trace.storages[storage].nbytes if storage >= 0 else 0
            if nbytes < self.least_bytes:
                continue
            whole = one is not None and one[1] * one[2] == nbytes
            if one is None or not whole or storage in found or storage in call.held:
                return ()
            part = -(-one[1] // self.ranks.count) * one[2]
            found[storage] = storage, part, part * self.ranks.count
        stays = {s for s, goes in call.tensors if not goes}
        return tuple(found.values()) if stays.isdisjoint(found) else ()


def check_same_step(sharding: Sharding, step: str) -> None:
    """Compare what ranks have recorded; before any of them runs its forward for real.

    Args:
        sharding: over which ranks; each of them has to ask.
        step: the record of the step, in words; empty where there is none, which is told only.

    Raises:
        ShardGroupError: the group is not there.
        ShardedStepsDifferError: another rank has another step, or none; on all that have one.
    """
    digests = _said(step and hashlib.sha256(step.encode()).hexdigest(), sharding.found_group())
    if not step or all(digest == digests[0] for digest in digests):
        return
    if "" in digests:
        raise _failed(f"The step cannot be recorded on rank {digests.index('')}", sharding)
    raise ShardedStepsDifferError(
        f"Ranks of the group ({sharding}) run other ops than this one, or on other shapes, "
        "in one step. Expected the same step on all of them, as they share out its values. "
        "Plan each rank alone, without shard_over=, or shard over ranks that do the same."
    )


def alike_in(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss_fn: Callable[[Any], Tensor] | None,
    sharding: Sharding,
) -> Alike:
    """Run a forward and compare what modules are given; every rank of the group has to.

    Args:
        model, args, kwargs, loss_fn: the step.
        sharding: over which ranks.

    Raises:
        ShardedStepsDifferError: the forward failed on another rank.
        UnknownValuesError: the model or its arguments have no values.
    """
    group = sharding.found_group()
    mine: dict[str, tuple[Given, ...]] | None = None
    try:
        mine = _given(model, args, kwargs, loss_fn, sharding)
    finally:
        said = _said(mine, group)  # that it failed, too: the others wait for a word
    if any(given is None for given in said):
        raise _failed(f"The forward failed on rank {said.index(None)}", sharding)
    found = {name: _same([given.get(name, ()) for given in said]) for name in mine}
    with functorch.real_tensors():
        return Alike(_ranks(group, sharding, _device_of(model)), found, max(sharding.min_bytes, 1))


def _failed(what: str, sharding: Sharding) -> ShardedStepsDifferError:
    return ShardedStepsDifferError(
        f"{what} of the group ({sharding}), which says why. Expected a step that runs on all of "
        "them, as they share out its values. Mend that rank, or plan without shard_over=."
    )


def _said(mine: Any, group: Any) -> list[Any]:
    """What each rank of the group says, in order."""
    said: list[Any] = [None] * dist.get_world_size(group)
    with functorch.real_tensors():
        dist.all_gather_object(said, mine, group=group)
    return said


def _same(said: list[tuple[Given, ...]]) -> tuple[Given, ...]:
    """What all ranks are given alike."""
    if len({len(given) for given in said}) > 1:
        return ()
    pairs = zip(*said, strict=True)
    return tuple(given[0] if len(set(given)) == 1 else None for given in pairs)


def _given(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss_fn: Callable[[Any], Tensor] | None,
    sharding: Sharding,
) -> dict[str, tuple[Given, ...]]:
    """What each module is given in its first call."""
    tensors = [t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor)]
    if any(autograd.is_fake(t) or t.is_meta for t in (*tensors, *model.parameters())):
        raise UnknownValuesError(
            f"Got shard_over={sharding} with tensors that have no values (fake or meta ones), "
            "expected real ones: the ranks compare what each module is given in a forward. Plan "
            "with the real model and batch, or without shard_over=."
        )
    found: dict[str, tuple[Given, ...]] = {}
    with (
        functorch.real_tensors(),
        untouched(model, loss_fn, args, kwargs, values=True),
        _told_of_calls(model, found, sharding),
        torch.no_grad(),
    ):
        model(*args, **kwargs)
    return found


@contextlib.contextmanager
def _told_of_calls(
    model: nn.Module, found: dict[str, tuple[Given, ...]], sharding: Sharding
) -> Iterator[None]:
    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            leaves = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
            found.setdefault(name, tuple(_of_tensor(leaf, sharding) for leaf in leaves))

        return note

    handles = [
        module.register_forward_pre_hook(noting(name), with_kwargs=True, prepend=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_tensor(tensor: Tensor, sharding: Sharding) -> Given:
    if autograd.is_distributed(tensor):
        return _SPREAD
    if not is_shardable(tensor, sharding.min_bytes):
        return None
    return checksum_of(tensor), tensor.numel(), tensor.element_size()


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _ranks(group: dist.ProcessGroup, sharding: Sharding, device: torch.device) -> Ranks:
    """The ranks with their rates: as given, or measured now; the slowest rank's count."""
    count, rate, latency_s = dist.get_world_size(group), sharding.bytes_per_s, sharding.latency_s
    if rate is None or latency_s is None:
        small, large = (_seconds(nbytes, group, device) for nbytes in (64, _SAMPLE_BYTES))
        measured = tell([int(small * 1e9), int(large * 1e9)], device, group)
        small, large = (max(times) / 1e9 for times in zip(*measured, strict=True))
        latency_s = small if latency_s is None else latency_s
        if rate is None:  # of a group of one, nothing is gathered
            rate = max(count - 1, 1) * _SAMPLE_BYTES / max(large - small, 1e-9)
    return Ranks(count, rate, latency_s)


def _seconds(nbytes: int, group: dist.ProcessGroup, device: torch.device) -> float:
    own = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    out = own.new_empty(nbytes * dist.get_world_size(group))
    times = []
    for _ in range(_SAMPLES):
        tell([0], device, group)  # all begin together
        began = time.perf_counter()
        tell([0] * 5, device, group)  # as every gather does
        gather(out, own, group)
        out[:1].tolist()  # what runs on a device has ended then
        times.append(time.perf_counter() - began)
    return min(times)
