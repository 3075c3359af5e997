"""Which modules of a recorded step can be regions, and why others cannot."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from ckpt_pass.eager.step_record import LOCAL, CallRecord, EagerTrace, OpRecord
from ckpt_pass.ops.taxonomy import op_name


def cannot_be_regions(trace: EagerTrace) -> dict[str, str]:
    """The modules that cannot be regions, and why."""
    found = {}
    moved = {buffer: index for index, op in enumerate(trace.ops) for buffer, _ in op.moves}
    for name, calls in _calls_by_name(trace).items():
        whys = (_why_once(trace, call) or _why_not_read(trace, call, moved) for call in calls)
        why = next(filter(None, whys), "") or _why_not_tied(trace, calls)
        if why:
            found[name] = why
    return found


def _calls_by_name(trace: EagerTrace) -> dict[str, list[CallRecord]]:
    """By module the calls in which a region does something: none under ``no_grad``."""
    found: dict[str, list[CallRecord]] = defaultdict(list)
    for call in trace.calls:
        if call.differentiable:
            found[call.name].append(call)
    return found


def _why_not_tied(trace: EagerTrace, calls: list[CallRecord]) -> str:
    """Why the calls of a module cannot all be regions alike; empty where they can."""
    if len(calls) == 1:
        return ""
    if any(one.ops[0] < other.ops[1] for other, one in pairwise(calls)):
        return "it calls itself"
    if len({_ops_of(trace, call) for call in calls}) > 1:
        return f"it is called {len(calls)} times, and runs other ops each time"
    asked = (any(n in trace.asked for n in range(*call.values)) for call in calls)
    return "" if all(asked) else "the backward asks for nothing of some of its calls"


def _ops_of(trace: EagerTrace, call: CallRecord) -> tuple[object, ...]:
    return tuple(trace.ops[index].call.target for index in _indices_of(trace, call))


def _indices_of(trace: EagerTrace, call: CallRecord) -> list[int]:
    """The ops that every call of the module runs, whatever is in autocast's cache by then."""
    return [index for index in range(*call.ops) if not trace.ops[index].cached]


def numbered_otherwise(trace: EagerTrace) -> set[int]:
    """Ops of modules that are called again whose number is another one in another call.

    One policy tells all calls what to keep, by those numbers; only the first call casts weights.
    """
    found = set[int]()
    for calls in _calls_by_name(trace).values():
        if len(calls) > 1:
            for same in zip(*(_indices_of(trace, call) for call in calls), strict=False):
                sites = (trace.ops[index].site for index in same)
                if len({(site.op, site.occurrence) for site in sites if site is not None}) > 1:
                    found.update(same)
    return found


def _why_once(trace: EagerTrace, call: CallRecord) -> str:
    """Why a module call must not run twice; empty where it may."""
    first = call.ops[0]
    for op in trace.ops[slice(*call.ops)]:
        assert callable(op.call.target)
        if op.effects and not _is_kept(op):
            return f"{op_name(op.call.target)} in it has an effect"
        if any(not nbytes for _, nbytes in op.moves):  # its copies would be larger than is known
            name = op_name(op.call.target)
            return f"{name} in it fills an empty buffer; plan after a first step"
        for storage in op.changes:
            if storage >= 0 and trace.storages[storage].born < first:
                return f"{op_name(op.call.target)} in it overwrites what came from outside"
    inside = range(first + 1, call.ops[1])
    if any(s.born in inside or s.dies in inside for s in trace.resized):
        return "parameters are gathered or freed in it"
    # What a call asks for itself, for a gradient inside of it, is made again with it.
    if any(trace.asked_again.get(number, -1) >= call.ops[1] for number in range(*call.values)):
        return "what it saves is asked for more than once, by a function or by several gradients"
    return ""


def _why_not_read(trace: EagerTrace, call: CallRecord, moved: dict[int, int]) -> str:
    """Why a module call would not read again what it has read of buffers; empty where it would.

    Args:
        trace: the record.
        call: of the module.
        moved: by buffer the last op that overwrites it.
    """
    ops = trace.ops[slice(*call.ops)] if moved else ()
    # What a region overwrites itself is copied, unless it is handed in.
    copied = {buffer for op in ops for buffer, _ in op.moves} - call.buffers
    read = {buffer for op in ops for buffer in op.buffers} - copied
    if any(moved.get(buffer, -1) >= call.ops[0] for buffer in read):
        return "the step overwrites a buffer that it reads or is given"
    return ""


#: What is done with a collective's result before it is used; nothing is exchanged.
_WAITS = ("_c10d_functional.wait_tensor.", "_c10d_functional._wrap_tensor_autograd.")


def _is_kept(op: OpRecord) -> bool:
    """Whether a region can keep what an op exchanges with other ranks, instead of running it again.

    Of a collective inside of an op on DTensors it sees nothing.
    """
    assert callable(op.call.target)
    name = op_name(op.call.target)
    if name.startswith(_WAITS):
        return True
    seen = op.site is not None and not op.site.op.startswith(LOCAL)
    return seen and name.startswith("_c10d_functional.") and bool(op.makes) and not op.changes


def left_out(trace: EagerTrace) -> dict[str, str]:
    """The modules that cannot be regions, and why; of modules in each other the inner ones.

    Those whose values the backward does not ask for would gain nothing, and are not told.
    """
    calls, out = trace.calls, cannot_be_regions(trace)
    found: dict[int, str] = {}
    for index, call in enumerate(calls):
        asked = any(number in trace.asked for number in range(*call.values))
        if call.name in out and asked and call.name:
            found[index] = out[call.name]
    outer = {calls[index].parent for index in found}
    return {calls[index].name: why for index, why in found.items() if index not in outer}
