"""Plan a job's step at the microbatches that make up a global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._errors import CkptPassError
from ckpt_pass.graph.capture import LossFn, NotTraceableError
from ckpt_pass.graph.cost import ROOFLINES
from ckpt_pass.job.counting import Around
from ckpt_pass.job.jobs import Job
from ckpt_pass.job.totals import InfeasibleTotalError, JobAsked
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.state.untouched import random_state_restored
from ckpt_pass.tools.ahead import plan
from ckpt_pass.tools.arguments import step_arguments
from ckpt_pass.tools.fitting import largest_that_fits

#: Makes the arguments of one forward: a tensor, a tuple of arguments, or a mapping of named ones.
MakeBatch: TypeAlias = Callable[[int], Any]
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class TuneArgumentError(CkptPassError):
    """A global batch, microbatches or a function that makes them that tune cannot work with."""


@dataclass(frozen=True)
class Way:
    """How a step is run: candidates of one way differ in their microbatches alone.

    Attributes:
        mode, inner, offload: as for :func:`ckpt_pass.plan`.
    """

    mode: str
    inner: str
    offload: OffloadLike | None = None

    def __str__(self) -> str:
        inner = f" ({self.inner})" if self.mode == "compiled" and self.inner != "aot_eager" else ""
        return f"{self.mode}{inner}{', offload' if self.offload is not None else ''}"


@dataclass(frozen=True, eq=False)
class Planned:
    """A microbatch and what came of planning its step.

    Attributes:
        way, microbatch, accumulate: which.
        plan: ``None`` where none fits, or none was tried because a smaller one does not.
        error: why none fits.
        refused: why there is no step of this size (batch normalisation of one sample).
    """

    way: Way
    microbatch: int
    accumulate: int
    plan: Plan | StepPlan | None = None
    error: InfeasibleTotalError | None = None
    refused: NotTraceableError | None = None

    @property
    def account(self) -> Account:
        """Of the job with this step."""
        assert self.plan is not None and self.plan.account is not None
        return self.plan.account

    @property
    def keeps_gradients(self) -> bool:
        """Whether a forward and backward adds to gradients that are there."""
        return self.account.keeps_gradients

    @property
    def kind(self) -> str:
        """In words, with which others its time goes: regions of an eager step take theirs, too."""
        regions = self.way.mode == "eager" and self.overhead_s > 0
        return f"{self.way}, with regions" if regions else str(self.way)

    @property
    def overhead_s(self) -> float:
        """Modelled seconds of recomputing, and of waiting for copies."""
        if isinstance(self.plan, StepPlan):
            return self.plan.recompute_time_s
        assert self.plan is not None
        return self.plan.predicted.overhead_s

    @property
    def own_s(self) -> float:
        """Modelled seconds of the forward and backward alone."""
        assert self.plan is not None
        if isinstance(self.plan, StepPlan):
            return self.plan.step_time_s
        return self.plan.predicted.step_time_s

    @property
    def recompute_share(self) -> float:
        """The one by the other."""
        return self.overhead_s / self.own_s if self.own_s else 0.0

    def pass_s(self, bytes_per_s: float) -> float:
        """Modelled seconds of a forward and backward that adds to the gradients, if it does."""
        added = 3 * self.account.gradients_bytes if self.keeps_gradients else 0
        return self.own_s + self.overhead_s + added / bytes_per_s


def microbatches_of(global_batch: int, asked: Iterable[int] | None) -> tuple[int, ...]:
    """The microbatches that make up a global batch exactly, in order.

    Args:
        global_batch: samples of an optimizer's step.
        asked: these alone; all divisors where ``None``.

    Raises:
        TuneArgumentError: there is no such batch, or one that is asked for does not divide it.
    """
    if not _is_count(global_batch):
        raise TuneArgumentError(
            f"Got global_batch={global_batch!r}, expected how many samples an optimizer's step "
            "has, 1 or more."
        )
    divisors = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
    if asked is None:
        return tuple(divisors)
    found = sorted(set(asked), key=lambda n: n if _is_count(n) else 0)
    wrong = [n for n in found if n not in divisors]
    if wrong or not found:
        raise TuneArgumentError(
            f"Got microbatches={found} for global_batch={global_batch}, expected sizes that divide "
            f"it, so that it is met exactly: of {', '.join(map(str, divisors))}."
        )
    return tuple(found)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass
class Batches:
    """The arguments at each microbatch, made when they are asked for; checks what is made.

    The random state is left as it was.
    """

    model: nn.Module
    make_batch: MakeBatch
    tool: Callable[..., Any]
    _looks: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.make_batch):
            raise TuneArgumentError(
                f"Got make_batch of type {type(self.make_batch).__name__}, "
                "expected a function: make_batch(8) returns the model's arguments for 8 samples."
            )

    def at(self, microbatch: int) -> Arguments:
        """The positional and the named arguments of a microbatch.

        Raises:
            TuneArgumentError: what is made does not depend on the size.
            StepArgumentError: the model does not take it.
        """
        with random_state_restored():
            made = self.make_batch(microbatch)
        args, kwargs = _as_arguments(made)
        step_arguments(self.model, self.tool, args, kwargs, {})
        self._check(microbatch, (args, kwargs))
        return args, kwargs

    def _check(self, microbatch: int, made: Arguments) -> None:
        shapes = [tuple(t.shape) for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        for size, known in self._looks.items():
            if size != microbatch and known == shapes:
                raise TuneArgumentError(
                    f"make_batch({size}) and make_batch({microbatch}) make tensors of the same "
                    f"shapes {shapes}, expected as many samples as it is called with."
                )
        self._looks[microbatch] = shapes


def _as_arguments(made: Any) -> Arguments:
    if isinstance(made, Mapping):
        return (), dict(made)
    return (tuple(made) if isinstance(made, (tuple, list)) else (made,)), {}


@dataclass(frozen=True)
class Planner:
    """Plans candidates.

    Attributes:
        batches: the arguments.
        loss_fn, how: of every plan (:func:`ckpt_pass.plan`).
        asked: the job; how many microbatches it adds up is the candidate's.
        tell: called before each plan.
    """

    batches: Batches
    loss_fn: LossFn | None
    how: Mapping[str, Any]
    asked: JobAsked
    tell: Callable[[str], None]

    def planned(self, way: Way, microbatches: Sequence[int], global_batch: int) -> list[Planned]:
        """The candidates of a way: those that fit with a plan, and the rest.

        How large a microbatch fits is searched for; all below it are planned.
        """
        found: dict[int, Planned] = {}

        def fits(place: int) -> bool:
            if place > len(several):
                return False
            size = several[place - 1]
            if size not in found:
                found[size] = self._one(way, size, global_batch // size)
            return found[size].plan is not None

        # A step of one microbatch lets go of its gradients: it may take less than a smaller one.
        several = [size for size in microbatches if size < global_batch]
        while several:  # the smallest ones may not run at all
            size = several[0]
            found[size] = self._one(way, size, global_batch // size)
            if found[size].refused is None:
                break
            del several[0]
        most = largest_that_fits(fits, 1) if several else 0
        for place in range(1, most + 1):
            fits(place)
        whole = [size for size in microbatches if size == global_batch]
        for size in whole:
            if self._may_fit(found.values()):
                found[size] = self._one(way, size, 1)
        return [found.get(size, Planned(way, size, global_batch // size)) for size in microbatches]

    def _may_fit(self, smaller: Iterable[Planned]) -> bool:
        """Whether a step of one microbatch may, that leaves no gradients while it runs."""
        return all(
            one.error.needed_bytes - one.error.account.gradients_bytes <= one.error.total_bytes
            for one in smaller
            if one.error is not None
        )

    def _one(self, way: Way, microbatch: int, accumulate: int) -> Planned:
        self.tell(f"planning {accumulate} x {microbatch}, {way}")
        model = self.batches.model
        args, kwargs = self.batches.at(microbatch)
        job = replace(self.asked.job, accumulate=accumulate)
        keeps = job.keeps_gradients and way.mode == "eager"

        def made(budget_bytes: int | None) -> Plan | StepPlan:
            return plan(
                model,
                *args,
                budget=budget_bytes,
                gradients="kept" if keeps else None,
                loss_fn=self.loss_fn,
                mode=way.mode,
                inner=way.inner,
                offload=way.offload,
                kwargs=kwargs,
                **self.how,
            )

        found = Planned(way, microbatch, accumulate)
        try:
            around = Around.of_step(model, args, kwargs, self.loss_fn)
            return replace(found, plan=replace(self.asked, job=job).planned(around, made))
        except InfeasibleTotalError as error:
            return replace(found, error=error)
        except NotTraceableError as error:
            return replace(found, refused=error)

    def cures(self, way: Way, microbatch: int, accumulate: int) -> None:
        """Say why a candidate does not fit, with what would make it fit.

        Raises:
            InfeasibleTotalError: it does not.
        """
        args, kwargs = self.batches.at(microbatch)
        plan(
            self.batches.model,
            *args,
            total=self.asked.total,
            optimizer=replace(self.asked.job, accumulate=accumulate),
            loss_fn=self.loss_fn,
            mode=way.mode,
            inner=way.inner,
            offload=way.offload,
            kwargs=kwargs,
            **self.how,
        )


def bandwidth_of(asked: JobAsked, account: Account) -> float:
    """Bytes a second that elementwise work on parameters moves, by the modelled rates."""
    paper = asked.device
    if paper is not None:
        return paper.attained * paper.bytes_per_s
    kind = torch.device(account.device).type
    return ROOFLINES.get(kind, ROOFLINES["cuda"]).bytes_per_s


def modelled_update_s(account: Account, job: Job, bytes_per_s: float) -> float:
    """Modelled seconds of an optimizer's step: what it reads and writes, and clipping before it."""
    moved = 2 * (account.states_bytes + account.gradients_bytes) + account.gradients_bytes
    clipped = 3 * account.gradients_bytes if job.clip_norm is not None else 0
    return (moved + clipped) / bytes_per_s
