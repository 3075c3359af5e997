"""What in a plan its reader would not expect; said loudly, below its summary."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator

from ckpt_pass._errors import nearest
from ckpt_pass.ops.taxonomy import OpClass, is_expensive
from ckpt_pass.plans.parts import Decision
from ckpt_pass.plans.record import CompiledExecution, EagerExecution, PlanRecord
from ckpt_pass.policy.named import POLICIES
from ckpt_pass.policy.rules import SAVING, FirstMatch, Policy, Rule, name_matches

#: Names of one warning; the rest are counted.
_NAMED = 3


def findings(plan: PlanRecord) -> tuple[str, ...]:
    """One sentence for each surprise.

    A pattern or op of the policy that matched nothing; an expensive op that is recomputed because
    no rule is about it; an op that nobody classified; a region that wrapped nothing; a graph break
    behind which the model goes on elsewhere. With a budget the solver recomputes what it chooses,
    and only a policy's own words are looked at.
    """
    rules = list(_rules_of(plan.asked.policy))
    return tuple(
        [
            *_unmatched(plan, rules),
            *_expensive(plan, rules),
            *_unclassified(plan),
            *_empty_regions(plan),
            *_breaks(plan),
        ]
    )


def warning_lines(plan: PlanRecord) -> list[str]:
    """The findings as lines of a summary."""
    return [f"WARNING      {finding}" for finding in findings(plan)]


def _rules_of(policy: Policy) -> Iterator[Rule]:
    if isinstance(policy, FirstMatch):
        for part in policy.policies:
            yield from _rules_of(part)
    elif isinstance(policy, Rule):
        yield policy


def _unmatched(plan: PlanRecord, rules: Iterable[Rule]) -> Iterator[str]:
    if plan.asked.policy in POLICIES.values():
        return  # a preset is for any model: it may well name ops that this one lacks
    ops = sorted({decision.site.op for decision in plan.decisions})
    modules = sorted(_modules(plan))
    for rule in rules:
        wrong = [*_unmatched_names(rule, ops), *_unmatched_module(rule, modules)]
        wrong += _unmatched_classes(rule, plan)
        if not wrong and rule != Rule(rule.decision) and not _matches_any(rule, plan.decisions):
            wrong = ["no op meets all of its conditions"]
        for reason in wrong:
            yield f"{rule} of the policy matched nothing: {reason}"


def _unmatched_names(rule: Rule, ops: list[str]) -> Iterator[str]:
    for pattern in rule.op:
        if not any(name_matches(pattern, name) for name in ops):
            yield f"no op of the step is named {pattern}.{nearest(pattern, ops)}"


def _unmatched_module(rule: Rule, modules: list[str]) -> Iterator[str]:
    pattern = rule.module
    if pattern is not None and not any(fnmatch.fnmatchcase(m, pattern) for m in modules):
        yield f"no op ran in a module named {pattern}.{nearest(pattern, modules)}"


def _unmatched_classes(rule: Rule, plan: PlanRecord) -> Iterator[str]:
    known = {decision.op_class for decision in plan.decisions}
    if rule.op_class and known.isdisjoint(map(str, rule.op_class)):
        yield f"no op of the step is of class {' or '.join(rule.op_class)}"


def _matches_any(rule: Rule, decisions: Iterable[Decision]) -> bool:
    """Whether enough ops meet a rule's conditions, its counts within a module apart."""
    count = sum(_matches(rule, decision) for decision in decisions)
    return count >= (rule.nth or 1)


def _matches(rule: Rule, decision: Decision) -> bool:
    if rule.op and not any(name_matches(pattern, decision.site.op) for pattern in rule.op):
        return False
    if rule.op_class and decision.op_class not in map(str, rule.op_class):
        return False
    around = _with_parents(decision.site.fqn)
    if rule.module is not None and not fnmatch.filter(around, rule.module):
        return False
    # Bytes of a view are 0 here, and a rule sees its full size; open sizes are not known.
    nbytes = decision.nbytes
    if not isinstance(nbytes, int) or decision.is_view:
        return True
    return (rule.min_bytes or 0) <= nbytes and (rule.max_bytes is None or nbytes <= rule.max_bytes)


def _with_parents(fqn: str) -> list[str]:
    parts = fqn.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _modules(plan: PlanRecord) -> set[str]:
    return {name for site in plan.sites for name in _with_parents(site.fqn) if name}


def _expensive(plan: PlanRecord, rules: list[Rule]) -> Iterator[str]:
    if plan.budget_bytes is not None or not any(rule.decision in SAVING for rule in rules):
        return
    about = [rule for rule in rules if rule.op or rule.op_class or rule.module is not None]
    again = [
        decision
        for decision in plan.with_fate("recomputed")
        if is_expensive(OpClass(decision.op_class))
        and not any(_matches(rule, decision) for rule in about)
    ]
    if again:
        yield (
            f"{len(again)} expensive ops are recomputed, since no rule is about them: "
            f"{_named(d.site.op for d in again)}"
        )


def _unclassified(plan: PlanRecord) -> Iterator[str]:
    unknown = [d.site.op for d in plan.decisions if d.op_class == OpClass.UNCLASSIFIED]
    if unknown:
        yield (
            f"{len(unknown)} ops are in no class, so that policies take them for expensive ones: "
            f"{_named(unknown)}"
        )


def _empty_regions(plan: PlanRecord) -> Iterator[str]:
    computing = [d for d in plan.decisions if not (d.is_view and d.fate != "recomputed")]
    needed = Counter(d.region for d in computing if d.fate != "unused")
    again = {d.region for d in plan.decisions if d.fate == "recomputed"}
    # A layer's output may be saved for the next one.
    step = plan.execution
    again |= {name for name, _ in step.moves} if isinstance(step, EagerExecution) else set()
    empty = [name for name in plan.regions if name not in again and needed[name] <= 1]
    if empty:
        yield f"regions that wrapped nothing which the backward needs: {_named(empty)}"
    modules = sorted(_modules(plan))
    for pattern in plan.asked.regions or ():
        if not any(fnmatch.fnmatchcase(name.partition("@")[0], pattern) for name in plan.regions):
            yield f"the region pattern {pattern} wrapped nothing.{nearest(pattern, modules)}"


def _breaks(plan: PlanRecord) -> Iterator[str]:
    step = plan.execution
    if isinstance(step, CompiledExecution) and step.graph_break:
        yield (
            f"graph break at {step.graph_break}: what comes after it is not part of this graph, "
            "nor of its peak"
        )


def _named(names: Iterable[str]) -> str:
    counts = Counter(names)
    shown = [f"{name} ({count})" if count > 1 else name for name, count in counts.most_common()]
    more = len(shown) - _NAMED
    return ", ".join(shown[:_NAMED]) + (f" and {more} more" if more > 0 else "")
