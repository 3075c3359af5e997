"""What four ranks hold alike, kept in parts: right gradients, a part of the bytes, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from ckpt_pass import Sharding
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.measure.allocations import profiled, read_recording
from ckpt_pass.ops.flops import FlopCounter
from tests.distributed.ranks import WIDTH, batch, made, on_ranks, peaks, trained

pytestmark = pytest.mark.distributed
RANKS = 4
MATMULS = ckpt_pass.shard(op_class="matmul") | ckpt_pass.recompute()
Region = Callable[..., Tensor]


# --- what runs on each rank -----------------------------------------------------------------


class Branch(nn.Module):
    """Dropout, a change in place, views of one product, an odd width."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 75), nn.Linear(25, width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        a, b, c = self.up(x).chunk(3, dim=-1)
        hidden = F.relu_(F.dropout(a * b, 0.3) + c)
        found: Tensor = self.down(hidden) if scale is None else self.down(hidden) * scale
        return found


class Branches(nn.Module):
    """Regions by hand; `run` takes the module and its arguments."""

    def __init__(self, run: Region, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Branch(width) for _ in range(3))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.run(layer, x, scale=x.mean(0, keepdim=True).expand_as(x))
        return x.square().mean()


def pair(rank: int) -> dist.ProcessGroup:
    """This rank's group of two."""
    groups = [dist.new_group([first, first + 1]) for first in range(0, RANKS, 2)]
    return groups[rank // 2]


def called(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    found: Tensor = layer(*args, **kwargs)
    return found


def trained_alike(model: nn.Module) -> Any:
    torch.manual_seed(5)
    return trained(model, 0, 67)


def by_hand(rank: int) -> dict[str, bool]:
    """Losses and gradients of three steps, beside those without regions."""
    two, first = pair(rank), Sharding(check="first", min_bytes=1)
    keeps = ckpt_pass.context_fn(MATMULS)
    everything = ckpt_pass.shard(two, min_bytes=1)
    drawn = ckpt_pass.shard(op="aten.bernoulli_*", min_bytes=1) | ckpt_pass.save()
    region = ckpt_pass.checkpoint
    ways: dict[str, Region] = {
        "inputs": partial(region, shard_inputs=True),
        "inputs of two": partial(region, shard_inputs=two),
        "inputs, checked once": partial(region, shard_inputs=first),
        "first argument": partial(region, shard_inputs=Sharding(two, arguments="first")),
        "matmuls": partial(region, policy=MATMULS),
        "all": partial(region, policy=everything),
        "draws": partial(region, policy=drawn),
        "both": partial(region, policy=MATMULS, shard_inputs=two),
        "torch's region": partial(torch_checkpoint, use_reentrant=False, context_fn=keeps),
        "nested": partial(region, lambda *a, **k: region(*a, **k, shard_inputs=True)),
    }
    plain = trained_alike(Branches(called))
    return {name: trained_alike(Branches(run)) == plain for name, run in ways.items()}


def by_placement(rank: int) -> dict[str, bool]:
    config = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
        "distribute_saved_activations": True,
    }
    # First: torch's cache of what DTensors do outlives a process group, and the names in it.
    mesh, two = of_tensor_parallel(), pair(rank)
    ways: dict[str, Any] = {
        "megatron": ckpt_pass.from_megatron(config, group=two),
        "deepspeed": ckpt_pass.from_deepspeed({"partition_activations": True}, group=two),
        "sharded": ckpt_pass.Sharded(ckpt_pass.as_placement("every-2")),
    }
    plain, found = trained(made(), 0), {}
    for name, placement in ways.items():
        model = made()
        ckpt_pass.apply(model, placement)
        found[name] = trained(model, 0) == plain
    beside, model = trained(split_over(mesh), 0), split_over(mesh)
    ckpt_pass.apply(model, "all", MATMULS, shard_inputs=init_device_mesh("cpu", (RANKS,)))
    found["tensor parallel"] = trained(model, 0) == beside
    return found


def of_tensor_parallel() -> Any:
    """This rank's pair, as one dimension of a mesh."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))["tensor"]


def split_over(mesh: Any, count: int = 3) -> nn.Module:
    """Tensor parallel over pairs."""
    model = made(count)
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def held_bytes(runs: dict[str, Callable[[], Tensor]]) -> dict[str, int]:
    """Bytes that each forward allocates and that are there at its end, but for its output."""
    outputs = {}
    for run in runs.values():
        run().sum().backward()  # gradients, and what gloo makes once
    with quiet_collector(), profiled() as session:
        for name, run in runs.items():
            with record_function(name):
                output = run()
            output.sum().backward()
            outputs[name] = output.nbytes
            del output
    recording = read_recording(session, torch.device("cpu"), runs.__contains__)
    return {
        name: recording.balance_before(end) - recording.balance_before(begin) - outputs[name]
        for name, (begin, end) in recording.spans.items()
    }


def bytes_of_parts(rank: int) -> dict[str, int]:
    """What a region holds of its input of 64 kB, or of what its first product makes of it."""
    layer, x = nn.Linear(64, 64, bias=False), torch.ones(256, 64, requires_grad=True)

    def inner(y: Tensor) -> Tensor:
        return layer(y).sin().cos().sum()

    def held(given: Callable[[], Tensor], **options: Any) -> Callable[[], Tensor]:
        return lambda: ckpt_pass.checkpoint(inner, given(), **options)

    two = pair(rank)
    kept = ckpt_pass.save(op_class="matmul") | ckpt_pass.recompute()
    kept_in_two = ckpt_pass.shard(two, op_class="matmul") | ckpt_pass.recompute()
    views = {
        "": x.clone,
        "turned ": lambda: x.t().contiguous().t(),
        "a slice ": lambda: x.repeat(1, 2)[:, :64],
        "expanded ": lambda: x[None].clone().expand(3, 256, 64),
    }
    found = {}
    for name, given in views.items():
        found[f"{name}whole"] = held(given)
        found[f"{name}two"] = held(given, shard_inputs=two)
        found[f"{name}four"] = held(given, shard_inputs=True)
    found["small"] = held(views[""], shard_inputs=Sharding(min_bytes=1 << 20))
    found["rule whole"] = held(lambda: x, policy=kept)
    found["rule two"] = held(lambda: x, policy=kept_in_two)
    found["rule four"] = held(lambda: x, policy=MATMULS)
    return held_bytes(found)


def uneven(rank: int) -> list[int]:
    """Parts of 10,001 elements of two bytes; none in a group of one; one for three regions."""
    one = [dist.new_group([number]) for number in range(RANKS)][rank]
    x = torch.ones(10001, dtype=torch.bfloat16, requires_grad=True)
    region = ckpt_pass.checkpoint

    def run(group: Any, times: int = 1) -> Tensor:
        y = x.clone()
        return sum_of(
            [region(lambda y: y.sin().sum(), y, shard_inputs=group) for _ in range(times)]
        )

    ways = ((True,), (pair(rank),), (one,), (True, 3))
    return list(held_bytes({str(n): partial(run, *way) for n, way in enumerate(ways)}).values())


def sum_of(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def distributed_tensors(rank: int) -> dict[str, Any]:
    """DTensors that are replicated over the group are sharded, others stay as they are."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    data = torch.randn(64, 64)
    layouts = {
        "replicated": (Replicate(), Replicate()),
        "replicated over the group": (Shard(0), Replicate()),
        "split over the group": (Replicate(), Shard(1)),
    }
    runs: dict[str, Callable[[], Tensor]] = {}
    leaves = []
    for name, layout in layouts.items():
        for group in (None, mesh["tensor"]):
            x = spread(data, mesh, layout)

            def run(x: Tensor = x, group: Any = group) -> Tensor:
                y = ckpt_pass.checkpoint(lambda t: t.sin() * t, x.clone(), shard_inputs=group)
                return y.to_local() if isinstance(y, DTensor) else y

            runs[f"{name} {group is not None}"] = run
            leaves.append(x)
    held = list(held_bytes(runs).values())
    gradients = [x.grad.to_local().numpy().tobytes() for x in leaves]
    return {
        name: (held[2 * n + 1] / held[2 * n], gradients[2 * n] == gradients[2 * n + 1])
        for n, name in enumerate(layouts)
    }


def spread(data: Tensor, mesh: Any, layout: Any) -> Any:
    return distribute_tensor(data, mesh, layout).detach().requires_grad_()


def refused(run: Callable[[], Tensor]) -> tuple[str, str]:
    try:
        run().sum().backward()
    except ckpt_pass.CkptPassError as error:
        return type(error).__name__, str(error)
    return "", ""


def refusals(rank: int) -> dict[str, tuple[str, str]]:
    region, layer, two = ckpt_pass.checkpoint, nn.Linear(32, 32), pair(rank)
    torch.manual_seed(0)
    model, slices = made(), batch(0).chunk(RANKS)

    def activation(x: Tensor) -> Tensor:
        return x.clone().requires_grad_() * 1

    def in_another_order() -> Tensor:
        x, y = activation(batch(0)), activation(batch(0))
        first, second = (nn.Sigmoid(), nn.Tanh())[:: 1 - 2 * (rank % 2)]
        return region(first, x, shard_inputs=True) + region(second, y, shard_inputs=True)

    def drawn() -> Tensor:
        torch.manual_seed(rank)
        return region(
            lambda y: F.dropout(y, 0.1).sin(), activation(batch(0)), policy=ckpt_pass.shard()
        )

    def later() -> Tensor:
        gate, x = torch.zeros(()), activation(batch(0))
        for _ in range(2):
            y = region(nn.Tanh(), x + gate * batch(rank), shard_inputs=True)
            gate += 1
            y.sum().backward(retain_graph=True)
        return y

    return {
        "data of its own": refused(
            lambda: region(model.layers[1], activation(batch(rank)), shard_inputs=True)
        ),
        "data of pairs": refused(
            lambda: region(model.layers[1], activation(batch(rank // 2)), shard_inputs=two)
        ),
        "a slice each": refused(lambda: region(layer, activation(slices[rank]), shard_inputs=True)),
        "another number of rows": refused(
            lambda: region(layer, activation(batch(0, rows=64 + rank)), shard_inputs=True)
        ),
        "another order": refused(in_another_order),
        "dropout": refused(drawn),
        "from the second step on": refused(later),
        "no such group": refused(lambda: region(layer, activation(batch(0)), shard_inputs="none")),
    }


def flops_of(model: nn.Module, x: Tensor) -> int:
    with FlopCounter() as counter:
        model(x).backward()
    return counter.flops


def plans(rank: int) -> list[dict[str, Any]]:
    """Plans of a tensor parallel step that may share out, beside Megatron's rule at its peak."""
    mesh = of_tensor_parallel()
    rows, depth = 1024, 5
    x = batch(0, rows=rows)
    plain = trained(split_over(mesh, depth), 0, rows)
    by_rule = split_over(mesh, depth)
    rule = ckpt_pass.from_megatron(
        {"recompute_granularity": "full", "distribute_saved_activations": True}, group=mesh
    )
    ckpt_pass.apply(by_rule, rule)
    plain_flops = flops_of(split_over(mesh, depth), x)
    by_the_rule = flops_of(by_rule, x) - plain_flops, (depth - 1) * x.nbytes // 2
    # gloo lets go of its buffers late at times, on one rank or the other: one budget for both.
    measured = torch.tensor(peaks(by_rule, lambda: by_rule(x).backward(), 1 << 60))
    dist.all_reduce(measured, dist.ReduceOp.MIN)
    megatron = int(measured)
    free = Sharding(mesh, bytes_per_s=1e15, latency_s=0.0)
    found = []
    for budget, over in ((megatron, mesh), (0.1, free)):
        model = split_over(mesh, depth)
        options: Any = {"mode": "eager", "shard_over": over}
        try:
            plan = ckpt_pass.plan(model, x, budget=budget, **options)
        except ckpt_pass.InfeasibleBudgetError as error:
            plan = ckpt_pass.plan(model, x, budget=error.least_feasible_bytes, **options)
        assert isinstance(plan, ckpt_pass.Plan)
        again = ckpt_pass.Plan.from_json(plan.to_json())
        again.apply(model)
        found.append(
            {
                "same": trained(model, 0, rows) == plain,
                "predicted": plan.peak_bytes,
                "measured": peaks(model, lambda m=model: m(x).backward(), plan.peak_bytes),
                "sharded": len(plan.with_fate("sharded")),
                "read again": again == plan,
                "text": str(plan),
                "recompute": flops_of(model, x) - plain_flops,
                "received": plan.predicted.gathered_bytes,
                "rule": by_the_rule,
                "budget": plan.budget_bytes,
            }
        )
    return found


def plans_that_differ(rank: int) -> tuple[str, str]:
    mesh = of_tensor_parallel()
    options: Any = {"budget": 0.5, "mode": "eager", "shard_over": mesh}
    return refused(lambda: ckpt_pass.plan(made(), batch(0, rows=64 + rank), **options))


class Fails(nn.Module):
    """On one rank, in the forward: while it is recorded, or on real tensors alone."""

    def __init__(self, rank: int, recorded: bool) -> None:
        super().__init__()
        self.inner, self.fails, self.recorded = made(), rank % 2 == 1, recorded

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and (self.recorded or type(x) is Tensor):
            raise ValueError("a batch that this rank cannot take")
        found: Tensor = self.inner(x)
        return found


def plans_of_one_that_fails(rank: int) -> list[tuple[str, str]]:
    mesh = of_tensor_parallel()
    options: Any = {"budget": 0.5, "mode": "eager", "shard_over": mesh}
    found = []
    for recorded in (True, False):
        model = Fails(rank, recorded)
        try:
            ckpt_pass.plan(model, batch(0), **options)
        except (ckpt_pass.CkptPassError, ValueError) as error:
            found.append((type(error).__name__, str(error)))
    return found


# --- tests ----------------------------------------------------------------------------------

JOBS = (
    by_hand,
    by_placement,
    bytes_of_parts,
    uneven,
    distributed_tensors,
    refusals,
    plans,
    plans_that_differ,
    plans_of_one_that_fails,
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return on_ranks(JOBS, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("job", ["by_hand", "by_placement"])
def test_gradients_over_three_steps(found: dict[str, list[Any]], job: str) -> None:
    for rank in found[job]:
        assert rank and all(rank.values()), rank


def test_the_bytes_that_are_held(found: dict[str, list[Any]]) -> None:
    nbytes = 256 * 64 * 4
    for rank in found["bytes_of_parts"]:
        gaps = rank.pop("a slice whole")
        assert gaps == 2 * nbytes  # with what it is a slice of
        for name, held in rank.items():
            ranks = 2 if name.endswith("two") else RANKS if name.endswith("four") else 1
            assert held == nbytes // ranks, (name, rank)


def test_sizes_that_cannot_be_shared_out(found: dict[str, list[Any]]) -> None:
    for four, two, one, three_regions in found["uneven"]:
        assert (four, two, one) == (2 * 2501, 2 * 5001, 2 * 10001)
        assert three_regions - four < 64  # sums, and no second part


def test_tensors_that_lie_over_ranks(found: dict[str, list[Any]]) -> None:
    for rank in found["distributed_tensors"]:
        assert all(same for _, same in rank.values()), rank
        shares = [share for share, _ in rank.values()]
        assert shares == pytest.approx([0.5, 0.5, 1.0], abs=0.001), rank


DIFFER, ORDER = "ShardedValueDiffersError", "ShardOrderError"


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("data of its own", DIFFER, "args[0] of Block hold different values"),
        ("data of pairs", "", ""),
        ("a slice each", DIFFER, "their checksums are"),
        ("another number of rows", DIFFER, "of other shapes or dtypes (here [6"),
        ("another order", ORDER, "gathers something else at the same time"),
        ("dropout", DIFFER, "the output of aten.bernoulli"),
        ("from the second step on", DIFFER, "args[0] of Tanh"),
        ("no such group", "ShardGroupError", "the group 'none'"),
    ],
)
def test_what_is_refused_on_all_ranks(
    found: dict[str, list[Any]], name: str, kind: str, says: str
) -> None:
    for rank in found["refusals"]:
        error, words = rank[name]
        assert error == kind and says in words, (error, words)


def test_plans_that_share_out(found: dict[str, list[Any]]) -> None:
    for rank in found["plans"]:
        for plan in rank:
            assert plan["same"] and plan["read again"], plan["text"]
            assert plan["measured"] == pytest.approx(plan["predicted"], rel=0.01)
        assert rank[-1]["sharded"] and "shared out by layers." in rank[-1]["text"]
    first = [plan["text"] for plan in found["plans"][0]]
    assert [plan["text"] for plan in found["plans"][1]] == first


def test_plans_beside_megatrons_rule(found: dict[str, list[Any]]) -> None:
    for rank in found["plans"]:
        recomputed, received = rank[0]["rule"]
        assert rank[0]["recompute"] <= recomputed, rank[0]
        assert rank[0]["received"] <= received, rank[0]


def test_steps_that_differ_share_out_nothing(found: dict[str, list[Any]]) -> None:
    for error, words in found["plans_that_differ"]:
        assert error == "ShardedStepsDifferError" and "run other ops than this one" in words


def test_a_rank_that_fails_lets_the_others_know(found: dict[str, list[Any]]) -> None:
    for rank, (recording, forward) in enumerate(found["plans_of_one_that_fails"]):
        own = rank % 2 == 1
        assert own == ("a batch that this rank cannot take" in recording[1]), recording
        assert own == ("a batch that this rank cannot take" in forward[1]), forward
        if not own:
            assert {recording[0], forward[0]} == {"ShardedStepsDifferError"}
            assert "cannot be recorded on rank 1" in recording[1]
            assert "forward failed on rank 1" in forward[1]
