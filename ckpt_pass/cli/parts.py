"""What the commands share: errors as exit codes, the factory's argument, progress, tables."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_pass._errors import CkptPassError
from ckpt_pass.cli.factory import FactoryError
from ckpt_pass.demo.training import PLAIN_WIDTH
from ckpt_pass.drawing.memory import missing_extra
from ckpt_pass.offloading.options import TARGETS, Offload
from ckpt_pass.planner.devices import DEVICES
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


def file_option(words: str, *names: str) -> Any:
    """A file to write, in a folder that is there: said before anything is planned or run."""
    import typer

    def checked(path: Path | None) -> Path | None:
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {str(path.parent)!r}")
        if path is not None and path.is_dir():
            raise typer.BadParameter(f"{str(path)!r} is a folder, expected a file to write")
        return path

    return typer.Option(None, *names, help=words, callback=checked)


def offload_option(words: str = "Values may move") -> Any:
    """``--offload``."""
    import typer

    return typer.Option(None, "--offload", help=f"{words}: {' or '.join(TARGETS)}.")


def offload_to(where: str | None) -> Offload | None:
    """What ``--offload`` means."""
    return None if where is None else Offload(to=where)


def eager_option() -> Any:
    """``--eager``."""
    import typer

    return typer.Option(False, "--eager", help="For a step without torch.compile.")


def mode_of(eager: bool) -> str:
    """What ``--eager`` means."""
    return "eager" if eager else "compiled"


def inner_option(default: str = "aot_eager") -> Any:
    """``--inner``."""
    import typer

    return typer.Option(default, "--inner", help="What compiles a step: aot_eager or inductor.")


def device_option() -> Any:
    """``--device``."""
    import typer

    return typer.Option(None, help=f"On paper: {', '.join(DEVICES)}.")


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
