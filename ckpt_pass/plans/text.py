"""A plan in words: how good it is, what it decides in which amounts, what its decisions cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from ckpt_pass.graph.shapes import shape_lines
from ckpt_pass.planner.device import Device
from ckpt_pass.plans.audit import warning_lines
from ckpt_pass.plans.parts import Decision
from ckpt_pass.plans.record import CompiledExecution, PlanRecord
from ckpt_pass.plans.timeline import text_plot
from ckpt_pass.plans.wording import format_bytes, format_seconds
from ckpt_pass.policy.sites import Bytes

#: Lines of a list of decisions; an engineer reads the first few.
LINES = 10
#: Reasons named in one line; the rest are counted.
_REASONS = 2
#: An index in a module's name: layers that differ in nothing else share a line.
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def summary(plan: PlanRecord) -> str:
    """The plan in a few lines."""
    fates = ("saved", "offloaded", "sharded", "recomputed", "unused")
    counts = {fate: len(plan.with_fate(fate)) for fate in fates}
    moved = f"{counts['offloaded']} offloaded, " if counts["offloaded"] else ""
    moved += f"{counts['sharded']} sharded, " if counts["sharded"] else ""
    found = plan.predicted
    return "\n".join(
        [
            f"policy       {plan.policy}",
            f"graph        {plan.fingerprint[:12]}, {len(plan.decisions)} ops, "
            f"{len(plan.regions)} regions",
            f"decisions    {counts['saved']} saved, {moved}{counts['recomputed']} recomputed, "
            f"{counts['unused']} not needed by the backward",
            f"saved bytes  {format_bytes(plan.saved_bytes)} (outputs "
            f"{format_bytes(found.output_bytes)} more)",
            f"peak         {format_bytes(found.peak_bytes)} predicted, {found.peak_at}"
            f"{_without(plan)}",
            *shape_lines(plan.peak_expression, plan.dimensions, plan.budget_bytes),
            f"recompute    {_share(found.recompute_flops, found.step_flops)} of the flops, "
            f"{_share(found.recompute_time_s, found.step_time_s)} of the modelled time",
            *(found.offloaded.summary_lines() if found.offloaded is not None else ()),
            *_gathers(plan),
            *budget_lines(plan),
            *warning_lines(plan),
        ]
    )


def _without(plan: PlanRecord) -> str:
    """What is not in the peak: by a policy alone, kernels are not measured."""
    if plan.budget_bytes is not None or plan.account is not None:
        return ""
    return ", without kernels' workspaces"


def _gathers(plan: PlanRecord) -> list[str]:
    found, goal = plan.predicted, plan.asked.goal
    if not found.gathered_bytes or goal is None:
        return []
    return [
        f"gathered     {format_bytes(found.gathered_bytes)} from other ranks, "
        f"{format_seconds(found.gather_s)}; {goal.shard_over}"
    ]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0.0 %"


def listing(plan: PlanRecord) -> str:
    """The summary, and one line a decision; views that cost nothing are left out."""
    shown = [d for d in plan.decisions if not (d.op_class == "view" and d.fate != "saved")]
    return "\n".join([summary(plan), "", *map(str, shown)])


def budget_lines(plan: PlanRecord) -> list[str]:
    """The budget, what it was met by, and how far the plan is from the fastest one."""
    if plan.budget_bytes is None:
        return []
    return [
        f"budget       {format_bytes(plan.budget_bytes)}, met by: {plan.proven.solver}",
        f"bound        {_bound(plan)}",
        *_inner(plan),
    ]


def _inner(plan: PlanRecord) -> list[str]:
    lines = []
    found = plan.execution.inductor if isinstance(plan.execution, CompiledExecution) else None
    if found is not None:
        again = f", planned again {found.replans} times" if found.replans else ""
        again += ", fused with care" if found.careful else ""
        alone = format_bytes(plan.predicted.timeline.peak_bytes)
        lines.append(
            f"inductor     the peak is its generated code's; of the graph alone {alone}{again}"
        )
    goal = plan.asked.goal
    if goal is not None and isinstance(goal.cost, Device):
        lines.append(
            f"on paper     for {goal.cost}: times by its rates; of what kernels allocate besides "
            "their outputs, at the most that of products (in the account) and of flash attention's "
            "backward counts, the rest is not known"
        )
        return lines
    measured = plan.predicted.measured_workspaces
    if measured:
        lines.append(f"workspaces   of {measured} kernels, measured on this machine")
    return lines


def _bound(plan: PlanRecord) -> str:
    found, again_s = plan.proven, plan.predicted.overhead_s
    what = "recomputation" if plan.predicted.offloaded is None else "recomputation and waiting"
    if not again_s:
        return "nothing that takes time is recomputed: no plan is faster"
    if found.status == "optimal":
        return "optimal: no plan within the budget recomputes less"
    stopped = "; the solver stopped at its time limit" if found.status == "time limit" else ""
    if not found.lower_bound_s:
        return f"not known how far this is from the fastest plan: no lower bound was found{stopped}"
    return (
        f"{format_seconds(found.lower_bound_s)} of {what} at least, "
        f"{format_seconds(again_s)} here: the fastest plan's step is at most "
        f"{100 * plan.gap:.1f} % shorter{stopped}"
    )


def overview(plan: PlanRecord) -> str:
    """The summary; for a plan with a budget also amounts, dear decisions and the timeline."""
    if plan.budget_bytes is None:
        return "\n\n".join([summary(plan), *([] if plan.account is None else [str(plan.account)])])
    found = plan.predicted.offloaded
    blocks = [
        summary(plan).splitlines(),
        list(plan.account.lines() if plan.account is not None else ()),
        list(_amounts(plan)),
        list(found.listing_lines() if found is not None else ()),
        list(_dearest("recomputed, most time first", plan, "recomputed", _time, _time_words)),
        list(_dearest("saved, most bytes first", plan, "saved", _bytes, _bytes_words)),
        list(_memory(plan)),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _memory(plan: PlanRecord) -> Iterator[str]:
    timeline, before = plan.predicted.timeline, plan.predicted.plain_timeline
    lines = text_plot(timeline, plan.budget_bytes)
    if not lines:
        return
    words = f"; nothing recomputed: {format_bytes(before.peak_bytes)}" if before is not None else ""
    yield f"memory over the step's modelled {format_seconds(timeline.duration_s)}{words}"
    yield from lines


# --- amounts --------------------------------------------------------------------------------


def _amounts(plan: PlanRecord) -> Iterator[str]:
    """Ops, views and bytes by what becomes of them, and why."""
    again = plan.with_fate("recomputed")
    most = max((decision.times for decision in again), default=0)
    groups = {
        "saved": plan.with_fate("saved"),
        "offloaded": plan.with_fate("offloaded"),
        "sharded": plan.with_fate("sharded"),
        "recomputed once": tuple(d for d in again if d.times <= 1),
        f"up to {most} times": tuple(d for d in again if d.times > 1),
        "not needed": plan.with_fate("unused"),
    }
    yield f"{'':16} {'ops':>5} {'views':>6} {'bytes':>11}  why"
    for name, decisions in groups.items():
        if decisions:
            views = sum(decision.is_view for decision in decisions)
            amount = format_bytes(_total(decision.nbytes for decision in decisions))
            why = "the backward does not read it" if name == "not needed" else _why(decisions)
            yield f"{name:16} {len(decisions) - views:>5} {views:>6} {amount:>11}  {why}"


def _total(items: Iterable[Bytes]) -> Bytes:
    total: Bytes = sum(items)
    return total


def _why(decisions: Iterable[Decision]) -> str:
    """The commonest rules; views follow what they are views of and have no say."""
    rules = Counter(decision.rule for decision in decisions if not decision.is_view)
    if len(rules) == 1:
        return next(iter(rules))
    named = [f"{rule} ({count})" for rule, count in rules.most_common(_REASONS)]
    rest = sum(rules.values()) - sum(count for _, count in rules.most_common(_REASONS))
    return ", ".join([*named, f"other rules ({rest})"] if rest else named)


# --- the dearest decisions ------------------------------------------------------------------


@dataclass(frozen=True)
class _Alike:
    """Decisions that differ in the index of their layer alone."""

    name: str
    members: tuple[Decision, ...]

    @property
    def time_s(self) -> float:
        return sum(decision.time_s * decision.times for decision in self.members)

    @property
    def nbytes(self) -> Bytes:
        return _total(decision.nbytes for decision in self.members)

    @property
    def runs(self) -> int:
        return sum(decision.times for decision in self.members)


def _dearest(
    title: str,
    plan: PlanRecord,
    fate: str,
    cost: Callable[[_Alike], float],
    words: Callable[[_Alike], str],
) -> Iterator[str]:
    groups = [group for group in _alike(plan.with_fate(fate)) if cost(group)]
    if not groups:
        return
    ranked = sorted(groups, key=lambda group: (-cost(group), group.name))
    yield title
    yield from (words(group) for group in ranked[:LINES])
    rest = ranked[LINES:]
    if rest:
        yield f"  and {sum(len(group.members) for group in rest)} that cost less"


def _alike(decisions: Iterable[Decision]) -> list[_Alike]:
    groups: dict[tuple[object, ...], list[Decision]] = {}
    for decision in decisions:
        site = decision.site
        key = (_INDEX.sub("*", site.fqn), site.op, site.occurrence, site.call)
        groups.setdefault(key, []).append(decision)
    return [_Alike(_name(members), tuple(members)) for members in groups.values()]


def _name(members: list[Decision]) -> str:
    site = members[0].site
    fqns = {member.site.fqn for member in members}
    return str(replace(site, fqn=_INDEX.sub("*", site.fqn))) if len(fqns) > 1 else str(site)


def _time(group: _Alike) -> float:
    return group.time_s


def _bytes(group: _Alike) -> float:
    """Bytes as a number; symbolic ones come first, since nobody knows how large they get."""
    return float(group.nbytes) if isinstance(group.nbytes, int) else float("inf")


def _time_words(group: _Alike) -> str:
    count = len(group.members)
    runs = f" in {group.runs} runs" if group.runs > count else ""
    return f"  {format_seconds(group.time_s):>10}  {count:>3} x {group.name}{runs}"


def _bytes_words(group: _Alike) -> str:
    return f"  {format_bytes(group.nbytes):>10}  {len(group.members):>3} x {group.name}"
