"""Placements that offload, and the configurations of others that ask for them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass import AllLayers, ByName, ChosenLayers, Offload, Offloaded, OffloadParts, Segments
from ckpt_pass.modules.configs import ConfigKeyError
from tests.regions.test_offload import Net, Watched, X, same
from tests.regions.test_offload import step as net_step
from tests.zoo import Case, hf
from tests.zoo.modular import UNET

HERE = Offload(min_bytes=1)
CASES = [case for case in hf.CASES if case.bitwise_repeats] + [UNET]
PLACED: dict[str, Any] = {
    "inputs": Offloaded(AllLayers(), HERE),
    "inputs of segments": Offloaded(Segments(2), Offload("disk", min_bytes=1)),
    "saved": Offloaded(AllLayers(), Offload("disk", min_bytes=1), "saved"),
    "policy": ckpt_pass.offload(op_class=("matmul", "convolution")) | ckpt_pass.recompute(),
}


def step(model: nn.Module, inputs: Any) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(*inputs)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *grads, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models(case: Case) -> None:
    model, inputs = case.make()
    start = copy.deepcopy(model.state_dict())
    wanted = step(model, inputs)
    for name, placed in PLACED.items():
        model.load_state_dict(start)
        placement, policy = (AllLayers(), placed) if name == "policy" else (placed, None)
        with ckpt_pass.applied(model, placement, policy, offload=HERE if policy else None):
            assert same(step(model, inputs), wanted), name


def test_what_a_choice_says() -> None:
    choice = Offloaded(ChosenLayers((0, 2)), Offload("disk"), "saved").choose(Net())
    assert str(choice).startswith(
        "placement layers-0,2: 2 modules in 2 regions; nothing recomputed, saved values offloaded"
    )
    (spec, _) = choice.regions.values()
    assert spec.offload_saved and spec.offload == Offload("disk") and not spec.offload_inputs


def test_saved_values_of_some_modules() -> None:
    net, store = Net(), Watched()
    wanted = net_step(net)
    with ckpt_pass.applied(net, Offloaded(ByName("*.up", "*.down"), what="saved"), offload=store):
        assert same(net_step(net), wanted)
    tokens = 4 * 16
    assert sorted(set(store.put_bytes)) == [tokens * 32 * 4, tokens * 4 * 32 * 4]
    assert len(store.put_bytes) == 8  # what the two linear layers of four blocks save: their inputs


@pytest.mark.parametrize(
    ("part", "name"),
    [("attn_norm", "norm1"), ("qkv_linear", "attn.qkv"), ("attn_proj", "attn.out_proj")],
)
def test_parts_of_layers(part: str, name: str) -> None:
    net = Named()
    choice = OffloadParts((part,)).choose(net)
    assert choice.names == tuple(f"layers.{k}.{name}" for k in range(2))
    with pytest.raises(ckpt_pass.NothingChosenError, match="mlp_norm"):
        OffloadParts((part, "mlp_norm")).choose(net)


def test_of_nested_parts_the_outermost() -> None:
    assert OffloadParts(("qkv_linear", "core_attn")).choose(Named()).names == (
        "layers.0.attn",
        "layers.1.attn",
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out_proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out_proj(q * k.sigmoid() * v)  # type: ignore[no-any-return]


class NamedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(32), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))  # type: ignore[no-any-return]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NamedBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


from_deepspeed, from_megatron = ckpt_pass.from_deepspeed, ckpt_pass.from_megatron


@pytest.mark.parametrize(
    ("read", "config", "placement"),
    [
        (from_deepspeed, {"cpu_checkpointing": True}, Offloaded(AllLayers())),
        (
            from_deepspeed,
            {
                "activation_checkpointing": {
                    "cpu_checkpointing": True,
                    "contiguous_memory_optimization": True,
                    "number_checkpoints": 2,
                }
            },
            Offloaded(Segments(2)),
        ),
        (
            from_megatron,
            {"cpu_offloading": True, "cpu_offloading_num_layers": 2},
            Offloaded(ChosenLayers((0, 1)), what="saved"),
        ),
        (from_megatron, {"cpu_offloading": False, "cpu_offloading_num_layers": 2}, None),
        (
            from_megatron,
            {
                "fine_grained_activation_offloading": True,
                "offload_modules": ["attn_norm", "core_attn"],
                "min_offloaded_tensor_size": 100,
            },
            Offloaded(OffloadParts(("attn_norm", "core_attn")), Offload(min_bytes=200), "saved"),
        ),
    ],
)
def test_configurations(read: Callable[[Any], Any], config: Any, placement: Any) -> None:
    assert read(config) == placement
    if placement is not None:
        net = Named()
        wanted = net_step(net)
        with ckpt_pass.applied(net, read(config)) as choice:
            assert choice and same(net_step(net), wanted)


@pytest.mark.parametrize(
    ("read", "config", "says"),
    [
        (from_deepspeed, {"contiguous_memory_optimization": True}, "without cpu_checkpointing"),
        (from_megatron, {"cpu_offloading": True}, "cpu_offloading_num_layers=None"),
        (from_megatron, {"cpu_offloading_weights": True}, "Parameters stay"),
        (
            from_megatron,
            {
                "cpu_offloading": True,
                "cpu_offloading_num_layers": 1,
                "recompute_granularity": "full",
            },
            "one of the two",
        ),
        (
            from_megatron,
            {"fine_grained_activation_offloading": True, "offload_modules": ["gdp_qkv"]},
            "gdp_qkv",
        ),
    ],
)
def test_configurations_that_mean_nothing_here(read: Any, config: Any, says: str) -> None:
    with pytest.raises(ConfigKeyError, match=says):
        read(config)


def test_arguments_that_contradict_each_other() -> None:
    net = Net()
    with pytest.raises(ckpt_pass.PlacementError, match="recomputes nothing, and has a policy"):
        ckpt_pass.apply(net, Offloaded(AllLayers(), what="saved"), "save-matmul")
    with pytest.raises(ckpt_pass.PlacementError, match="together with offload_inputs="):
        ckpt_pass.apply(net, budget=0.5, example_inputs=X, offload_inputs=True)
    with pytest.raises(ckpt_pass.PlacementError, match="Did you mean 'inputs'"):
        Offloaded(AllLayers(), what="input")
    with pytest.raises(ckpt_pass.PlacementError, match="expected a placement"):
        Offloaded("all")  # type: ignore[arg-type]
    with pytest.raises(ckpt_pass.PlacementError, match="core_attn"):
        OffloadParts(("core_attention",))


def test_copies_and_pickles_of_models_that_offload() -> None:
    torch.manual_seed(0)
    net = Named()
    wanted = net_step(net)
    ckpt_pass.apply(net, Offloaded(AllLayers(), Offload("disk")))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert ckpt_pass.is_checkpointed(other) and same(net_step(other), wanted)
        ckpt_pass.remove(other)
        assert same(net_step(other), wanted)
