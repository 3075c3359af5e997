"""The plan of a step that dynamo cuts: one for each of its graphs, and the peak of the whole.

What runs between the graphs runs as it is; its bytes are in the peak.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ckpt_pass.drawing.web import write_page
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.account_file import account_to_data
from ckpt_pass.plans.audit import findings
from ckpt_pass.plans.curve import CurveLike, curve_data
from ckpt_pass.plans.files import PlanFile
from ckpt_pass.plans.page_data import page_data
from ckpt_pass.plans.parts import Decision
from ckpt_pass.plans.reading import is_of_step, read_plan_text, step_from_json
from ckpt_pass.plans.record import Asked
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.plans.writing import step_to_json
from ckpt_pass.policy.sites import Bytes

#: Graphs that the summary shows, one a line; the rest are counted.
_GRAPHS = 20


@dataclass(frozen=True)
class StepPlan(PlanFile):
    """The decisions for a step of several graphs, as a value that prints, saves and loads itself.

    Attributes:
        parts: the plan of each graph that has a backward, in the order in which dynamo makes them.
        asked: policy and budget of the whole step.
        peak_bytes: predicted peak of forward and backward above what was allocated before, graphs
            and what runs between them; exact for ``inner="aot_eager"``.
        peak_at: the op at the peak, in words.
        plain_peak_bytes: the same of the step with nothing recomputed.
        outside_bytes: the most bytes while code between the graphs runs.
        breaks: where dynamo cuts the step, and why.
        account: the memory of the whole job, where an optimizer was given.
    """

    parts: tuple[Plan, ...]
    asked: Asked
    peak_bytes: int
    peak_at: str
    plain_peak_bytes: int
    outside_bytes: int
    breaks: tuple[str, ...]
    account: Account | None = None

    def with_account(self, account: Account) -> StepPlan:
        """This plan as the forward and backward of a job.

        Args:
            account: of the job, without them.
        """
        outputs = self.parts[-1].predicted.output_bytes if self.parts else 0
        known = outputs if isinstance(outputs, int) else 0
        beside = sum(part.predicted.beside_gradients_bytes for part in self.parts)
        return replace(self, account=account.with_step(self.peak_bytes, known, beside))

    @property
    def mode(self) -> str:
        """``compiled``."""
        return "compiled"

    @property
    def policy(self) -> str:
        """The policy, in words."""
        return self.asked.words

    @property
    def budget_bytes(self) -> int | None:
        """The budget of the whole step, if any."""
        return self.asked.budget_bytes

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Those of all graphs, in order."""
        return tuple(decision for part in self.parts for decision in part.decisions)

    @property
    def regions(self) -> tuple[str, ...]:
        """The layers, in order."""
        return tuple(dict.fromkeys(region for part in self.parts for region in part.regions))

    @property
    def saved_bytes(self) -> Bytes:
        """Bytes that the forwards hold for the backwards, outputs not counted."""
        return sum((part.saved_bytes for part in self.parts), 0)

    @property
    def recompute_time_s(self) -> float:
        """Modelled seconds of the forward ops that run again."""
        return sum(part.predicted.recompute_time_s for part in self.parts)

    @property
    def step_time_s(self) -> float:
        """Modelled seconds of the graphs with nothing recomputed."""
        return sum(part.predicted.step_time_s for part in self.parts)

    @property
    def status(self) -> str:
        """``optimal`` where nothing is recomputed, else ``feasible``: no bound is known."""
        return "feasible" if self.recompute_time_s else "optimal"

    @property
    def gap(self) -> float:
        """The share that recomputation has in the graphs' time: no lower bound is known."""
        whole = self.step_time_s + self.recompute_time_s
        return self.recompute_time_s / whole if whole else 0.0

    @property
    def fingerprint(self) -> str:
        """Identifies the graphs together with the policy."""
        return hashlib.sha256("".join(p.fingerprint for p in self.parts).encode()).hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader would not expect of the graphs; breaks stand in the summary."""
        found = (words for part in self.parts for words in findings(part))
        return tuple(dict.fromkeys(words for words in found if not self._tells_of_break(words)))

    def _tells_of_break(self, words: str) -> bool:
        return any(place in words for place in self.breaks)

    def to_json(self) -> str:
        """The plan as JSON: the same text for the same plan."""
        apart = ("parts", "asked", "account")
        names = [field.name for field in fields(self) if field.name not in apart]
        facts: dict[str, Any] = {name: getattr(self, name) for name in names}
        facts["breaks"] = list(self.breaks)
        if self.account is not None:
            facts["account"] = account_to_data(self.account)
        return step_to_json(self.parts, self.asked, facts)

    @classmethod
    def from_json(cls, text: str) -> StepPlan:
        """The plan that a JSON text describes; nothing in it is evaluated.

        Raises:
            PlanFileError: the text is no such plan, or was changed after it was written.
        """
        found = step_from_json(text)
        return cls(**{**found, "parts": tuple(Plan(**part) for part in found["parts"])})

    def summary(self) -> str:
        """The plan in a few lines."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"policy       {self.policy}"
        yield f"graphs       {len(self.parts)} with a backward: dynamo cuts the step"
        yield from (f"  at         {place}" for place in self.breaks)
        yield (
            f"peak         {format_bytes(self.peak_bytes)} predicted for the whole step, "
            f"{self.peak_at}"
        )
        yield f"  before     {format_bytes(self.plain_peak_bytes)} with nothing recomputed"
        yield f"  between    {format_bytes(self.outside_bytes)} at most while no graph runs"
        if self.budget_bytes is not None:
            yield f"budget       {format_bytes(self.budget_bytes)} for the whole step"
        for number, part in enumerate(self.parts[:_GRAPHS]):
            found = part.predicted
            again = found.recompute_time_s / found.step_time_s if found.step_time_s else 0.0
            yield (
                f"graph {number:<6} {len(part.decisions)} ops, peak "
                f"{format_bytes(part.peak_bytes)} alone, saves {format_bytes(part.saved_bytes)}, "
                f"recomputes {100 * again:.1f} % of its modelled time"
            )
        if len(self.parts) > _GRAPHS:
            yield f"             and {len(self.parts) - _GRAPHS} more"
        yield from (f"WARNING      {words}" for words in self.warnings)

    def report(self, path: str | Path, curve: CurveLike | None = None) -> Path:
        """Write a page that opens in a browser, as :meth:`ckpt_pass.Plan.report` does.

        Each graph has its own curve, and the decisions of all stand in one table.

        Args:
            path: of the page.
            curve: points of the trade-off.

        Raises:
            MissingExtraError: plotly is not installed.
            InvalidCurveError: the curve is none.
        """
        parts = [(f"graph {number}", part) for number, part in enumerate(self.parts)]
        points = curve_data(self, self.plain_peak_bytes, curve)
        data = page_data(parts, self.summary(), self.warnings, self.account, points)
        asked = self.budget_bytes
        within = self.policy if asked is None else f"within {format_bytes(asked)}"
        title = f"Plan of the compiled step, in {len(parts)} graphs: {within}"
        return write_page(title, data, Path(path))

    def listing(self) -> str:
        """The summary, and the decisions of each graph."""
        return "\n\n".join([self.summary(), *(part.listing() for part in self.parts)])

    def __str__(self) -> str:
        account = () if self.account is None else (str(self.account),)
        return "\n\n".join([self.summary(), *account])


def load_plan(path: str | Path) -> Plan | StepPlan:
    """Read a plan from a file, of one graph or of several.

    Raises:
        PlanFileError: the file is no plan, or was changed after it was written.
        OSError: the file cannot be read.
    """
    text = read_plan_text(Path(path))
    return StepPlan.from_json(text) if is_of_step(text) else Plan.from_json(text)
