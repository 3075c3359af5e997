"""The search for a plan whose step keeps to the budget after what inductor makes of it.

Each round is a plan that inductor has lowered: its code tells the peak, and no kernel is compiled
(:mod:`ckpt_pass.compile.dry_run`). Rounds differ by what the planner is asked for, and by whether
inductor fuses with care.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ckpt_pass._torch.generated import GeneratedHalf
from ckpt_pass.compile.dry_run import StepPeak, open_lifetimes
from ckpt_pass.compile.symbolic import peak_of_lifetimes
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.record import InductorPeak
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.sites import Bytes

#: Plans made for less by what the last one was over.
_LOWERED = 2
#: ... and at least so many parts of the budget less.
_STEP = 500
#: Plans made for more, to recompute less, once one is within the budget.
_RAISED = 2
#: ... as long as this share of the budget is left to gain.
_WORTH_IT = 0.03
#: For what recomputes nothing but what costs nothing: fused kernels may need no more for it.
_AMPLE = 1 << 62
#: A cut whose peak before inductor's changes is so many budgets is not tried. Those that stock
#: torch 2.13 reaches its least with have 1.48 (max_unpool2d) and 1.57 times what becomes of them.
_HOPELESS = 2
#: Last resorts: for the least that any plan needs, and so much more of the way to no recomputation.
_LAST_RESORTS = (0.0, 0.1, 0.3)


@dataclass(frozen=True)
class Round:
    """One lowering by inductor; no plan where the graph has no backward.

    Attributes:
        artefacts: its name in torch's caches; empty where they are not used.
        careful: whether inductor was told to fuse with care.
    """

    compiled: Callable[..., Any]
    plan: Plan | None
    peak: StepPeak
    halves: tuple[GeneratedHalf, ...]
    artefacts: str
    careful: bool

    def finished(self) -> Callable[..., Any]:
        """The compiled graph with its kernels."""
        for half in self.halves:
            half.compile_kernels()
        return self.compiled

    def planned(self) -> Plan | None:
        """Its plan, with the peak of what inductor makes of it."""
        return None if self.plan is None else self.taken(self.plan, self.plan.budget_bytes)

    @property
    def is_over(self) -> bool:
        """Whether the peak of what inductor makes of its plan is above the plan's own budget."""
        budget_bytes = self.plan.budget_bytes if self.plan is not None else None
        return budget_bytes is not None and self.peak.nbytes > budget_bytes

    def taken(self, plan: Plan, budget_bytes: int | None, replans: int = 0) -> Plan:
        """The plan of this round for a budget, with the peak of what inductor makes of it."""
        inner = InductorPeak(self.peak.nbytes, replans, self.careful)
        dimensions = plan.dimensions
        expression: Bytes = self.peak.nbytes
        if dimensions:
            expression = peak_of_lifetimes(open_lifetimes(self.halves), dimensions, expression)
        return plan.within_inductor(budget_bytes, inner, self.peak.where, expression)

    @property
    def overhead_s(self) -> float:
        return self.plan.predicted.overhead_s if self.plan is not None else 0.0


@dataclass
class Search:
    """Looks for what to ask the planner for, so that inductor's peak is within the budget.

    First inductor fuses as it does; where no plan of the graph fits, with the cuts at one price for
    every saved byte, too. If that is over the budget, carefully: kernels keep to the order of the
    plan. At last with what needs least, and inductor as it is.

    Attributes:
        planned_for: plans for a number of bytes and lowers the plan, perhaps carefully.
        cut_for: lowers a cut, by its number, whose peak before inductor's changes is no more than
            so many bytes.
        budget_bytes: what the peak may be.
        floor: the least that a plan needs before inductor's changes; 0 where it is not known.
        rounds: how many plans were lowered.
        best: the fastest plan within the budget.
        asked_for_best: what it was made for; ``None`` of a cut.
        careful: how inductor fuses now.
        peaks: inductor's peak by what was asked for, where it fuses so.
        plain_bytes: the peak of the graph with nothing recomputed.
    """

    planned_for: Callable[[int, bool], Round]
    cut_for: Callable[[int, int], Round]
    budget_bytes: int
    floor: int = 0
    rounds: int = 0
    best: Round | None = None
    asked_for_best: int | None = None
    careful: bool = False
    peaks: dict[int, int] = field(default_factory=dict)
    plain_bytes: int = 0

    def add(self, asked: int, found: Round) -> None:
        """Note a plan for so many bytes; it is held only if it is the best."""
        self.peaks[asked] = found.peak.nbytes
        self._note(asked, found)

    def _note(self, asked: int | None, found: Round) -> None:
        assert found.plan is not None
        self.rounds += 1
        plain = found.plan.predicted.plain_timeline
        self.plain_bytes = plain.peak_bytes if plain is not None else 0
        if found.peak.nbytes > self.budget_bytes:
            return
        if self.best is None or found.overhead_s < self.best.overhead_s:
            self.best, self.asked_for_best = found, asked

    def found(self) -> Round:
        """The fastest plan within the budget that is found.

        Raises:
            InfeasibleBudgetError: none is.
        """
        # All last resorts are tried whatever the budget is: what a refusal names can be met.
        peaks = self._reach_far() if self.floor > self.budget_bytes else []
        without_care = self.peaks
        if self.best is None:
            peaks += self._fuse_carefully()
        if self.best is None:
            self.careful, self.peaks = False, without_care
            peaks += self._last_resorts(_AMPLE)
        if self.best is None:
            raise InfeasibleBudgetError(self.budget_bytes, min(peaks, default=self.floor))
        self._raise()
        return self.best

    def _reach_far(self) -> list[int]:
        """No plan of the graph alone fits: those whose kernels need less; inductor's peaks."""
        self._try(self.floor)
        lower = self.peaks.get(self.floor, self.floor) < self.floor
        return self._cuts() if lower else []

    def _fuse_carefully(self) -> list[int]:
        self.careful, self.peaks = True, {}
        if self.floor <= self.budget_bytes:
            self._try(self.budget_bytes)
        self._lower()
        return self._last_resorts()

    def _try(self, asked: int) -> None:
        if asked in self.peaks:
            return
        try:
            self.add(asked, self.planned_for(asked, self.careful))
        except InfeasibleBudgetError as error:
            self.floor = error.least_feasible_bytes

    def _lower(self) -> None:
        """Ask for less by what the last plan was over."""
        for _ in range(_LOWERED):
            if self.best is not None or not self.peaks:
                return
            lowest = min(self.peaks)
            over = self.peaks[lowest] - self.budget_bytes
            # A little more than that: inductor's peak does not fall byte by byte.
            asked = lowest - over - over // 4 - self.budget_bytes // _STEP
            if self.floor and asked <= self.floor:
                return
            self._try(asked)

    def _cuts(self) -> list[int]:
        """Try cuts, fastest first, until one is within the budget; inductor's peaks.

        Where the step needs less than its graph: kernels that reach far never write what is, say,
        unpooled in the backward again (max_unpool2d: 464 kB, 554 with care, 623 of the graph
        alone). The graph does not tell which values these are. What stock inductor saves where it
        needs least is such a cut.
        """
        found: list[int] = []
        while True:
            try:
                cut = self.cut_for(len(found), _HOPELESS * self.budget_bytes)
            except InfeasibleBudgetError:
                return found
            self._note(None, cut)
            found.append(cut.peak.nbytes)
            if cut.peak.nbytes <= self.budget_bytes:
                return found

    def _last_resorts(self, *others: int) -> list[int]:
        """Try what needs least, and others, until one is within the budget; inductor's peaks."""
        found: list[int] = []
        if self.best is not None:
            return found
        if not self.floor:
            self._try(1)
        self._try(max(self.floor, 1))
        above = max(self.plain_bytes - self.floor, 0)
        for asked in (*(self.floor + int(share * above) for share in _LAST_RESORTS), *others):
            if self.best is None:
                self._try(asked)
                found += [self.peaks[asked]] if asked in self.peaks else []
        return found

    def _raise(self) -> None:
        """Ask for more while inductor's peak is well below the budget and ops run again."""
        for _ in range(_RAISED):
            best, asked = self.best, self.asked_for_best
            assert best is not None
            if asked is None:  # a cut: those that recompute less were tried before
                return
            over = min((a for a, p in self.peaks.items() if p > self.budget_bytes), default=None)
            if over is not None and over > asked:
                more = (over - asked) // 2
            else:
                more = self.budget_bytes - best.peak.nbytes
            room = min(more, self.budget_bytes - best.peak.nbytes)
            if not best.overhead_s or room < _WORTH_IT * self.budget_bytes:
                return
            self._try(asked + more)
