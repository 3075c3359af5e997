"""The graphs of a step as inductor compiles them: the code that it generates runs in their place.

Dynamo cuts the step, and AOTAutograd wraps the graphs, as for ``aot_eager``; where the halves of a
graph would run op by op, the code that inductor has generated for them runs dry instead
(:mod:`ckpt_pass.compile.dry_run`), on the step's own fake tensors. So what the graphs hold for each
other, and what runs between them, is counted as on the real run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ckpt_pass._torch import autograd, compilers, functorch
from ckpt_pass._torch.generated import GeneratedHalf
from ckpt_pass.compile.dry_run import StepPeak, run_dry
from ckpt_pass.compile.engine import Partitioner
from ckpt_pass.compile.replan import Lowering
from ckpt_pass.compile.rounds import Round
from ckpt_pass.graph.calls import fake_like
from ckpt_pass.plans.parts import Replay
from ckpt_pass.plans.value import Plan
from ckpt_pass.steps.halves import Halves, LostValuesError, layout_of
from ckpt_pass.steps.seen import SeenGraph

_Key: TypeAlias = tuple[str, bool, Replay]
"""The graph, whether it is fused with care, and what is decided for it."""


def _key_of(plan: Plan) -> _Key:
    assert plan.inductor is not None and plan.replay is not None, "it was lowered here"
    return plan.fingerprint, plan.inductor.careful, plan.replay


@dataclass(frozen=True)
class Fused:
    """What inductor makes of a plan.

    Attributes:
        plan: with inductor's peak, of the graph alone.
        peak: the same, by halves.
        halves: what runs where the graph's halves do.
    """

    plan: Plan
    peak: StepPeak
    halves: Halves


@dataclass(frozen=True)
class FusedGraph(SeenGraph):
    """A graph that inductor is to compile; its joint graph is the one that inductor splits.

    Attributes:
        lowering: lowers it for one plan after the other.
        fake: the mode of the step's tensors.
        known: what was made of plans so far.
    """

    lowering: Lowering = field(kw_only=True)
    fake: functorch.FakeTensorMode = field(kw_only=True)
    known: dict[_Key, Fused] = field(default_factory=dict, kw_only=True)

    def plan(self, partitioner: Partitioner, careful: bool) -> Plan:
        """The plan that a partitioner makes of the graph, with inductor's peak."""
        return self.lowered(partitioner, careful).plan

    def halves(self, partitioner: Partitioner) -> Halves:
        """What inductor makes of what a partitioner decides, or of one of its plans."""
        for plan in partitioner.plans:
            if _key_of(plan) in self.known:
                return self.known[_key_of(plan)].halves
        return self.lowered(partitioner, careful=False).halves

    @property
    def first(self) -> Fused:
        """What inductor made of what was decided at first."""
        return next(iter(self.known.values()))

    def peak_of(self, plan: Plan) -> StepPeak:
        """By halves, the peak of a plan that was made here."""
        return self.known[_key_of(plan)].peak

    def lowered(self, partitioner: Partitioner, careful: bool) -> Fused:
        """Have inductor generate code for what is decided, and run that dry.

        Raises:
            InfeasibleBudgetError: no plan of the graph fits.
            DryRunError: the code needs data to be followed.
        """
        chosen = replace(partitioner, input_names=self.input_names, leaves=self.leaves)
        made, split = _lowered(self.lowering, chosen, careful)
        assert split is not None, "a graph with a backward is split"
        return self.remember(made, split)

    def remember(self, made: Round, split: _Split) -> Fused:
        """Keep what inductor has made of a plan."""
        plan = made.planned()
        assert plan is not None, "a graph with a backward has a plan"
        forward, backward = split.halves
        layout = layout_of(forward, self.num_fwd_outputs)
        if layout is None:
            raise LostValuesError
        halves = Halves(
            _run_of(made.halves, False, forward, self.fake),
            _run_of(made.halves, True, backward, self.fake),
            layout,
            len(backward.graph.find_nodes(op="placeholder")),
        )
        found = self.known[_key_of(plan)] = Fused(plan, made.peak, halves)
        return found


def fused_graph(
    lowering: Lowering,
    partitioner: Partitioner,
    graph_break: str,
    fake: functorch.FakeTensorMode,
) -> FusedGraph | compilers.RunHalf | None:
    """A graph as inductor makes it of what a partitioner decides.

    Returns:
        The graph; what runs where it does, if it has no backward; ``None`` where nothing is
        computed in it.
    """
    made, split = _lowered(lowering, partitioner, careful=False)
    if split is None:
        return _run_of(made.halves, False, None, fake) if made.halves else None
    found = FusedGraph(
        split.joint,
        split.options["num_fwd_outputs"],
        tuple(split.options.get("static_lifetime_input_indices") or ()),
        partitioner.input_names,
        graph_break,
        partitioner.leaves,
        lowering=lowering,
        fake=fake,
    )
    found.remember(made, split)
    return found


def lowering_of(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    staying: frozenset[int],
    fake: functorch.FakeTensorMode,
) -> Lowering:
    """What lowers a graph of a step again and again, and holds nothing of the step.

    Args:
        gm, inputs: dynamo's graph and its example inputs.
        staying: the tensors that are there all the time, by ``id``.
        fake: the mode of the step's tensors.
    """

    passing = [v for v in inputs if isinstance(v, Tensor) and id(v) not in staying]
    with fake, torch.enable_grad():
        stand_ins = _stand_ins(passing)
    given = [stand_ins.get(id(value), value) for value in inputs]
    return Lowering(compilers.copied(gm), given, {}, None, kept=False)


def _stand_ins(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """By its ``id``, what looks like each tensor; those that share memory are views of one."""
    groups: dict[int, list[Tensor]] = {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        strided = tensor.layout is torch.strided
        key = tensor.untyped_storage()._cdata if strided else -id(tensor)
        groups.setdefault(key, []).append(tensor)
    found: dict[int, Tensor] = {}
    for group in groups.values():
        first = min(group, key=Tensor._is_view)  # what the others are views of, if it is there
        is_base = len(group) == 1 or not first._is_view()
        base = fake_like(first) if is_base else _memory_like(first)
        if first.is_leaf:
            base.requires_grad_(first.requires_grad)
        else:  # what is no leaf may be changed in place
            base = autograd.with_history(base)
        for tensor in group:
            with torch.set_grad_enabled(tensor.requires_grad):
                place = tensor.size(), tensor.stride(), tensor.storage_offset()
                whole = is_base and tensor is first
                found[id(tensor)] = base if whole else base.as_strided(*place)
    return found


def _memory_like(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor looks at, in a row."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.empty(count, dtype=tensor.dtype, device=tensor.device)


@dataclass(frozen=True)
class _Split:
    """A call of a partition function: the joint graph as it was, torch's keywords, both halves."""

    joint: fx.GraphModule
    options: Mapping[str, Any]
    halves: tuple[fx.GraphModule, fx.GraphModule]


@dataclass(frozen=True)
class _Telling(Partitioner):
    """A partitioner that tells what it was given and what it returned."""

    told: list[_Split] = field(default_factory=list)

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint = compilers.with_copied_graph(gm)
        halves = super().__call__(gm, joint_inputs, **kwargs)
        self.told.append(_Split(joint, kwargs, halves))
        return halves


def _lowered(
    lowering: Lowering, partitioner: Partitioner, careful: bool
) -> tuple[Round, _Split | None]:
    own = {one.name: getattr(partitioner, one.name) for one in fields(Partitioner)}
    telling = _Telling(**own)
    with functorch.without_modes():
        made = lowering.lowered(telling, careful)
    return made, telling.told[-1] if telling.told else None


def _run_of(
    halves: Sequence[GeneratedHalf],
    is_backward: bool,
    graph: fx.GraphModule | None,
    fake: functorch.FakeTensorMode,
) -> compilers.RunHalf:
    """What runs a half: its code, or its graph where inductor has generated none for it."""
    half = next((one for one in halves if one.is_backward is is_backward), None)
    if half is None:
        assert graph is not None
        return compilers.half_as_it_is(graph)
    with fake:
        constants = {name: fake_like(value) for name, value in half.constants.items()}
    return lambda args: run_dry(half, constants, args)
