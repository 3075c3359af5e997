"""One policy value: the same step and the same saved call sites, eager and compiled."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy

import ckpt_pass
from tests.zoo import Case, StepResult, checkpoint_blocks, hf, programs, run_step

POLICIES = {
    "save-matmul-attention": "save-matmul-attention",
    "save-nothing": "save-nothing",
    "every-other-matmul": "every-other-matmul",
    "second-matmul-of-mlp": ckpt_pass.save(op_class="matmul", module="*.mlp", nth=2)
    | ckpt_pass.save(op_class="reduction", max_bytes=1 << 14)
    | ckpt_pass.recompute(),
}


def with_blocks(cases: tuple[Case, ...]) -> dict[str, Case]:
    return {case.name: case for case in cases if case.block_names(case.make()[0])}


CASES = with_blocks((*programs.CASES, *hf.CASES))


@functools.cache
def plain_step(name: str) -> StepResult:
    module, inputs = CASES[name].make()
    return run_step(module, inputs)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_eager_and_compiled(case: Case, policy: str) -> None:
    module, inputs = case.make()
    context_fn = ckpt_pass.context_fn(POLICIES[policy])
    checkpoint_blocks(module, case.block_names(module), context_fn=context_fn)

    with ckpt_pass.watch_regions() as eager:
        assert_same_gradients(case, run_step(module, inputs), plain_step(case.name))

    # Running statistics have moved: start again from the beginning.
    module, inputs = case.make()
    checkpoint_blocks(module, case.block_names(module), context_fn=context_fn)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with ckpt_pass.watch_regions() as compiling:
        assert_same_gradients(case, run_step(module, inputs, compiled), plain_step(case.name))

    traced = [region.saved_sites for region in compiling if region.traced]
    assert len(traced) == len(eager) >= len(case.block_names(module))  # one may be called twice
    assert [region.saved_sites for region in eager] == traced


def assert_same_gradients(case: Case, ours: StepResult, plain: StepResult) -> None:
    """Buffers are left out: the rerun of torch's checkpoint counts a batch norm's batch again."""
    assert torch.equal(ours.loss, plain.loss)
    assert ours.gradients.keys() == plain.gradients.keys()
    for name, expected in plain.gradients.items():
        if case.bitwise_vs_eager and case.bitwise_repeats:
            assert torch.equal(ours.gradients[name], expected), name
        else:  # the case's own rounding, see its flags
            torch.testing.assert_close(ours.gradients[name], expected)


def test_the_policies_differ() -> None:
    saved = {}
    for name, policy in POLICIES.items():
        module, inputs = CASES["llama"].make()
        checkpoint_blocks(
            module, CASES["llama"].block_names(module), context_fn=ckpt_pass.context_fn(policy)
        )
        with ckpt_pass.watch_regions() as regions:
            run_step(module, inputs)
        saved[name] = tuple(region.saved_sites for region in regions)
    assert len(set(saved.values())) == len(POLICIES)


@pytest.mark.parametrize("case", ["gpt2", "llama", "bert", "vit"])
def test_torchs_partitioner_saves_only_what_the_policy_saves(case: str) -> None:
    """What crosses from the compiled forward to its backward was tagged so, or enters a region."""
    crossing: list[fx.Node] = []

    def partition(gm: fx.GraphModule, inputs: object, **kwargs: int) -> tuple[object, object]:
        forward, backward = min_cut_rematerialization_partition(gm, inputs, **kwargs)
        (output,) = forward.graph.find_nodes(op="output")
        saved = output.args[0][kwargs["num_fwd_outputs"] :]
        crossing.extend(n for n in saved if n.op == "call_function")
        return forward, backward

    module, inputs = CASES[case].make()
    context_fn = ckpt_pass.context_fn("save-matmul-attention")
    checkpoint_blocks(module, CASES[case].block_names(module), context_fn=context_fn)
    backend = aot_autograd(fw_compiler=boxed_nop, partition_fn=partition)
    run_step(module, inputs, torch.compile(module, backend=backend, fullgraph=True))

    inside = [node for node in crossing if "ac_graph_id" in node.meta]
    assert inside
    for node in inside:
        enters_another = any(
            user.meta.get("ac_graph_id") != node.meta["ac_graph_id"] for user in node.users
        )
        assert node.meta["recompute"] is CheckpointPolicy.MUST_SAVE or enters_another, node


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_part_is_told_of(in_place: bool) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    if in_place:
        model[1].compile(backend="aot_eager")
    else:
        model[1] = torch.compile(model[1], backend="aot_eager")
    with pytest.warns(ckpt_pass.CompiledPartWarning, match="^1 of Sequential is compiled"):
        plan = ckpt_pass.plan(model, torch.randn(64, 32), budget=1.0, mode="eager")
    assert plan.peak_bytes
