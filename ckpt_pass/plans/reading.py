"""Read plans from JSON, trusting nothing."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ckpt_pass.graph.shapes import Dimension
from ckpt_pass.planner.clock import Transfer
from ckpt_pass.plans.account_file import account_from_data
from ckpt_pass.plans.expressions import expression_from_data
from ckpt_pass.plans.link_use import LinkUse, MovedActivation
from ckpt_pass.plans.old_format import grouped
from ckpt_pass.plans.parts import (
    Decision,
    Replay,
    SavedActivation,
    SavedActivations,
    Signature,
)
from ckpt_pass.plans.reading_asked import CLASSES, POLICIES, read_asked
from ckpt_pass.plans.record import (
    CompiledExecution,
    EagerExecution,
    InductorPeak,
    Predicted,
    Proven,
)
from ckpt_pass.plans.schema import PlanFileError, Reader
from ckpt_pass.plans.timeline import Timeline
from ckpt_pass.plans.writing import FORMAT, SEVERAL, checksum
from ckpt_pass.policy.sites import CallSite
from ckpt_pass.regions.keeps import Moves
from ckpt_pass.version import __version__

#: A plan for a graph of 100,000 ops takes some 10 MB.
MOST_CHARACTERS = 64_000_000

_FATES = {fate: fate for fate in ("saved", "offloaded", "sharded", "recomputed", "unused")}
_STATUSES = {status: status for status in ("optimal", "feasible", "time limit")}
_MODES = {mode: mode for mode in ("compiled", "eager")}
_KINDS = {
    kind: kind
    for kind in (
        "activation",
        "offloaded",
        "sharded",
        "output",
        "random state",
        "input",
        "parameter",
    )
}


def read_plan_text(path: Path) -> str:
    """The text of a plan file.

    Raises:
        PlanFileError: it is too large, or no text.
        OSError: it cannot be read.
    """
    nbytes = path.stat().st_size
    if nbytes > MOST_CHARACTERS:
        raise PlanFileError(str(path), f"a file of at most {MOST_CHARACTERS} bytes", nbytes)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanFileError(str(path), "a text in UTF-8", error.reason) from error


def plan_from_json(text: str) -> dict[str, Any]:
    """The fields of the plan that a JSON text describes.

    Raises:
        PlanFileError: the text is no plan, or was changed after it was written.
    """
    return _plan_fields(data_of(text))


def data_of(text: str) -> Any:
    """What a JSON text says.

    Raises:
        PlanFileError: it is no JSON.
    """
    if len(text) > MOST_CHARACTERS:
        raise PlanFileError("the file", f"at most {MOST_CHARACTERS} characters", len(text))
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PlanFileError("the file", f"JSON ({error})", text[:40]) from error


def _plan_fields(data: Any, where: str = "") -> dict[str, Any]:
    reader = checked(data, where, (1, FORMAT))
    if isinstance(data, dict) and data.get("mode") == SEVERAL:
        raise PlanFileError("mode", "compiled or eager (StepPlan.load reads this one)", SEVERAL)
    return _plan(Reader(grouped(data)) if data["format"] == 1 else reader)


def checked(data: Any, where: str, formats: tuple[int, ...]) -> Reader:
    """The data of a file, of a known format and with the checksum that belongs to it.

    Raises:
        PlanFileError: it is not.
    """
    reader = Reader(data, where)
    found = reader["format"].value
    if isinstance(found, bool) or found not in formats:
        older = ", or 1" if 1 in formats else ""
        raise PlanFileError("format", f"{FORMAT}, the one of ckpt_pass {__version__}{older}", found)
    if reader["checksum"].value != checksum(data):
        raise PlanFileError("checksum", "that of the rest of the file", reader["checksum"].value)
    return reader


def is_of_step(text: str) -> bool:
    """Whether a JSON text says that it is a plan of several graphs."""
    data = data_of(text)
    return isinstance(data, dict) and data.get("mode") == SEVERAL


def step_from_json(text: str) -> dict[str, Any]:
    """The fields of the plan of several graphs that a JSON text describes; each part's as well.

    Raises:
        PlanFileError: the text is no such plan, or was changed after it was written.
    """
    reader = checked(data_of(text), "", (FORMAT,))
    reader["mode"].one_of({SEVERAL: SEVERAL})
    return dict(
        parts=[_plan_fields(part.value, part.where) for part in reader["parts"].items()],
        asked=read_asked(reader["asked"]),
        peak_bytes=reader["peak_bytes"].whole(),
        peak_at=reader["peak_at"].text(),
        plain_peak_bytes=reader["plain_peak_bytes"].whole(),
        outside_bytes=reader["outside_bytes"].whole(),
        breaks=reader["breaks"].texts(),
        account=reader.get("account").maybe(account_from_data),
    )


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of a plan")


def _plan(reader: Reader) -> dict[str, Any]:
    decisions = _decisions(reader)
    sites = [decision.site for decision in decisions]
    sites += [_site(item) for item in reader["merged_sites"].items()]
    eager = reader["mode"].one_of(_MODES) == "eager"
    execution = reader["execution"]
    return dict(
        fingerprint=reader["fingerprint"].text(),
        decisions=decisions,
        saved=SavedActivations(_saved(reader)),
        regions=reader["regions"].texts(),
        sites=frozenset(sites),
        asked=read_asked(reader["asked"]),
        predicted=_predicted(reader),
        proven=_proven(reader["proven"]),
        execution=_eager_execution(execution) if eager else _compiled_execution(execution),
    )


def _predicted(reader: Reader) -> Predicted:
    found = reader["predicted"]
    return Predicted(
        peak_bytes=found["peak_bytes"].whole(),
        peak_at=found["peak_at"].text(),
        output_bytes=expression_from_data(found["output_bytes"]),
        recompute_flops=found["recompute_flops"].whole(),
        step_flops=found["step_flops"].whole(),
        recompute_time_s=found["recompute_time_s"].number(),
        step_time_s=found["step_time_s"].number(),
        timeline=_timeline(reader["timeline"]),
        plain_timeline=reader["plain_timeline"].maybe(_timeline),
        measured_workspaces=found["measured_workspaces"].whole(),
        offloaded=found.get("offloaded").maybe(_offloaded),
        account=found.get("account").maybe(account_from_data),
        gathered_bytes=found.get("gathered_bytes").maybe(Reader.whole) or 0,
        gather_s=found.get("gather_s").maybe(Reader.number) or 0.0,
        beside_gradients_bytes=found.get("beside_gradients_bytes").maybe(Reader.whole) or 0,
    )


def _offloaded(reader: Reader) -> LinkUse:
    times = {
        field.name: reader[field.name].number()
        for field in fields(LinkUse)
        if field.name.endswith("_s")
    }
    return LinkUse(
        where=reader["where"].text(),
        host_peak_bytes=reader["host_peak_bytes"].whole(),
        values=tuple(_moved(row) for row in reader["values"].items()),
        **times,
    )


def _moved(reader: Reader) -> MovedActivation:
    name, again_s, storage, nbytes, *times = reader.items(2 + len(fields(Transfer)))
    way = Transfer(storage.whole(), nbytes.whole(), *(time.number() for time in times))
    return MovedActivation(name.text(), again_s.number(), way)


def _proven(reader: Reader) -> Proven:
    return Proven(
        solver=reader["solver"].text(),
        status=reader["status"].one_of(_STATUSES),
        lower_bound_s=reader["lower_bound_s"].number(),
    )


def _compiled_execution(reader: Reader) -> CompiledExecution:
    return CompiledExecution(
        signature=_signature(reader["signature"]),
        replay=_replay(reader["replay"]),
        peak_expression=expression_from_data(reader["peak_expression"]),
        dimensions=tuple(_dimension(item) for item in reader["dimensions"].items()),
        graph_break=reader["graph_break"].text(),
        inductor=reader["inductor"].maybe(_inductor_peak),
    )


def _inductor_peak(reader: Reader) -> InductorPeak:
    peak_bytes, replans, *rest = reader.items()[:3]
    return InductorPeak(peak_bytes.whole(), replans.whole(), any(one.flag() for one in rest))


def _eager_execution(reader: Reader) -> EagerExecution:
    moves = reader.get("moves").maybe(lambda found: tuple(map(_module_moves, found.items())))
    return EagerExecution(
        _signature(reader["signature"]),
        frozenset(reader["random_regions"].texts()),
        moves or (),
        frozenset(reader.get("sharded_regions").maybe(Reader.texts) or ()),
    )


def _module_moves(reader: Reader) -> tuple[str, Moves]:
    name, numbers, ahead, arguments = reader.items(4)
    chosen = frozenset(number.whole() for number in numbers.items())
    return name.text(), Moves(chosen, ahead.whole(), arguments.flag())


def _site(reader: Reader) -> CallSite:
    fqn, call, op, occurrence = reader.items(4)
    return CallSite(fqn.text(), op.text(), occurrence.whole(), call.whole())


def _decisions(reader: Reader) -> tuple[Decision, ...]:
    rules = [
        (name.one_of(POLICIES), str(op_class.one_of(CLASSES)), rule.text())
        for name, op_class, rule in (item.items(3) for item in reader["rules"].items())
    ]
    times = [item.number() for item in reader["times_s"].items()]
    found = []
    for group in reader["decisions"].items():
        fqn, call, region, rows = group.items(4)
        for row in rows.items():
            op, occurrence, fate, rule, nbytes, runs, time_s = row.items(7)
            tag, op_class, words = rule.pick(rules)
            found.append(
                Decision(
                    site=CallSite(fqn.text(), op.text(), occurrence.whole(), call.whole()),
                    op_class=op_class,
                    nbytes=expression_from_data(nbytes),
                    decision=tag,
                    rule=words,
                    fate=fate.one_of(_FATES),
                    region=region.maybe(Reader.text),
                    times=runs.whole(),
                    time_s=time_s.pick(times),
                )
            )
    return tuple(found)


def _saved(reader: Reader) -> list[SavedActivation]:
    words = [item for item in reader["words"].items()]
    found = []
    for row in reader["saved"].items():
        kind, place, shape, dtype, nbytes, provenance, reason = row.items(7)
        site = place.maybe(_site)
        said = provenance.maybe(Reader.text)
        found.append(
            SavedActivation(
                kind=kind.pick(words).one_of(_KINDS),
                site=site,
                shape=tuple(expression_from_data(size) for size in shape.items()),
                dtype=dtype.pick(words).text(),
                nbytes=expression_from_data(nbytes),
                provenance=f"output of {site}" if said is None else said,
                reason=reason.pick(words).text(),
            )
        )
    return found


def _signature(reader: Reader) -> Signature:
    return Signature(
        torch_version=reader["torch"].text(),
        arguments=reader["arguments"].texts(),
        parameters=reader["parameters"].texts(),
        library_version=reader["ckpt_pass"].text(),
    )


def _replay(reader: Reader) -> Replay:
    labels = list(reader["labels"].texts())
    saved = tuple(item.pick(labels) for item in reader["saved"].items())
    drops, merged = _pairs(reader["drops"], labels), _pairs(reader["merged"], labels)
    moves = reader.get("moves").maybe(lambda found: _moves(found, labels))
    return Replay(saved, drops, merged, moves or ())


def _moves(reader: Reader, labels: list[str]) -> tuple[tuple[str, str, str, int], ...]:
    found = []
    for row in reader.items():
        value, released, fetched, run = row.items(4)
        names = (value.pick(labels), released.pick(labels), fetched.pick(labels))
        found.append((*names, run.whole()))
    return tuple(found)


def _pairs(reader: Reader, labels: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = (item.items(2) for item in reader.items())
    return tuple((one.pick(labels), other.pick(labels)) for one, other in pairs)


def _timeline(reader: Reader) -> Timeline:
    changes = [item.whole(-(1 << 62)) for item in reader["changes"].items()]
    seconds = [item.number() for item in reader["seconds"].items()]
    at, total = [], 0
    for item in reader["bytes"].items():
        total += item.pick(changes)
        at.append(total)
    moments = tuple(item.pick(seconds) for item in reader["times"].items())
    if len(moments) != len(at):
        raise PlanFileError(reader.where, "as many times as bytes", (len(moments), len(at)))
    return Timeline(tuple(at), reader["forward_length"].whole(0, len(at)), moments)


def _dimension(reader: Reader) -> Dimension:
    symbol, places, traced, least, most = reader.items(5)
    return Dimension(
        symbol.text(), places.texts(), traced.whole(), least.whole(), most.maybe(Reader.whole)
    )
