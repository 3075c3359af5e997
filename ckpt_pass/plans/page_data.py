"""What a plan's page shows, as plain data: small, and the same for the same plan.

Times are whole nanoseconds, bytes are whole bytes; names and reasons that repeat stand in tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from ckpt_pass.planner.alive import KINDS
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.contents import Contents, layer_of
from ckpt_pass.plans.link_use import LinkUse
from ckpt_pass.plans.numbering import Numbering
from ckpt_pass.plans.parts import Decision
from ckpt_pass.plans.record import CompiledExecution, PlanRecord
from ckpt_pass.plans.timeline import Timeline
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.policy.sites import Bytes
from ckpt_pass.version import __version__

#: Characters of the first word of a summary's line, with the blanks behind it.
_NAME = 13
FATES = ("saved", "offloaded", "recomputed", "unused")
OF_ONE_GRAPH = (
    "What stands here is of this graph alone: what other graphs hold meanwhile is in the peak of "
    "the whole step."
)
NO_CONTENTS = (
    "This plan was read from a file, which holds the curve but not what lies beneath it. Make the "
    "plan again (ckpt_pass.plan) to see what is in memory at each moment."
)


def graph_data(name: str, plan: PlanRecord, alone: bool) -> dict[str, Any]:
    """The memory of one graph over its step.

    Args:
        name: of the graph, for people.
        plan: its plan.
        alone: whether the step has no other graph.
    """
    found = plan.predicted
    plain = found.plain_timeline
    return {
        "name": name,
        "peak": found.peak_bytes,
        "peak_at": found.peak_at,
        "budget": plan.budget_bytes,
        "note": _note(plan, alone),
        "timeline": _timeline(found.timeline),
        "plain": None if plain is None else _timeline(plain),
        "contents": None if found.contents is None else _contents(found.contents),
        "link": None if found.offloaded is None else _link(found.offloaded),
    }


def _note(plan: PlanRecord, alone: bool) -> str:
    step, found = plan.execution, plan.predicted
    notes = [] if alone else [OF_ONE_GRAPH]
    notes += [] if found.contents is not None else [NO_CONTENTS]
    if isinstance(step, CompiledExecution) and step.inductor is not None:
        notes.append(
            "The curve is that of the graph that Inductor was given: "
            f"{format_bytes(found.timeline.peak_bytes)} at most. The peak of the code that "
            f"Inductor makes of it is {format_bytes(found.peak_bytes)}."
        )
    return " ".join(notes)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _timeline(found: Timeline) -> dict[str, Any]:
    moments = [_nanoseconds(moment) for moment in found.begins_s]
    return {
        "forward": found.forward_length,
        "changes": _changes(found.bytes_at),
        "ns": [after - before for before, after in pairwise(moments)],
    }


def _changes(levels: Iterable[int]) -> list[int]:
    """Each level less the one before it."""
    found, before = [], 0
    for level in levels:
        found.append(level - before)
        before = level
    return found


def _contents(found: Contents) -> dict[str, Any]:
    layers = Numbering()
    names = [[layers.number(name.layer), name.words] for name in found.names]
    numbers = {kind: number for number, kind in enumerate(KINDS)}
    lives: list[int] = []
    for life in found.lives:  # one flat list: places as differences, which are short
        length = life.last - life.first
        lives += (life.maker, life.nbytes, life.first, length, numbers[life.kind])
    return {
        "kinds": list(KINDS),
        "layers": layers.things,
        "names": names,
        "ran": list(found.ran),
        "lives": lives,
    }


def _link(found: LinkUse) -> dict[str, Any]:
    return {
        "where": found.where,
        "values": [
            [
                value.name,
                value.nbytes,
                *map(
                    _nanoseconds,
                    (
                        value.transfer.out_start_s,
                        value.transfer.out_end_s,
                        value.transfer.in_start_s,
                        value.transfer.in_end_s,
                        value.transfer.used_s,
                    ),
                ),
            ]
            for value in found.values
        ],
    }


def decisions_data(graphs: Sequence[Sequence[Decision]]) -> dict[str, Any]:
    """The decisions of each graph, as rows of a table."""
    layers, rules, classes = Numbering(), Numbering(), Numbering()
    rows = [
        [
            number,
            layers.number(layer_of(decision.region, decision.site.fqn)),
            str(decision.site),
            classes.number(decision.op_class),
            FATES.index(decision.fate),
            *_bytes(decision.nbytes),
            decision.times,
            _nanoseconds(decision.time_s),
            rules.number(decision.rule),
        ]
        for number, decisions in enumerate(graphs)
        for decision in decisions
    ]
    return {
        "fates": list(FATES),
        "layers": layers.things,
        "rules": rules.things,
        "classes": classes.things,
        "rows": rows,
    }


def _bytes(nbytes: Bytes) -> tuple[int, str]:
    """Bytes as a number, or -1 and the expression where a size was left open."""
    return (nbytes, "") if isinstance(nbytes, int) else (-1, str(nbytes))


def account_data(found: Account) -> dict[str, Any]:
    """The account of a job: what is there in each part of it."""
    return {
        "job": f"{found.job}, on {found.device}",
        "total": found.total_bytes,
        "rows": [list(row) for row in found.rows()],
        "phases": [
            {
                "name": phase.name,
                "parts": [[name, nbytes] for name, nbytes in found.parts(phase)],
                "peak": phase.peak_bytes,
                "planned": phase.above_bytes is not None,
            }
            for phase in found.phases
        ],
    }


def page_data(
    graphs: Sequence[tuple[str, PlanRecord]],
    summary: str,
    warnings: Sequence[str],
    account: Account | None,
    curve: dict[str, Any],
) -> dict[str, Any]:
    """All of a page.

    Args:
        graphs: the plans of the step's graphs, with their names.
        summary: the plan in a few lines: a word, and what is said of it.
        warnings: what a reader would not expect.
        account: of the whole job, if known.
        curve: the trade-off (:func:`ckpt_pass.plans.curve.curve_data`).
    """
    return {
        "facts": list(_facts(summary)),
        "warnings": list(warnings),
        "account": None if account is None else account_data(account),
        "graphs": [graph_data(name, plan, alone=len(graphs) == 1) for name, plan in graphs],
        "decisions": decisions_data([plan.decisions for _, plan in graphs]),
        "curve": curve,
        "footer": f"ckpt_pass {__version__}. Peaks are predictions, times are modelled; bytes are "
        "those above what was allocated when the step began.",
    }


def _facts(summary: str) -> Iterator[list[str]]:
    """The lines of a summary, taken apart; warnings stand elsewhere."""
    for line in summary.partition("\n\n")[0].splitlines():
        name, words = line[:_NAME].strip(), line[_NAME:].strip()
        if name != "WARNING":
            yield [name, words]
