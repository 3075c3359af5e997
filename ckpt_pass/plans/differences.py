"""What differs between two plans, the most telling first."""

from __future__ import annotations

from ckpt_pass.plans.value import Plan

_SHOWN = 5


def plan_differences(one: Plan, other: Plan) -> tuple[str, ...]:
    """What differs between two plans, in words: the step that they are for, then decisions.

    Empty where both decide the same for the same step. Decisions are compared by call site, in the
    order of execution, so that the first one named is the first that differs.
    """
    found = [*_settings(one, other), *_steps(one, other)]
    theirs = {decision.site: decision for decision in other.decisions}
    differ = [
        f"{mine.site}: {mine.fate} in one, {theirs[mine.site].fate} in the other"
        for mine in one.decisions
        if mine.site in theirs and mine.fate != theirs[mine.site].fate
    ]
    more = len(differ) - _SHOWN
    return (*found, *differ[:_SHOWN], *([f"and {more} more decisions"] if more > 0 else []))


def _settings(one: Plan, other: Plan) -> list[str]:
    names = ("mode", "policy", "budget_bytes", "regions", "peak_bytes")
    found = []
    for name in names:
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            found.append(f"{name}: {_short(mine)} in one, {_short(theirs)} in the other")
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _steps(one: Plan, other: Plan) -> list[str]:
    found = []
    if one.signature is not None and other.signature is not None:
        for name in ("torch_version", "library_version", "arguments", "parameters"):
            mine, theirs = getattr(one.signature, name), getattr(other.signature, name)
            if mine != theirs:
                found.append(f"{name}: {_short(mine)} in one, {_short(theirs)} in the other")
    for which, missing in (("one", other.sites - one.sites), ("other", one.sites - other.sites)):
        if missing:
            found.append(f"{len(missing)} call sites are not in the {which}, first {min(missing)}")
    return found
