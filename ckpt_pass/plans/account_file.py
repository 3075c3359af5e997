"""The account of a job in a plan file."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ckpt_pass.plans.account import Account, JobPhase
from ckpt_pass.plans.schema import Reader


def account_to_data(account: Account) -> dict[str, Any]:
    """An account as data."""
    found = {field.name: getattr(account, field.name) for field in fields(Account)}
    rows = [[phase.name, phase.standing_bytes, phase.above_bytes] for phase in account.phases]
    return {**found, "phases": rows}


def account_from_data(reader: Reader) -> Account:
    """The account that data describe.

    Raises:
        PlanFileError: they describe none.
    """
    return Account(
        device=reader["device"].text(),
        job=reader["job"].text(),
        parameters_bytes=reader["parameters_bytes"].whole(),
        buffers_bytes=reader["buffers_bytes"].whole(),
        inputs_bytes=reader["inputs_bytes"].whole(),
        gradients_bytes=reader["gradients_bytes"].whole(),
        states_bytes=reader["states_bytes"].whole(),
        states_now_bytes=reader["states_now_bytes"].whole(),
        outputs_bytes=reader["outputs_bytes"].whole(),
        phases=tuple(map(_phase, reader["phases"].items())),
        total_bytes=reader["total_bytes"].maybe(Reader.whole),
        workspaces_bytes=reader.get("workspaces_bytes").maybe(Reader.whole) or 0,
    )


def _phase(reader: Reader) -> JobPhase:
    name, standing, above = reader.items(3)
    return JobPhase(name.text(), standing.whole(), above.maybe(Reader.whole))
