"""The six ways in which a family is trained, and what came of each."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass import CkptPassError, InfeasibleBudgetError
from tests.zoo import SEED, StepResult
from tests.zoo.families import Family

EAGER_TOLERANCE = 0.01
"""How far an eager plan's peak may be from the measured one."""

TIME_LIMIT_S = 2.0
"""For the solvers: what is looked at is whether a plan holds, not how good it is."""

# Verdicts, the good ones first.
RIGHT = "right"
UNCOVERED = "uncovered"  # over, and the warning said that the budget covers a part only
REFUSED = "refused"  # by an error of ours
TORCH = "torch refuses"  # what aot_eager alone does not compile either
OFF = "off"  # within the budget, but not the peak that was predicted
OVER = "over"
WRONG = "wrong"
ERROR = "error"  # one that is not ours
CRASH = "crash"  # the process ended, or took too long


@dataclass(frozen=True)
class Outcome:
    """What came of one family in one way; bytes are above the start of the step."""

    family: str
    way: str
    verdict: str
    detail: str = ""
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    peak_bytes: int | None = None
    plain_bytes: int | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for a line of JSON."""
        return asdict(self)


def seed_all() -> None:
    """Every generator that a forward may draw from."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


@dataclass(frozen=True)
class _Measured:
    step: StepResult
    peak_bytes: int


def _measured(
    module: nn.Module, batch: Mapping[str, Any], forward: Callable[..., Any]
) -> _Measured:
    """One step from the state that the module is in, and then the peak of another."""

    def step() -> Tensor:
        seed_all()
        loss: Tensor = forward(**batch)
        return loss

    loss = step()
    loss.backward()
    named = dict(module.named_parameters())
    result = StepResult(
        loss.detach().clone(),
        {name: p.grad.to_dense().clone() for name, p in named.items() if p.grad is not None},
        {name: buffer.clone() for name, buffer in module.named_buffers()},
    )
    del loss
    peak = ckpt_pass.measure_step(step, repeats=1, params=named.values()).peak_bytes
    return _Measured(result, peak)


class Trial:
    """A family, with the steps that the ways are compared with."""

    def __init__(self, family: Family) -> None:
        self.family = family
        module, batch = family.make()
        self.plain = _measured(module, batch, module)
        self._aot: _Measured | None = None
        self._aot_error: Exception | None = None

    def aot_eager(self) -> _Measured:
        """Torch's own compiled step.

        Raises whatever torch does.
        """
        if self._aot_error is not None:
            raise self._aot_error
        if self._aot is None:
            torch._dynamo.reset()
            module, batch = self.family.make()
            try:
                self._aot = _measured(module, batch, torch.compile(module, backend="aot_eager"))
            except Exception as error:
                self._aot_error = error
                raise
        return self._aot

    def run(self, way: str) -> Outcome:
        """Train in one way."""
        began = time.perf_counter()
        torch._dynamo.reset()
        outcome = Outcome(self.family.name, way, RIGHT, plain_bytes=self.plain.peak_bytes)
        try:
            if way in COMPILED:
                outcome = replace(outcome, plain_bytes=self.aot_eager().peak_bytes)
        except Exception as error:
            outcome = replace(outcome, verdict=TORCH, detail=_words(error))
        else:
            with _noted() as notes:
                outcome = self._tried(outcome, notes)
        return replace(outcome, seconds=round(time.perf_counter() - began, 1))

    def _tried(self, outcome: Outcome, notes: list[str]) -> Outcome:
        try:
            return WAYS[outcome.way](self, outcome, notes)
        except Exception as error:
            ours = of_ours(error)
            return replace(
                outcome,
                verdict=ERROR if ours is None else REFUSED,
                detail=_words(ours or error),
            )

    def judged(
        self, outcome: Outcome, found: _Measured, notes: list[str], tolerance: float = 0.0
    ) -> Outcome:
        """The outcome of a step that ran."""
        outcome = replace(outcome, peak_bytes=found.peak_bytes)
        difference = self._difference(found.step, outcome.way in COMPILED)
        if difference:
            return replace(outcome, verdict=WRONG, detail=difference)
        budget, predicted = outcome.budget_bytes, outcome.predicted_bytes
        covered = not any("UncoveredBudgetWarning" in note for note in notes)
        if budget is not None and found.peak_bytes > budget:
            verdict = OVER if covered else UNCOVERED
            return replace(outcome, verdict=verdict, detail=f"{found.peak_bytes - budget:+,} bytes")
        if predicted is not None and covered:
            off = found.peak_bytes - predicted
            if abs(off) > tolerance * found.peak_bytes:
                return replace(outcome, verdict=OFF, detail=f"{off:+,} bytes")
        return replace(outcome, detail="" if covered else "a part of the step")

    def _difference(self, step: StepResult, compiled: bool) -> str:
        """What is not as it should be; nothing where all is."""
        plain = self.plain.step
        found = _differing(step, plain)
        if not found or not compiled:
            return found
        torchs = self.aot_eager().step
        if not _differing(step, torchs) or _distance(step, plain) <= 2 * _distance(torchs, plain):
            return ""
        return found


def _values(step: StepResult) -> dict[str, Tensor]:
    return {
        "loss": step.loss,
        **step.gradients,
        **{f"buffer {n}": b for n, b in step.buffers.items()},
    }


def _differing(found: StepResult, expected: StepResult) -> str:
    """Names what differs, to the last bit."""
    ours, theirs = _values(found), _values(expected)
    if ours.keys() != theirs.keys():
        return f"gradients of others: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    names = [n for n in ours if not torch.equal(ours[n].nan_to_num(), theirs[n].nan_to_num())]
    if not names:
        return ""
    return f"{len(names)} of {len(ours)} differ, {names[0]} by {_distance(found, expected):.3g}"


def _distance(found: StepResult, expected: StepResult) -> float:
    """The largest difference, of the size of the value that differs."""
    ours, theirs = _values(found), _values(expected)
    if ours.keys() != theirs.keys():
        return float("inf")
    worst = 0.0
    for name, value in ours.items():
        if value.numel():
            wide = torch.complex128 if value.is_complex() else torch.float64
            difference = (value.to(wide) - theirs[name].to(wide)).abs().max()
            worst = max(worst, float(difference / (theirs[name].to(wide).abs().max() + 1e-12)))
    return worst


def of_ours(error: BaseException | None) -> CkptPassError | None:
    """The error of this library behind what torch raised."""
    while error is not None:
        if isinstance(error, CkptPassError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


@contextmanager
def _noted() -> Iterator[list[str]]:
    """The names of the warnings that were given."""
    notes: list[str] = []

    def note(message: Any, category: type, *_: Any, **__: Any) -> None:
        notes.append(f"{category.__name__}: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield notes


# --- the ways -------------------------------------------------------------------------------------


def _backend(trial: Trial, outcome: Outcome, notes: list[str], budget: float | int) -> Outcome:
    """With the budget, or with the least that the refusals name (one a graph)."""
    for _ in range(12):
        torch._dynamo.reset()
        notes.clear()
        module, batch = trial.family.make()
        backend = ckpt_pass.make_backend(
            budget=budget, inner="aot_eager", time_limit_s=TIME_LIMIT_S
        )
        try:
            found = _measured(module, batch, torch.compile(module, backend=backend))
        except Exception as error:
            ours = of_ours(error)
            if not isinstance(ours, InfeasibleBudgetError):
                raise
            budget = ours.least_feasible_bytes
            continue
        alone = len(backend.plans) == 1
        bytes_ = backend.plans[0].budget_bytes if alone else _bytes(budget, outcome)
        predicted = backend.plans[0].peak_bytes if alone else None
        outcome = replace(outcome, budget_bytes=bytes_, predicted_bytes=predicted)
        return trial.judged(outcome, found, notes)
    return replace(outcome, verdict=ERROR, detail="the least that is named is refused again")


def _bytes(budget: float | int, outcome: Outcome) -> int:
    assert outcome.plain_bytes is not None
    return budget if isinstance(budget, int) else int(budget * outcome.plain_bytes)


def _half(trial: Trial, outcome: Outcome, notes: list[str]) -> Outcome:
    return _backend(trial, outcome, notes, 0.5)


def _least(trial: Trial, outcome: Outcome, notes: list[str]) -> Outcome:
    return _backend(trial, outcome, notes, 1)


def _planned(module: nn.Module, batch: Mapping[str, Any], mode: str) -> Any:
    how: dict[str, Any] = {"mode": mode, "kwargs": batch, "time_limit_s": TIME_LIMIT_S}
    seed_all()
    try:
        return ckpt_pass.plan(module, budget=0.5, **how)
    except InfeasibleBudgetError as error:
        seed_all()
        return ckpt_pass.plan(module, budget=error.least_feasible_bytes, **how)


def _ahead(trial: Trial, outcome: Outcome, notes: list[str]) -> Outcome:
    """Planned on one model, carried out on another that is equal."""
    plan = _planned(*trial.family.make(), "compiled")
    torch._dynamo.reset()  # sizes that torch's own step has left open are no plan's
    module, batch = trial.family.make()
    backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
    found = _measured(module, batch, torch.compile(module, backend=backend))
    outcome = replace(outcome, budget_bytes=plan.budget_bytes, predicted_bytes=plan.peak_bytes)
    return trial.judged(outcome, found, notes)


def _eager(trial: Trial, outcome: Outcome, notes: list[str]) -> Outcome:
    plan = _planned(*trial.family.make(), "eager")
    module, batch = trial.family.make()
    plan.apply(module)
    found = _measured(module, batch, module)
    outcome = replace(outcome, budget_bytes=plan.budget_bytes, predicted_bytes=plan.peak_bytes)
    return trial.judged(outcome, found, notes, EAGER_TOLERANCE)


def _placed(name: str) -> Callable[[Trial, Outcome, list[str]], Outcome]:
    def way(trial: Trial, outcome: Outcome, notes: list[str]) -> Outcome:
        module, batch = trial.family.make()
        ckpt_pass.apply(module, name)
        return trial.judged(outcome, _measured(module, batch, module), notes)

    return way


WAYS: Mapping[str, Callable[[Trial, Outcome, list[str]], Outcome]] = {
    "half": _half,
    "least": _least,
    "ahead": _ahead,
    "eager": _eager,
    "all": _placed("all"),
    "sqrt-segments": _placed("sqrt-segments"),
}
COMPILED = frozenset({"half", "least", "ahead"})
