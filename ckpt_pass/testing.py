"""Golden texts of checkpointing decisions, for tests of models, policies and compilers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ckpt_pass.plans.parts import Decision
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.policy.rules import PolicyLike
from ckpt_pass.tools.ahead import plan_one


def golden(model: Any, *args: Any, policy: PolicyLike | None = None, **options: Any) -> str:
    """A short, stable text of what the forward saves and what the backward recomputes.

    Made for ``expecttest``: no addresses, no node names, no times; one line a module and fate,
    ops in the order in which they run; layers that decide alike are folded into one line. It
    changes only when a decision, a shape or the order of the ops changes.

    Args:
        model, args, policy: as for :func:`ckpt_pass.explain`.
        options: further options of :func:`ckpt_pass.plan`.
    """
    return golden_of(plan_one(model, *args, policy=policy, **options))


def golden_of(plan: Plan) -> str:
    """The golden text of a plan that was made already, as by a backend."""
    header = f"policy {plan.policy.partition(':')[0]}"
    body = _folded(_blocks(plan))
    activations = Counter(item.kind for item in plan.saved)
    counts = ", ".join(
        f"{activations[kind]} {kind}" + ("s" if activations[kind] > 1 else "")
        for kind in ("parameter", "input", "random state")
        if activations[kind]
    )
    footer = f"saved {format_bytes(plan.saved_bytes)}" + (f"; also {counts}" if counts else "")
    return "\n".join([header, *body, footer]) + "\n"


Block = tuple[str, tuple[str, ...]]


def _blocks(plan: Plan) -> list[Block]:
    """Each region (or what lies between regions) with its lines, in order of execution."""
    blocks: list[tuple[str, list[Decision]]] = []
    for decision in plan.decisions:
        if decision.op_class in ("view", "metadata") and decision.fate != "saved":
            continue
        name = decision.region or ""
        if not blocks or blocks[-1][0] != name:
            blocks.append((name, []))
        blocks[-1][1].append(decision)
    return [(name, tuple(_lines(name, decisions))) for name, decisions in blocks]


def _lines(region: str, decisions: list[Decision]) -> list[str]:
    """One line for each run of ops in the same module with the same fate."""
    lines: list[list[str]] = []
    for decision in decisions:
        prefix = region.partition("@")[0]
        module = decision.site.fqn.removeprefix(prefix).lstrip(".") or "."
        op = decision.site.op.removeprefix("aten.").removesuffix(".default")
        cost = (
            f" {format_bytes(decision.nbytes)}" if decision.fate in ("saved", "offloaded") else ""
        )
        if lines and lines[-1][0] == f"  {decision.fate:10} {module}:":
            lines[-1].append(f"{op}{cost}")
        else:
            lines.append([f"  {decision.fate:10} {module}:", f"{op}{cost}"])
    return [f"{line[0]} {', '.join(line[1:])}" for line in lines]


def _folded(blocks: list[Block]) -> list[str]:
    """Consecutive blocks with equal lines share one entry."""
    runs: list[tuple[list[str], tuple[str, ...]]] = []
    for name, lines in blocks:
        if runs and runs[-1][1] == lines and name:
            runs[-1][0].append(name)
        else:
            runs.append(([name], lines))
    text = []
    for names, lines in runs:
        if names[0]:
            text.append(names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}")
        else:
            text.append("(no region)")
        text.extend(lines)
    return text
