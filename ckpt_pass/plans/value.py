"""The plan: what was decided for one graph, as a value that prints itself.

A plan holds no tensors and no graph, only call sites, bytes and words.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ckpt_pass._errors import nearest
from ckpt_pass.drawing.web import write_page
from ckpt_pass.graph.shapes import bytes_at, where_within
from ckpt_pass.offloading.options import InvalidOffloadError
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.audit import findings
from ckpt_pass.plans.curve import CurveLike, curve_data
from ckpt_pass.plans.files import PlanFile
from ckpt_pass.plans.page_data import page_data
from ckpt_pass.plans.plot import plot_plan
from ckpt_pass.plans.reading import plan_from_json
from ckpt_pass.plans.record import (
    CompiledExecution,
    EagerExecution,
    InductorPeak,
    PlanRecord,
    Predicted,
)
from ckpt_pass.plans.region_specs import region_specs
from ckpt_pass.plans.signature import check_eager_step
from ckpt_pass.plans.text import listing, overview, summary
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.plans.writing import plan_to_json
from ckpt_pass.policy.sites import Bytes, CallSite
from ckpt_pass.regions.wrapping import (
    RegionSpec,
    UnknownRegionError,
    applied_regions,
    apply_regions,
    check_regions,
    regions_of,
    remove_regions,
)

#: Where the fields of a plan lie that once stood side by side: they are found by their old names,
#: too. What the other kind of plan has alone is ``None``.
_MOVED = {
    **{field.name: ("predicted", field.name) for field in fields(Predicted)},
    "solver": ("proven", "solver"),
    "lower_bound_s": ("proven", "lower_bound_s"),
    "recipe": ("asked",),
    "random_regions": ("execution", "random_regions"),
    "graph_break": ("execution", "graph_break"),
    "inner_peak_bytes": ("execution", "inductor", "peak_bytes"),
    "replans": ("execution", "inductor", "replans"),
}


@dataclass(frozen=True)
class Plan(PlanRecord, PlanFile):
    """The decisions for one graph, as a value that prints, draws, saves and applies itself.

    What it holds stands in :class:`ckpt_pass.plans.record.PlanRecord`: ``decisions``, ``saved``,
    ``regions``, and the groups ``asked``, ``predicted``, ``proven`` and ``execution``.
    """

    if not TYPE_CHECKING:  # so that a type checker still knows what a plan has

        def __getattr__(self, name: str) -> Any:
            if name not in _MOVED:
                known = [key for key in dir(type(self)) if not key.startswith("_")]
                raise AttributeError(f"A Plan has no attribute {name!r}.{nearest(name, known)}")
            return reduce(lambda value, key: getattr(value, key, None), _MOVED[name], self)

    @property
    def saved_sites(self) -> frozenset[CallSite]:
        """The call sites whose outputs are held for the backward."""
        return frozenset(decision.site for decision in self.with_fate("saved"))

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

    def apply(self, model: nn.Module, offload: OffloadLike | bool | None = None) -> None:
        """Make the plan's regions checkpoint regions of an eager model, until :meth:`remove`.

        The model is not edited: each region's module gets a ``forward`` of its own. A plan that
        was made for a compiled step is carried out as far as eager mode can: its layers are
        regions, and keep what the plan saves in them; its peak does not hold then.

        Args:
            model: the model.
            offload: where an eager plan moves values to; where it was made for, if ``None``.

        Raises:
            UnknownRegionError: the model lacks a module of the plan.
            PlanMismatchError: its parameters are not those that an eager plan was made for.
            AlreadyAppliedError: a module is a region already.
            InvalidOffloadError: it moves values, and was read from a file that does not say where.
        """
        self._check(model, offload)
        apply_regions(model, self.region_specs(offload))

    def cut_at(self, graph_break: str) -> Plan:
        """This plan of a graph after which dynamo cut the model."""
        assert isinstance(self.execution, CompiledExecution)
        return replace(self, execution=replace(self.execution, graph_break=graph_break))

    @property
    def inner(self) -> str:
        """What compiles the halves that the plan is made for: ``inductor`` or ``aot_eager``."""
        return "aot_eager" if self.inductor is None else "inductor"

    @property
    def inductor(self) -> InductorPeak | None:
        """What inductor makes of it, where it was made for inductor."""
        return self.execution.inductor if isinstance(self.execution, CompiledExecution) else None

    def within_inductor(
        self, budget_bytes: int | None, peak: InductorPeak, peak_at: str, expression: Bytes
    ) -> Plan:
        """This plan with inductor's peak as its own, and the budget that was asked for, if any.

        The plan itself may have been made for another one; its timeline stays that of the graph
        that inductor is given.

        Args:
            budget_bytes: the budget.
            peak, peak_at: inductor's, and where it is.
            expression: the peak for all sizes.
        """
        assert isinstance(self.execution, CompiledExecution)
        return replace(
            self,
            asked=replace(self.asked, budget_bytes=budget_bytes),
            predicted=replace(self.predicted, peak_bytes=peak.peak_bytes, peak_at=peak_at),
            execution=replace(self.execution, inductor=peak, peak_expression=expression),
        )

    def with_account(self, account: Account) -> Plan:
        """This plan as the forward and backward of a job.

        Args:
            account: of the job, without them.
        """
        outputs, beside = self.predicted.output_bytes, self.predicted.beside_gradients_bytes
        known = outputs if isinstance(outputs, int) else 0
        found = account.with_step(self.peak_bytes, known, beside)
        return replace(self, predicted=replace(self.predicted, account=found))

    def _check(self, model: nn.Module, offload: OffloadLike | bool | None) -> None:
        check_regions(model, self.region_specs(offload))
        if self.mode == "eager":
            check_eager_step(self.signature, model)

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`apply`; a plan without regions has left nothing to undo.

        Raises:
            NotAppliedError: the model has no regions, and the plan has.
        """
        if self._region_specs or regions_of(model):
            remove_regions(model)

    def applied(
        self, model: nn.Module, offload: OffloadLike | bool | None = None
    ) -> AbstractContextManager[nn.Module]:
        """The same inside a ``with`` block only."""
        self._check(model, offload)
        return applied_regions(model, self.region_specs(offload))

    def region_specs(self, offload: OffloadLike | bool | None = None) -> Mapping[str, RegionSpec]:
        """What becomes of each region in eager mode, by FQN.

        Args:
            offload: where an eager plan moves values to; where it was made for, if ``None``.

        Raises:
            InvalidOffloadError: it moves values, and was read from a file that does not say where.
        """
        found = self._region_specs
        if not any(spec.moves is not None for spec in found.values()):
            return found
        goal = self.asked.goal
        where = goal.offload if offload is None and goal is not None else as_offload(offload)
        if where is None:
            raise InvalidOffloadError(
                "The plan moves values to a store of the user's, which its file does not hold. "
                "Expected the store to be named: plan.apply(model, offload=store)."
            )
        return {name: replace(spec, offload=where) for name, spec in found.items()}

    @cached_property
    def _region_specs(self) -> Mapping[str, RegionSpec]:
        step = self.execution
        if not isinstance(step, EagerExecution):
            return region_specs(self.regions, self.decisions)
        found = region_specs(self.regions, self.decisions, step.random_regions, dict(step.moves))
        sharding = None if self.asked.goal is None else self.asked.goal.shard_over
        shared = {name: replace(found[name], shard_inputs=sharding) for name in step.sharded}
        return {**found, **shared}

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

    def summary(self) -> str:
        """The plan in a few lines."""
        return summary(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What in it a reader would not expect (:func:`ckpt_pass.plans.audit.findings`)."""
        return findings(self)

    def overview(self) -> str:
        """The summary; with a budget also amounts, the dearest decisions, and memory over time."""
        return overview(self)

    def plot(self, path: str | Path) -> Path:
        """Draw memory over the step, before (nothing recomputed) and as planned; return the path.

        Where values are moved, below it the memory at the other place, and the copies each way.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        title = "memory over one training step, as predicted"
        timelines = self.predicted.timeline, self.predicted.plain_timeline
        moved = self.predicted.offloaded
        return plot_plan(title, *timelines, self.budget_bytes, Path(path), moved)

    def report(self, path: str | Path, curve: CurveLike | None = None) -> Path:
        """Write a page that opens in a browser, without a network; return its path.

        On it are the account of the job (or what the peak consists of), memory over the step with
        what is alive at any moment, the decisions as a table, and the trade-off. The same plan
        gives the same bytes. What is alive is not in plan files: of a plan that was read from one
        the page has the curve alone, and says so.

        Args:
            path: of the page.
            curve: points of the trade-off: what :func:`ckpt_pass.sweep` returns, or plans of the
                same step for other budgets.

        Raises:
            MissingExtraError: plotly is not installed.
            InvalidCurveError: the curve is none.
        """
        plain = self.predicted.plain_timeline
        points = curve_data(self, None if plain is None else plain.peak_bytes, curve)
        parts = [("the step", self)]
        data = page_data(parts, self.summary(), self.warnings, self.account, points)
        asked = self.budget_bytes
        within = self.policy if asked is None else f"within {format_bytes(asked)}"
        return write_page(f"Plan of the {self.mode} step: {within}", data, Path(path))

    def listing(self) -> str:
        """The summary, and one line a decision; views that cost nothing are left out."""
        return listing(self)

    def __str__(self) -> str:
        return self.overview()
