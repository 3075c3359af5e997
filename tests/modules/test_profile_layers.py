"""What layers cost, in normalised units: 512 x 512 float32 is 1 MiB; and estimates on paper."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass import estimate_savings, profile_layers
from tests.zoo.hf import CASES

MIB = 2**20
ROWS = WIDTH = 512


class Block(nn.Module):
    """Saves: its input (outside), the linear's output, and the sine's; returns a third."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        hidden = torch.sin(torch.sin(self.fc(x)))
        return hidden if scale is None else hidden * scale


class Net(nn.Module):
    def __init__(self, depth: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, **options)
        return x.sum()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, WIDTH)


def test_bytes_are_exact(x: Tensor) -> None:
    found = profile_layers(Net(), x, rounds=0)
    assert [profile.name for profile in found] == ["layers.0", "layers.1", "layers.2"]
    for profile in found:
        assert profile.activation_bytes == 2 * MIB  # both sines save their arguments
        assert profile.output_bytes == MIB
        assert profile.input_bytes == MIB
        assert profile.parameters == WIDTH * WIDTH
        assert profile.gradient_bytes == MIB
        # The gradient that comes in, the cosine, and their product.
        assert profile.working_bytes == 3 * MIB
        assert (profile.forward_s, profile.backward_s) == (0.0, 0.0)


def test_an_output_that_is_saved_inside_counts_once(x: Tensor) -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.Tanh())
    )
    first, second = profile_layers(model, x, layers=["0", "1"], rounds=0)
    assert (first.activation_bytes, first.output_bytes) == (0, MIB)  # tanh saves its result
    assert (second.activation_bytes, second.output_bytes) == (MIB, MIB)


def test_keyword_arguments_and_what_all_layers_share(x: Tensor) -> None:
    """A value that every layer gets is no layer's input; an input from outside takes nothing."""
    model = nn.ModuleDict({"net": Net()})["net"]
    scale = torch.ones(ROWS, 1)
    found = profile_layers(model, x, rounds=1, scale=scale)
    assert [p.activation_bytes for p in found] == [2 * MIB] * 3  # a constant factor is outside
    assert [p.input_bytes for p in found] == [MIB] * 3
    (alone,) = profile_layers(Block(), x, layers=[""], rounds=0, loss_fn=torch.sum)
    assert alone.input_bytes == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_autograd_saves_them(case: Any) -> None:
    """Against hooks on a real step, which see every saved value of each layer."""
    model, inputs = case.make()
    profiles = {p.name: p for p in profile_layers(model, *inputs, rounds=0)}
    made: dict[str, dict[int, int]] = {name: {} for name in profiles}
    open_now: list[tuple[str, set[int]]] = []
    keep: list[Any] = []

    def keys(values: Any) -> set[int]:
        leaves = torch.utils._pytree.tree_leaves(values)
        keep.extend(leaves)
        return {t.untyped_storage()._cdata for t in leaves if isinstance(t, Tensor)}

    parameters = keys(list(model.parameters()) + list(model.buffers()))
    seen: set[int] = set()

    def pack(value: Tensor) -> Tensor:
        key = value.untyped_storage()._cdata
        keep.append(value.detach())
        for name, outside in open_now:
            if key not in outside | parameters and key not in seen:
                made[name][key] = value.untyped_storage().nbytes()
        seen.add(key)
        return value

    def enter(name: str) -> Any:
        return lambda module, args, kwargs: open_now.append((name, keys((args, kwargs))))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        name, _ = open_now.pop()
        for key in keys(output):
            made[name].pop(key, None)

    for name in profiles:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(enter(name), with_kwargs=True)
        layer.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model(*inputs)
    for name, found in made.items():
        assert sum(found.values()) == profiles[name].activation_bytes, name


def test_times_are_those_of_the_step(x: Tensor) -> None:
    """Layers of other sizes take other times, and all of them less than the step."""

    class Uneven(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), nn.Sequential(*(Block() for _ in range(6)))])

    torch.set_num_threads(1)
    model = Uneven()
    start = time.perf_counter()
    small, large = profile_layers(model, x, layers=["layers.0", "layers.1"], rounds=3)
    elapsed = time.perf_counter() - start
    assert large.forward_s > 2 * small.forward_s > 0
    assert large.backward_s > 2 * small.backward_s > 0
    total = sum(p.forward_s + p.backward_s for p in (small, large))
    assert total < elapsed / 3


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)) for _ in range(2))
    )
    mark = torch.ones(8, 8)
    model[0][0].weight.grad = mark  # type: ignore[index, union-attr]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    profile_layers(model, torch.randn(4, 8), layers=["0", "1"], loss_fn=torch.sum, rounds=2)
    # randn above came before; only the profile must not draw
    assert model[0][0].weight.grad is mark  # type: ignore[index, union-attr]
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    torch.set_rng_state(state)
    torch.randn(4, 8)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    profile_layers(model, torch.randn(4, 8), layers=["0", "1"], loss_fn=torch.sum, rounds=1)
    assert torch.equal(torch.get_rng_state(), after)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_an_optimizer_in_the_backward_takes_no_step(x: Tensor) -> None:
    model, steps = Net(), []
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 0.1)

        def step(leaf: Tensor, optimizer: torch.optim.SGD = optimizer) -> None:
            optimizer.step()
            steps.append(leaf)

        parameter.register_post_accumulate_grad_hook(step)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    profile_layers(model, x, loss_fn=torch.sum, rounds=1)
    assert not steps and all(map(torch.equal, model.parameters(), before))
    model(x).sum().backward()
    assert len(steps) == len(before)


def test_what_cannot_be_profiled(x: Tensor) -> None:
    model = Net()
    with pytest.raises(ckpt_pass.ProfileError, match=r"no module 'layer\.0'.*'layers\.0'"):
        profile_layers(model, x, layers=["layer.0"])
    model.spare = Block()
    with pytest.raises(ckpt_pass.ProfileError, match="'spare' of Net is not called"):
        profile_layers(model, x, layers=["spare"])
    with_regions = Net()
    ckpt_pass.apply(with_regions, "all")
    with pytest.raises(ckpt_pass.ProfileError, match="has 3 checkpoint regions"):
        profile_layers(with_regions, x)
    with pytest.raises(ckpt_pass.NoLayersError):
        profile_layers(nn.Linear(2, 2), torch.randn(2, 2))


# --- on paper -------------------------------------------------------------------------------


def test_counts_of_layers() -> None:
    """With activations of 1 and boundaries of 0, bytes are layers."""
    found = estimate_savings(
        16,
        activation_bytes=1,
        output_bytes=0,
        placements=["none", "all", "alternate", "every-4", "segments-4", "layers-0"],
    )
    assert [row.saved_bytes for row in found.rows] == [16, 0, 8, 12, 0, 15]
    assert [row.peak_bytes for row in found.rows] == [16, 1, 8, 12, 4, 15]
    assert [row.forward_share for row in found.rows] == [0, 1, 0.5, 0.25, 1, 1 / 16]
    assert found.of("alternate").saved_share == 0.5
    assert found.of("all").step_share == pytest.approx(1 / 3)


def test_boundaries_count() -> None:
    """A region keeps its input: 4 segments of 4 layers keep 4, and hold 4 x (16 + 1) at most."""
    found = estimate_savings(16, activation_bytes=16, output_bytes=1, placements=["sqrt-segments"])
    (row,) = found.rows
    assert (row.regions, row.saved_bytes) == (4, 4)
    assert row.peak_bytes == 3 + 4 * (16 + 1)
    assert row.saved_share == 1 - 4 / (16 * 17)


@pytest.mark.slow
def test_the_paper_keeps_what_the_step_saves(x: Tensor) -> None:
    """Saved bytes differ from placement to placement as they do in the measured step."""
    model = Net(4)
    names = ["none", "all", "alternate", "segments-2"]
    paper = estimate_savings(profile_layers(model, x, rounds=0), placements=names)
    measured = []
    for name in names:
        with ckpt_pass.applied(model, name):
            measured.append(ckpt_pass.measure_step(lambda: model(x), warmup=0, repeats=1))
    saved = [m.saved_bytes for m in measured]
    assert saved[0] is not None
    for row, real in zip(paper.rows, saved, strict=True):
        assert real is not None
        assert saved[0] - real == paper.rows[0].saved_bytes - row.saved_bytes


def test_the_table() -> None:
    text = str(estimate_savings(4, activation_bytes=3_000_000, output_bytes=1_000_000))
    assert text.splitlines()[0] == "4 layers, on paper"
    row = next(line for line in text.splitlines() if line.startswith("all"))
    assert row.split() == ["all", "4", "4.00", "75.0%", "7.00", "56.2%", "100.0%", "33.3%"]


def test_wrong_numbers() -> None:
    wrong = ckpt_pass.EstimateArgumentError
    with pytest.raises(wrong, match="without activation_bytes"):
        estimate_savings(4)
    with pytest.raises(wrong, match="0 layers"):
        estimate_savings(0, activation_bytes=1, output_bytes=1)
    with pytest.raises(wrong, match="no bytes below 0"):
        estimate_savings(2, activation_bytes=-1, output_bytes=1)
    with pytest.raises(wrong, match="beside profiles"):
        estimate_savings([ckpt_pass.LayerProfile("a", 1, 1)], activation_bytes=1)
    with pytest.raises(wrong, match="no row 'al'; expected one of none"):
        estimate_savings(2, activation_bytes=1, output_bytes=1).of("al")
    with pytest.raises(ckpt_pass.PlacementError, match="segments"):
        estimate_savings(2, activation_bytes=1, output_bytes=1, placements=["segments-3"])
