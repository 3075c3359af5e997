"""Regions and placements that shard, as far as one process can tell: options and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass import Sharding

RULE = ckpt_pass.shard(op_class="matmul") | ckpt_pass.recompute()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def batch() -> Tensor:
    return torch.randn(16, 32)


def test_nothing_is_sharded_without_a_process_group() -> None:
    net = Net()
    for options in ({"policy": RULE}, {"shard_inputs": True}, {"shard_inputs": "of mine"}):
        with pytest.raises(ckpt_pass.ShardGroupError, match="no such process group now"):
            ckpt_pass.checkpoint(net.layers[1], net.layers[0](batch()), **options)


@pytest.mark.parametrize(
    "use",
    [
        lambda net: ckpt_pass.plan(net, batch(), policy=RULE),
        lambda net: ckpt_pass.explain(net, batch(), policy=RULE),
        lambda net: torch.compile(
            lambda x: ckpt_pass.checkpoint(net, x, policy=RULE), backend="aot_eager", fullgraph=True
        )(batch()),
        lambda net: torch.compile(net, backend=ckpt_pass.make_backend(RULE, inner="aot_eager"))(
            batch()
        ),
    ],
    ids=["plan", "explain", "region", "backend"],
)
def test_a_rule_is_refused_in_compiled_graphs(use: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(Exception, match="in eager regions only"):
        use(Net())


def test_sharded_inputs_cut_a_compiled_graph() -> None:
    net = Net()

    def step(x: Tensor) -> Tensor:
        found: Tensor = ckpt_pass.checkpoint(net.layers[1], net.layers[0](x), shard_inputs="none")
        return found

    with pytest.raises(ckpt_pass.ShardGroupError):  # as it says in eager mode
        torch.compile(step, backend="eager")(batch())


def test_what_enters_a_region_is_kept_in_one_place() -> None:
    net = Net()
    with pytest.raises(ckpt_pass.ContradictoryRegionError, match="shard_inputs together with"):
        ckpt_pass.checkpoint(net, batch(), shard_inputs=True, offload_inputs=True)
    with pytest.raises(ckpt_pass.PlacementError, match="shards what enters its regions"):
        ckpt_pass.apply(net, shard_inputs=True, offload_inputs=True)
    with pytest.raises(ckpt_pass.PlacementError, match="within a budget a plan chooses"):
        ckpt_pass.apply(net, budget=0.5, example_inputs=batch(), shard_inputs=True)
    offloads = ckpt_pass.Offloaded(ckpt_pass.as_placement("all"))
    with pytest.raises(ckpt_pass.PlacementError, match="shards what enters its regions"):
        ckpt_pass.apply(net, offloads, shard_inputs=True)
    assert not ckpt_pass.is_checkpointed(net)


def test_placements_say_what_they_shard() -> None:
    net, every_2 = Net(), ckpt_pass.as_placement("every-2")
    with ckpt_pass.applied(net, ckpt_pass.Sharded(every_2, Sharding("7"))) as choice:
        assert str(choice).splitlines()[0].endswith("inputs are sharded over group 7")
        assert {spec.shard_inputs for spec in choice.regions.values()} == {Sharding("7")}
    with ckpt_pass.applied(net, shard_inputs=Sharding(arguments="first")) as choice:
        assert str(choice).splitlines()[0].endswith("first arguments are sharded over all ranks")
    with pytest.raises(ckpt_pass.PlacementError, match="expected a placement"):
        ckpt_pass.Sharded("all")  # type: ignore[arg-type]
    with pytest.raises(ckpt_pass.PlacementError, match=r"expected ckpt_pass.Sharding\(group\)"):
        ckpt_pass.Sharded(every_2, True)  # type: ignore[arg-type]


def test_a_rule_in_a_plan_file() -> None:
    policy = ckpt_pass.shard("7", op="aten.bmm", check="first") | ckpt_pass.save()
    plan = ckpt_pass.plan(Net(), batch(), policy=policy)
    again = type(plan).from_json(plan.to_json())
    assert again.asked == plan.asked
