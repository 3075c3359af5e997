"""From a recorded eager step to the torch-free problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx

from ckpt_pass.eager.alike import Alike
from ckpt_pass.eager.candidates import cannot_be_regions, numbered_otherwise
from ckpt_pass.eager.step_record import LOCAL, CallRecord, EagerTrace, OpRecord
from ckpt_pass.eager.two_ways import replaced
from ckpt_pass.graph.cost import (
    at_traced_shape,
    device_type,
    modelled_time_s,
    node_flops,
    shared_by_flops,
    workspace_size,
)
from ckpt_pass.graph.kernel_cache import KernelFacts
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.slots import ALIGNMENT
from ckpt_pass.ops.taxonomy import OpClass, classify
from ckpt_pass.planner.eager_parts import EagerOp, EagerRegion, EagerStorage, SavedValue
from ckpt_pass.planner.eager_problem import EagerProblem
from ckpt_pass.planner.link import Link

_NOT_MEASURED = KernelFacts(None, None)
#: Looking at an op from Python takes some 11 microseconds (empty dispatch modes around the blocks
#: of benchmarks/eager_cost.py, CPU, torch 2.13), once in the forward and once in the rerun.
KEEPING_S = 2.2e-5
#: Looking at every op of a forward is counted as so much of a modelled step at most. On gpt2-12L
#: and llama-16L it is 0.6 and 1.0 %, in full; on a model so small that Python is what costs it
#: would be several times the step, and plans would spend flops to save it.
KEEPING_SHARE = 0.01


def eager_problem(
    trace: EagerTrace,
    kernels: Mapping[fx.Node, KernelFacts],
    formulas: Mapping[tuple[int, int], int],
    link: Link | None = None,
    least_bytes: int = 0,
    alike: Alike | None = None,
) -> EagerProblem:
    """Describe a recorded step.

    Modelled times stand for a step of which arithmetic is most: see ``graph.cost.FLOPS_SHARES`` and
    ``KEEPING_SHARE``. Where kernels were timed, they count as measured, and so does keeping.

    Args:
        trace: the record.
        kernels: what was measured of the kernels of its calls.
        formulas: ranges of ops in the backward, and the bytes that were measured of them.
        link: what may move values; ``None`` where nothing can.
        least_bytes: smaller values stay.
        alike: what ranks hold alike of what modules are given, if they may share it out.
    """
    costs = {op.call: _cost(op.call, kernels) for op in trace.ops}
    overwritten = {storage for op in trace.ops for storage in op.changes}
    may_keep = set(range(trace.forward_length)) - numbered_otherwise(trace)
    ops = tuple(
        _op(op, index in may_keep, costs[op.call], overwritten)
        for index, op in enumerate(trace.ops)
    )
    added = _added(trace)
    storages = tuple(
        EagerStorage(s.nbytes, s.born, s.dies, s.of_graph, s.resized, number in added)
        for number, s in enumerate(trace.storages)
    )
    ops, storages = replaced(ops, storages, formulas)
    turns = {number: turn for turn, number in enumerate(trace.asked)}
    values = tuple(
        SavedValue(
            v.storage,
            v.released,
            number in turns,
            v.saved_at,
            trace.asked.get(number, 0),
            turns.get(number, 0),
            v.node,
            v.waits,
        )
        for number, v in enumerate(trace.saved)
    )
    keeping_s = KEEPING_S
    if all(kernels.get(call, _NOT_MEASURED).time_s is None for call in costs):
        ops = _with_shared_times(ops, device_type(trace.ops[-1].call))
        step_s = sum(op.time_s for op in ops)
        keeping_s = min(KEEPING_S, KEEPING_SHARE * step_s / max(trace.forward_length, 1))
    regions = tuple(_regions(trace))
    if link is not None:
        goes = _movable(trace, overwritten, least_bytes)
        calls = {call.name: call for call in trace.calls}
        times = Counter(call.name for call in trace.calls)
        regions = tuple(
            replace(
                region,
                moves=tuple(n for n in range(*region.values) if n in goes),
                sent=_sent(trace, calls[region.name], overwritten, least_bytes),
            )
            if times[region.name] == 1  # what moves is counted by module
            else region
            for region in regions
        )
    if alike is not None:
        regions = alike.with_parts(trace, regions)
    return EagerProblem(
        ops,
        trace.forward_length,
        storages,
        values,
        regions,
        keeping_s,
        link,
        Offload.IN_FLIGHT,
        ALIGNMENT,
        ranks=None if alike is None else alike.ranks,
    )


def _added(trace: EagerTrace) -> set[int]:
    """The gradients that are added to what an earlier step has left."""
    if not trace.found_bytes:
        return set()
    backward = trace.ops[trace.forward_length :]
    adds = (op for op in backward if op.call.target is torch.ops.aten.add_.Tensor)
    return {storage for op in adds if op.changes == (-1,) for storage in op.uses}


def _sent(
    trace: EagerTrace, call: CallRecord, overwritten: set[int], least_bytes: int
) -> tuple[int, ...]:
    """The storages that go where the activations among a call's arguments are to.

    None where any of them is not the step's own, is changed in place, stands there twice (each
    would come back for itself), or stays there as well.
    """
    least = max(least_bytes, 1)
    goes = [s for s, may in call.tensors if may and (s < 0 or trace.storages[s].nbytes >= least)]
    stays = {s for s, may in call.tensors if not may} | overwritten | {-1, *call.held}
    alone = stays.isdisjoint(goes) and len(set(goes)) == len(goes)
    return tuple(goes) if alone else ()


def _movable(trace: EagerTrace, overwritten: set[int], least_bytes: int) -> set[int]:
    """The saved values that can lie elsewhere until the backward asks for them, once.

    Not what existed before the step, nor what is changed in place, what Python holds until then
    anyway, and what a backward inside the forward asks for.
    """
    found = set()
    for number, asked_at in trace.asked.items():
        saved = trace.saved[number]
        if saved.storage < 0 or not saved.plain or saved.storage in overwritten:
            continue
        storage = trace.storages[saved.storage]
        large = storage.nbytes >= max(least_bytes, 1)
        if large and trace.forward_length <= asked_at and storage.dies <= asked_at:
            found.add(number)
    return found


def _with_shared_times(ops: tuple[EagerOp, ...], device: str) -> tuple[EagerOp, ...]:
    times = shared_by_flops([op.time_s for op in ops], [op.flops for op in ops], device)
    return tuple(replace(op, time_s=time_s) for op, time_s in zip(ops, times, strict=True))


def _cost(call: fx.Node, kernels: Mapping[fx.Node, KernelFacts]) -> tuple[float, int, int]:
    """Time, flops and workspace of a call."""
    facts = kernels.get(call, _NOT_MEASURED)
    flops = node_flops(call)
    time_s = facts.time_s if facts.time_s is not None else modelled_time_s(call, flops)
    workspace = facts.workspace_bytes
    if workspace is None:
        workspace = at_traced_shape(workspace_size(call))
    return time_s, flops, workspace


def _op(
    op: OpRecord, may_keep: bool, cost: tuple[float, int, int], overwritten: set[int]
) -> EagerOp:
    time_s, flops, workspace = cost
    assert callable(op.call.target)
    computes = bool(op.makes) or bool(op.changes)
    keepable = (
        may_keep
        and not (op.site is not None and op.site.op.startswith(LOCAL))
        and bool(op.makes)
        and not op.changes
        and not op.draws
        and not op.casts_weight
        and overwritten.isdisjoint(op.makes)
        and classify(op.call.target) not in (OpClass.VIEW, OpClass.METADATA)
    )
    return EagerOp(
        name=str(op.site) if op.site is not None else str(op.call.target),
        time_s=time_s if computes else 0.0,
        flops=flops,
        workspace_bytes=workspace,
        makes=op.makes,
        keepable=keepable,
        must_keep=op.effects,
        cached=op.cached,
    )


def _regions(trace: EagerTrace) -> list[EagerRegion]:
    """The module calls that can be regions: of modules of which every call may run twice."""
    calls = trace.calls
    out = cannot_be_regions(trace)
    numbers: dict[int, int] = {}
    found: list[EagerRegion] = []
    for index, call in enumerate(calls):
        if not call.name or call.name in out or not call.differentiable:
            continue
        parent = call.parent
        while parent >= 0 and parent not in numbers:
            parent = calls[parent].parent
        region = region_of(trace, call, numbers.get(parent, -1))
        if region is not None:
            numbers[index] = len(found)
            found.append(region)
    return found


def region_of(trace: EagerTrace, call: CallRecord, parent: int = -1) -> EagerRegion | None:
    """A module call as a region; ``None`` where the backward asks for nothing that it saves."""
    first, last = call.ops
    inside = range(*call.values)
    asked = [trace.asked[number] for number in inside if number in trace.asked]
    if not asked:
        return None
    ops = trace.ops[first:last]
    casts = dict(_casts_anew(trace, call, _needed(trace, call)))
    used = {storage for op in ops for storage in op.uses}
    used |= {trace.saved[number].storage for number in inside} | {*call.given}
    outside = [s for s in used if s >= 0 and trace.storages[s].born < first and s not in casts]
    # What draws nothing in evaluation may do so in training, where the plan may be used.
    draws = any(op.draws for op in ops) or not call.trains
    # What buffers were before the call is copied for the recomputation.
    copies = dict(moved for op in ops for moved in op.moves)
    return EagerRegion(
        name=call.name,
        parent=parent,
        ops=call.ops,
        values=call.values,
        needed=_needed(trace, call),
        reruns=min(asked),
        done=max(trace.saved[number].released for number in inside),
        arguments=tuple(sorted({*outside, *call.held})),
        extra_bytes=(torch.get_rng_state().nbytes if draws else 0) + sum(copies.values()),
        draws=draws,
        dropped=call.dropped,
        casts=tuple(casts.items()),
    )


def _casts_anew(trace: EagerTrace, call: CallRecord, needed: int) -> Iterator[tuple[int, int]]:
    """The weights that autocast had cast before a call, and its op that uses each first.

    A recomputation has a cache of its own, and casts them again.
    """
    first = call.ops[0]
    seen = set(call.given)
    for offset, op in enumerate(trace.ops[first : first + needed]):
        for storage in op.uses:
            maker = trace.storages[storage].born
            if storage not in seen and maker < first and trace.ops[maker].cached:
                yield storage, offset
            seen.add(storage)


def _needed(trace: EagerTrace, call: CallRecord) -> int:
    """How many ops have begun when the last of a call's values is saved."""
    return trace.saved[call.values[1] - 1].saved_at - call.ops[0]
