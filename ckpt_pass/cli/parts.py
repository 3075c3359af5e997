"""What the commands share: errors as exit codes, the factory's argument, progress, tables."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ckpt_pass._errors import CkptPassError
from ckpt_pass.cli.factory import FactoryError
from ckpt_pass.demo.training import PLAIN_WIDTH
from ckpt_pass.drawing.memory import missing_extra
from ckpt_pass.offloading.options import TARGETS, Offload
from ckpt_pass.tools.users_step import Progress

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """Print this library's errors as one message instead of a traceback."""
    try:
        yield
    except CkptPassError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, FactoryError) else 1)


def target_argument() -> Any:
    """The argument that names a model."""
    import typer

    return typer.Argument(
        metavar="FACTORY",
        help="path/to/file.py:name or package.module:name, a function without arguments that "
        "returns (model, inputs).",
    )


def offload_option(help_: str = "Values may move") -> Any:
    """The option that lets values move."""
    import typer

    return typer.Option(None, "--offload", help=f"{help_}: {' or '.join(TARGETS)}.")


def inner_option(default: str = "aot_eager") -> Any:
    """The option that names the compiler."""
    import typer

    return typer.Option(default, "--inner", help="What compiles it: aot_eager or inductor.")


def offload_of(target: str | None) -> Offload | None:
    """What ``--offload`` asks for."""
    return None if target is None else Offload(to=target)


@contextlib.contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    """A progress bar that leaves nothing behind; nothing where stderr is no terminal."""
    with missing_extra("cli"):
        from rich.console import Console
        from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def console_for_tables(narrowest: int = PLAIN_WIDTH) -> Console:
    """Standard output; in a pipe, whose width nobody knows, of a fixed one."""
    with missing_extra("cli"):
        from rich.console import Console
    console = Console()
    return console if console.is_terminal else Console(width=narrowest)
