"""The graphs of a step that runs, as a backend of ``torch.compile`` sees them, and what they hold.

Dynamo and AOTAutograd make each graph once. For other plans its halves alone are made again and run
in the place of those that it was compiled with (:mod:`ckpt_pass.steps.halves`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ckpt_pass._torch import ahead, compilers, functorch
from ckpt_pass._torch.random_states import told_of_states
from ckpt_pass._torch.storages import told_of_resizes
from ckpt_pass._torch.watched import WatchedFakeMode, WatchedMode
from ckpt_pass.compile.breaks import graph_break
from ckpt_pass.compile.engine import OPEN, Partitioner
from ckpt_pass.compile.replan import Lowering
from ckpt_pass.eager.answers import Answers, asks
from ckpt_pass.eager.trace_ops import HeldNumbers, Sums, as_really
from ckpt_pass.graph.gradients import leaves_among
from ckpt_pass.graph.held import Curve, HeldBytes
from ckpt_pass.graph.kernels import Kernels
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.plans.goal import as_goal
from ckpt_pass.policy.sites import output_tensors
from ckpt_pass.steps.fused import FusedGraph, fused_graph, lowering_of
from ckpt_pass.steps.halves import Halves, Layout, LostValuesError, layout_of
from ckpt_pass.steps.seen import SeenGraph

#: More than any step takes: nothing is recomputed.
SAVES_ALL = as_goal(1 << 60)


@dataclass
class GraphCall:
    """A run of a graph: from which op of the step to which, in either half.

    Attributes:
        graph: its number among those that were seen.
        forward, backward: moments; ``backward`` is ``None`` where none runs.
    """

    graph: int
    forward: tuple[int, int]
    backward: tuple[int, int] | None = None


@dataclass(frozen=True)
class StepRun:
    """A step that ran.

    Attributes:
        graphs: the graphs with a backward, in the order in which dynamo made them.
        calls: their runs, in order.
        curve: the bytes held at each op, between the graphs too.
        breaks: where dynamo cut the step, and why.
    """

    graphs: tuple[SeenGraph, ...]
    calls: tuple[GraphCall, ...]
    curve: Curve
    breaks: tuple[str, ...]


@dataclass(eq=False)
class Graphs:
    """The backend of a run; watches it, too.

    Attributes:
        partitioner: decides for each graph.
        mode: tells of the ops that run.
        fake: for tensors without data; the same where the step runs on such.
        words: what the inputs are, by ``id``.
        answers: what code between the graphs is told of values, if it must be.
        staying: the tensors that are there all the time, by ``id``.
    """

    partitioner: Partitioner
    mode: WatchedFakeMode | WatchedMode
    fake: functorch.FakeTensorMode
    words: Mapping[int, str]
    answers: Answers | None
    staying: frozenset[int]
    seen: list[SeenGraph | None] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    calls: list[GraphCall] = field(default_factory=list)
    layouts: list[Layout | None] = field(default_factory=list)
    instead: dict[int, Halves] = field(default_factory=dict)
    forwards: dict[int, compilers.RunHalf] = field(default_factory=dict)
    kernels: Kernels = field(default_factory=Kernels)
    backward: bool = False

    compiler_name = "ckpt_ahead"

    def begin(self, device_type: str) -> None:
        """Count anew."""
        self.held = HeldBytes(self.fake, device_type)
        self._left = self.answers.anew() if self.answers is not None else None
        self.calls = []
        self.backward = self._inside = False
        self._sums = Sums()
        self._numbers = HeldNumbers()

    @property
    def _is_real(self) -> bool:
        return isinstance(self.mode, WatchedMode)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, what runs is seen."""
        self.mode.watcher = self._watch
        seen = self.mode if isinstance(self.mode, WatchedMode) else contextlib.nullcontext()
        try:
            with seen, told_of_states(self._state_read), told_of_resizes(self._resized):
                yield
        finally:
            self.mode.watcher = None

    def _state_read(self, state: torch.Tensor) -> None:
        """A region between graphs, say, keeps a state of random numbers; graphs count theirs."""
        if self._inside:
            return
        storage = state.untyped_storage()
        weakref.finalize(storage, self.held.hold(storage.nbytes())).atexit = False

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if self.mode.watcher is not None:
            self.held.resized(storage)

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        """Inside, what runs is no part of the step."""
        watcher, self.mode.watcher = self.mode.watcher, None
        try:
            yield
        finally:
            self.mode.watcher = watcher

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        with self._unseen():
            return self._compiled(gm, inputs)

    def _compiled(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        placeholders = gm.graph.find_nodes(op="placeholder")
        names = tuple(
            self.words.get(id(ahead.example(node))) or compilers.placeholder_source(node)
            for node in placeholders
        )
        leaves = leaves_among(inputs)
        cut = graph_break(gm)
        # Others may be seen before AOTAutograd is done with this one.
        index = len(self.seen)
        self.seen.append(None)
        self.layouts.append(None)
        chosen = replace(self.partitioner, input_names=names, leaves=leaves)
        fuses = chosen.free is not None
        lowering = lowering_of(gm, inputs, self.staying, self.fake) if fuses else None
        # Under what is wrapped around its halves, others run: it is to save something.
        eager = (
            replace(chosen, policy=OPEN, goal=SAVES_ALL, plans=(), free=None) if fuses else chosen
        )

        def partition(joint: fx.GraphModule, given: Any, **options: Any) -> Any:
            static = tuple(options.get("static_lifetime_input_indices") or ())
            kept = compilers.with_copied_graph(joint)
            outputs = options["num_fwd_outputs"]
            self.seen[index] = SeenGraph(kept, outputs, static, names, cut, leaves)
            halves = eager(joint, given, **options)
            self.layouts[index] = layout_of(halves[0], outputs)
            return halves

        def around(is_backward: bool, run: compilers.RunHalf, args: list[Any]) -> Any:
            return self._half(index, is_backward, run, args)

        compiled = compilers.compile_eager(gm, inputs, partition, around)
        if lowering is not None:
            self._fuse(index, lowering, chosen, cut)
        self.breaks += [cut] if cut else []
        return compiled

    def _fuse(self, index: int, lowering: Lowering, partitioner: Partitioner, cut: str) -> None:
        """Run what inductor makes of a graph in its place."""
        found = fused_graph(lowering, partitioner, cut, self.fake)
        if isinstance(found, FusedGraph):
            self.seen[index] = found
            self.instead[index] = found.first.halves
        elif found is not None:
            self.forwards[index] = found

    def decide_again(self, partitioner: Partitioner) -> None:
        """Run other halves of the graphs from now on.

        Args:
            partitioner: decides for each graph; for what is compiled from now on as well.

        Raises:
            LostValuesError: they cannot stand in for those that were compiled.
        """
        self.partitioner, self.instead = partitioner, {}
        for index, graph in enumerate(self.seen):
            if graph is None:
                continue
            if self.layouts[index] is None:
                raise LostValuesError
            self.instead[index] = graph.halves(partitioner)

    def _half(self, index: int, is_backward: bool, run: compilers.RunHalf, args: list[Any]) -> Any:
        if self.seen[index] is None:  # it has no backward
            return self.forwards.get(index, run)(args)
        before, self._inside = self._inside, True
        start = self.held.moment
        try:
            result = self._run_half(index, is_backward, run, args)
        finally:
            self._inside = before
        span = start, self.held.moment
        if not is_backward:
            self.calls.append(GraphCall(index, span))
            return result
        open_calls = [c for c in self.calls if c.graph == index and c.backward is None]
        if open_calls:
            open_calls[-1].backward = span
        return result

    def _run_half(
        self, index: int, is_backward: bool, run: compilers.RunHalf, args: list[Any]
    ) -> Any:
        halves, compiled = self.instead.get(index), self.layouts[index]
        if halves is None or compiled is None:
            return run(args)
        if is_backward:
            return halves.run_backward(args, compiled)
        return halves.run_forward(args, compiled, self._unseen)

    def _watch(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[Any], Any]
    ) -> Any:
        if op_name(func).startswith("prim."):
            return run(func)
        self._numbers.begins()
        if self._left is not None and not self.backward and asks(func):
            with self.fake:
                result = self._left.next(func)
        else:
            between = self.backward and not self._inside
            joins = between and self._sums.adds_up(func, args, kwargs)
            result = run(torch.ops.aten.add_.Tensor if joins else func)
        if not self._inside:
            given = list(output_tensors((*args, *kwargs.values())))
            numbers = self._numbers.bytes_of(func, args, given)
            self._numbers.ran(func, given, result)
            let_go = self.held.hold(numbers) if numbers else None
            if let_go is not None and self.backward:
                self._numbers.hold(let_go)
        looks = None if self._inside or self._is_real else self._as_really
        result = self.held.note(func, args, kwargs, result, self._where(func), looks)
        self._sums.note(result)
        return result

    def _as_really(self, call: fx.Node, result: Any, given: set[int]) -> Any:
        """What an op between the graphs returns, made to look as its kernel's: others see it."""
        with self.fake:
            return as_really(call, result, self.kernels, given)

    def _where(self, func: Any) -> str:
        half = "backward" if self.backward else "forward"
        place = f"a graph's {half}" if self._inside else f"the {half}, outside of the graphs"
        return f"in {place}, at {op_name(func)}"

    def found(self) -> StepRun:
        """What the last run was."""
        found = {index: graph for index, graph in enumerate(self.seen) if graph is not None}
        called = {call.graph for call in self.calls}
        # Dynamo makes some anew once it has learnt what changes from step to step.
        known = {graph.looks for index, graph in found.items() if index in called}
        kept = [i for i, graph in found.items() if i in called or graph.looks not in known]
        renamed = {index: number for number, index in enumerate(kept)}
        calls = tuple(replace(call, graph=renamed[call.graph]) for call in self.calls)
        graphs = tuple(found[index] for index in kept)
        breaks = tuple(dict.fromkeys(self.breaks))
        return StepRun(graphs, calls, self.held.curve(), breaks)
