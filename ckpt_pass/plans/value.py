"""The plan: what was decided for one graph, as a value that prints itself.

A plan holds no tensors and no graph, only call sites, bytes and words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from ckpt_pass._errors import nearest
from ckpt_pass.graph.shapes import Dimension, bytes_at, shape_lines, where_within
from ckpt_pass.plans.audit import findings, warning_lines
from ckpt_pass.plans.parts import Decision as Decision
from ckpt_pass.plans.parts import Recipe as Recipe
from ckpt_pass.plans.parts import Replay as Replay
from ckpt_pass.plans.parts import SavedActivation as SavedActivation
from ckpt_pass.plans.parts import SavedActivations as SavedActivations
from ckpt_pass.plans.parts import Signature as Signature
from ckpt_pass.plans.plot import plot_plan
from ckpt_pass.plans.reading import plan_from_json, read_plan_text
from ckpt_pass.plans.region_specs import region_specs
from ckpt_pass.plans.signature import check_eager_step
from ckpt_pass.plans.text import budget_lines, overview
from ckpt_pass.plans.text import format_bytes as format_bytes
from ckpt_pass.plans.timeline import Timeline
from ckpt_pass.plans.writing import plan_to_json
from ckpt_pass.policy.sites import Bytes, CallSite
from ckpt_pass.regions.wrapping import (
    RegionSpec,
    UnknownRegionError,
    applied_regions,
    apply_regions,
    check_regions,
    remove_regions,
)


@dataclass(frozen=True)
class Plan:
    """The decisions for one graph.

    Attributes:
        policy: the policy, in words.
        fingerprint: identifies the graph (ops, shapes, dtypes, edges) together with the policy.
        decisions: one for each op execution of the forward, in order.
        saved: the values that the backward gets from the forward.
        output_bytes: bytes of the forward's outputs, which the caller holds.
        peak_bytes: predicted peak of forward and backward above what was allocated before, on
            the graph as it is (``inner="aot_eager"``). Exact where ops allocate nothing but
            their outputs; what kernels need besides is measured where there is a budget, and left
            out otherwise. At the traced shape.
        peak_at: the op that runs at the peak, in words.
        recompute_flops, recompute_time_s: of the forward ops that run again; time is modelled.
        step_flops, step_time_s: of the same step with nothing recomputed.
        budget_bytes: the budget that the plan was made for, if any.
        solver: what found the plan for the budget, in words.
        status: ``optimal`` (no plan within the budget recomputes less), ``feasible``, or
            ``time limit`` (the best that was found in time).
        lower_bound_s: no plan within the budget has less recompute time; 0 where nothing is known.
        regions: the layers or checkpoint regions, in order.
        timeline: bytes over the step, of symbolic sizes at the traced shape.
        plain_timeline: the same of the step with nothing recomputed; where there is a budget.
        peak_expression: the peak for all sizes that were left symbolic, under this same plan; the
            number itself where none was.
        dimensions: those sizes, and the inputs that have them.
        sites: the call sites of the graph.
        recipe: what the plan was asked for, so that it can be made again.
        measured_workspaces: how many kernels run with a workspace that was measured, on this
            machine; the peak relies on them.
        mode: ``compiled``, or ``eager`` where regions are recomputed as a whole.
        random_regions: the regions that draw random numbers, or may once they are in training mode;
            ``None`` where that is not known.
        signature: what the step takes, so that a use for another one is noticed.
        replay: what a compiled plan does, so that it can be done again without solving.
        inner_peak_bytes: peak of inductor's own schedule, where there is a budget and inductor.
        replans: how often the plan was made again because of it.
        graph_break: where dynamo cut the model after this graph, and why; empty where it did not.
    """

    policy: str
    fingerprint: str
    decisions: tuple[Decision, ...]
    saved: SavedActivations
    output_bytes: Bytes
    peak_bytes: int
    peak_at: str
    recompute_flops: int
    step_flops: int
    recompute_time_s: float
    step_time_s: float
    budget_bytes: int | None
    solver: str
    status: str
    lower_bound_s: float
    regions: tuple[str, ...]
    timeline: Timeline
    plain_timeline: Timeline | None
    peak_expression: Bytes
    dimensions: tuple[Dimension, ...]
    sites: frozenset[CallSite]
    recipe: Recipe
    measured_workspaces: int = 0
    inner_peak_bytes: int | None = None
    replans: int = 0
    mode: str = "compiled"
    random_regions: frozenset[str] | None = None
    signature: Signature | None = None
    replay: Replay | None = None
    graph_break: str = ""

    @property
    def saved_bytes(self) -> Bytes:
        """Bytes that the forward holds for the backward, its outputs not counted."""
        return self.saved.saved_bytes

    def with_fate(self, fate: str) -> tuple[Decision, ...]:
        """The decisions whose outcome is ``saved``, ``recomputed`` or ``unused``."""
        return tuple(decision for decision in self.decisions if decision.fate == fate)

    @property
    def saved_sites(self) -> frozenset[CallSite]:
        """The call sites whose outputs are held for the backward."""
        return frozenset(decision.site for decision in self.with_fate("saved"))

    @property
    def gap(self) -> float:
        """How much shorter the step of the fastest plan may be, as a share of this one's time.

        Against ``lower_bound_s``: where that is 0 and nothing is proven, it is merely the share
        that recomputation has in the step.
        """
        if self.status == "optimal":
            return 0.0
        step_s = self.step_time_s + self.recompute_time_s
        return max(self.recompute_time_s - self.lower_bound_s, 0.0) / step_s if step_s else 0.0

    @property
    def symbols(self) -> dict[str, str]:
        """The symbol of each input's dimension that was left open: ``argument 0 dim 1`` to s27."""
        return {place: d.symbol for d in self.dimensions for place in d.places}

    def peak_bytes_at(self, sizes: Mapping[str, int]) -> int:
        """The peak of this plan at given sizes.

        Args:
            sizes: by symbol or by place (:attr:`symbols`), for all that were left open.

        Raises:
            SizeError: a size is missing, unknown, or one that the graph is not valid for.
        """
        return bytes_at(self.peak_expression, self.dimensions, sizes)

    @property
    def holds_for(self) -> str:
        """For which sizes the plan keeps to its budget, in words, such as ``s27 <= 12``.

        For each size with the others as they were traced. Empty without a budget, and where no
        size was left open.
        """
        if self.budget_bytes is None:
            return ""
        return where_within(self.peak_expression, self.dimensions, self.budget_bytes)

    def to_json(self) -> str:
        """The plan as JSON: the same text for the same plan."""
        return plan_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that a JSON text describes; nothing in it is evaluated.

        Raises:
            PlanFileError: the text is no plan, or was changed after it was written.
        """
        return cls(**plan_from_json(text))

    def save(self, path: str | Path) -> Path:
        """Write the plan to a file; return its path."""
        path = Path(path)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file.

        Raises:
            PlanFileError: the file is no plan, or was changed after it was written.
            OSError: the file cannot be read.
        """
        return cls.from_json(read_plan_text(Path(path)))

    def apply(self, model: nn.Module) -> None:
        """Make the plan's regions checkpoint regions of an eager model, until :meth:`remove`.

        The model is not edited: each region's module gets a ``forward`` of its own. A plan that
        was made for a compiled step is carried out as far as eager mode can: its layers are
        regions, and keep what the plan saves in them; its peak does not hold then.

        Raises:
            UnknownRegionError: the model lacks a module of the plan.
            PlanMismatchError: its parameters are not those that an eager plan was made for.
            AlreadyAppliedError: a module is a region already.
        """
        self._check(model)
        apply_regions(model, self.region_specs())

    def _check(self, model: nn.Module) -> None:
        check_regions(model, self.region_specs())
        if self.mode == "eager":
            check_eager_step(self.signature, model)

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Undo :meth:`apply`.

        Raises:
            NotAppliedError: the model has no regions.
        """
        remove_regions(model)

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The same inside a ``with`` block only."""
        self._check(model)
        return applied_regions(model, self.region_specs())

    def region_specs(self) -> Mapping[str, RegionSpec]:
        """What becomes of each region in eager mode, by FQN."""
        return self._region_specs

    @cached_property
    def _region_specs(self) -> Mapping[str, RegionSpec]:
        return region_specs(self.regions, self.decisions, self.random_regions)

    def region_spec(self, name: str) -> RegionSpec | None:
        """What becomes of the module ``name`` in eager mode; ``None`` where it is no region.

        Raises:
            UnknownRegionError: no op of the plan's step ran in a module of that name.
        """
        found = self.region_specs().get(name)
        if found is None and name not in self._modules:
            raise UnknownRegionError(
                f"The plan knows no module {name!r}.{nearest(name, self._modules)} Expected the "
                "FQN of a module that ran in its step, relative to the model that was planned."
            )
        return found

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The modules that ops ran in, and those around them."""
        parts = [site.fqn.split(".") for site in self.sites if site.fqn]
        return frozenset(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1))

    def _peak(self) -> str:
        return f"{format_bytes(self.peak_bytes)} predicted, {self.peak_at}"

    @staticmethod
    def _share(part: float, whole: float) -> str:
        return f"{100 * part / whole:.1f} %" if whole else "0.0 %"

    def summary(self) -> str:
        """The plan in a few lines."""
        counts = {fate: len(self.with_fate(fate)) for fate in ("saved", "recomputed", "unused")}
        return "\n".join(
            [
                f"policy       {self.policy}",
                f"graph        {self.fingerprint[:12]}, {len(self.decisions)} ops, "
                f"{len(self.regions)} regions",
                f"decisions    {counts['saved']} saved, {counts['recomputed']} recomputed, "
                f"{counts['unused']} not needed by the backward",
                f"saved bytes  {format_bytes(self.saved_bytes)} (outputs "
                f"{format_bytes(self.output_bytes)} more)",
                f"peak         {self._peak()}",
                *shape_lines(self.peak_expression, self.dimensions, self.budget_bytes),
                f"recompute    {self._share(self.recompute_flops, self.step_flops)} of the flops, "
                f"{self._share(self.recompute_time_s, self.step_time_s)} of the modelled time",
                *budget_lines(self),
                *warning_lines(self),
            ]
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What in it a reader would not expect (:func:`ckpt_pass.plans.audit.findings`)."""
        return findings(self)

    def overview(self) -> str:
        """The summary; with a budget also amounts, the dearest decisions, and memory over time."""
        return overview(self)

    def plot(self, path: str | Path) -> Path:
        """Draw memory over the step, before (nothing recomputed) and as planned; return the path.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        title = "memory over one training step, as predicted"
        timelines = self.timeline, self.plain_timeline
        return plot_plan(title, *timelines, self.budget_bytes, Path(path))

    def listing(self) -> str:
        """The summary, and one line a decision; views that cost nothing are left out."""
        return "\n".join([self.summary(), "", *_folded(self.decisions)])

    def __str__(self) -> str:
        return self.overview()


def _folded(decisions: Sequence[Decision]) -> list[str]:
    """One line a decision; views that cost nothing are left to the full listing."""
    return [str(d) for d in decisions if not (d.op_class == "view" and d.fate != "saved")]
