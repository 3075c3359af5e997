"""Run a compiled step on fake tensors: its graphs, what runs between them, and the bytes held.

Dynamo compiles the step as it will the real one, the graphs run op by op, and the code between
them runs as it is. Nothing is computed; every value is held by whom it is held on the real run.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import ahead, autograd, compilers, functorch
from ckpt_pass._torch.random_states import told_of_states
from ckpt_pass._torch.watched import WatchedFakeMode, WatchedMode
from ckpt_pass.compile.breaks import graph_break
from ckpt_pass.compile.engine import Partitioner
from ckpt_pass.eager.answers import Answers, OtherPathError, asks, real_answers
from ckpt_pass.eager.trace_ops import (
    HeldNumbers,
    Sums,
    as_really,
    differentiate,
    saved_numbers_bytes,
)
from ckpt_pass.graph.capture import (
    LossFn,
    input_words,
    raise_for,
    whole_step,
)
from ckpt_pass.graph.gradients import leaves_among
from ckpt_pass.graph.held import Curve, HeldBytes, device_type_of
from ckpt_pass.graph.joint import JointGraph, read_joint
from ckpt_pass.graph.kernels import Kernels
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.policy.sites import output_tensors
from ckpt_pass.state.holders import Reached
from ckpt_pass.state.untouched import random_state_restored, untouched

#: The first run compiles; what a step makes at first use is there in the second, and may make
#: dynamo compile it anew.
_MOST_RUNS = 4


@dataclass(frozen=True)
class SeenGraph:
    """One of dynamo's graphs of a step, that has a backward.

    Attributes:
        module: its joint graph, before anything was decided.
        num_fwd_outputs, static_inputs: what AOTAutograd says of it.
        input_names: what goes in, in the user's words.
        graph_break: where dynamo cut the step after it, and why; empty where it did not.
        leaves: which inputs are leaves that require gradients.
    """

    module: fx.GraphModule
    num_fwd_outputs: int
    static_inputs: tuple[int, ...]
    input_names: tuple[str, ...]
    graph_break: str
    leaves: frozenset[int]

    @cached_property
    def looks(self) -> str:
        """A hash of its ops, edges, shapes and dtypes; names of modules do not matter."""
        nodes = list(self.module.graph.nodes)
        number = {node: index for index, node in enumerate(nodes)}
        digest = hashlib.sha256(
            f"{self.num_fwd_outputs}/{self.static_inputs}/{sorted(self.leaves)}".encode()
        )
        for node in nodes:
            args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
            target = op_name(node.target) if node.op == "call_function" else node.op
            value = node.meta.get("val")
            looks = (getattr(value, "dtype", ""), list(getattr(value, "shape", ())))
            digest.update(f"{target}{args}{looks}\n".encode())
        return digest.hexdigest()

    def joint(self, regions: tuple[str, ...] | None) -> JointGraph:
        """The graph, read anew: what is decided for it changes a copy."""
        module = compilers.with_copied_graph(self.module)
        module.graph.eliminate_dead_code()
        names, outputs = list(self.input_names), self.num_fwd_outputs
        return read_joint(module, outputs, self.static_inputs, regions, names, self.leaves)


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


@dataclass(frozen=True)
class FakeStep:
    """A step that can be run on fake tensors; nothing of it is changed.

    Attributes:
        model, args, kwargs: the call; tensors stand for their looks.
        loss_fn: applied to what the model returns, if that is no loss.
        regions: FQN patterns of the layers.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss_fn: LossFn | None = None
    regions: tuple[str, ...] | None = None

    def run(self, partitioner: Partitioner) -> StepRun:
        """Compile the step with ``aot_eager`` halves, run forward and backward, count bytes.

        Args:
            partitioner: decides for each graph.

        Raises:
            NotTraceableError: the code between the graphs fails on fake tensors.
            OtherPathError: the forward goes another way when it is called again.
            NothingToDifferentiateError: there is no backward.
        """
        try:
            return self._in_some_way(partitioner)
        except CkptPassError:
            raise
        except Exception as error:  # whatever the model's own code raises, with the place
            raise_for(self.model, error)

    def _real_answers(self) -> Answers:
        """What the code between the graphs is told of values: the forward runs for real.

        It runs compiled, so that the same code is left to Python, and once before, so that it is
        compiled then.
        """
        step = whole_step(self.model, self.loss_fn)
        compiled = compilers.compile_apart(step, compilers.run_graphs, None)
        with compilers.own_profile():
            self._run_for_real(compiled)
            return real_answers(lambda: self._run_for_real(compiled))

    def _run_for_real(self, compiled: Callable[..., Any]) -> None:
        with untouched(self.model, self.loss_fn, self.args, self.kwargs, values=True):
            compiled(*self.args, **self.kwargs)

    def _in_some_way(self, partitioner: Partitioner) -> StepRun:
        """On fake tensors; told of values where it looks at them; or for real where it must be."""
        try:
            return self._on_fakes(partitioner, None)
        except autograd.NO_VALUES:
            if any(autograd.is_fake(t) or t.is_meta for t in Reached(self._roots).tensors):
                raise
        try:
            return self._on_fakes(partitioner, self._real_answers())
        except (OtherPathError, RuntimeError, *autograd.NO_VALUES):
            pass  # on fake tensors it goes another way, or sizes depend on values in its graphs
        return self._for_real(partitioner)

    @property
    def _roots(self) -> tuple[Any, ...]:
        return self.model, self.loss_fn, self.args, dict(self.kwargs)

    def _on_fakes(self, partitioner: Partitioner, answers: Answers | None) -> StepRun:
        mode = WatchedFakeMode()
        fakes = ahead.Fakes(Reached(self._roots).tensors, mode)
        with untouched(*self._roots, stand_in=fakes) as roots, ahead.on_fakes(mode):
            graphs = _Graphs(partitioner, mode, mode, input_words(self.model, *roots[2:]), answers)
            return self._run(roots, graphs)

    def _for_real(self, partitioner: Partitioner) -> StepRun:
        """The whole step runs, a few times, and takes the memory of one with nothing recomputed."""
        mode = WatchedMode()
        with untouched(*self._roots, values=True) as roots, compilers.own_profile():
            words = input_words(self.model, *roots[2:])
            fake = functorch.FakeTensorMode(allow_non_fake_inputs=True)
            return self._run(roots, _Graphs(partitioner, mode, fake, words, None))

    def _run(self, roots: tuple[Any, ...], graphs: _Graphs) -> StepRun:
        model, loss_fn, args, kwargs = roots
        leaves = [tensor for tensor in Reached(roots).tensors if tensor.is_leaf]
        compiled = compilers.compile_apart(whole_step(model, loss_fn), graphs, None)
        for _ in range(_MOST_RUNS):
            before = len(graphs.seen)
            graphs.begin(device_type_of(leaves))
            # Each run draws what the user's next step will: layers are dropped by chance, say.
            with random_state_restored(), graphs.watched():
                self._step(compiled, args, kwargs, graphs)
            for leaf in leaves:
                leaf.grad = None
            if len(graphs.seen) == before:
                break
        return graphs.found()

    def _step(self, compiled: Callable[..., Any], args: Any, kwargs: Any, graphs: _Graphs) -> None:
        value = compiled(*args, **kwargs)
        graphs.backward = True
        differentiate(self.model, value)


@dataclass(eq=False)
class _Graphs:
    """The backend of a run; watches it, too.

    Attributes:
        partitioner: decides for each graph.
        mode: tells of the ops that run.
        fake: for tensors without data; the same where the step runs on such.
        words: what the inputs are, by ``id``.
        answers: what code between the graphs is told of values, if it must be.
    """

    partitioner: Partitioner
    mode: WatchedFakeMode | WatchedMode
    fake: functorch.FakeTensorMode
    words: Mapping[int, str]
    answers: Answers | None
    seen: list[SeenGraph | None] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    calls: list[GraphCall] = field(default_factory=list)
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
            with seen, told_of_states(self._state_read):
                yield
        finally:
            self.mode.watcher = None

    def _state_read(self, state: torch.Tensor) -> None:
        """A region between graphs, say, keeps a state of random numbers; graphs count theirs."""
        if self._inside:
            return
        storage = state.untyped_storage()
        weakref.finalize(storage, self.held.hold(storage.nbytes())).atexit = False

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        watcher, self.mode.watcher = self.mode.watcher, None  # a compilation is no part of a step
        try:
            return self._compiled(gm, inputs)
        finally:
            self.mode.watcher = watcher

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
        chosen = replace(self.partitioner, input_names=names, leaves=leaves)

        def partition(joint: fx.GraphModule, given: Any, **options: Any) -> Any:
            static = tuple(options.get("static_lifetime_input_indices") or ())
            kept = compilers.with_copied_graph(joint)
            outputs = options["num_fwd_outputs"]
            self.seen[index] = SeenGraph(kept, outputs, static, names, cut, leaves)
            return chosen(joint, given, **options)

        def around(is_backward: bool, run: Callable[[], Any]) -> Any:
            return self._half(index, is_backward, run)

        compiled = compilers.compile_eager(gm, inputs, partition, around)
        self.breaks += [cut] if cut else []
        return compiled

    def _half(self, index: int, is_backward: bool, run: Callable[[], Any]) -> Any:
        if self.seen[index] is None:  # it has no backward
            return run()
        before, self._inside = self._inside, True
        start = self.held.moment
        try:
            result = run()
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
            between = self.backward and not self._inside and not self._is_real
            joins = between and self._sums.adds_up(func, args, kwargs)
            result = run(torch.ops.aten.add_.Tensor if joins else func)
        if not self._inside:
            numbers = saved_numbers_bytes(func, args, output_tensors((*args, *kwargs.values())))
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
