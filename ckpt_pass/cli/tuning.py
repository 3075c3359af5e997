"""The command ``ckpt-pass tune``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ckpt_pass.cli.factory import build
from ckpt_pass.cli.job import DEFAULT_OPTIMIZER, check_job, optimizer_option
from ckpt_pass.cli.parts import (
    console_for_tables,
    device_option,
    errors_as_exit_codes,
    file_option,
    inner_option,
    offload_option,
    offload_to,
    progress_on_stderr,
    target_argument,
)
from ckpt_pass.job.named import optimizer_named
from ckpt_pass.plans.budget import parse_budget
from ckpt_pass.report.tunings import Tuned, tuned_table
from ckpt_pass.tools.ahead import MODES
from ckpt_pass.tools.axis import NAMES as DIMENSIONS
from ckpt_pass.tools.axis import Axis
from ckpt_pass.tools.candidates import MakeBatch
from ckpt_pass.tools.tuning import ROUNDS, tune

#: Of a table that goes to a file or a pipe: every column fits.
_WIDTH = 120


def tune_command() -> Callable[..., None]:
    """The command, for typer."""
    import typer

    total_option = typer.Option(..., help="Memory of the whole training job: 24GiB, or bytes.")
    global_option = typer.Option(256, help="Samples of an optimizer's step.")
    micro_option = typer.Option(
        None, "--microbatch", help="Only this one; may be given several times."
    )
    mode_option = typer.Option(
        None, "--mode", help=f"{' or '.join(MODES)}; may be given several times. [{MODES[0]}]"
    )
    dim_option = typer.Option(DIMENSIONS[0], help="The dimension that holds the samples.")
    measure_option = typer.Option(None, min=0, help="Candidates that are measured at the most.")
    rounds_option = typer.Option(ROUNDS, min=1, help="Timings of each that is measured.")
    png_option = file_option("Draw the curve here.")
    json_option = file_option("Write the rows here.", "--json")
    save_option = file_option("Write the plan of the choice here, as JSON.")

    def tune_(
        target: str = target_argument(),
        total: str = total_option,
        optimizer: str | None = optimizer_option(),
        global_batch: int = global_option,
        microbatches: list[int] | None = micro_option,
        modes: list[str] | None = mode_option,
        inner: str = inner_option(),
        offload: str | None = offload_option(),
        device: str | None = device_option(),
        dim: str = dim_option,
        measure: int | None = measure_option,
        rounds: int = rounds_option,
        png: Path | None = png_option,
        json_: Path | None = json_option,
        save: Path | None = save_option,
    ) -> None:
        """Find the microbatch and the plan that train the most samples per second within a total.

        The factory's inputs are one batch of any size: their samples are repeated, or cut.
        """
        with errors_as_exit_codes():
            check_job(total, optimizer, device)
            model, inputs = build(target)
            amount: Any = parse_budget(total)
            with progress_on_stderr() as progress:
                found = tune(
                    model,
                    _batches_of(inputs, dim),
                    total=amount,
                    optimizer=optimizer_named(optimizer or DEFAULT_OPTIMIZER, model),
                    global_batch=global_batch,
                    microbatches=microbatches or None,
                    mode=modes or MODES[0],
                    inner=inner,
                    offload=offload_to(offload),
                    device=device,
                    measure=measure,
                    rounds=rounds,
                    progress=progress,
                )
            _show(found, png, json_, save)

    return tune_


def _batches_of(inputs: tuple[Any, ...], dim: str) -> MakeBatch:
    """Batches of any size, made of the samples of one."""
    axis = Axis.of(dict(enumerate(inputs)), dim)
    return lambda size: axis.repeated(size)[0]


def _show(found: Tuned, png: Path | None, json_: Path | None, save: Path | None) -> None:
    console = console_for_tables(_WIDTH)
    console.print(tuned_table(found))
    for line in found.lines():
        console.print(line, highlight=False)
    written = [found.plot(png)] if png is not None else []
    if json_ is not None:
        json_.write_text(json.dumps(_as_data(found), indent=2) + "\n")
        written.append(json_)
    if save is not None:
        written.append(found.plan.save(save))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _as_data(found: Tuned) -> dict[str, Any]:
    """What was found, without the plans."""
    data = {one.name: getattr(found, one.name) for one in fields(found) if one.name != "rows"}
    data["rows"] = [
        {one.name: getattr(row, one.name) for one in fields(row) if one.name != "plan"}
        for row in found.rows
    ]
    return data
