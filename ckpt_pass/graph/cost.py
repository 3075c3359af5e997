"""Bytes of values in a graph: by storage, exact, symbolic where sizes are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import functorch
from ckpt_pass._torch.wrappers import wraps
from ckpt_pass.graph.collectives import collective_workspace_bytes
from ckpt_pass.graph.joint import JointGraph, StorageKey
from ckpt_pass.ops.flops import flop_formula
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.planner.caching_allocator import in_blocks
from ckpt_pass.policy.sites import Bytes, optimization_hint, output_tensors

#: Ops whose kernels allocate a tensor of their (first) output's size besides the output. The CPU's
#: dropout casts the mask to the values' dtype first, in the forward and in the backward (seen in
#: allocation events, torch 2.13).
_OUTPUT_SIZED_WORKSPACE = frozenset(
    {"aten.native_dropout.default", "aten.native_dropout_backward.default"}
)


class SymbolicBytesError(CkptPassError):
    """Bytes depend on a size that only the data of a run tell."""


@dataclass(frozen=True)
class Roofline:
    """Time of an op as the larger of arithmetic and memory traffic, and a launch.

    The defaults are orders of magnitude; plans depend on the ratios between ops only.

    Attributes:
        flops_per_s: arithmetic rate of matrix products.
        bytes_per_s: memory bandwidth.
        launch_s: fixed cost of an op.
    """

    flops_per_s: float
    bytes_per_s: float
    launch_s: float

    def time_s(self, flops: int, moved_bytes: int) -> float:
        """Seconds for one op."""
        return max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s) + self.launch_s


#: A few server cores: some 50 Gflop/s in fp32 and 10 GB/s; an A100-like accelerator in bf16.
ROOFLINES = {"cpu": Roofline(5e10, 1e10, 1e-6), "cuda": Roofline(2e14, 1.5e12, 3e-6)}
#: So much of a step's modelled time is shared out among its ops by their flops, the rest by the
#: roofline. On a CPU elementwise ops on what was just made run far above the bandwidth of memory:
#: a product of llama-16L takes 63 times as long as an elementwise product of its result (3,853 and
#: 61 microseconds, AMD EPYC, one thread, fp32, torch 2.13); the roofline says 9, a share of 0.8
#: 43, of 0.9 86. And in small steps, where launches are most of the time, flops keep their weight:
#: fused steps launch less. Of 697 op lists for torch's selective checkpointing, simulated on the
#: models of benchmarks/eager_budgets.py, 42 recompute fewer flops than our plan at the same peak
#: with a share of 0 (up to 13 % of the step), 5 with 0.8 (none against 0.5 to 0.8 %), and no list
#: with 0.9.
FLOPS_SHARES = {"cpu": 0.9, "cuda": 0.0}


def shared_by_flops(times_s: Sequence[float], flops: Sequence[int], device: str) -> list[float]:
    """Times of all ops of a step, the device's share of their sum dealt out anew by flops."""
    share = FLOPS_SHARES.get(device, 0.0)
    total_s, total_flops = sum(times_s), sum(flops)
    if not share or not total_flops:
        return list(times_s)
    second = share * total_s / total_flops
    return [(1 - share) * t + second * f for t, f in zip(times_s, flops, strict=True)]


def node_flops(node: fx.Node) -> int:
    """Flops of one op, from torch's formulas and ours; 0 where there is none."""
    formula = flop_formula(node.target)
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return optimization_hint(formula(*args, **kwargs, out_val=node.meta.get("val")))


def at_traced_shape(size: int | torch.SymInt) -> int:
    """A size as a number.

    Raises:
        SymbolicBytesError: it depends on data, so that no shape was traced; the message names it.
    """
    if isinstance(size, torch.SymInt) and not size.node.has_hint():
        raise SymbolicBytesError(
            f"A size {size} depends on the values of tensors, expected one that follows from the "
            "shapes of the inputs. Keep ops with data-dependent shapes (nonzero, unique, .item()) "
            "out of the compiled step, or wrap them in a custom op."
        )
    return optimization_hint(size)


def moved_bytes(node: fx.Node) -> int:
    """Bytes of the storages that an op reads and writes, at the traced shape."""
    found = dict(storage_sizes(node.meta.get("val")))
    for source in node.all_input_nodes:
        found |= storage_sizes(source.meta.get("val"))
    return sum(at_traced_shape(size) for size in found.values())


def modelled_time_s(node: fx.Node, flops: int) -> float:
    """Seconds of one op by the roofline of its device."""
    roofline = ROOFLINES.get(device_type(node), ROOFLINES["cuda"])
    return roofline.time_s(flops, moved_bytes(node))


def device_type(node: fx.Node) -> str:
    """The device that an op runs on, as ``cpu`` or ``cuda``."""
    found = [tensor.device.type for tensor in output_tensors(node.meta.get("val"))]
    return found[0] if found else "cpu"


def workspace_size(node: fx.Node) -> int | torch.SymInt:
    """Bytes that an op's kernel allocates and frees besides its outputs, where that is known."""
    name = op_name(node.target) if callable(node.target) else ""
    if name not in _OUTPUT_SIZED_WORKSPACE or device_type(node) != "cpu":
        return collective_workspace_bytes(node)
    return next(iter(storage_sizes(node.meta.get("val")).values()), 0)


def random_state_bytes(node: fx.Node) -> int:
    """Bytes of the random state saved for a recomputed random op, where they lie with its values.

    The state of the CPU's generator has 5,056 bytes (torch 2.13). That of an accelerator's lies on
    the CPU, too (16 bytes), or in a generator: nothing is allocated on the device.
    """
    return 0 if _on_accelerator(node) else torch.get_rng_state().nbytes


def draws_from_a_saved_tensor(node: fx.Node) -> bool:
    """Whether a recomputed random op gets its state as a tensor: then it may run again and again.

    A generator that belongs to the graph moves on with each run, and must be run as often in the
    backward as in the forward.
    """
    return not (_on_accelerator(node) and functorch.states_in_generators())


def _on_accelerator(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) else value
    return isinstance(first, torch.Tensor) and first.device.type != "cpu"


def as_bytes(size: int | torch.SymInt) -> Bytes:
    """A size as a number, or as an expression when it is symbolic."""
    if isinstance(size, torch.SymInt):
        expression = sympy.sympify(size.node.expr)
        return int(expression) if expression.is_number else expression
    return int(size)


def allocated_bytes(nbytes: int, device_type: str) -> int:
    """The bytes that a device hands out for a storage.

    The caching allocators of accelerators hand out blocks. What one adds where it does not split a
    block that is a little too large is not in here: that depends on what was freed before.
    """
    return nbytes if device_type in ("cpu", "meta") else in_blocks(nbytes)


def storage_sizes(value: Any) -> dict[StorageKey, int | torch.SymInt]:
    """The storages behind a node's value and the bytes of each."""
    found: dict[StorageKey, int | torch.SymInt] = {}
    for tensor in output_tensors(value):
        for storage in functorch.storages_of(tensor):
            found[storage._cdata] = storage.nbytes()
    return found


def storages(value: Any) -> dict[StorageKey, Bytes]:
    """The same, as numbers or expressions."""
    return {key: as_bytes(size) for key, size in storage_sizes(value).items()}


def beside_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors keep in memory besides themselves, being parts of something larger.

    Of sparse tensors, and those that wrap others, it is not known; nor where a size is open.
    """
    plain = [t for t in tensors if t.layout is torch.strided and not wraps([type(t)])]
    # Not nbytes: tensors of open sizes have none.
    own = sum(t.numel() * t.element_size() for t in plain)
    whole = sum(storage_sizes(plain).values())
    return max(0, whole - own) if isinstance(whole, int) and isinstance(own, int) else 0


def own_bytes(joint: JointGraph, node: fx.Node) -> Bytes:
    """Bytes of the storages that this op allocates; 0 for views."""
    total: Bytes = 0
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return sum(storages(value).values()) if joint.owner(node) is node else 0
    for nbytes in storages(value).values():
        total = total + nbytes
    return total


def held_bytes(nodes: Iterable[fx.Node], besides: Iterable[fx.Node] = ()) -> Bytes:
    """Bytes of the distinct storages of ``nodes`` that are not storages of ``besides``."""
    known = {key for node in besides for key in storages(node.meta.get("val"))}
    total: Bytes = 0
    for node in nodes:
        for key, nbytes in storages(node.meta.get("val")).items():
            if key not in known:
                known.add(key)
                total = total + nbytes
    return total
