"""Read what a plan was asked for: policy, budget, and how it was to be met."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.offloading.options import InvalidOffloadError, Offload
from ckpt_pass.offloading.sharding import InvalidShardingError, Sharding
from ckpt_pass.ops.taxonomy import OpClass
from ckpt_pass.planner.device import Device, InvalidDeviceError
from ckpt_pass.planner.solvers import SOLVERS, as_solver
from ckpt_pass.plans.goal import COSTS, GRADIENTS, CostLike, Goal, InFlight
from ckpt_pass.plans.record import Asked
from ckpt_pass.plans.schema import CodePolicy, PlanFileError, Reader
from ckpt_pass.policy.rules import FirstMatch, Policy, Rule, Ruling

POLICIES = {member.name: member for member in CheckpointPolicy}
CLASSES = {str(member): member for member in OpClass}


def read_asked(reader: Reader) -> Asked:
    """The group ``asked`` of a plan file.

    Raises:
        PlanFileError: it is none.
    """
    return Asked(
        words=reader["words"].text(),
        policy=_policy(reader["policy"], 0),
        regions=reader["regions"].maybe(Reader.texts),
        goal=reader["goal"].maybe(_goal),
        budget_bytes=reader["budget_bytes"].maybe(Reader.whole),
    )


def _goal(reader: Reader) -> Goal:
    budget = reader["budget"]
    amount: Any = budget.value
    if isinstance(amount, str):
        amount = budget.text()
    else:
        amount = budget.whole(1) if isinstance(amount, int) else budget.number()
    solver = as_solver(reader["solver"].one_of({name: name for name in SOLVERS}))
    limit = reader["time_limit_s"].maybe(Reader.number)
    cost = _cost(reader["cost"])
    offload = reader.get("offload").maybe(_offload)
    in_flight = reader.get("in_flight").maybe(_in_flight)
    gradients = reader.get("gradients").maybe(_gradients) or "new"
    shards = reader.get("shard_over").maybe(_sharding)
    return Goal(amount, solver, limit, cost, offload, in_flight, gradients, shards)


def _in_flight(reader: Reader) -> InFlight:
    first, later = reader.items(2)
    return InFlight(first.whole(1), later.whole())


def _gradients(reader: Reader) -> str:
    return reader.one_of({name: name for name in GRADIENTS})


def _cost(reader: Reader) -> CostLike:
    if isinstance(reader.value, str):
        return reader.one_of({name: name for name in COSTS})
    rates = (pair.items(2) for pair in reader["flops_per_s"].items())
    try:
        return Device(
            name=reader["name"].text(),
            memory_bytes=reader["memory_bytes"].whole(1),
            flops_per_s=tuple((name.text(), rate.number()) for name, rate in rates),
            bytes_per_s=reader["bytes_per_s"].number(),
            host_bytes_per_s=reader["host_bytes_per_s"].number(),
            launch_s=reader["launch_s"].number(),
            attained=reader["attained"].number(),
            kind=reader["kind"].text(),
            product_workspace_bytes=reader.get("product_workspace_bytes").maybe(Reader.whole) or 0,
        )
    except InvalidDeviceError as error:
        raise PlanFileError(reader.where, "a device", str(error)) from None


def _offload(reader: Reader) -> Offload:
    budget = reader["host_budget"]
    try:
        return Offload(
            to=reader["to"].text(),
            host_budget=budget.value if isinstance(budget.value, str) else budget.maybe(_amount),
            d2h_bytes_per_s=reader["d2h_bytes_per_s"].maybe(Reader.number),
            h2d_bytes_per_s=reader["h2d_bytes_per_s"].maybe(Reader.number),
            folder=reader["folder"].maybe(Reader.text),
            min_bytes=reader["min_bytes"].whole(),
        )
    except InvalidOffloadError as error:
        raise PlanFileError(reader.where, "options for offloading", str(error)) from error


def _amount(reader: Reader) -> int:
    return reader.whole(1)


def _policy(reader: Reader, depth: int) -> Policy:
    if depth > 16:
        raise PlanFileError(reader.where, "policies that are not nested so deeply", "deeper ones")
    found: Any = reader.value
    kind = next(iter(found)) if isinstance(found, dict) and found else None
    if kind == "rule":
        return _rule(reader["rule"])
    if kind == "first":
        parts = tuple(_policy(part, depth + 1) for part in reader["first"].items())
        return FirstMatch(parts, reader["name"].text())
    return CodePolicy(reader["code"].text())


def _ruling(reader: Reader) -> Ruling:
    if not isinstance(reader.value, dict):
        return reader.one_of(POLICIES)
    return _sharding(reader["shard"])


def _sharding(reader: Reader) -> Sharding:
    try:
        return Sharding(
            group=reader["group"].maybe(Reader.text),
            min_bytes=reader["min_bytes"].whole(),
            check=reader["check"].text(),
            arguments=reader["arguments"].text(),
            bytes_per_s=reader["bytes_per_s"].maybe(Reader.number),
            latency_s=reader["latency_s"].maybe(Reader.number),
        )
    except InvalidShardingError as error:
        raise PlanFileError(reader.where, "options for sharding", str(error)) from error


def _rule(reader: Reader) -> Rule:
    return Rule(
        decision=_ruling(reader["decision"]),
        op=reader["op"].texts(),
        op_class=tuple(item.one_of(CLASSES) for item in reader["op_class"].items()),
        module=reader["module"].maybe(Reader.text),
        nth=reader["nth"].maybe(Reader.whole),
        every=reader["every"].maybe(Reader.whole),
        min_bytes=reader["min_bytes"].maybe(Reader.whole),
        max_bytes=reader["max_bytes"].maybe(Reader.whole),
        label=reader["label"].text(),
    )
