"""Measuring in normalised units: 512 x 512 float32 is 1 MiB, a 512-cubed matmul is 1 unit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ckpt_pass.measure.step import (
    GradientMismatchError,
    MeasureArgumentError,
    NoLossError,
    UnknownParametersError,
    compare_gradients,
    measure_step,
)

MIB = 2**20  # bytes of 512 x 512 float32
UNIT = 2 * 512**3  # flops of one matmul of that size
SCALAR = 4  # bytes of the loss, and of the gradient of the loss

quick = partial(measure_step, warmup=0, repeats=1)


def matrix(*, grad: bool = False) -> Tensor:
    return torch.randn(512, 512).div_(512**0.5).requires_grad_(grad)


def block(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.sin(torch.sin(x @ first) @ second)


class Chain:
    """Two blocks of (matmul, sin, matmul, sin), plain or with each block checkpointed."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.weights = [matrix(grad=True) for _ in range(4)]
        self.x = matrix()
        self.dropout = dropout

    def plain(self) -> Tensor:
        return self._run(block)

    def checkpointed(self) -> Tensor:
        return self._run(
            # Without preserve_rng_state=False, the 5056 bytes of a state per block count as saved.
            lambda *args: checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        )

    def _run(self, each: Callable[..., Tensor]) -> Tensor:
        x = self.x
        for i in (0, 2):
            x = nn.functional.dropout(each(x, *self.weights[i : i + 2]), self.dropout)
        return x.sum()


@pytest.fixture
def chain() -> Chain:
    return Chain()


def test_saved_peak_and_flops_of_a_plain_chain(chain: Chain) -> None:
    got = quick(chain.plain)
    # Saved: 4 matmul outputs (for sin) and 3 sin outputs (for the next matmul). Outside: x and
    # the weights. The last sin's output is dead, sum needs its shape only.
    assert got.saved_bytes == 7 * MIB + SCALAR
    # The peak is at the first sin's backward: of its two temporaries (cos, and cos * gradient)
    # on top of the saved 7; no gradient of a weight is there yet, each comes as two values go.
    assert got.peak_bytes == 9 * MIB + 2 * SCALAR
    assert got.flops == (4 + 7) * UNIT  # x needs no gradient: 2 * 4 - 1 in the backward
    assert got.device == "cpu"
    assert got.time_s > 0


def test_checkpointing_saves_bytes_and_costs_flops(chain: Chain) -> None:
    got = quick(chain.checkpointed)
    assert got.saved_bytes == 1 * MIB + SCALAR  # the border between the blocks
    assert got.flops == (4 + 7 + 4) * UNIT  # torch stops early, yet a sin needs the last matmul


def test_the_timeline_begins_at_zero_and_holds_the_peak_and_the_gradients(chain: Chain) -> None:
    got = quick(chain.plain)
    times = [at for at, _ in got.timeline]
    assert got.timeline[0] == (0.0, 0)
    assert times == sorted(times)
    assert max(count for _, count in got.timeline) == got.peak_bytes
    assert got.timeline[-1][1] == 4 * MIB  # the weights' gradients; the loss went with the step
    assert got.timeline[-1][0] < 60.0  # seconds: events and markers have one clock


def test_what_was_there_before_does_not_count(chain: Chain) -> None:
    alone = quick(chain.plain)
    ballast = matrix()
    for weight in chain.weights:
        weight.grad = torch.ones_like(weight)
    assert quick(chain.plain).peak_bytes == alone.peak_bytes
    del ballast


def test_an_own_backward_is_measured_with_params(chain: Chain) -> None:
    def step() -> None:
        chain.plain().backward()

    whole = quick(chain.plain)
    for backward in (None, False):
        own = quick(step, params=chain.weights, backward=backward)
        assert own.saved_bytes is None
        assert own.flops == whole.flops
        assert own.peak_bytes == whole.peak_bytes


def test_a_loss_returned_after_an_own_backward_is_not_walked_twice(chain: Chain) -> None:
    def step() -> Tensor:
        loss = chain.plain()
        loss.backward()
        return loss

    assert quick(step, params=chain.weights).saved_bytes is None
    with pytest.raises(UnknownParametersError, match="Pass params="):
        quick(step)


def test_gradients_random_state_and_collector_are_left_as_they_were() -> None:
    chain = Chain(dropout=0.5)
    old = torch.ones(512, 512)
    chain.weights[0].grad = old
    before = torch.get_rng_state()
    quick(chain.plain)
    assert chain.weights[0].grad is old
    assert bool((old == 1).all())
    assert chain.weights[1].grad is None
    assert torch.equal(torch.get_rng_state(), before)
    assert gc.isenabled()


def test_gradients_come_back_after_an_error(chain: Chain) -> None:
    old = torch.ones(512, 512)
    chain.weights[0].grad = old
    with pytest.raises(NoLossError, match=r"Tensor of shape \(512, 512\)"):
        measure_step(lambda: chain.x @ chain.weights[0], params=chain.weights, backward=True)
    assert chain.weights[0].grad is old
    assert gc.isenabled()


def test_every_run_draws_the_same_numbers(chain: Chain) -> None:
    drawn = []

    def step() -> Tensor:
        drawn.append(float(torch.rand(())))
        return chain.plain()

    measure_step(step, warmup=2, repeats=4)
    assert len(drawn) == 2 + 4 + 3
    assert len(set(drawn)) == 1


def test_wrong_arguments_say_what_is_wrong(chain: Chain) -> None:
    with pytest.raises(MeasureArgumentError, match="repeats=0; expected at least 1"):
        measure_step(chain.plain, repeats=0)
    with pytest.raises(MeasureArgumentError, match="warmup=-1"):
        measure_step(chain.plain, warmup=-1)
    with pytest.raises(UnknownParametersError):
        measure_step(chain.plain, backward=False)
    with pytest.raises(NoLossError, match="returned NoneType"):
        measure_step(lambda: None, backward=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("warmup", [0, 1])
def test_flops_of_a_compiled_step_have_the_recomputation(warmup: int, dropout: float) -> None:
    chain = Chain(dropout)
    step = torch.compile(chain.checkpointed, backend="aot_eager", fullgraph=True)
    assert measure_step(step, warmup=warmup, repeats=1).flops == (4 + 7 + 4) * UNIT


def test_saved_bytes_of_a_compiled_step(chain: Chain) -> None:
    step = torch.compile(chain.checkpointed, backend="aot_eager", fullgraph=True)
    assert quick(step).saved_bytes == 1 * MIB + SCALAR


@pytest.mark.slow
def test_flops_of_a_step_compiled_by_inductor(chain: Chain) -> None:
    step = torch.compile(chain.checkpointed, fullgraph=True)
    assert quick(step).flops == (4 + 7 + 4) * UNIT


def test_attention_recomputed_with_its_random_state_is_counted_twice() -> None:
    # 2 heads of 128 x 64: Q K^T and P V are 2 matmuls of 2 * 2 * 128 * 128 * 64 flops each.
    attention = 2 * 2 * 2 * 128 * 128 * 64
    query = torch.randn(1, 2, 128, 64, requires_grad=True)

    def attend(q: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q).sin()

    plain = quick(lambda: attend(query).sum()).flops
    step = torch.compile(
        lambda: checkpoint(attend, query, use_reentrant=False).sum(),
        backend="aot_eager",
        fullgraph=True,
    )
    assert plain == attention + attention * 5 // 2  # backward: 5 matmuls, the scores once more
    assert quick(step).flops == plain + attention


def test_the_same_step_compares_equal_bit_by_bit() -> None:
    chain = Chain(dropout=0.5)
    named = {str(i): weight for i, weight in enumerate(chain.weights)}
    same = compare_gradients(chain.plain, chain.checkpointed, named)
    assert same.equal
    assert same.max_abs_diff == 0.0
    assert same.compared == 4
    assert str(same) == "bitwise equal: the loss and 4 gradients and buffers"
    same.raise_if_different()


def test_a_wrong_gradient_is_found_and_named(chain: Chain) -> None:
    def wrong() -> Tensor:
        loss = chain.plain()
        return loss + (chain.weights[2] - chain.weights[2].detach()).sum()

    named = {f"w{i}": weight for i, weight in enumerate(chain.weights)}
    got = compare_gradients(chain.plain, wrong, named)
    assert not got.equal
    assert got.loss_equal
    assert got.different == ("w2",)
    assert got.worst == "w2"
    assert got.max_abs_diff == pytest.approx(1.0, abs=1e-4)
    assert str(got).startswith("1 of 5 differ (w2); worst is 'w2', by 1")
    assert compare_gradients(chain.plain, wrong, named, atol=1.001).equal
    with pytest.raises(GradientMismatchError, match="worst is 'w2'"):
        got.raise_if_different()


def test_a_missing_gradient_is_a_difference(chain: Chain) -> None:
    def frozen() -> Tensor:
        return block(block(chain.x, *chain.weights[:2]), *chain.weights[2:]).sum()

    spare = matrix(grad=True)
    named = {"w0": chain.weights[0], "spare": spare}
    assert compare_gradients(chain.plain, frozen, named).equal  # spare has none on either side
    got = compare_gradients(chain.plain, lambda: frozen() + 0 * spare.sum(), named)
    assert got.loss_equal
    assert got.different == ("spare",)
    assert got.max_abs_diff == float("inf")


@pytest.mark.parametrize(
    ("left", "right", "equal", "diff"),
    [
        (float("nan"), float("nan"), True, 0.0),
        (float("inf"), float("inf"), True, 0.0),
        (float("nan"), 1.0, False, float("inf")),
        (0.0, -0.0, False, 0.0),  # a bit apart, though not as numbers
        (1.0, 1.5, False, 0.5),
    ],
)
def test_bitwise_with_nan_equal_to_nan(left: float, right: float, equal: bool, diff: float) -> None:
    weight = torch.ones(3, requires_grad=True)

    def step(slope: float) -> Tensor:
        loss = weight.sum().detach().requires_grad_()
        weight.grad = torch.tensor([1.0, slope, 2.0])
        return loss

    got = compare_gradients(lambda: step(left), lambda: step(right), {"w": weight})
    assert got.equal is equal
    assert got.max_abs_diff == diff
    assert got.worst == "w"


def test_batch_norm_updated_twice_is_found_and_undone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(8, 4)

    def twice() -> Tensor:
        with torch.no_grad():
            model(x)
        return model(x).square().sum()

    assert compare_gradients(lambda: model(x).square().sum(), twice, dict()).equal
    model.zero_grad()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    got = compare_gradients(lambda: model(x).square().sum(), twice, model)
    assert set(got.different) == set(before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(param.grad is None for param in model.parameters())
