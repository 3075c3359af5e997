"""Kernels too large to run: what smaller ones tell of them is what they would have told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ckpt_pass.graph import kernel_scale
from ckpt_pass.graph.kernel_call import Call, TensorSpec
from ckpt_pass.graph.kernel_run import measure
from ckpt_pass.graph.kernel_scale import carried_on, made_small
from ckpt_pass.graph.kernels import WORKSPACE, _measure

CPU = torch.device("cpu")
aten = torch.ops.aten


def spec(
    size: Sequence[int],
    dtype: torch.dtype = torch.float32,
    stride: Sequence[int] | None = None,
) -> TensorSpec:
    found = torch.empty(size, device="meta").stride() if stride is None else tuple(stride)
    return TensorSpec(tuple(size), found, dtype, CPU)


def call(target: Any, *args: Any, **kwargs: Any) -> Call:
    return Call(target, args, kwargs, CPU)


CALLS = {
    "product": call(aten.mm.default, spec((512, 256)), spec((256, 4096))),
    "transposed product": call(
        aten.mm.default, spec((512, 256), stride=(1, 512)), spec((256, 4096), stride=(1, 256))
    ),
    "square product": call(aten.mm.default, spec((1024, 1024)), spec((1024, 1024))),
    "vocabulary": call(aten._log_softmax.default, spec((256, 8000)), 1, False),
    "its backward": call(
        aten._log_softmax_backward_data.default,
        spec((256, 8000)),
        spec((256, 8000)),
        1,
        torch.float32,
    ),
    "a scalar in a large storage": call(
        aten.mse_loss.default, spec((2048, 1024)), spec((2048, 1024))
    ),
    "a cast inside": call(aten.mean.dim, spec((2048, 1024), torch.bfloat16), [-1], True),
    "a mask": call(
        aten.bitwise_and.Tensor,
        spec((1, 1, 2048, 2048), torch.bool),
        spec((1, 1, 2048, 2048), torch.bool),
    ),
    "heads apart": call(
        aten.clone.default,
        spec((1, 2048, 8, 64), stride=(1048576, 64, 131072, 1)),
        memory_format=torch.contiguous_format,
    ),
    "a size among the arguments": call(
        aten.embedding_dense_backward.default,
        spec((1, 512, 512)),
        spec((1, 512), torch.int64),
        8000,
        -1,
        False,
    ),
}


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large here is still run in milliseconds, so that both can be compared."""
    monkeypatch.setattr(kernel_scale, "LARGE_FLOPS", 2 * 10**8)
    monkeypatch.setattr(kernel_scale, "LARGE_BYTES", 1 << 22)
    monkeypatch.setattr(kernel_scale, "_SMALL_BYTES", 1 << 16)


@pytest.mark.parametrize("name", CALLS)
def test_small_kernels_tell_what_the_large_one_does(name: str) -> None:
    large = CALLS[name]
    small = made_small(large)
    assert small is not None
    assert all(made_small(one) is None for one in small.calls[1:])
    run, failed = measure({"": large}, WORKSPACE)
    told, unlike = _measure({"": large}, WORKSPACE)
    assert not failed and not unlike
    assert told == run


def test_kernels_within_the_limits_are_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_scale, "LARGE_FLOPS", 10**12)
    monkeypatch.setattr(kernel_scale, "LARGE_BYTES", 1 << 40)
    assert all(made_small(large) is None for large in CALLS.values())


def test_what_has_no_long_dimension_is_run_as_it_is() -> None:
    assert made_small(call(aten.mul.Tensor, spec((96,) * 3), spec((96,) * 3))) is None


def test_outputs_of_other_kinds_are_told_apart() -> None:
    small = made_small(CALLS["product"])
    assert small is not None
    facts, _ = measure({str(n): one for n, one in enumerate(small.calls)}, WORKSPACE)
    ordered = [facts[str(n)] for n in range(3)]
    other, _ = measure({"": CALLS["a cast inside"]}, WORKSPACE)
    assert carried_on(small, ordered) is not None
    assert carried_on(small, [ordered[0], ordered[1], other[""]]) is None


def test_times_follow_the_work() -> None:
    large = CALLS["product"]
    small = made_small(large)
    assert small is not None
    assert small.share == pytest.approx(small.sizes[0] / small.full)
    told, _ = _measure({"": large}, frozenset({"time"}))
    first, _ = measure({"": small.calls[0]}, frozenset({"time"}))
    assert told[""].time_s is not None and first[""].time_s is not None
    assert told[""].time_s > 2 * first[""].time_s
