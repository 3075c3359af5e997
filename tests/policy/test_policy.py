"""Policies: what a rule matches, who decides first, what a wrong one says."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

import ckpt_pass
from ckpt_pass.policy.opinion import opinion
from ckpt_pass.policy.sites import SiteCounter

MM, ADD, RELU = (
    torch.ops.aten.mm.default,
    torch.ops.aten.add.Tensor,
    torch.ops.aten.relu.default,
)
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
SAVE, RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE

#: Two layers, each: attention in ``attn``, two matmuls in ``mlp`` and its ``up``, an add.
PROGRAM = [
    (op, path, layer)
    for layer in ("layers.0", "layers.1")
    for op, path in (
        (ATTENTION, (layer, f"{layer}.attn")),
        (MM, (layer, f"{layer}.mlp", f"{layer}.mlp.up")),
        (RELU, (layer, f"{layer}.mlp")),
        (MM, (layer, f"{layer}.mlp", f"{layer}.mlp.down")),
        (ADD, (layer,)),
    )
]


def saved_by(policy: object) -> list[str]:
    """The call sites of PROGRAM that a policy saves."""
    counter, chosen = SiteCounter(), ckpt_pass.as_policy(policy)
    contexts = [
        counter.visit(op, tuple((fqn, 0) for fqn in path), layer, torch.zeros(2, 2))
        for op, path, layer in PROGRAM
    ]
    return [str(c.site) for c in contexts if opinion(chosen, c).saves]


def in_layers(*sites: str) -> list[str]:
    return [site.format(layer) for layer in ("layers.0", "layers.1") for site in sites]


FLASH = "{}.attn aten._scaled_dot_product_flash_attention_for_cpu.default"
UP, DOWN = "{}.mlp.up aten.mm.default", "{}.mlp.down aten.mm.default"
ACT, SUM = "{}.mlp aten.relu.default", "{} aten.add.Tensor"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("save-matmul-attention", in_layers(FLASH, UP, DOWN)),
        ("save-attention", in_layers(FLASH)),
        ("save-matmul", in_layers(UP, DOWN)),
        ("save-nothing", []),
        ("every-other-matmul", in_layers(FLASH, UP)),
        ("save-everything", in_layers(FLASH, UP, ACT, DOWN, SUM)),
        (ckpt_pass.save(op_class="matmul", module="*.mlp", nth=2), in_layers(DOWN)),
        (ckpt_pass.save(op="aten.mm", module="*.mlp", nth=2), in_layers(DOWN)),
        (ckpt_pass.save(op_class="matmul", module="*.mlp", every=2), in_layers(UP)),
        (ckpt_pass.save(module="layers.1.mlp"), [s.format("layers.1") for s in (UP, ACT, DOWN)]),
        (ckpt_pass.save(op="aten.*"), in_layers(FLASH, UP, ACT, DOWN, SUM)),
        (ckpt_pass.save(op=[torch.ops.aten.add_.Tensor]), in_layers(SUM)),
        (ckpt_pass.save(op=torch.ops.aten.mm), in_layers(UP, DOWN)),
        (ckpt_pass.save(min_bytes=17), []),
        (ckpt_pass.save(op_class="matmul", min_bytes=16, max_bytes=16), in_layers(UP, DOWN)),
        (ckpt_pass.recompute(op="aten.mm") | ckpt_pass.save(), in_layers(FLASH, ACT, SUM)),
        (
            ckpt_pass.first_match(
                ckpt_pass.recompute(module="layers.0"), ckpt_pass.policies()["save-matmul"]
            ),
            [s.format("layers.1") for s in (UP, DOWN)],
        ),
        ([MM], in_layers(UP, DOWN)),
        (lambda site: SAVE if site.fqn.endswith("up") else None, in_layers(UP)),
        (lambda ctx, op, *args, **kwargs: op is RELU, in_layers(ACT)),
    ],
)
def test_what_a_policy_saves(policy: object, expected: list[str]) -> None:
    assert saved_by(policy) == expected


def test_occurrences_restart_with_each_module_call_and_each_region() -> None:
    counter = SiteCounter()
    sites = [counter.visit(MM, (("block", call),), None).site for call in (0, 0, 1)]
    assert [str(site) for site in sites] == [
        "block aten.mm.default",
        "block aten.mm.default#1",
        "block@1 aten.mm.default",
    ]
    indices = [counter.visit(MM, (), region).scopes[0].op_index for region in ("a", "a", "b")]
    assert indices == [0, 1, 0]


def test_an_in_place_op_counts_as_its_functional_twin() -> None:
    counter = SiteCounter()
    first = counter.visit(torch.ops.aten.add_.Tensor, ()).site
    second = counter.visit(ADD, ()).site
    assert (first.op, first.occurrence) == ("aten.add.Tensor", 0)
    assert (second.op, second.occurrence) == ("aten.add.Tensor", 1)


@pytest.mark.parametrize("name", ckpt_pass.policies())
def test_named_policies_are_values(name: str) -> None:
    policy = ckpt_pass.policies()[name]
    assert policy == pickle.loads(pickle.dumps(policy))
    assert hash(policy) == hash(pickle.loads(pickle.dumps(policy)))
    assert str(policy).startswith(f"{name}: ")
    assert "0x" not in repr(policy)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ckpt_pass.as_policy("save-matmuls"),
            ckpt_pass.UnknownPolicyError,
            r"no policy named 'save-matmuls'. Did you mean 'save-matmul'\? Known policies: save-",
        ),
        (lambda: ckpt_pass.as_policy(3), ckpt_pass.UnknownPolicyError, r"Got 3 of type int"),
        (lambda: ckpt_pass.as_policy([]), ckpt_pass.UnknownPolicyError, r"non-empty list"),
        (
            lambda: ckpt_pass.save(op_class="matmull"),
            ckpt_pass.InvalidRuleError,
            r"no op class 'matmull'. Did you mean 'matmul'\?",
        ),
        (lambda: ckpt_pass.save(op="x", nth=0), ckpt_pass.InvalidRuleError, r"nth counts from 1"),
        (
            lambda: ckpt_pass.save(op="x", nth=1, every=2),
            ckpt_pass.InvalidRuleError,
            r"both nth and every",
        ),
        (lambda: ckpt_pass.save(nth=1), ckpt_pass.InvalidRuleError, r"give op= or op_class="),
    ],
)
def test_wrong_policies_say_what_is_wrong(
    make: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("nonsense", ["save", 7, object()])
def test_a_policy_that_returns_nonsense_is_named_with_the_site(nonsense: object) -> None:
    def my_policy(site: ckpt_pass.SiteContext) -> object:
        return nonsense

    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    with pytest.raises(ckpt_pass.PolicyReturnError, match=r"my_policy returned .* at .*aten\."):
        ckpt_pass.plan(model, x, policy=my_policy)


def test_an_unclassified_custom_op_is_saved_by_the_default_policy() -> None:
    from tests.zoo import programs

    case = next(case for case in programs.CASES if case.name == "custom-op")
    module, inputs = case.make()
    with pytest.warns(ckpt_pass.UnclassifiedOpWarning, match=r"ckpt_pass_zoo\.swish.*save\(op="):
        plan = ckpt_pass.plan(module, *inputs)
    (custom,) = {d.op_class for d in plan.decisions if "ckpt_pass_zoo" in d.site.op}
    assert custom == "unclassified"
    assert {d.decision for d in plan.decisions if d.op_class == "unclassified"} == {SAVE}
    assert RECOMPUTE in {d.decision for d in plan.decisions}
