"""Kernels that are too large to be run for a plan: measured small, and carried on to their size.

A product with a vocabulary takes minutes on a CPU, and gigabytes. So a call beyond the limits below
is made with its longest dimension cut to a fraction, at three sizes. Every number that is measured
(bytes, sizes, strides) is a polynomial of that dimension: of the first degree, of the second where
it stands twice in a tensor. The polynomial through the three gives the number at the full size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

import torch

from ckpt_pass._torch.autograd import NO_VALUES
from ckpt_pass._torch.functorch import FakeTensorMode
from ckpt_pass.graph.kernel_cache import KernelFacts, OutputFacts
from ckpt_pass.graph.kernel_call import Call, TensorSpec, mapped, specs_in
from ckpt_pass.ops.flops import flop_formula
from ckpt_pass.policy.sites import output_tensors

#: What a call may take on the CPU, inputs and outputs together: half a second on a server's core.
LARGE_FLOPS = 100_000_000_000
LARGE_BYTES = 1 << 30
#: Calls with fewer bytes of inputs are not looked at: their products are below the limit, too.
_SMALL_BYTES = 1 << 24
#: The smallest size that a dimension is cut to; kernels choose another way for smaller ones.
_LEAST = 64
#: What a number may be off the straight line through two others, and lie on it: rounded bytes.
_SLACK_BYTES = 4096


@dataclass(frozen=True)
class Small:
    """A large call, made small.

    Attributes:
        full: the size of the dimension that is cut.
        sizes: what it is cut to, the largest first.
        calls: with each of them.
        share: of the whole call's work, as far as flops or bytes tell, in the first of them.
    """

    full: int
    sizes: tuple[int, ...]
    calls: tuple[Call, ...]
    share: float


def made_small(call: Call) -> Small | None:
    """Smaller calls in the place of one that is too large to run; ``None`` if it is not."""
    if call.device.type != "cpu" or _bytes_of(call) < _SMALL_BYTES:
        return None
    work = _work_of(call)
    if work is None or work.is_little:
        return None
    full = size = work.longest
    while (size := size // 2) // 4 >= _LEAST:
        sizes = (size, size // 2, size // 4)
        calls = [_cut(call, full, size) for size in sizes]
        found = tuple(one for one in calls if one is not None)
        first = _work_of(found[0]) if len(found) == len(sizes) else None
        if first is None:
            return None
        if first.is_little:
            flops = first.flops / work.flops if work.flops else 0.0
            return Small(full, sizes, found, flops or first.nbytes / work.nbytes)
    return None


@dataclass(frozen=True)
class _Work:
    flops: int
    nbytes: int
    longest: int

    @property
    def is_little(self) -> bool:
        """Whether it can be run for a plan."""
        return self.flops <= LARGE_FLOPS and self.nbytes <= LARGE_BYTES


def _bytes_of(call: Call) -> int:
    specs = specs_in((call.args, dict(call.kwargs)))
    return sum(_elements(spec.size, spec.stride) * spec.dtype.itemsize for spec in specs)


def _elements(size: Sequence[int], stride: Sequence[int]) -> int:
    if not all(size):
        return 0
    return sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1


def _work_of(call: Call) -> _Work | None:
    """What a call computes and holds, found on fake tensors; ``None`` where they do not tell."""
    formula = flop_formula(call.target)

    def make(value: Any) -> Any:
        return value.make() if isinstance(value, TensorSpec) else value

    try:
        with FakeTensorMode(), torch.no_grad():
            args = mapped(call.args, make)
            kwargs = {name: mapped(value, make) for name, value in call.kwargs.items()}
            output = call.target(*args, **kwargs)
            flops = formula(*args, **kwargs, out_val=output) if formula is not None else 0
    except (*NO_VALUES, RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    made = list(output_tensors(output))
    nbytes = _bytes_of(call) + sum(t.numel() * t.dtype.itemsize for t in made)
    specs = specs_in((call.args, dict(call.kwargs)))
    sizes = [n for spec in specs for n in spec.size] + [n for t in made for n in t.shape]
    return _Work(flops, nbytes, max(sizes, default=0))


def _cut(call: Call, full: int, size: int) -> Call | None:
    """The call with another size in the place of ``full``, wherever that stands."""
    specs = list(specs_in((call.args, dict(call.kwargs))))
    if any(spec.source is not None or not _is_cuttable(spec, full) for spec in specs):
        return None

    def cut(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            stride = tuple(_stride(value, at, full, size) for at in range(len(value.size)))
            rows = size if value.rows == full else value.rows
            sizes = tuple(size if n == full else n for n in value.size)
            return replace(value, size=sizes, stride=stride, rows=rows)
        return size if type(value) is int and value == full else value

    kwargs = {name: mapped(value, cut) for name, value in call.kwargs.items()}
    return replace(call, args=mapped(call.args, cut), kwargs=kwargs)


def _inner(spec: TensorSpec, at: int, full: int) -> int:
    """How many dimensions of the size that is cut lie within a step along another."""
    step = spec.stride[at]
    dims = zip(spec.size, spec.stride, strict=True)
    return sum(n == full and 0 < other < step for n, other in dims)


def _is_cuttable(spec: TensorSpec, full: int) -> bool:
    places = range(len(spec.size))
    return all(spec.stride[at] % full ** _inner(spec, at, full) == 0 for at in places)


def _stride(spec: TensorSpec, at: int, full: int, size: int) -> int:
    times = _inner(spec, at, full)
    stride: int = spec.stride[at] // full**times * size**times
    return stride


def carried_on(small: Small, measured: Sequence[KernelFacts]) -> KernelFacts | None:
    """The facts at the full size, from those of the small calls; ``None`` where they do not fit."""
    outputs = _outputs(small, [facts.outputs for facts in measured])
    if outputs is None and any(facts.outputs is not None for facts in measured):
        return None
    workspaces = [facts.workspace_bytes for facts in measured]
    time_s = measured[0].time_s
    return KernelFacts(
        _number(small, workspaces),
        None if time_s is None else time_s / small.share,
        outputs,
    )


def _outputs(
    small: Small, found: Sequence[tuple[OutputFacts, ...] | None]
) -> tuple[OutputFacts, ...] | None:
    first = found[0]
    if first is None or any(o is None or len(o) != len(first) for o in found):
        return None
    outputs = []
    for looks in zip(*(o or () for o in found), strict=True):
        if len({(look.dtype, len(look.size), look.storage_bytes is None) for look in looks}) > 1:
            return None
        outputs.append(
            OutputFacts(
                tuple(_all(small, [look.size for look in looks])),
                tuple(_all(small, [look.stride for look in looks])),
                looks[0].dtype,
                _number(small, [look.storage_bytes for look in looks]),
            )
        )
    return tuple(outputs)


def _all(small: Small, rows: Sequence[Sequence[int]]) -> Iterator[int]:
    for numbers in zip(*rows, strict=True):
        found = _number(small, numbers)
        assert found is not None
        yield found


def _number(small: Small, numbers: Sequence[int | None]) -> int | None:
    """A number at the full size; a line where the third lies on that of the first two."""
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return None
    points = list(zip(small.sizes, known, strict=True))
    line, size = points[:2], small.sizes[2]
    straight = abs(_through(line, size) - known[2]) <= _SLACK_BYTES * (known[0] > _SLACK_BYTES)
    return max(0, ceil(_through(line if straight else points, small.full)))


def _through(points: Sequence[tuple[int, int]], place: int) -> Fraction:
    """The value at a place of the polynomial through some points (Lagrange)."""
    total = Fraction(0)
    for at, value in points:
        term = Fraction(value)
        for other, _ in points:
            if other != at:
                term *= Fraction(place - other, at - other)
        total += term
    return total
