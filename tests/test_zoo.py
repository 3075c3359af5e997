"""The zoo itself: every case runs, compiles without a graph break, and repeats itself.

What the other tests build on: eager's loss and gradients are the truth, the compiled step
equals them (dropout included, for ``aot_eager`` draws as eager does), and the fields of a case
say what the case does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import default_partition, make_boxed_func  # type: ignore[import-untyped]
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tests.zoo import SEED, Built, Case, StepResult, checkpoint_blocks, hf, programs, run_step

CASES = hf.CASES + programs.CASES
BLOCK_CASES = [case for case in CASES if case.block_names(case.make()[0])]
# Two of bfloat16's relative spacings (2**-7), for sums of a few such terms in another order.
RTOL = 2.0**-6
ATOL = 2.0**-12  # for elements near nought, of gradients that reach 0.2

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_block_case = pytest.mark.parametrize("case", BLOCK_CASES, ids=str)


def compiled(module: nn.Module, backend: Any = "aot_eager") -> Callable[..., Any]:
    """The module compiled without a graph break."""
    compiled_module: Callable[..., Any] = torch.compile(module, backend=backend, fullgraph=True)
    return compiled_module


def _as_it_is(graph: GraphModule, inputs: Any) -> Any:
    return make_boxed_func(graph.forward)


# Like aot_eager, mutations of inputs inside the graph included, but nothing is recomputed.
save_everything = aot_autograd(
    fw_compiler=_as_it_is, partition_fn=default_partition, keep_inference_input_mutations=True
)


def assert_same(actual: StepResult, expected: StepResult, bitwise: bool = True) -> None:
    """Loss, gradients and buffers are the same, to the last bit unless told."""
    rtol, atol = (0.0, 0.0) if bitwise else (RTOL, ATOL)
    for have, want in (
        (actual.loss, expected.loss),
        (actual.gradients, expected.gradients),
        (actual.buffers, expected.buffers),
    ):
        torch.testing.assert_close(have, want, rtol=rtol, atol=atol)


@every_case
def test_eager_steps_repeat(case: Case) -> None:
    first, second = (run_step(*case.make()) for _ in range(2))
    assert first.loss.ndim == 0
    assert_same(first, second, case.bitwise_repeats)
    assert all(gradient.count_nonzero() > 0 for gradient in first.gradients.values())


@every_case
def test_fields_tell_the_truth(case: Case) -> None:
    module, inputs = case.make()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    step = run_step(module, inputs)
    names = {name for name, _ in module.named_parameters()}
    assert names - step.gradients.keys() == case.gradless
    changed = any(not torch.equal(before[name], step.buffers[name]) for name in before)
    assert changed == case.mutates_buffers
    other = run_step(*case.make(), seed=SEED + 1)
    assert torch.equal(step.loss, other.loss) != case.draws_random


@every_case
def test_make_leaves_the_global_random_state(case: Case) -> None:
    before = torch.get_rng_state()
    case.make()
    assert torch.equal(torch.get_rng_state(), before)


@every_case
def test_compiled_equals_eager_and_repeats(case: Case) -> None:
    eager = run_step(*case.make())
    module, inputs = case.make()
    initial = {name: value.clone() for name, value in module.state_dict().items()}
    forward = compiled(module, "aot_eager" if case.aot_eager_right else save_everything)
    first = run_step(module, inputs, forward)
    assert_same(first, eager, case.bitwise_vs_eager)
    module.load_state_dict(initial)
    assert_same(run_step(module, inputs, forward), first, case.bitwise_repeats)


@pytest.mark.parametrize("name", ["autocast", "buffer-mutation"])
def test_exceptions_are_needed(name: str) -> None:
    """Where this starts to fail, the case no longer needs its field that excuses it."""
    (case,) = (case for case in CASES if case.name == name)
    assert not (case.bitwise_vs_eager and case.aot_eager_right)
    module, inputs = case.make()
    step = run_step(module, inputs, compiled(module))
    with pytest.raises(AssertionError):
        assert_same(step, run_step(*case.make()), bitwise=case.aot_eager_right)


@every_block_case
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_checkpointed_blocks_equal_plain(case: Case, compile_it: bool) -> None:
    plain = run_step(*case.make())
    module, inputs = case.make()
    undo = checkpoint_blocks(module, case.block_names(module))
    step = run_step(module, inputs, compiled(module) if compile_it else None)
    if case.mutates_buffers and not compile_it:
        # The eager recomputation changes the buffers a second time, the compiled one does not.
        with pytest.raises(AssertionError):
            torch.testing.assert_close(step.buffers, plain.buffers)
        step = replace(step, buffers=plain.buffers)
    assert_same(step, plain, case.bitwise_repeats)
    undo()
    assert all("forward" not in vars(submodule) for submodule in module.modules())


def _save_matmuls(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    matmul = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if matmul else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_save_matmuls)


@pytest.mark.parametrize(
    "context_fn",
    [_contexts, partial(create_selective_checkpoint_contexts, _save_matmuls)],
    ids=["function", "partial"],
)
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_checkpoint_blocks_takes_a_context_fn(
    context_fn: Callable[[], Any], compile_it: bool
) -> None:
    (case,) = (case for case in CASES if case.name == "residual-stack")
    plain = run_step(*case.make())
    module, inputs = case.make()
    checkpoint_blocks(module, case.block_names(module), context_fn)
    forward = compiled(module) if compile_it else module
    assert_same(run_step(module, inputs, forward), plain)


@pytest.mark.parametrize(
    ("make", "blocks", "layers", "weight_bytes"),
    [
        (hf.llama_16l, "model.model.layers", 16, 53_462_016),
        (hf.gpt2_12l, "model.transformer.h", 12, 39_196_672),
    ],
    ids=["llama-16l", "gpt2-12l"],
)
def test_reference_models(
    make: Callable[[], Built], blocks: str, layers: int, weight_bytes: int
) -> None:
    module, inputs = make()
    assert sum(p.nbytes for p in module.parameters()) == weight_bytes
    names = {name for name, _ in module.named_modules()}
    assert f"{blocks}.{layers - 1}" in names and f"{blocks}.{layers}" not in names
    assert inputs[0].numel() == 1024 and int(inputs[0].max()) < 128
