"""The command ``ckpt-pass``: it calls the library and prints, and decides nothing.

Exit codes: 0; 1 for an error of this library, or a plan's promise that does not hold; 2 for a wrong
command line or factory; 3 where the job does not fit that ``doctor`` is asked about.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ckpt_pass.cli.compare import compare_command
from ckpt_pass.cli.diagnosing import doctor_command
from ckpt_pass.cli.factory import build
from ckpt_pass.cli.job import (
    accumulate_option,
    check_job,
    job_options,
    optimizer_option,
    total_option,
)
from ckpt_pass.cli.parts import (
    console_for_tables,
    device_option,
    eager_option,
    errors_as_exit_codes,
    file_option,
    inner_option,
    mode_of,
    offload_option,
    offload_to,
    progress_on_stderr,
    target_argument,
)
from ckpt_pass.cli.tuning import tune_command
from ckpt_pass.demo.model import ModelConfig
from ckpt_pass.demo.training import DEFAULTS, DemoSettings, run_demo
from ckpt_pass.drawing.memory import missing_extra
from ckpt_pass.planner.solvers import DEFAULT_SOLVER, solver_names
from ckpt_pass.plans.budget import BudgetLike, check_budget, parse_budget
from ckpt_pass.plans.goal import COSTS
from ckpt_pass.plans.step_plan import StepPlan, load_plan
from ckpt_pass.policy.named import DEFAULT_POLICY, POLICIES, as_policy
from ckpt_pass.policy.rules import Rule
from ckpt_pass.report.sweeps import sweep_table
from ckpt_pass.tools.ahead import PlanModeError, plan
from ckpt_pass.tools.axis import NAMES as FIT_DIMENSIONS
from ckpt_pass.tools.curve import planned_curve
from ckpt_pass.tools.fitting import fit
from ckpt_pass.tools.sweeping import ROUNDS, Sweep, sweep
from ckpt_pass.tools.verification import verify

if TYPE_CHECKING:
    import typer


def main() -> NoReturn:
    """Run the command line and exit."""
    with errors_as_exit_codes():
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
    app.command("plan")(_plan_command())
    app.command("verify")(_verify_command())
    app.command("sweep")(_sweep_command())
    app.command("compare")(compare_command())
    app.command("doctor")(doctor_command())
    app.command("fit")(_fit_command())
    app.command("tune")(tune_command())
    app.command("policies")(_policies)
    app.command("demo")(_demo_command())
    return app


def _policy_option() -> Any:
    import typer

    return typer.Option(
        None, help=f"One of {', '.join(POLICIES)}. {DEFAULT_POLICY} unless there is a budget."
    )


def _budget_option() -> Any:
    import typer

    return typer.Option(
        None,
        help="Peak to stay within: 6GiB, a number of bytes, a fraction such as 0.5 of the peak "
        "without recomputation, or 'device'.",
    )


def _checked(policy: str | None, budget: str | None) -> BudgetLike | None:
    """Say what is misspelt before the model is built; return the budget."""
    as_policy(policy or DEFAULT_POLICY)
    return None if budget is None else check_budget(parse_budget(budget))


def _explain_command() -> Callable[..., None]:
    import typer

    summary_option = typer.Option(False, "--summary", help="Only the first lines.")

    def explain(
        target: str = target_argument(),
        policy: str | None = _policy_option(),
        budget: str | None = _budget_option(),
        summary: bool = summary_option,
    ) -> None:
        """Show what a policy or a budget saves and recomputes in one training step, and why.

        The step is traced, not run.
        """
        with errors_as_exit_codes():
            amount = _checked(policy, budget)
            model, inputs = build(target)
            made = plan(model, *inputs, policy=policy, budget=amount)
            typer.echo(made.summary() if summary else made.listing())

    return explain


def _plan_command() -> Callable[..., None]:
    import typer

    png_option = file_option("Also draw memory over the step here.")
    report_option = file_option("Also write a page for a browser here.")
    curve_option = typer.Option(
        0, min=0, help="Of that page: plans for so many further budgets, as the trade-off."
    )
    solver_option = typer.Option(DEFAULT_SOLVER, help=f"One of {', '.join(solver_names())}.")
    limit_option = typer.Option(None, "--time-limit", help="Seconds for the solver.")
    cost_option = typer.Option(COSTS[0], help=f"Kernel times: {' or '.join(COSTS)}.")
    save_option = file_option("Write the plan here, as JSON.")

    def plan_(
        target: str = target_argument(),
        policy: str | None = _policy_option(),
        budget: str | None = _budget_option(),
        total: str | None = total_option(),
        optimizer: str | None = optimizer_option(),
        accumulate: int = accumulate_option(),
        png: Path | None = png_option,
        report: Path | None = report_option,
        curve: int = curve_option,
        solver: str = solver_option,
        time_limit: float | None = limit_option,
        cost: str = cost_option,
        device: str | None = device_option(),
        offload: str | None = offload_option(),
        eager: bool = eager_option(),
        inner: str = inner_option(),
        save: Path | None = save_option,
    ) -> None:
        """Plan one training step: what is decided in which amounts, and memory over the step.

        The step is traced, not run. `explain` lists every decision.
        """
        if curve and report is None:
            raise typer.BadParameter("--curve is for the page of --report PATH; got no --report")
        with errors_as_exit_codes():
            amount = _checked(policy, budget)
            check_job(total, optimizer, device)
            model, inputs = build(target)
            options: dict[str, Any] = {
                "policy": policy,
                "solver": solver,
                "time_limit_s": time_limit,
                "cost": cost,
                "device": device,
                "offload": offload_to(offload),
                "mode": mode_of(eager),
                "inner": inner,
            }
            job = job_options(model, total, optimizer, accumulate)
            made = plan(model, *inputs, budget=amount, **job, **options)
            typer.echo(str(made))
            if save is not None:
                typer.echo(f"\nwrote {made.save(save)}")
            if report is not None:
                others = planned_curve(model, *inputs, points=curve, **options) if curve else None
                typer.echo(f"\nwrote {made.report(report, others)}")
            if png is not None:
                if isinstance(made, StepPlan):
                    raise PlanModeError(
                        "Got --png for a step that dynamo cuts in several graphs; expected one "
                        "graph. Leave --png out, or take the breaks that the plan names away."
                    )
                typer.echo(f"\nwrote {made.plot(png)}")

    return plan_


def _verify_command() -> Callable[..., None]:
    import typer

    plan_option = typer.Option(
        None, "--plan", exists=True, dir_okay=False, help="A plan file, as Plan.save writes it."
    )
    rtol_option = typer.Option(0.0, min=0.0, help="How far gradients may be apart, relative.")
    atol_option = typer.Option(0.0, min=0.0, help="The same, absolute; inductor rounds elsewhere.")

    def verify_(
        target: str = target_argument(),
        plan_file: Path | None = plan_option,
        policy: str | None = _policy_option(),
        budget: str | None = _budget_option(),
        total: str | None = total_option(),
        optimizer: str | None = optimizer_option(),
        accumulate: int = accumulate_option(),
        offload: str | None = offload_option(),
        eager: bool = eager_option(),
        inner: str = inner_option(),
        rtol: float = rtol_option,
        atol: float = atol_option,
    ) -> None:
        """Run a training step plain and planned, and compare: loss, gradients, peak, flops.

        The exit code is 1 where anything that the plan promises does not hold.
        """
        with errors_as_exit_codes():
            amount = _checked(policy, budget)
            check_job(total, optimizer)
            made = None if plan_file is None else load_plan(plan_file)
            model, inputs = build(target)
            found = verify(
                model,
                *inputs,
                plan=made,
                policy=policy,
                budget=amount,
                **job_options(model, total, optimizer, accumulate),
                offload=offload_to(offload),
                mode=mode_of(eager),
                inner=inner,
                rtol=rtol,
                atol=atol,
            )
            typer.echo(found)
            if not found.ok:
                sys.exit(1)

    return verify_


def _sweep_command() -> Callable[..., None]:
    import typer

    points_option = typer.Option(8, min=2, help="Budgets, from the least to no recomputation.")
    budgets_option = typer.Option(
        None, "--budget", help="A budget in the place of --points; may be given several times."
    )
    torch_option = typer.Option(
        True,
        "--torch/--no-torch",
        help="Also torch's activation_memory_budget, and a checkpoint around every layer.",
    )
    rounds_option = typer.Option(ROUNDS, min=1, help="Timings of each point.")
    png_option = file_option("Draw the curve here.")
    json_option = file_option("Write the rows here.", "--json")

    def sweep_(
        target: str = target_argument(),
        policy: str | None = _policy_option(),
        points: int = points_option,
        budgets: list[str] | None = budgets_option,
        inner: str = inner_option(),
        with_torch: bool = torch_option,
        rounds: int = rounds_option,
        png: Path | None = png_option,
        json_: Path | None = json_option,
    ) -> None:
        """Run a training step at a row of budgets: peak, recomputation and time of each."""
        with errors_as_exit_codes():
            amounts = [check_budget(parse_budget(budget)) for budget in budgets or ()]
            as_policy(policy or DEFAULT_POLICY)
            model, inputs = build(target)
            with progress_on_stderr() as progress:
                found = sweep(
                    model,
                    *inputs,
                    points=points,
                    budgets=amounts or None,
                    policy=policy,
                    inner=inner,
                    with_torch=with_torch,
                    rounds=rounds,
                    progress=progress,
                )
            _show_sweep(found, png, json_)

    return sweep_


def _show_sweep(found: Sweep, png: Path | None, json_: Path | None) -> None:
    console = console_for_tables()
    console.print(sweep_table(found.title, found.rows))
    if json_ is not None:
        json_.write_text(json.dumps(asdict(found), indent=2) + "\n")
        console.print(f"wrote {json_}", highlight=False, soft_wrap=True)
    if png is not None:
        console.print(f"wrote {found.plot(png)}", highlight=False, soft_wrap=True)


def _fit_command() -> Callable[..., None]:
    import typer

    budget_option = typer.Option(
        None, help="Peak to stay within: 6GiB, a number of bytes, or 'device'."
    )
    dim_option = typer.Option(FIT_DIMENSIONS[0], help=f"One of {', '.join(FIT_DIMENSIONS)}.")

    def fit_command(
        target: str = target_argument(),
        budget: str | None = budget_option,
        total: str | None = total_option(),
        optimizer: str | None = optimizer_option(),
        accumulate: int = accumulate_option(),
        dim: str = dim_option,
        policy: str | None = _policy_option(),
    ) -> None:
        """Find the largest batch (or sequence) whose training step keeps to a budget.

        The step is traced, not run.
        """
        with errors_as_exit_codes():
            amount = _checked(policy, budget)
            check_job(total, optimizer)
            model, inputs = build(target)
            job = job_options(model, total, optimizer, accumulate)
            typer.echo(fit(model, *inputs, budget=amount, **job, dim=dim, policy=policy))

    return fit_command


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
    threads_option = typer.Option(DEFAULTS.threads, min=1, help="Threads that torch computes on.")
    layers_option = typer.Option(DEFAULTS.model.layers, min=1, help="Layers of the model.")
    dim_option = typer.Option(DEFAULTS.model.dim, min=8, help="Width of the model.")
    length_option = typer.Option(DEFAULTS.model.length, min=1, help="Characters of a sequence.")
    batch_option = typer.Option(DEFAULTS.batch, min=1, help="Sequences of a step.")
    budget_option = typer.Option(
        DEFAULTS.budget, min=0.0, max=1.0, help="Share of the peak that the planned steps get."
    )

    def demo(
        steps: int = steps_option,
        out: Path = out_option,
        inner: str = inner_option(DEFAULTS.inner),
        threads: int = threads_option,
        layers: int = layers_option,
        dim: int = dim_option,
        length: int = length_option,
        batch: int = batch_option,
        budget: float = budget_option,
    ) -> None:
        """Train a small transformer with and without recomputation; measure and compare."""
        with errors_as_exit_codes():
            model = ModelConfig(layers, dim, length)
            run_demo(DemoSettings(steps, inner, threads, model, batch, budget, out))

    return demo
