"""Plan files of format 1, whose fields stood side by side, in the groups of the newer format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GROUPS = {
    "predicted": (
        "peak_bytes", "peak_at", "output_bytes", "recompute_flops", "step_flops",
        "recompute_time_s", "step_time_s", "measured_workspaces",
    ),
    "proven": ("solver", "status", "lower_bound_s"),
}  # fmt: skip
_EXECUTIONS = {
    "compiled": ("signature", "peak_expression", "dimensions", "graph_break", "replay"),
    "eager": ("signature", "random_regions"),
}


def grouped(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a plan of format 1, arranged as format 2.

    Nothing is checked here: what is missing stays missing, and its reader says so.
    """
    found = dict(data)
    for name, keys in _GROUPS.items():
        found[name] = _taken(data, keys)
    mode = data.get("mode")
    kind = mode if isinstance(mode, str) and mode in _EXECUTIONS else "compiled"
    found["execution"] = _taken(data, _EXECUTIONS[kind])
    if kind == "compiled" and "inner_peak_bytes" in data:
        inner = data["inner_peak_bytes"]
        found["execution"]["inductor"] = None if inner is None else [inner, data.get("replans")]
    if isinstance(data.get("recipe"), dict):
        asked = {"words": data.get("policy"), "budget_bytes": data.get("budget_bytes")}
        found["asked"] = {**data["recipe"], **asked}
    return found


def _taken(data: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: data[key] for key in keys if key in data}
