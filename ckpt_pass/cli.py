"""The command ``ckpt-pass``: it calls the library and prints, and decides nothing.

Exit codes: 0; 1 for an error of this library; 2 for a wrong command line or factory.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ckpt_pass._demo_model import ModelConfig
from ckpt_pass.budget import check_budget, parse_budget
from ckpt_pass.demo import DEFAULTS, DemoSettings, run_demo
from ckpt_pass.errors import CkptPassError
from ckpt_pass.explain import plan
from ckpt_pass.factory import FactoryError, build
from ckpt_pass.policies import DEFAULT_POLICY, POLICIES, as_policy
from ckpt_pass.policy import Rule
from ckpt_pass.report import missing_extra

if TYPE_CHECKING:
    import typer


def main() -> NoReturn:
    """Run the command line and exit."""
    with _errors_as_exit_codes():
        app = make_app()
    app(prog_name="ckpt-pass")
    sys.exit(0)


def make_app() -> typer.Typer:
    """Build the commands.

    Raises:
        MissingExtraError: typer or rich is not installed.
    """
    with missing_extra("cli"):
        import rich  # noqa: F401  # the demo needs it: better said now than after the training
        import typer

    app = typer.Typer(
        help="Which activations a training step keeps, and which it recomputes.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("explain")(_explain_command())
    app.command("policies")(_policies)
    app.command("demo")(_demo_command())
    return app


@contextlib.contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    """Print this library's errors as one message instead of a traceback."""
    try:
        yield
    except CkptPassError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, FactoryError) else 1)


def _explain_command() -> Callable[..., None]:
    import typer

    policy_names = ", ".join(POLICIES)
    target_argument = typer.Argument(
        metavar="FACTORY",
        help="path/to/file.py:name or package.module:name, a function without arguments that "
        "returns (model, inputs).",
    )
    policy_option = typer.Option(
        None, help=f"One of {policy_names}. {DEFAULT_POLICY} unless there is a budget."
    )
    budget_option = typer.Option(
        None,
        help="Peak to stay within: 6GiB, a number of bytes, a fraction such as 0.5 of the peak "
        "without recomputation, or 'device'.",
    )
    summary_option = typer.Option(False, "--summary", help="Only the first lines.")

    def explain(
        target: str = target_argument,
        policy: str | None = policy_option,
        budget: str | None = budget_option,
        summary: bool = summary_option,
    ) -> None:
        """Show what a policy or a budget saves and recomputes in one training step, and why.

        The step is traced, not run.
        """
        with _errors_as_exit_codes():
            # What is misspelt is said before the model is built.
            as_policy(policy or DEFAULT_POLICY)
            amount = None if budget is None else check_budget(parse_budget(budget))
            model, inputs = build(target)
            made = plan(model, *inputs, policy=policy, budget=amount)
            typer.echo(made.summary() if summary else str(made))

    return explain


def _policies() -> None:
    """List the named policies; the first rule that matches decides."""
    for name, policy in POLICIES.items():
        print(name + (" (the default)" if name == DEFAULT_POLICY else ""))
        for rule in policy.policies:
            # The conditions themselves say more here than a label made for long listings.
            print(f"    {replace(rule, label='') if isinstance(rule, Rule) else rule}")


def _demo_command() -> Callable[..., None]:
    import typer

    steps_option = typer.Option(DEFAULTS.steps, min=1, help="Training steps of each variant.")
    out_option = typer.Option(DEFAULTS.out, help="Folder for the plots.")
    inner_option = typer.Option(
        DEFAULTS.inner, help="What compiles forward and backward: inductor or aot_eager."
    )
    threads_option = typer.Option(DEFAULTS.threads, min=1, help="Threads that torch computes on.")
    layers_option = typer.Option(DEFAULTS.model.layers, min=1, help="Layers of the model.")
    dim_option = typer.Option(DEFAULTS.model.dim, min=8, help="Width of the model.")
    length_option = typer.Option(DEFAULTS.model.length, min=1, help="Characters of a sequence.")
    batch_option = typer.Option(DEFAULTS.batch, min=1, help="Sequences of a step.")

    def demo(
        steps: int = steps_option,
        out: Path = out_option,
        inner: str = inner_option,
        threads: int = threads_option,
        layers: int = layers_option,
        dim: int = dim_option,
        length: int = length_option,
        batch: int = batch_option,
    ) -> None:
        """Train a small transformer with and without recomputation; measure and compare."""
        with _errors_as_exit_codes():
            model = ModelConfig(layers, dim, length)
            run_demo(DemoSettings(steps, inner, threads, model, batch, out))

    return demo
