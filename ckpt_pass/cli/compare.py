"""The command ``ckpt-pass compare``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ckpt_pass.cli.factory import build
from ckpt_pass.cli.parts import (
    console_for_tables,
    errors_as_exit_codes,
    file_option,
    offload_option,
    offload_to,
    progress_on_stderr,
    target_argument,
)
from ckpt_pass.modules.layers.find import NoLayersError
from ckpt_pass.modules.layers.layer_profile import LayerProfile
from ckpt_pass.modules.layers.profiling import profile_layers
from ckpt_pass.report.page import write_report
from ckpt_pass.report.strategy_plots import save_plots
from ckpt_pass.report.strategy_table import Comparison, comparison_table
from ckpt_pass.tools.strategies import DEFAULT_STRATEGIES, ROUNDS, as_strategy, compare_strategies

#: Of a table that goes to a file or a pipe: every column fits.
WIDTH = 150


def compare_command() -> Callable[..., None]:
    """The command, for typer."""
    import typer

    strategy_option = typer.Option(
        None,
        "--strategy",
        "-s",
        help="A placement (all), a placement and a policy (all:save-matmul), or budget=0.5; may be "
        f"given several times. By default: {', '.join(DEFAULT_STRATEGIES)}.",
    )
    rounds_option = typer.Option(ROUNDS, min=1, help="Timings of each strategy.")
    plots_option = typer.Option(None, "--plots", help="Folder for the pictures.")
    html_option = file_option("Write one page with everything here.", "--html")
    json_option = file_option("Write the rows here.", "--json")

    def compare(
        target: str = target_argument(),
        strategies: list[str] | None = strategy_option,
        rounds: int = rounds_option,
        offload: str | None = offload_option("Also plan each budget with values that may move"),
        plots: Path | None = plots_option,
        html: Path | None = html_option,
        json_: Path | None = json_option,
    ) -> None:
        """Run a training step under several strategies: peak, recomputation, time, equality."""
        with errors_as_exit_codes():
            chosen = [as_strategy(name) for name in strategies or DEFAULT_STRATEGIES]
            model, inputs = build(target)
            with progress_on_stderr() as progress:
                found = compare_strategies(
                    model,
                    *inputs,
                    strategies=chosen,
                    rounds=rounds,
                    offload=offload_to(offload),
                    progress=progress,
                )
                profiles: tuple[LayerProfile, ...] = ()
                if plots is not None or html is not None:
                    # A model without layers has no picture of them.
                    with contextlib.suppress(NoLayersError):
                        profiles = profile_layers(model, *inputs)
            _show(found, profiles, plots, html, json_)

    return compare


def _show(
    found: Comparison,
    profiles: tuple[LayerProfile, ...],
    plots: Path | None,
    html: Path | None,
    json_: Path | None,
) -> None:
    console = console_for_tables(WIDTH)
    console.print(comparison_table(found))
    written: list[Path] = []
    if json_ is not None:
        json_.write_text(json.dumps(asdict(found), indent=2) + "\n")
        written.append(json_)
    if plots is not None:
        written += save_plots(found, plots, profiles)
    if html is not None:
        written.append(write_report(found, html, profiles))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
