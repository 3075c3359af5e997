"""Layers are found from the module tree, in models of many libraries' shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ckpt_pass import NoLayersError, find_layers, skip_values
from tests.zoo import hf, modular
from tests.zoo.modular import DoubleConv


def named(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{number}" for number in range(count)]


@pytest.mark.parametrize(
    ("make", "names", "shape"),
    [
        (hf.gpt2, named("model.transformer.h", 3), "chain"),
        (hf.llama, named("model.model.layers", 3), "chain"),
        (hf.mixtral, named("model.model.layers", 2), "chain"),
        (hf.bert, named("model.bert.encoder.layer", 2), "chain"),
        (hf.vit, named("model.vit.layers", 2), "chain"),
        (
            hf.resnet,
            [
                *named("model.resnet.encoder.stages.0.layers", 2),
                *named("model.resnet.encoder.stages.1.layers", 2),
            ],
            "stages",
        ),
        (
            modular.t5,
            [*named("model.encoder.block", 2), *named("model.decoder.block", 2)],
            "encoder-decoder",
        ),
        (
            modular.bart,
            [*named("model.model.encoder.layers", 2), *named("model.model.decoder.layers", 2)],
            "encoder-decoder",
        ),
        (
            modular.transformer,
            [*named("transformer.encoder.layers", 2), *named("transformer.decoder.layers", 2)],
            "encoder-decoder",
        ),
        (modular.unet, [*named("downs", 2), "bottleneck", *named("ups", 2)], "encoder-decoder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models(make: Callable[[], modular.Built], names: list[str], shape: str) -> None:
    model, _ = make()
    found = find_layers(model)
    assert list(found.names) == names
    assert found.shape == shape
    assert str(found).startswith(f"{len(names)} layers, {shape}: ")


class Block(nn.Module):
    """A block of two linear layers."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        if experts:
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(experts))


def tree(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def row(count: int, make: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(count))


def conv() -> nn.Module:
    return DoubleConv(4, 4)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        # torchvision's ResNet: the stages are numbered and hold numbered blocks.
        (
            tree(
                conv1=nn.Conv2d(3, 4, 3),
                layer1=nn.Sequential(Block(), Block()),
                layer2=nn.Sequential(Block(), Block()),
                fc=nn.Linear(4, 2),
            ),
            ["layer1.0", "layer1.1", "layer2.0", "layer2.1"],
        ),
        # The well-known U-Net with numbered halves and a bottleneck between them.
        (
            tree(
                encoder1=conv(), pool1=nn.MaxPool2d(2), encoder2=conv(), bottleneck=conv(),
                upconv2=nn.Conv2d(4, 4, 1), decoder2=conv(), decoder1=conv(),
            ),
            ["encoder1", "encoder2", "bottleneck", "decoder2", "decoder1"],
        ),
        (
            tree(inc=conv(), down1=nn.Sequential(nn.MaxPool2d(2), conv()),
                 down2=nn.Sequential(nn.MaxPool2d(2), conv())),
            ["down1", "down2"],
        ),
        # Experts are repeated too, but belong to their layer.
        (tree(layers=row(2, lambda: Block(experts=3))), ["layers.0", "layers.1"]),
        # A container has no forward of its own: what is in it counts.
        (
            tree(layers=row(2, lambda: nn.ModuleList([Block(), Block()]))),
            ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"],
        ),
        # A single layer that the presets know.
        (tree(only=nn.TransformerEncoderLayer(4, 1)), ["only"]),
        # No rows at all: the steps of the longest sequential.
        (tree(mlp=nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))), named("mlp", 3)),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0", "1"]),
    ],
    ids=["torchvision", "numbered", "down", "experts", "containers", "preset", "mlp", "root"],
)  # fmt: skip
def test_trees(model: nn.Module, names: list[str]) -> None:
    assert list(find_layers(model).names) == names


def test_no_layers() -> None:
    with pytest.raises(NoLayersError, match="no submodules"):
        find_layers(nn.Linear(2, 2))


def test_skips_of_a_unet() -> None:
    model, inputs = modular.UNET.make()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    skips = skip_values(model, *inputs)
    assert [(skip.layer, skip.used_by) for skip in skips] == [
        ("downs.0", "ups.1"),
        ("downs.1", "ups.0"),
    ]
    assert skips[0].nbytes == 2 * 4 * 16 * 16 * 4
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_chain_has_no_skips() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = row(4, lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    assert skip_values(Net(), torch.randn(2, 4)) == ()


def test_layers_that_read_all_that_came_before() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = row(3, lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()))

        def forward(self, x: Tensor) -> Tensor:
            first = self.layers[0](x)
            second = self.layers[1](first)
            return self.layers[2](first + second) + first  # type: ignore[no-any-return]

    (skip,) = skip_values(Dense(), torch.randn(2, 4))
    assert (skip.layer, skip.used_by, skip.nbytes) == ("layers.0", "", 32)
