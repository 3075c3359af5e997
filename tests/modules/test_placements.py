"""Placements: the same step wherever regions are, nothing left behind, clear words on bad input."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass import (
    AllLayers,
    AutoMemory,
    ByName,
    ConfigKeyError,
    EveryN,
    Megatron,
    NoLayers,
    NothingChosenError,
    PlacementError,
    Segments,
    Sharded,
    Sharding,
    SqrtSegments,
    UnknownPlacementError,
    applied,
    apply,
    from_deepspeed,
    from_megatron,
    from_torchtitan,
    is_checkpointed,
    remove,
)
from ckpt_pass.regions.wrapping import RegionForward, regions_of
from tests.zoo import Built, Case, StepResult, assert_same_step, modular, run_step, seeded
from tests.zoo import hf as zoo
from tests.zoo.modular import TRANSFORMER, UNET
from tests.zoo.placed import CASES, MEASURED, PLACEMENTS, SIX, TRANSFORMERS, placed

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@functools.cache
def plain(case: Case) -> StepResult:
    model, inputs = case.make()
    return run_step(model, inputs)


def assert_as_plain(case: Case, got: StepResult) -> None:
    assert_same_step(got, plain(case))


@each_case
def test_every_placement_gives_the_same_step(case: Case) -> None:
    chosen = 0
    model, inputs = case.make()
    before = copy.deepcopy(model.state_dict())
    for asked in [*PLACEMENTS, *MEASURED]:
        placement = placed(asked, case)
        model.load_state_dict(before)
        keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
        choice = apply(model, placement)
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_parameters()] == names
        assert list(regions_of(model)) == sorted(choice.names, key=list(dict(
            model.named_modules())).index)  # fmt: skip
        assert_as_plain(case, run_step(model, inputs))
        chosen += bool(choice)
        assert bool(choice) == (asked != "none")
        remove(model)
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert not any("_ckpt_pass_choice" in module.__dict__ for module in model.modules())
    assert chosen == len(PLACEMENTS) + 1


@pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
@pytest.mark.parametrize("modules", [("core_attn",), ("layernorm",), ("core_attn", "layernorm")])
def test_megatron_selective(case: Case, modules: tuple[str, ...]) -> None:
    model, inputs = case.make()
    with applied(model, Megatron(modules=modules)) as choice:
        assert choice and all("layer" in one.name or ".h." in one.name for one in choice)
        assert_as_plain(case, run_step(model, inputs))


@pytest.mark.parametrize("build", [modular.t5, modular.bart])
def test_encoder_decoders(build: Callable[[], Built]) -> None:
    make = seeded(build)
    model, inputs = make()
    wanted = run_step(model, inputs)
    for placement in ("all", "alternate", "segments-2", "megatron-selective"):
        with applied(model, placement):
            got = run_step(model, inputs)
        assert all(torch.equal(got.gradients[name], g) for name, g in wanted.gradients.items())


@pytest.mark.parametrize("modules", [("mlp",), ("mlp_act",), ("layernorm", "mlp")])
def test_megatron_selective_mlp(modules: tuple[str, ...]) -> None:
    for case in SIX[:2]:
        model, inputs = case.make()
        with applied(model, Megatron(modules=modules)):
            assert_as_plain(case, run_step(model, inputs))


@pytest.mark.parametrize("case", [SIX[0], UNET], ids=str)
@pytest.mark.parametrize("policy", ["save-matmul-attention", "save-nothing"])
@pytest.mark.parametrize("placement", ["alternate", "segments-2", "megatron-full"])
def test_a_policy_says_what_regions_keep(case: Case, policy: str, placement: str) -> None:
    model, inputs = case.make()
    with applied(model, placement, policy):
        assert_as_plain(case, run_step(model, inputs))


@pytest.mark.parametrize("case", [SIX[0], TRANSFORMER], ids=str)
def test_a_budget_hands_over_to_the_eager_plan(case: Case) -> None:
    model, inputs = case.make()
    choice = apply(model, budget=0.8, example_inputs=inputs)
    plan = ckpt_pass.plan(case.make()[0], *inputs, budget=0.8, mode="eager")
    assert choice.names == plan.regions and choice.regions == plan.region_specs()
    assert_as_plain(case, run_step(model, inputs))
    remove(model)


@pytest.mark.parametrize("placement", ["all", "segments-2", Segments(1, nested=True)])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(placement: Any, copied: Any) -> None:
    case = SIX[0]
    model, inputs = case.make()
    apply(model, placement)
    model.loss = zoo.next_token_loss
    other = copied(model)
    forwards = regions_of(other)
    assert forwards.keys() == regions_of(model).keys()
    assert all(forward.module is other.get_submodule(name) for name, forward in forwards.items())
    assert str(is_checkpointed(other)) == str(is_checkpointed(model))
    remove(model)
    assert_as_plain(case, run_step(other, inputs))
    remove(other)
    assert not regions_of(other)


def test_is_checkpointed_says_what_apply_did() -> None:
    model, _ = SIX[0].make()
    before = is_checkpointed(model)
    assert not before and [one.inside for one in before] == [False] * 3
    apply(model, "alternate")
    assert str(is_checkpointed(model)) == (
        "placement alternate: 2 modules in 2 regions\n"
        "model.transformer.h.0  GPT2Block  in   layer 0 is even\n"
        "model.transformer.h.1  GPT2Block  out  layer 1: not asked\n"
        "model.transformer.h.2  GPT2Block  in   layer 2 is even"
    )
    around = nn.ModuleDict({"inner": model})
    assert is_checkpointed(around).names[0] == "inner.model.transformer.h.0"
    remove(around)
    assert not is_checkpointed(model)
    plan = ckpt_pass.plan(model, *SIX[0].make()[1], budget=0.6, mode="eager")
    with plan.applied(model):
        assert is_checkpointed(model).names == plan.regions


def test_the_plain_placement_can_be_removed_too() -> None:
    model, _ = UNET.make()
    assert not apply(model, "none")
    with pytest.raises(ckpt_pass.AlreadyAppliedError, match="none applied"):
        apply(model, "all")
    remove(model)
    with pytest.raises(ckpt_pass.NotAppliedError):
        remove(model)


def test_forwards_of_others_come_back() -> None:
    model, inputs = UNET.make()
    theirs = model.bottleneck.forward = functools.partial(type(model.bottleneck).forward,
                                                           model.bottleneck)  # fmt: skip
    with applied(model, "all"):
        assert isinstance(model.bottleneck.forward, RegionForward)
        assert_as_plain(UNET, run_step(model, inputs))
    assert model.bottleneck.forward is theirs


# --- names ----------------------------------------------------------------------------------


def test_placements_list_themselves() -> None:
    listed = ckpt_pass.placements()
    assert set(listed) == {
        "none", "all", "alternate", "every-n", "layers", "by-name", "custom", "heavy-ops", "auto",
        "auto-memory", "sqrt-segments", "segments", "optimal-segments", "megatron", "offloaded",
        "offload-parts", "sharded",
    }  # fmt: skip
    assert all(listed.values())


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("every-4", EveryN(4)),
        ("segments-4", Segments(4)),
        ("layers-0,-2", ckpt_pass.ChosenLayers((0, -2))),
        ("auto-10", ckpt_pass.Auto(10)),
        ("megatron-full", Megatron("full")),
        ("sqrt-segments", SqrtSegments()),
    ],
)
def test_names_with_parameters(name: str, placement: Any) -> None:
    assert ckpt_pass.as_placement(name) == placement
    assert ckpt_pass.as_placement(placement) is placement
    assert hash(placement) == hash(ckpt_pass.as_placement(name))


@pytest.mark.parametrize("name", ["alternat", "every-", "segments", "optimal-segments", "by-name"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UnknownPlacementError, match=r"Did you mean|needs arguments"):
        ckpt_pass.as_placement(name)
    with pytest.raises(UnknownPlacementError, match="of type int"):
        ckpt_pass.as_placement(3)  # type: ignore[arg-type]


# --- bad input ------------------------------------------------------------------------------


def chain(depth: int = 3) -> nn.Sequential:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    return nn.Sequential(*(block() for _ in range(depth)))


@dataclass(frozen=True)
class Bad:
    placement: Any
    error: type[Exception]
    says: str


def no_module(module: nn.Module) -> bool:
    return False


BAD = [
    Bad("every-0", PlacementError, "n=0"),
    Bad("segments-4", PlacementError, "4 segments for 3 layers"),
    Bad("layers-3", PlacementError, r"from -3 to 2: Sequential has 3 layers \(0 to 2\)"),
    Bad(ByName("Linera"), NothingChosenError, "'Linera' matches no module.*Did you mean 'Linear'"),
    Bad(no_module, NothingChosenError, "says yes to"),
    Bad("heavy-ops", NothingChosenError, "1,048,576"),
    Bad("auto", NothingChosenError, "largest has 28"),
    Bad("auto-memory", PlacementError, "profile_layers"),
    Bad(AutoMemory(0.5, (ckpt_pass.LayerProfile("x", 1, 1),)), PlacementError, "'x' is of no"),
    Bad(AutoMemory(1, (ckpt_pass.LayerProfile("0", 9, 5),)), PlacementError, "cannot meet 1"),
    Bad("megatron-selective", NothingChosenError, "have no core_attn"),
    Bad(Megatron("full", "block", 9), PlacementError, "9 layers for 3 layers"),
]


@pytest.mark.parametrize(
    "bad", BAD, ids=lambda bad: getattr(bad.placement, "__name__", str(bad.placement))
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(bad: Bad) -> None:
    model = chain()
    with pytest.raises(bad.error, match=bad.says):
        apply(model, bad.placement)
    assert not any("forward" in module.__dict__ for module in model.modules())
    apply(model, "all")


def test_no_layers_says_what_was_looked_for_and_what_is_there() -> None:
    model = nn.ModuleDict({"inner": nn.Linear(2, 2), "act": nn.GELU()})
    with pytest.raises(ckpt_pass.NoLayersError) as caught:
        apply(model)
    assert "layers.3" in str(caught.value) and "inner (Linear), act (GELU)" in str(caught.value)


def test_two_placements() -> None:
    model = chain()
    apply(model, "all")
    with pytest.raises(ckpt_pass.AlreadyAppliedError, match="all applied"):
        apply(model, "alternate")
    around = nn.ModuleDict({"inner": model})
    with pytest.raises(ckpt_pass.AlreadyAppliedError):
        apply(around, ByName("inner"))


def test_modules_that_regions_share() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ckpt_pass.SharedModuleError, match="'0' and '1'"):
        apply(nn.Sequential(block, block), "all")
    shared = nn.Linear(4, 4)
    two = nn.Sequential(nn.Sequential(shared, nn.GELU()), nn.Sequential(shared, nn.GELU()))
    with pytest.warns(ckpt_pass.SharedModuleWarning, match="share a Linear"):
        apply(two, "all")


def test_frozen_and_eval_models_are_warned_about() -> None:
    frozen, evaluating = chain().requires_grad_(False), chain().eval()
    with pytest.warns(ckpt_pass.InactiveRegionsWarning, match="no parameter"):
        apply(frozen, "all")
    with pytest.warns(ckpt_pass.InactiveRegionsWarning, match="eval mode"):
        apply(evaluating, "all")
    x = torch.randn(2, 4, requires_grad=True)
    frozen(x).sum().backward()
    assert x.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(chain().eval(), "none")


def test_a_budget_goes_with_nothing_else() -> None:
    x = torch.randn(2, 4)
    for options in ({"placement": "all"}, {"policy": "save-matmul"}):
        with pytest.raises(PlacementError, match="one of the two"):
            apply(chain(), budget=0.5, example_inputs=x, **options)
    with pytest.raises(PlacementError, match="example_inputs"):
        apply(chain(), budget=0.5)


def test_nested_segments_with_a_policy() -> None:
    with pytest.raises(ckpt_pass.SegmentError, match="handed out once"):
        apply(chain(), Segments(1, nested=True), "save-matmul")


def test_a_measuring_placement_measures() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).square().mean()  # type: ignore[no-any-return]

    model, x = Net(), torch.randn(64, 4)
    choice = apply(model, AutoMemory(0.9), example_inputs=x)
    assert 1 <= len(choice.names) < 3 and "bytes" in str(choice)


# --- configurations of others ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "config", "placement"),
    [
        (from_deepspeed, {"activation_checkpointing": {"number_checkpoints": 3}}, Segments(3)),
        (from_deepspeed, {"number_checkpoints": None, "profile": False}, AllLayers()),
        (from_torchtitan, {"mode": "none", "early_stop": False}, NoLayers()),
        (from_torchtitan, SimpleNamespace(mode="full", memory_budget=0.5), AllLayers()),
        (
            from_torchtitan,
            {"mode": "selective", "selective_ac_option": "3"},
            EveryN(3, offset=2),
        ),
        (from_megatron, {"recompute_granularity": None}, None),
        (
            from_megatron,
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 2,
            },
            Megatron("full", "block", 2),
        ),
        (
            from_megatron,
            {"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]},
            Megatron(modules=("mlp", "layernorm")),
        ),
    ],
)
def test_configurations(read: Any, config: Any, placement: Any) -> None:
    assert read(config) == placement


class SelectiveAC:
    @dataclass
    class Config:
        force_recompute_mm_shapes_by_fqns: tuple[str, ...] = ("router.gate",)
        preserve_rng_state: bool = True


def test_newer_torchtitan_configurations() -> None:
    found = from_torchtitan(SelectiveAC.Config())
    assert isinstance(found, AllLayers)
    assert "recompute(op_class=matmul, module=*router.gate*)" in str(found.policy)


def test_configurations_that_shard() -> None:
    config = {"recompute_granularity": "full", "distribute_saved_activations": True}
    first = Sharding("3", arguments="first")
    assert from_megatron(config, group="3") == Sharded(Megatron("full"), first)
    assert from_megatron({**config, "distribute_saved_activations": False}) == Megatron("full")
    shards = from_deepspeed({"partition_activations": True})
    assert shards == Sharded(AllLayers(), Sharding())


@pytest.mark.parametrize(
    ("read", "config", "says"),
    [
        (from_deepspeed, {"contiguous_memory_optimization": True}, "without cpu_checkpointing"),
        (from_deepspeed, {"partition_activations": True, "cpu_checkpointing": True}, "one place"),
        (from_deepspeed, {"number_checkpoint": 3}, "Did you mean 'number_checkpoints'"),
        (from_deepspeed, {"number_checkpoints": "all"}, "'all'"),
        (from_deepspeed, 3, "of type int"),
        (from_deepspeed, {"cpu_checkpointing": "yes"}, "cpu_checkpointing='yes', expected true"),
        (from_deepspeed, {"partition_activations": "false"}, "true or false"),
        (from_megatron, {"distribute_saved_activations": "no"}, "true or false"),
        (from_megatron, {"cpu_offloading": "True"}, "cpu_offloading='True'"),
        (from_torchtitan, {"mode": "memory_budget"}, "budget="),
        (from_torchtitan, {"mode": "selective", "selective_ac_option": "ops"}, "'ops'"),
        (from_torchtitan, {"mode": "full", "debug": True}, "debug=True"),
        (from_torchtitan, {"mode": "full", "moed": 1}, "not known"),
        (from_megatron, {"recompute_granularity": "selective",
                         "recompute_modules": ["mla_up_proj"]}, "mla_up_proj"),
        (from_megatron, {"distribute_saved_activations": True}, "expected 'full'"),
        (from_megatron, {"recompute_granularity": "selective",
                         "distribute_saved_activations": True}, "expected 'full'"),
        (from_megatron, {"recompute_granularity": "full", "sequence_parallel": True,
                         "distribute_saved_activations": True}, "sequence_parallel"),
        (from_megatron, {"num_layers": 2}, "not known"),
    ],
)  # fmt: skip
def test_configurations_that_mean_nothing_here(read: Any, config: Any, says: str) -> None:
    with pytest.raises(ConfigKeyError, match=says):
        read(config)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "ful"},
        {"granularity": "full", "method": "blocks"},
        {"granularity": "full", "method": "block"},
        {"method": "uniform"},
        {"modules": ("attn",)},
        {"modules": ()},
    ],
)
def test_bad_megatron_options(options: dict[str, Any]) -> None:
    with pytest.raises(PlacementError, match="expected"):
        Megatron(**options)


@pytest.fixture(autouse=True)
def _no_warnings_unless_asked() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ckpt_pass.InactiveRegionsWarning)
        warnings.simplefilter("error", ckpt_pass.SharedModuleWarning)
        yield
