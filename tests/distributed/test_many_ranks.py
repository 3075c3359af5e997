"""Plans of models that are split over ranks: right gradients, right peaks, and nobody waits."""

from __future__ import annotations

import random
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, schedules
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile

import ckpt_pass
from ckpt_pass import distributed
from tests.distributed.ranks import (
    ROWS,
    Block,
    batch,
    made,
    on_ranks,
    peaks,
    tracked_bytes,
    trained,
)
from tests.job.jobs import train

pytestmark = pytest.mark.distributed
BUDGETS = (0.95, 0.7)
FIVE_BUDGETS = (0.95, 0.85, 0.75, 0.65, 0.55)
Wrap = Callable[[nn.Module], nn.Module]


# --- what runs on each rank -----------------------------------------------------------------


def planned_and_trained(
    wrap: Wrap, rank: int, budget: float, rows: int = ROWS, **asked: Any
) -> dict[str, Any]:
    """A model that is wrapped, planned and trained, beside one without a plan."""
    inputs = batch(0, rows=rows)
    beside = wrap(made())
    plain, exchanged = trained(beside, rank, rows), exchanges(beside, inputs)
    model = wrap(made())
    if rank == 1:
        time.sleep(0.1)  # nobody waits for the others while it plans
    plan = planned_or_least(model, inputs, budget, {"mode": "eager", **asked})
    plan.apply(model)
    same = trained(model, rank, rows) == plain and exchanges(model, inputs) == exchanged
    times = 3 if asked.get("gradients") == "accumulated" else 1

    def step() -> None:
        for _ in range(times):
            model(inputs).backward()

    measured = peaks(model, step, plan.peak_bytes)
    return {
        "same": same,
        "predicted": plan.peak_bytes,
        "measured": measured,
        "budget": plan.budget_bytes,
        "regions": len(plan.regions),
    }


def planned_or_least(
    model: nn.Module, inputs: Tensor, budget: float, asked: dict[str, Any]
) -> ckpt_pass.Plan:
    """The plan for a budget, or for the least that its refusal names."""
    try:
        plan = ckpt_pass.plan(model, inputs, budget=budget, **asked)
    except ckpt_pass.InfeasibleBudgetError as error:
        plan = ckpt_pass.plan(model, inputs, budget=error.least_feasible_bytes, **asked)
    assert isinstance(plan, ckpt_pass.Plan)
    return plan


def sharded(reshard: bool = True, **options: Any) -> Wrap:
    def wrap(model: nn.Module) -> nn.Module:
        for layer in model.layers:  # type: ignore[union-attr]
            fully_shard(layer, reshard_after_forward=reshard, **options)
        fully_shard(model, reshard_after_forward=reshard, **options)
        return model

    return wrap


def replicated(**options: Any) -> Wrap:
    return lambda model: DistributedDataParallel(model, **options)


def split(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def fsdp(rank: int) -> list[dict[str, Any]]:
    return [planned_and_trained(sharded(), rank, budget) for budget in BUDGETS]


def fsdp_kept(rank: int) -> list[dict[str, Any]]:
    return [planned_and_trained(sharded(reshard=False), rank, BUDGETS[1])]


def fsdp_mixed(rank: int) -> list[dict[str, Any]]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return [planned_and_trained(sharded(mp_policy=policy), rank, BUDGETS[1])]


def fsdp_accumulated(rank: int) -> list[dict[str, Any]]:
    return [planned_and_trained(sharded(), rank, BUDGETS[1], gradients="accumulated")]


def ddp(rank: int) -> list[dict[str, Any]]:
    views, unused = {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}
    budget = BUDGETS[1]
    return [
        planned_and_trained(replicated(), rank, budget, gradients="accumulated"),
        planned_and_trained(replicated(**views), rank, budget),
        planned_and_trained(replicated(**unused), rank, budget),
    ]


def tensor_parallel(rank: int) -> list[dict[str, Any]]:
    return [planned_and_trained(split, 0, budget, rows=256) for budget in (0.9, 0.7)]


def split_in_rows(model: nn.Module) -> nn.Module:
    """Tensor and sequence parallel: each rank has rows of its own between the products."""
    mesh = init_device_mesh("cpu", (2,))
    how = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
    }
    for layer in model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, mesh, how)
    return model


def sequence_parallel(rank: int) -> list[dict[str, Any]]:
    return [planned_and_trained(split_in_rows, rank, 0.7, rows=256)]


def split_and_sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for layer in model.layers:  # type: ignore[union-attr]
        how = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(layer, mesh["tensor"], how)
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model


def in_two_ways(rank: int) -> list[dict[str, Any]]:
    return [
        planned_and_trained(split_and_sharded, rank // 2, budget, rows=256)
        for budget in FIVE_BUDGETS
    ]


def at_five_budgets(rank: int) -> list[dict[str, Any]]:
    """Every way of splitting on two ranks, from near the plain peak to the least that there is."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    views: dict[str, Any] = {"gradient_as_bucket_view": True}
    late: dict[str, Any] = {"gradients": "accumulated"}
    ways: list[tuple[Wrap, int, int, dict[str, Any]]] = [
        (sharded(), rank, ROWS, {}),
        (sharded(), rank, ROWS, late),
        (sharded(reshard=False), rank, ROWS, {}),
        (sharded(mp_policy=bf16), rank, ROWS, {}),
        (replicated(), rank, ROWS, {}),
        (replicated(), rank, ROWS, late),
        (replicated(**views), rank, ROWS, {}),
        (split, 0, 256, {}),
        (split_in_rows, rank, 256, {}),
    ]
    found = [
        planned_and_trained(wrap, seed, budget, rows, **asked)
        for budget in FIVE_BUDGETS
        for wrap, seed, rows, asked in ways
    ]
    stages = [stage(rank, kind, b) for kind in (ScheduleGPipe, Schedule1F1B) for b in FIVE_BUDGETS]
    return found + stages


def beside_torchs_tracker(rank: int) -> tuple[int, int]:
    """The peak of an FSDP2 step: ours, and what FSDPMemTracker finds in one that is run."""
    model, inputs = sharded()(made()), batch(rank)
    plan = ckpt_pass.plan(model, inputs, budget=1.0, mode="eager")
    return plan.peak_bytes, tracked_bytes(model, inputs)


def exchanges(model: nn.Module, inputs: Tensor) -> int:
    """How often gloo reduces something in a step."""
    with profile() as session:
        model(inputs).backward()
    return sum(e.count for e in session.key_averages() if e.key == "gloo:all_reduce")


def planned_after_a_step(rank: int) -> bool:
    """A plan leaves FSDP as it was, also once it has gathered parameters and let go of them."""
    plain, model = sharded()(made()), sharded()(made())
    before = trained(plain, rank) == trained(model, rank)
    ckpt_pass.plan(model, batch(0), budget=0.95, mode="eager")
    return before and trained(plain, rank) == trained(model, rank)


def together(rank: int) -> tuple[Any, ...]:
    """The same step with two budgets; then two steps of different sizes, under FSDP."""
    budget = 0.9 - 0.15 * rank
    plan = distributed.plan_together(made(), batch(rank), budget=budget, name="same")
    distributed.agree(plan, name="same")
    model, plain = sharded()(made()), sharded()(made())
    rows = batch(rank, rows=64 + 64 * rank)
    own = distributed.plan_together(model, rows, budget=0.8, name="different")
    own.apply(model)
    return plan.budget_bytes, own.budget_bytes, trained(model, rank) == trained(plain, rank)


def without_room(rank: int) -> None:
    distributed.plan_together(made(), batch(rank), budget=0.9 if rank else 1000)


def without_a_way(rank: int) -> None:
    model = made()
    if rank == 1:
        model.layers[1] = nn.Linear(7, 7)
    distributed.plan_together(model, batch(rank), budget=0.9)


def too_late(rank: int) -> None:
    if rank == 0:
        distributed.plan_together(made(), batch(rank), budget=0.9, timeout_s=1.0)
    else:
        time.sleep(3.0)


def with_other_collectives(rank: int) -> None:
    model = sharded()(made())
    distributed.plan_together(model if rank else made(), batch(rank), budget=0.95)


class Ring(torch.autograd.Function):
    """Each of two ranks gets what the other has."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        other, found = 1 - dist.get_rank(), torch.empty_like(x)
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x.contiguous(), other), dist.P2POp(dist.irecv, found, other)]
        )
        for work in works:
            work.wait()
        return found

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        found: Tensor = Ring.apply(gradient)  # type: ignore[no-untyped-call]
        return found


def point_to_point(rank: int) -> bool:
    """A region that saves all it can, and exchanges without a collective."""

    def region(x: Tensor) -> Tensor:
        found: Tensor = Ring.apply(x.sin()).cos() * torch.rand_like(x)  # type: ignore[no-untyped-call]
        return found

    found = []
    for run in (region, lambda x: ckpt_pass.checkpoint(region, x, policy="save-everything")):
        torch.manual_seed(0)
        x = batch(rank).requires_grad_()
        run(x).sum().backward()
        found.append(x.grad)
    assert found[0] is not None and found[1] is not None
    return torch.equal(found[0], found[1])


def random_pairs(rank: int) -> list[tuple[bool, bool]]:
    """For each of a hundred pairs of plans: whether they are one, and whether ranks agree."""
    ways: tuple[dict[str, Any], ...] = (
        {"budget": 1.0, "mode": "eager"},
        {"policy": "save-nothing"},
        {"policy": "save-matmul"},
    )
    plans = [
        ckpt_pass.plan(made(count), batch(0, rows=rows), **how)
        for count, rows in ((2, 64), (2, 32), (3, 64))
        for how in ways
    ]
    generator, found = random.Random(7), []
    for number in range(100):
        pair = generator.choices(range(len(plans)), k=2)
        try:
            distributed.agree(plans[pair[rank]], name=f"pair {number}", timeout_s=20.0)
        except distributed.PlansDivergeError:
            found.append((pair[0] == pair[1], False))
        else:
            found.append((pair[0] == pair[1], True))
    return found


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def pipeline(rank: int) -> list[dict[str, Any]]:
    return [stage(rank, ScheduleGPipe, BUDGETS[1]), stage(rank, Schedule1F1B, 1.0)]


def stage(rank: int, kind: Any, budget: float) -> dict[str, Any]:
    """One of two stages, four microbatches; with and without a plan."""
    count, rows = 4, 32
    inputs, target = batch(1, rows=count * rows), batch(2, rows=count * rows)
    losses: list[Tensor] = []

    def step() -> None:
        losses.clear()
        if rank == 0:
            schedule.step(inputs, return_outputs=False)
        else:
            schedule.step(target=target, losses=losses, return_outputs=False)

    found = []
    for planned in (False, True):
        torch.manual_seed(rank)
        model = nn.Sequential(*(Block() for _ in range(3)))
        schedule = kind(PipelineStage(model, rank, 2, torch.device("cpu")), count, loss_fn=_loss)
        if planned:
            asked = {
                "mode": "eager",
                "in_flight": distributed.in_flight_of(schedule),
                "loss_fn": (lambda output: _loss(output, target[:rows])) if rank else None,
            }
            plan = planned_or_least(
                model, batch(3, rows=rows).requires_grad_(rank > 0), budget, asked
            )
            plan.apply(model)
        step()
        gradients = [p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None]
        found.append(([float(loss) for loss in losses], gradients))
    return {
        "same": found[0] == found[1],
        "predicted": plan.peak_bytes,
        "measured": peaks(model, step, plan.peak_bytes),
        "budget": plan.budget_bytes,
        "in_flight": str(plan.asked.goal.in_flight),  # type: ignore[union-attr]
    }


def whole_job(rank: int) -> dict[str, Any]:
    """Three steps of a job on what a rank has, within a total."""
    model, inputs = made(), batch(rank)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)

    def job() -> ckpt_pass.Job:
        return ckpt_pass.Job(torch.optim.AdamW(model.parameters()), clip_norm=1.0)

    plain = ckpt_pass.plan(model, inputs, total="1MB", optimizer=job(), mode="eager")
    assert plain.account is not None
    total = plain.account.peak_bytes - plain.peak_bytes // 10
    plan = ckpt_pass.plan(model, inputs, total=total, optimizer=job(), mode="eager")
    assert isinstance(plan, ckpt_pass.Plan) and plan.account is not None
    plan.apply(model)
    before = plan.account.before_bytes
    measured = peaks(
        model, lambda: train(lambda: model(inputs), model, job()), plan.account.peak_bytes - before
    )
    return {
        "predicted": plan.account.peak_bytes,
        "measured": before + measured,
        "budget": total,
        "regions": len(plan.regions),
    }


# --- tests ----------------------------------------------------------------------------------

TRAINED = (
    fsdp,
    fsdp_kept,
    fsdp_mixed,
    fsdp_accumulated,
    ddp,
    tensor_parallel,
    sequence_parallel,
    pipeline,
)
OTHERS = (
    planned_after_a_step,
    together,
    without_room,
    without_a_way,
    too_late,
    with_other_collectives,
    random_pairs,
    point_to_point,
    whole_job,
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return on_ranks((*TRAINED, *OTHERS), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [job.__name__ for job in TRAINED])
def test_gradients_and_peaks(found: dict[str, list[Any]], name: str) -> None:
    check(found[name])


@pytest.mark.slow
def test_two_ways_on_four_ranks(tmp_path: Path) -> None:
    check(on_ranks([in_two_ways], tmp_path, ranks=4)["in_two_ways"])


@pytest.mark.slow
def test_all_ways_at_five_budgets(tmp_path: Path) -> None:
    check(on_ranks([at_five_budgets], tmp_path)["at_five_budgets"])


@pytest.mark.slow
def test_what_torchs_tracker_says(tmp_path: Path) -> None:
    for ours, theirs in on_ranks([beside_torchs_tracker], tmp_path)["beside_torchs_tracker"]:
        assert 0.99 * theirs <= ours <= 1.01 * theirs, (ours, theirs)


def check(ranks: list[list[dict[str, Any]]]) -> None:
    for rank in ranks:
        for one in rank:
            assert one["same"], one
            assert one["predicted"] <= one["budget"], one
            # What stages hand to each other is counted whether it is on its way or not.
            assert 0.97 <= one["measured"] / one["predicted"] <= 1.01, one


def test_the_whole_job_of_a_rank(found: dict[str, list[Any]]) -> None:
    """Its account is met where ranks really exchange."""
    for one in found["whole_job"]:
        assert one["regions"] and one["predicted"] <= one["budget"], one
        assert 0.99 <= one["measured"] / one["predicted"] <= 1.01, one


def test_a_plan_leaves_fsdp_as_it_was(found: dict[str, list[Any]]) -> None:
    assert found["planned_after_a_step"] == [True, True]


def test_microbatches_in_flight(found: dict[str, list[Any]]) -> None:
    words = [[one["in_flight"] for one in rank] for rank in found["pipeline"]]
    gpipe = "4 microbatches in flight, 3 once there are gradients"
    assert words == [[gpipe, "2 microbatches in flight"], [gpipe, "1 microbatches in flight"]]


def test_one_plan_for_the_tightest_rank(found: dict[str, list[Any]]) -> None:
    (same, own, right), (other_same, other_own, other_right) = found["together"]
    assert same == other_same and own < other_own and right and other_right


def test_a_rank_that_cannot_plan(found: dict[str, list[Any]]) -> None:
    assert [kind for kind, *_ in found["without_room"]] == [
        "InfeasibleBudgetError",
        "RankFailedError",
    ]
    assert "Rank 0 could not plan its step: InfeasibleBudgetError" in found["without_room"][1][1]
    assert [kind for kind, *_ in found["without_a_way"]] == [
        "RankFailedError",
        "NotTraceableError",
    ]


def test_random_pairs_of_plans(found: dict[str, list[Any]]) -> None:
    one, other = found["random_pairs"]
    assert one == other and all(same == agreed for same, agreed in one)
    assert {same for same, _ in one} == {False, True}


def test_exchange_from_one_rank_to_another(found: dict[str, list[Any]]) -> None:
    """What is to be waited for is no value: a second wait for it would not end."""
    assert found["point_to_point"] == [True, True]


def test_a_rank_that_is_late(found: dict[str, list[Any]]) -> None:
    kind, words, seconds = found["too_late"][0]
    assert kind == "RankMissingError" and "Rank 1 did not bring its plan within 1 s" in words
    assert seconds < 30


def test_ranks_with_other_collectives(found: dict[str, list[Any]]) -> None:
    for kind, words, _ in found["with_other_collectives"]:
        assert kind == "RanksDifferError"
        assert "number 0 is none on rank 0" in words


def test_a_schedule_without_an_order() -> None:
    with pytest.raises(distributed.ScheduleError, match="Got a str"):
        distributed.in_flight_of("1f1b")


def test_without_a_process_group() -> None:
    with pytest.raises(distributed.NoProcessGroupError, match=r"plan_together\(\) compares"):
        distributed.plan_together(made(), batch(0), budget=0.9)


def test_schedules_with_two_backwards_are_refused() -> None:
    """What a region keeps it hands out once: the backward of weights would find nothing."""
    kinds = schedules._ComputationType
    order = [schedules._Action(0, kinds(word), 0) for word in ("F", "I", "W")]
    schedule = types.SimpleNamespace(pipeline_order={0: order})
    with pytest.raises(distributed.ScheduleError, match="backward of weights apart"):
        distributed.in_flight_of(schedule, stage_index=0)
