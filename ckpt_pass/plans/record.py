"""What a plan says, without what can be done with it: its fields, in groups that name themselves.

A step that is compiled and one that is not are carried out again in different ways, and each
plan has what its own kind needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ckpt_pass.graph.shapes import Dimension
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.contents import Contents
from ckpt_pass.plans.goal import Goal
from ckpt_pass.plans.link_use import LinkUse
from ckpt_pass.plans.parts import Decision, Replay, SavedActivations, Signature
from ckpt_pass.plans.timeline import Timeline
from ckpt_pass.policy.rules import Policy
from ckpt_pass.policy.sites import Bytes, CallSite
from ckpt_pass.regions.keeps import Moves


@dataclass(frozen=True)
class Asked:
    """What a plan was asked for, so that it can be made again.

    Attributes:
        words: the policy in words.
        policy: the policy itself.
        regions: FQN patterns of the layers; ``None`` where they were found.
        goal: the budget and how it was to be met, if any.
        budget_bytes: the budget as bytes of this step, if any.
    """

    words: str
    policy: Policy
    regions: tuple[str, ...] | None
    goal: Goal | None
    budget_bytes: int | None


@dataclass(frozen=True)
class Predicted:
    """What the planned step will take.

    Attributes:
        peak_bytes: peak of forward and backward above what was allocated before: on the graph as
            it is (``inner="aot_eager"``), or, of a step that inductor compiled for a budget, of
            the code that it generated. Exact where ops allocate nothing but their outputs; what
            kernels need besides is measured where there is a budget, and left out otherwise. At the
            traced shape.
        peak_at: the op that runs at the peak, in words.
        output_bytes: bytes of the forward's outputs, which the caller holds.
        recompute_flops, recompute_time_s: of the forward ops that run again; time is modelled.
        step_flops, step_time_s: of the same step with nothing recomputed.
        timeline: bytes over the step, of symbolic sizes at the traced shape.
        plain_timeline: the same of the step with nothing recomputed; where there is a budget.
        measured_workspaces: how many kernels run with a workspace that was measured, on this
            machine; the peak relies on them.
        offloaded: what is moved to another place and back, if anything might be.
        account: the memory of the whole job, where an optimizer was given.
        gathered_bytes, gather_s: what a rank gets from others of what they share out, and how long
            that takes.
        beside_gradients_bytes: what the gradients keep besides themselves, being parts of something
            larger (of a weight that is put together with a frozen one).
        contents: what is in memory at each place of the timeline; ``None`` in a plan that was read
            from a file, which does not hold it.
    """

    peak_bytes: int
    peak_at: str
    output_bytes: Bytes
    recompute_flops: int
    step_flops: int
    recompute_time_s: float
    step_time_s: float
    timeline: Timeline
    plain_timeline: Timeline | None
    measured_workspaces: int
    offloaded: LinkUse | None = None
    account: Account | None = None
    gathered_bytes: int = 0
    gather_s: float = 0.0
    beside_gradients_bytes: int = 0
    contents: Contents | None = field(default=None, compare=False, repr=False)

    @property
    def overhead_s(self) -> float:
        """Recompute time, what the ops wait for copies, and for what other ranks have."""
        waits_s = self.offloaded.stall_s if self.offloaded else 0.0
        return self.recompute_time_s + waits_s + self.gather_s


@dataclass(frozen=True)
class Proven:
    """How good a plan is, and what found it.

    Attributes:
        solver: what found the plan for the budget, in words; empty without one.
        status: ``optimal`` (no plan within the budget recomputes less), ``feasible``, or
            ``time limit`` (the best that was found in time).
        lower_bound_s: no plan within the budget has less recompute time (where values may be moved:
            recompute time and waiting for copies); 0 where nothing is known.
    """

    solver: str
    status: str
    lower_bound_s: float


@dataclass(frozen=True)
class InductorPeak:
    """What the code that inductor generated for a planned step takes.

    Attributes:
        peak_bytes: its peak.
        replans: how often the plan was made again because of it.
        careful: whether inductor was told to fuse only ops that are near each other.
    """

    peak_bytes: int
    replans: int
    careful: bool = False


@dataclass(frozen=True)
class CompiledExecution:
    """How a compiled plan is carried out again.

    Attributes:
        signature: what the step takes, so that a use for another one is noticed.
        replay: what it does, so that it can be done again without solving.
        peak_expression: the peak for all sizes that were left symbolic, under this same plan; the
            number itself where none was.
        dimensions: those sizes, and the inputs that have them.
        graph_break: where dynamo cut the model after this graph, and why; empty where it did not.
        inductor: inductor's own peak, where it is the inner compiler and the plan was made for it:
            with a budget, or ahead of time.
    """

    signature: Signature
    replay: Replay
    peak_expression: Bytes
    dimensions: tuple[Dimension, ...] = ()
    graph_break: str = ""
    inductor: InductorPeak | None = None


@dataclass(frozen=True)
class EagerExecution:
    """How an eager plan is carried out again: its regions, and what they keep.

    Attributes:
        signature: what the step takes, so that a use for another one is noticed.
        random_regions: the regions that draw random numbers, or may once they are in training mode.
        moves: what regions move: the arguments of one that runs again, or what autograd saves in
            one that does not.
        sharded: the regions whose arguments are sharded.
    """

    signature: Signature
    random_regions: frozenset[str]
    moves: tuple[tuple[str, Moves], ...] = ()
    sharded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PlanRecord:
    """The decisions for one graph.

    Attributes:
        fingerprint: identifies the graph (ops, shapes, dtypes, edges) together with the policy.
        decisions: one for each op execution of the forward, in order.
        saved: the values that the backward gets from the forward.
        regions: the layers or checkpoint regions, in order.
        sites: the call sites of the graph.
        asked: policy, regions, budget.
        predicted: peak, time and flops, memory over time.
        proven: what found the plan, and how far it is from the best one at most.
        execution: how it is carried out again; of one kind for compiled steps, of another for
            eager ones.
    """

    fingerprint: str
    decisions: tuple[Decision, ...]
    saved: SavedActivations
    regions: tuple[str, ...]
    sites: frozenset[CallSite]
    asked: Asked
    predicted: Predicted
    proven: Proven
    execution: CompiledExecution | EagerExecution

    @property
    def policy(self) -> str:
        """The policy, in words."""
        return self.asked.words

    @property
    def mode(self) -> str:
        """``compiled``, or ``eager`` where regions are recomputed as a whole."""
        return "eager" if isinstance(self.execution, EagerExecution) else "compiled"

    @property
    def signature(self) -> Signature:
        """What the step takes."""
        return self.execution.signature

    @property
    def budget_bytes(self) -> int | None:
        """The budget that the plan was made for, if any."""
        return self.asked.budget_bytes

    @property
    def peak_bytes(self) -> int:
        """The predicted peak (:class:`Predicted`)."""
        return self.predicted.peak_bytes

    @property
    def account(self) -> Account | None:
        """The memory of the whole job, where an optimizer was given."""
        return self.predicted.account

    @property
    def saved_bytes(self) -> Bytes:
        """Bytes that the forward holds for the backward, its outputs not counted."""
        return self.saved.saved_bytes

    @property
    def status(self) -> str:
        """``optimal``, ``feasible``, or ``time limit`` (:class:`Proven`)."""
        return self.proven.status

    @property
    def gap(self) -> float:
        """How much shorter the step of the fastest plan may be, as a share of this one's time.

        Against ``proven.lower_bound_s``: where that is 0 and nothing is proven, it is merely the
        share that recomputation has in the step, with what is waited for copies.
        """
        if self.proven.status == "optimal":
            return 0.0
        again_s = self.predicted.overhead_s
        step_s = self.predicted.step_time_s + again_s
        return max(again_s - self.proven.lower_bound_s, 0.0) / step_s if step_s else 0.0

    @property
    def peak_expression(self) -> Bytes:
        """The peak for all sizes that were left symbolic; a number where none was."""
        step = self.execution
        return step.peak_expression if isinstance(step, CompiledExecution) else self.peak_bytes

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The sizes that were left symbolic."""
        return self.execution.dimensions if isinstance(self.execution, CompiledExecution) else ()

    @property
    def replay(self) -> Replay | None:
        """What a compiled plan does again; ``None`` for an eager one."""
        return self.execution.replay if isinstance(self.execution, CompiledExecution) else None

    def with_fate(self, fate: str) -> tuple[Decision, ...]:
        """The decisions whose outcome is ``saved``, ``offloaded``, ``recomputed`` or ``unused``."""
        return tuple(decision for decision in self.decisions if decision.fate == fate)
