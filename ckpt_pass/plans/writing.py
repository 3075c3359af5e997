"""Write plans as JSON: readable, the same bytes for the same plan, and data only.

Decisions stand in the order of execution, grouped by module call, one a line. Strings and numbers
that repeat go into tables. A checksum over everything tells a damaged or edited file from a plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, fields
from itertools import groupby
from typing import Any

from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.sharding import Sharding
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.planner.device import Device
from ckpt_pass.planner.solvers import SOLVERS
from ckpt_pass.plans.account_file import account_to_data
from ckpt_pass.plans.expressions import expression_to_data
from ckpt_pass.plans.link_use import LinkUse
from ckpt_pass.plans.numbering import Numbering
from ckpt_pass.plans.parts import Decision, Replay, SavedActivation, Signature
from ckpt_pass.plans.record import (
    Asked,
    CompiledExecution,
    EagerExecution,
    PlanRecord,
    Predicted,
    Proven,
)
from ckpt_pass.plans.schema import CodePolicy
from ckpt_pass.plans.timeline import Timeline
from ckpt_pass.policy.rules import FirstMatch, Policy, Rule, Ruling, describe
from ckpt_pass.policy.sites import CallSite
from ckpt_pass.version import __version__

#: 1: all fields side by side; 2: in groups.
FORMAT = 2
#: The mode of a file with a plan for each of several graphs of a step.
SEVERAL = "several graphs"
#: Members of a group of decisions: module, call, region, and the rows.
_GROUP = 4


def plan_to_json(plan: PlanRecord) -> str:
    """The plan as JSON."""
    return _pretty(_with_checksum(_plan_data(plan))) + "\n"


def step_to_json(parts: Sequence[PlanRecord], asked: Asked, facts: Mapping[str, Any]) -> str:
    """The plan of a step of several graphs as JSON.

    Args:
        parts: the plan of each graph.
        asked: what was asked of the step.
        facts: what is predicted of it.
    """
    head = {
        "format": FORMAT,
        "ckpt_pass": __version__,
        "mode": SEVERAL,
        "asked": _asked_data(asked),
    }
    data = {**head, **facts, "parts": [_with_checksum(_plan_data(part)) for part in parts]}
    return _pretty(_with_checksum(data)) + "\n"


def _with_checksum(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "checksum": checksum(data)}


def checksum(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _pretty(value: Any, depth: int = 0) -> str:
    """Objects take a line for each member, and so do lists of lists; other lists take one line."""
    inner, outer = " " * (depth + 1), " " * depth
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(k)}: {_pretty(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{outer}}}"
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        lines = [f"{inner}{_pretty_row(item, depth + 1)}" for item in value]
        return "[\n" + ",\n".join(lines) + f"\n{outer}]"
    return _compact(value)


def _pretty_row(row: list[Any], depth: int) -> str:
    """A row on one line; the rows inside a group stand below its name."""
    if not (row and isinstance(row[-1], list) and len(row) == _GROUP):
        return _compact(row)
    head = ",".join(_compact(item) for item in row[:-1])
    return f"[{head},{_pretty(row[-1], depth)}]"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _plan_data(plan: PlanRecord) -> dict[str, Any]:
    rules, times, words = Numbering(), Numbering(), Numbering()
    saved = [_saved_data(item, words) for item in plan.saved]
    decisions = _decisions_data(plan.decisions, rules, times)
    listed = {decision.site for decision in plan.decisions}
    return {
        "format": FORMAT,
        "ckpt_pass": __version__,
        "mode": plan.mode,
        "fingerprint": plan.fingerprint,
        "asked": _asked_data(plan.asked),
        "predicted": _predicted_data(plan.predicted),
        "proven": {field.name: getattr(plan.proven, field.name) for field in fields(Proven)},
        "execution": _execution_data(plan.execution),
        "regions": list(plan.regions),
        "decisions": decisions,
        "rules": rules.things,
        "times_s": times.things,
        "merged_sites": [_site_data(site) for site in sorted(plan.sites - listed)],
        "saved": saved,
        "words": words.things,
        "timeline": _timeline_data(plan.predicted.timeline),
        "plain_timeline": None
        if plan.predicted.plain_timeline is None
        else _timeline_data(plan.predicted.plain_timeline),
    }


def _predicted_data(found: Predicted) -> dict[str, Any]:
    return {
        "peak_bytes": found.peak_bytes,
        "peak_at": found.peak_at,
        "output_bytes": expression_to_data(found.output_bytes),
        "recompute_flops": found.recompute_flops,
        "step_flops": found.step_flops,
        "recompute_time_s": found.recompute_time_s,
        "step_time_s": found.step_time_s,
        "measured_workspaces": found.measured_workspaces,
        **({} if found.offloaded is None else {"offloaded": _offloaded_data(found.offloaded)}),
        **(
            {"gathered_bytes": found.gathered_bytes, "gather_s": found.gather_s}
            if found.gathered_bytes
            else {}
        ),
        **(
            {"beside_gradients_bytes": found.beside_gradients_bytes}
            if found.beside_gradients_bytes
            else {}
        ),
        **({} if found.account is None else {"account": account_to_data(found.account)}),
    }


def _offloaded_data(found: LinkUse) -> dict[str, Any]:
    data = {field.name: getattr(found, field.name) for field in fields(LinkUse)}
    rows = [[v.name, v.again_s, *astuple(v.transfer)] for v in found.values]
    return {**data, "values": rows}


def _execution_data(step: CompiledExecution | EagerExecution) -> dict[str, Any]:
    data: dict[str, Any] = {"signature": _signature_data(step.signature)}
    if isinstance(step, EagerExecution):
        found = [[name, sorted(m.numbers), m.ahead, m.arguments] for name, m in step.moves]
        moves = {"moves": found} if found else {}
        shards = {"sharded_regions": sorted(step.sharded)} if step.sharded else {}
        return {**data, "random_regions": sorted(step.random_regions), **moves, **shards}
    inner = step.inductor
    return {
        **data,
        "peak_expression": expression_to_data(step.peak_expression),
        "dimensions": [
            [d.symbol, list(d.places), d.traced, d.least, d.most] for d in step.dimensions
        ],
        "graph_break": step.graph_break,
        "inductor": None if inner is None else [inner.peak_bytes, inner.replans, inner.careful],
        "replay": _replay_data(step.replay),
    }


def _signature_data(signature: Signature) -> dict[str, Any]:
    return {
        "torch": signature.torch_version,
        "arguments": list(signature.arguments),
        "parameters": list(signature.parameters),
        "ckpt_pass": signature.library_version,
    }


def _site_data(site: CallSite) -> list[Any]:
    return [site.fqn, site.call, site.op, site.occurrence]


def _decisions_data(
    decisions: Sequence[Decision], rules: Numbering, times: Numbering
) -> list[list[Any]]:
    found = []
    for key, group in groupby(decisions, lambda d: (d.site.fqn, d.site.call, d.region)):
        rows = [
            [
                decision.site.op,
                decision.site.occurrence,
                decision.fate,
                rules.number((decision.decision.name, decision.op_class, decision.rule)),
                expression_to_data(decision.nbytes),
                decision.times,
                times.number(decision.time_s),
            ]
            for decision in group
        ]
        found.append([*key, rows])
    return found


def _saved_data(item: SavedActivation, words: Numbering) -> list[Any]:
    """A saved activation; what its provenance says in most cases is left out."""
    usual = f"output of {item.site}"
    return [
        words.number(item.kind),
        None if item.site is None else _site_data(item.site),
        [expression_to_data(_size(size)) for size in item.shape],
        words.number(item.dtype),
        expression_to_data(item.nbytes),
        None if item.provenance == usual else item.provenance,
        words.number(item.reason),
    ]


def _size(size: object) -> Any:
    """A size as a number or an expression."""
    return size.node.expr if hasattr(size, "node") else size


def _replay_data(replay: Replay) -> dict[str, Any]:
    labels = Numbering()
    saved = [labels.number(label) for label in replay.saved]
    pairs = {
        name: [[labels.number(one), labels.number(other)] for one, other in found]
        for name, found in (("drops", replay.drops), ("merged", replay.merged))
    }
    moves = [
        [*(labels.number(label) for label in (value, released, fetched)), run]
        for value, released, fetched, run in replay.moves
    ]
    found = {"labels": labels.things, "saved": saved, **pairs}
    return {**found, "moves": moves} if moves else found


def _timeline_data(timeline: Timeline) -> dict[str, Any]:
    steps, seconds = Numbering(), Numbering()
    before = 0
    changes = []
    for nbytes in timeline.bytes_at:
        changes.append(steps.number(nbytes - before))
        before = nbytes
    moments = [seconds.number(second) for second in timeline.seconds_of]
    return {
        "forward_length": timeline.forward_length,
        "changes": steps.things,
        "bytes": changes,
        "seconds": seconds.things,
        "times": moments,
    }


def _asked_data(asked: Asked) -> dict[str, Any]:
    goal = asked.goal
    many = None if goal is None else goal.in_flight
    named = goal is not None and any(goal.solver is solver for solver in SOLVERS.values())
    return {
        "words": asked.words,
        "budget_bytes": asked.budget_bytes,
        "policy": _policy_data(asked.policy),
        "regions": None if asked.regions is None else list(asked.regions),
        "goal": None
        if goal is None
        else {
            "budget": goal.budget,
            "solver": goal.solver.name if named else "auto",
            "time_limit_s": goal.time_limit_s,
            "cost": asdict(goal.cost) if isinstance(goal.cost, Device) else goal.cost,
            **({} if goal.offload is None else {"offload": _offload_data(goal.offload)}),
            **({} if many is None else {"in_flight": [many.first, many.later]}),
            **({} if goal.gradients == "new" else {"gradients": goal.gradients}),
            **({} if goal.shard_over is None else {"shard_over": asdict(goal.shard_over)}),
        },
    }


def _offload_data(offload: OffloadLike) -> dict[str, Any] | None:
    """Options as data; a store of the user's is none, and must be named again."""
    if not isinstance(offload, Offload):
        return None
    found = {field.name: getattr(offload, field.name) for field in fields(Offload)}
    return {**found, "folder": None if offload.folder is None else str(offload.folder)}


def _ruling_data(ruling: Ruling) -> str | dict[str, Any]:
    return {"shard": asdict(ruling)} if isinstance(ruling, Sharding) else ruling.name


def _policy_data(policy: Policy) -> dict[str, Any]:
    if type(policy) is Rule:
        values = {field.name: getattr(policy, field.name) for field in fields(Rule)}
        values["decision"] = _ruling_data(policy.decision)
        values["op"] = list(policy.op)
        values["op_class"] = [str(op_class) for op_class in policy.op_class]
        return {"rule": values}
    if type(policy) is FirstMatch:
        return {"first": [_policy_data(part) for part in policy.policies], "name": policy.name}
    words = policy.words if isinstance(policy, CodePolicy) else describe(policy)
    return {"code": words}
