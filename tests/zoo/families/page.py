"""The page in the documentation: what came of every family in every way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.zoo.families import Family, ways

#: What the table does not say, written by hand.
NOTES = Path(__file__).with_name("notes.md")

HEAD = """\
# A zoo of families

What became of {count} of the {all} families of models that the zoo has: tiny sizes, random weights,
the defaults of their libraries (dropout on, caches on, layers dropped by chance). Each was trained
for one step in six ways on the CPU, on one thread, and compared with the plain step. The page is
made by

    python -m tests.zoo.families --page docs/understand/zoo.md

with torch {torch}; `pip install -e '.[zoo]'` brings the libraries that other tests do not need.

| way | what is done |
|---|---|
| half | `make_backend(budget=0.5, inner="aot_eager")`, or the least that it names |
| least | the least that the refusal of 1 byte names |
| ahead | `plan(budget=0.5)` on one model, `make_backend(plan=plan)` on another one |
| eager | `plan(mode="eager", budget=0.5)`, or the least; applied to another model |
| all, sqrt | `apply(model, "all")`, `apply(model, "sqrt-segments")` |

| result | means |
|---|---|
| *n* % | right, see below; *n*: the measured peak, of the plain one |
| part, *n* % | right, but the budget covers a part of the step, which a warning says |
| *an error* | refused, by this error of ours; the reasons are below |
| torch | torch's own `aot_eager` does not compile it either |
| **over**, **off** | right gradients, but a peak above the budget, or not the predicted one |
| **wrong** | other gradients |
| **error**, **crash** | an error that is not ours; the process died or hung |
| nothing | not run |

Right means: loss, gradients and buffers are the plain step's to the last bit (compiled: those of
torch's own `aot_eager`, or no further from the plain step's than these), the measured peak is
within the budget, and is the predicted one (compiled to the byte, eager within 1 %). The peak of so
small a step is mostly gradients and single activations; what counts here is that it is met.

"""


def read(lines: Iterable[str]) -> list[ways.Outcome]:
    """Outcomes from lines of JSON; of one family and way the last one counts."""
    found: dict[tuple[str, str], ways.Outcome] = {}
    for line in lines:
        if line.strip():
            outcome = ways.Outcome(**json.loads(line))
            found[outcome.family, outcome.way] = outcome
    return list(found.values())


def page(outcomes: Sequence[ways.Outcome], families: Iterable[Family], version: str) -> str:
    """The page, as Markdown."""
    of: dict[str, dict[str, ways.Outcome]] = {}
    for outcome in outcomes:
        of.setdefault(outcome.family, {})[outcome.way] = outcome
    known = list(families)
    tried = [family for family in known if family.name in of]
    text = HEAD.format(count=len(tried), all=len(known), torch=version)
    text += _summary(outcomes)
    text += "\n" + NOTES.read_text()
    text += "\n## Families\n\n| family | kind | " + " | ".join(_short(way) for way in ways.WAYS)
    text += " |\n|---|---|" + "---|" * len(ways.WAYS) + "\n"
    for family in tried:
        cells = [_cell(of[family.name].get(way)) for way in ways.WAYS]
        text += f"| {family.name} | {family.kind} | {' | '.join(cells)} |\n"
    return text + _reasons(outcomes)


def _short(way: str) -> str:
    return way.partition("-")[0]


def _cell(outcome: ways.Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.verdict == ways.REFUSED:
        return outcome.detail.partition(":")[0]
    if outcome.verdict == ways.TORCH:
        return "torch"
    if outcome.verdict not in (ways.RIGHT, ways.UNCOVERED):
        return f"**{outcome.verdict}**"
    share = ""
    if outcome.peak_bytes is not None and outcome.plain_bytes:
        share = f"{100 * outcome.peak_bytes / outcome.plain_bytes:.0f} %"
    return share if not outcome.detail else f"part, {share}"


def _summary(outcomes: Sequence[ways.Outcome]) -> str:
    verdicts = (ways.RIGHT, ways.UNCOVERED, ways.REFUSED, ways.TORCH, ways.OFF, ways.OVER)
    verdicts += (ways.WRONG, ways.ERROR, ways.CRASH)
    counts = Counter((o.way, _counted(o)) for o in outcomes)
    used = [v for v in verdicts if any(counts[way, v] for way in ways.WAYS)]
    names = [{ways.UNCOVERED: "part", ways.TORCH: "torch"}.get(v, v) for v in used]
    text = f"## Counts\n\n| way | {' | '.join(names)} |\n|---|{'---:|' * len(used)}\n"
    for way in ways.WAYS:
        text += f"| {_short(way)} | {' | '.join(str(counts[way, v]) for v in used)} |\n"
    return text


def _counted(outcome: ways.Outcome) -> str:
    part = outcome.verdict == ways.RIGHT and outcome.detail
    return ways.UNCOVERED if part else outcome.verdict


def _reasons(outcomes: Sequence[ways.Outcome]) -> str:
    good = (ways.RIGHT, ways.UNCOVERED)
    rows: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.verdict not in good:
            rows.setdefault((outcome.family, _clean(outcome.detail)), []).append(
                _short(outcome.way)
            )
    text = "\n## Refusals and failures\n\n| family | ways | what was said |\n|---|---|---|\n"
    for (family, words), found in rows.items():
        text += f"| {family} | {', '.join(found)} | {words} |\n"
    return text


def _clean(detail: str) -> str:
    """What was said, without folders of a machine, in one cell."""
    words = [_file(word) for word in detail.split()]
    text = " ".join(words).replace("|", "\\|").replace("<", "\\<").replace("`", "'")
    return text if len(text) < 300 else text[:300].rsplit(" ", 1)[0] + " ..."


def _file(word: str) -> str:
    return Path(word).name if word.count("/") > 2 else word


def as_line(outcome: ways.Outcome) -> str:
    """One line of JSON."""
    fields: dict[str, Any] = outcome.as_dict()
    return json.dumps(fields)
