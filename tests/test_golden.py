"""Golden texts of decisions, and the call sites and regions behind them."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import nn

import ckpt_pass
from ckpt_pass.graph.regions import RegionFinder
from ckpt_pass.testing import golden, golden_of
from tests.zoo import hf


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth: int = 3, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


X = torch.randn(8, 16)


def golden_net(depth: int = 3, **options: Any) -> str:
    return golden(Net(depth), X, **options)


def plan_net(depth: int = 2, x: torch.Tensor = X, **options: Any) -> ckpt_pass.Plan:
    return ckpt_pass.plan(Net(depth), x, **options)


def test_default_policy() -> None:
    assert_expected_inline(
        golden_net(),
        """\
policy save-matmul-attention
layers.0 .. layers.2
  recomputed norm: native_layer_norm
  saved      up: addmm 2.0 KiB
  recomputed .: gelu
  unused     down: addmm
  saved      .: add.Tensor 512 B
(no region)
  unused     .: pow.Tensor_Scalar, mean
saved 7.5 KiB; also 12 parameters, 1 input
""",
    )


def test_save_nothing() -> None:
    assert_expected_inline(
        golden_net(policy="save-nothing"),
        """\
policy save-nothing
layers.0 .. layers.2
  recomputed norm: native_layer_norm
  recomputed up: addmm
  recomputed .: gelu
  unused     down: addmm
  saved      .: add.Tensor 512 B
(no region)
  unused     .: pow.Tensor_Scalar, mean
saved 1.5 KiB; also 15 parameters, 1 input
""",
    )


def test_one_line_selector() -> None:
    second = ckpt_pass.save(op_class="matmul", module="layers.1", nth=1) | ckpt_pass.recompute()
    assert_expected_inline(
        golden_net(depth=2, policy=second),
        """\
policy save(op_class=matmul, module=layers.1, nth=1) | recompute()
layers.0
  recomputed norm: native_layer_norm
  recomputed up: addmm
  recomputed .: gelu
  unused     down: addmm
  saved      .: add.Tensor 512 B
layers.1
  recomputed norm: native_layer_norm
  saved      up: addmm 2.0 KiB
  recomputed .: gelu
  unused     down: addmm
  saved      .: add.Tensor 512 B
(no region)
  unused     .: pow.Tensor_Scalar, mean
saved 3.0 KiB; also 9 parameters, 1 input
""",
    )


def test_golden_is_stable_from_run_to_run_and_under_the_backend() -> None:
    text = golden_net()
    assert golden_net() == text

    backend = ckpt_pass.make_backend(inner="aot_eager")
    torch.compile(Net(), backend=backend)(X).backward()
    # Dynamo hands parameters over as they are used: the same set, counted alike.
    assert golden_of(backend.plans[0]).splitlines()[:-1] == text.splitlines()[:-1]


def test_plan_prints_policy_graph_and_one_line_a_decision() -> None:
    plan = plan_net()
    lines = plan.listing().splitlines()
    assert lines[0].startswith("policy       save-matmul-attention: ")
    assert lines[2] == "decisions    4 saved, 8 recomputed, 4 not needed by the backward"
    (up,) = [line for line in lines if line.startswith("layers.0.up ")]
    assert up.split() == [
        "layers.0.up", "aten.addmm.default", "matmul", "2.0", "KiB", "saved", "MUST_SAVE",
        "save(expensive", "ops)",
    ]  # fmt: skip
    assert plan.fingerprint == plan_net().fingerprint
    others = plan_net(x=X[:4]), plan_net(depth=3), plan_net(policy="save-nothing")
    assert plan.fingerprint not in [other.fingerprint for other in others]


def test_saved_activations_tell_where_each_value_comes_from() -> None:
    saved = ckpt_pass.saved_activations(Net(depth=2), X)
    assert [(a.nbytes, a.provenance, a.reason) for a in saved.of_kind("activation")] == [
        (2048, "output of layers.0.up aten.addmm.default", "save(expensive ops)"),
        (512, "output of layers.0 aten.add.Tensor", "border of a region"),
        (2048, "output of layers.1.up aten.addmm.default", "save(expensive ops)"),
        (512, "output of layers.1 aten.add.Tensor", "border of a region"),
    ]
    assert [a.provenance for a in saved.of_kind("input")] == ["argument 0"]
    assert "parameter layers.1.down.weight" in [a.provenance for a in saved.of_kind("parameter")]
    assert saved.saved_bytes == 2 * (2048 + 512)


def test_symbolic_sizes_stay_symbols() -> None:
    plan = plan_net(depth=1, dynamic=True)
    (symbol,) = plan.saved_bytes.free_symbols
    fixed = plan_net(depth=1, x=torch.randn(24, 16))
    assert plan.saved_bytes.subs(symbol, 24) == fixed.saved_bytes


def regions_of(*chains: str) -> list[str | None]:
    """The region of an op in the innermost module of each chain (``a/a.b``: a's child b)."""
    paths = [tuple((fqn, 0) for fqn in chain.split("/")) for chain in chains]
    finder = RegionFinder.over(paths)
    return [finder.region(path) for path in paths]


def test_layers_are_regions() -> None:
    assert regions_of("emb", "h.0", "h.0/h.0.mlp", "h.1/h.1.mlp", "head") == [
        None, "h.0", "h.0", "h.1", None,
    ]  # fmt: skip


def test_a_stage_that_holds_nothing_but_layers_is_no_region() -> None:
    layer = "s.{0}/s.{0}.l.{1}", "s.{0}/s.{0}.l.{1}/s.{0}.l.{1}.conv"
    chains = [part.format(s, i) for s in (0, 1) for i in (0, 1) for part in layer]
    assert regions_of(*chains)[::2] == ["s.0.l.0", "s.0.l.1", "s.1.l.0", "s.1.l.1"]


def test_experts_inside_a_layer_are_part_of_it_and_leaves_are_no_regions() -> None:
    assert regions_of("l.0", "l.0/l.0.e.0/l.0.e.0.w", "l.0/l.0.e.1/l.0.e.1.w", "l.1/l.1.n") == [
        "l.0", "l.0", "l.0", "l.1",
    ]  # fmt: skip
    assert regions_of("net/net.0", "net/net.1", "net/net.2") == [None, None, None]


def test_resnet_layers() -> None:
    module, inputs = next(case for case in hf.CASES if case.name == "resnet").make()
    plan = ckpt_pass.plan(module, *inputs)
    stages = "model.resnet.encoder.stages"
    assert plan.regions == tuple(f"{stages}.{s}.layers.{i}" for s in (0, 1) for i in (0, 1))
