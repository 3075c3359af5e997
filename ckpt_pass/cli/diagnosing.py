"""The command ``ckpt-pass doctor``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from ckpt_pass.cli.factory import build
from ckpt_pass.cli.job import (
    accumulate_option,
    check_job,
    job_options,
    optimizer_option,
)
from ckpt_pass.cli.parts import (
    device_option,
    eager_option,
    errors_as_exit_codes,
    file_option,
    inner_option,
    mode_of,
    offload_option,
    offload_to,
    target_argument,
)
from ckpt_pass.tools.diagnosing import doctor

#: The exit code where the job does not fit: no error, and no success.
DOES_NOT_FIT = 3


def doctor_command() -> Callable[..., None]:
    """The command, for typer."""
    import typer

    total_option = typer.Option(
        "device", help="Memory of the whole training job: 24GiB, bytes, or what the device has."
    )
    json_option = file_option("Write the diagnosis here.", "--json")

    def doctor_(
        target: str = target_argument(),
        total: str = total_option,
        optimizer: str | None = optimizer_option(),
        accumulate: int = accumulate_option(),
        device: str | None = device_option(),
        offload: str | None = offload_option(),
        eager: bool = eager_option(),
        inner: str = inner_option(),
        json_: Path | None = json_option,
    ) -> None:
        """Say what a training job takes, whether it fits, and if not, what would make it fit.

        The step is traced, not run. The exit code is 3 where the job does not fit.
        """
        with errors_as_exit_codes():
            check_job(total, optimizer, device)
            model, inputs = build(target)
            found = doctor(
                model,
                *inputs,
                **job_options(model, total, optimizer, accumulate),
                device=device,
                offload=offload_to(offload),
                mode=mode_of(eager),
                inner=inner,
            )
            typer.echo(str(found))
            if json_ is not None:
                json_.write_text(json.dumps(found.to_data(), indent=2) + "\n")
                typer.echo(f"\nwrote {json_}")
            if not found.fits:
                sys.exit(DOES_NOT_FIT)

    return doctor_
