"""The door to inductor's fusion: which ops share a kernel, and what is never written to memory.

A fused kernel runs where its last op stands, and what its first ones read waits for it. Where a sum
gathers a term of every layer, or one value serves many, inductor fuses ops across the whole
backward, and every layer's values stay alive together. A plan counts on the order that it has given
to the ops: so only those share a kernel that stand between the same two calls of libraries.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch._functorch import partitioners


def fusion_between_calls() -> AbstractContextManager[Any]:
    """Inside, inductor fuses no ops across an op that is none of its own loops.

    Such are matrix products, convolutions, fused attention.
    """
    from torch._inductor.virtualized import V

    usual: Any = type(V.choices)

    known: dict[int, tuple[Any, list[int]]] = {}  # schedules, and the places of their calls

    class Between(usual):  # type: ignore[misc]  # whatever class the user chose
        def can_fuse(self, scheduler: Any, node1: Any, node2: Any, *rest: Any) -> bool:
            first = min(node1.min_order, node2.min_order)
            last = max(node1.max_order, node2.max_order)
            if id(scheduler) not in known:  # one for each half
                known[id(scheduler)] = scheduler, _calls_of(scheduler)
            calls = known[id(scheduler)][1]
            if bisect_left(calls, last) > bisect_right(calls, first):  # one lies between
                return False
            return bool(super().can_fuse(scheduler, node1, node2, *rest))

    return cast(AbstractContextManager[Any], V.set_choices_handler(Between()))


def _calls_of(scheduler: Any) -> list[int]:
    """The places of what is no loop of inductor's own: calls of libraries, templates."""
    nodes = scheduler.nodes
    return sorted(node.min_order for node in nodes if node.is_extern() or node.is_template())


#: Bytes count as little where so many times as many are read or written: sums of rows, say.
_LITTLE = 16


def end_kernels_early(nodes: Sequence[Any]) -> None:
    """Have a schedule's kernels on the CPU end where that frees memory for what comes next.

    Inductor puts all loops between two calls of libraries into one C++ function: what any of them
    writes is allocated before it, and what any of them reads is freed after it. Only this one
    schedule is changed.

    Args:
        nodes: of the schedule.
    """
    device = torch.device("cpu")
    if all(node.get_device() != device for node in nodes):
        return
    scheduler = nodes[0].scheduler
    backend = scheduler.get_backend(device)
    usual = backend.ready_to_flush
    sizes = {
        dep.name: _size(scheduler, [dep])
        for node in nodes
        for dep in (*node.read_writes.reads, *node.read_writes.writes)
    }
    backend.ready_to_flush = lambda: usual() or _frees_much(scheduler, sizes)


def _frees_much(scheduler: Any, sizes: Mapping[str, int]) -> bool:
    """Whether what waits to be freed, and what the next loops write, are both large."""
    from torch._inductor.virtualized import V

    rest = itertools.dropwhile(lambda n: n is not scheduler.current_node, scheduler.nodes)
    following = next(itertools.islice(rest, 1, None), None)
    if following is None:
        return False
    gone = V.graph.removed_buffers
    waiting = sum(sizes.get(name, 0) for name in scheduler.buffer_names_to_free - gone)
    written = {dep.name for dep in following.read_writes.writes} - gone
    allocated = sum(sizes.get(name, 0) for name in written)
    return min(waiting, allocated) * _LITTLE > max(waiting, allocated)


def _size(scheduler: Any, deps: Iterable[Any]) -> int:
    return sum(scheduler.dep_size_hint(dep) for dep in deps)


#: Ops that inductor fuses and that go through a whole row, or a whole tensor, for each result.
_REDUCTIONS = """
    sum mean amax amin max min prod argmax argmin any all var std var_mean std_mean logsumexp
    prepare_softmax_online cumsum sum_to_size _grad_sum_to_size
    """
#: Elementwise ops, or look-ups, that torch's partitioner does not count among those that fuse.
_FUSE_TOO = frozenset({"constant_pad_nd", "slice_scatter", "select_scatter", "embedding", "fma"})
#: Ops that call one of those that ``should_realize_on_reuse`` in inductor's ``ir`` calls heavy.
_HEAVY = """
    exp expm1 log log10 log1p log2 logsumexp sigmoid tanh silu softplus mish logaddexp
    silu_backward sigmoid_backward tanh_backward mish_backward softplus_backward
    """


def fuses(op: object) -> bool:
    """Whether inductor makes an op a part of a kernel with others: elementwise ones, reductions."""
    return _is_one_of(op, _fusible()) or _base_name(op) in _FUSE_TOO


def is_inlined(op: object) -> bool:
    """Whether inductor computes an op's result where it is read, element by element."""
    goes_through = _base_name(op) in _REDUCTIONS.split()
    return fuses(op) and not goes_through and not _is_one_of(op, _views())


def is_heavy(op: object) -> bool:
    """Whether inductor computes an op no more than once where that is on a CPU."""
    return _base_name(op) in _HEAVY.split()


def _is_one_of(op: object, ops: Collection[object]) -> bool:
    """Whether an op is listed, itself or with all its overloads."""
    return op in ops or getattr(op, "overloadpacket", None) in ops


def _base_name(op: object) -> str:
    name = getattr(op, "_opname", None) or getattr(op, "__name__", "")
    return str(name)


@functools.cache
def _fusible() -> frozenset[object]:
    return frozenset(partitioners.get_default_op_list().fusible_ops)


@functools.cache
def _views() -> frozenset[object]:
    return frozenset(partitioners.get_default_op_list().view_ops)
