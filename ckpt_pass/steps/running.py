"""Run a compiled step on fake tensors: its graphs, what runs between them, and the bytes held.

Dynamo compiles the step as it will the real one, the graphs run op by op, and the code between
them runs as it is. Nothing is computed; every value is held by whom it is held on the real run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import ahead, autograd, compilers, functorch
from ckpt_pass._torch.watched import WatchedFakeMode, WatchedMode
from ckpt_pass.compile.engine import Partitioner
from ckpt_pass.eager.answers import Answers, OtherPathError, real_answers
from ckpt_pass.eager.trace_ops import differentiate
from ckpt_pass.graph.capture import (
    LossFn,
    NotTraceableError,
    input_words,
    raise_for,
    scripted_in,
    whole_step,
)
from ckpt_pass.graph.held import device_type_of
from ckpt_pass.state.holders import Reached
from ckpt_pass.state.untouched import random_state_restored, untouched
from ckpt_pass.steps.graphs import Graphs, StepRun
from ckpt_pass.steps.halves import LostValuesError

#: The first run compiles; what a step makes at first use is there in the second, and may make
#: dynamo compile it anew.
_MOST_RUNS = 4


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

    @contextlib.contextmanager
    def opened(self, partitioner: Partitioner) -> Iterator[StepRuns]:
        """Compile the step with ``aot_eager`` halves, run forward and backward, count bytes.

        Inside the ``with`` block it can be run with other plans. Its tensors are fake there.

        Args:
            partitioner: decides for each graph.

        Raises:
            NotTraceableError: the code between the graphs fails on fake tensors.
            OtherPathError: the forward goes another way when it is called again.
            NothingToDifferentiateError: there is no backward.
        """
        with ExitStack() as stack:
            with _told(self.model):
                runs = self._in_some_way(partitioner, stack)
            yield runs

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

    def _in_some_way(self, partitioner: Partitioner, stack: ExitStack) -> StepRuns:
        """On fake tensors; told of values where it looks at them; or for real where it must be."""
        if scripted_in(self.model) is not None:
            return stack.enter_context(self._for_real(partitioner))
        try:
            return stack.enter_context(self._on_fakes(partitioner, None))
        except autograd.NO_VALUES:
            if any(autograd.is_fake(t) or t.is_meta for t in Reached(self._roots).tensors):
                raise
        try:
            return stack.enter_context(self._on_fakes(partitioner, self._real_answers()))
        # On fake tensors it goes another way, or sizes depend on values in its graphs. Under a mode
        # of torch functions dynamo fails with an AttributeError where resumed code draws a number
        # (random, numpy; torch 2.13); the user's own comes again.
        except (OtherPathError, RuntimeError, AttributeError, *autograd.NO_VALUES):
            pass
        return stack.enter_context(self._for_real(partitioner))

    @property
    def _roots(self) -> tuple[Any, ...]:
        return self.model, self.loss_fn, self.args, dict(self.kwargs)

    @contextlib.contextmanager
    def _on_fakes(self, partitioner: Partitioner, answers: Answers | None) -> Iterator[StepRuns]:
        mode = WatchedFakeMode()
        fakes = ahead.Fakes(Reached(self._roots).tensors, mode)
        with untouched(*self._roots, stand_in=fakes) as roots:
            staying = frozenset(id(tensor) for tensor in Reached(roots).tensors)

            def graphs(chosen: Partitioner) -> Graphs:
                words = input_words(self.model, *roots[2:])
                return Graphs(chosen, mode, mode, words, answers, staying)

            yield StepRuns(roots, graphs, lambda: ahead.on_fakes(mode), partitioner)

    @contextlib.contextmanager
    def _for_real(self, partitioner: Partitioner) -> Iterator[StepRuns]:
        """The whole step runs, a few times, and takes the memory of one with nothing recomputed.

        Raises:
            NotTraceableError: inductor is to compile its graphs, whose code can only run dry.
        """
        if partitioner.free is not None:
            raise NotTraceableError(
                f"The step of {type(self.model).__name__} is cut by dynamo, and what runs between "
                "its graphs needs values that fake tensors do not have. Expected a step that runs "
                "on fake tensors for inner='inductor'. Plan with inner='aot_eager' or "
                "mode='eager', or take the breaks out of the model."
            )
        with untouched(*self._roots, values=True) as roots:

            def graphs(chosen: Partitioner) -> Graphs:
                fake = functorch.FakeTensorMode(allow_non_fake_inputs=True)
                words = input_words(self.model, *roots[2:])
                return Graphs(chosen, WatchedMode(), fake, words, None, frozenset())

            yield StepRuns(roots, graphs, compilers.own_profile, partitioner)


class StepRuns:
    """The runs of a step, with one plan after the other.

    Args:
        roots: model, loss function, arguments.
        graphs: makes the backend that sees its graphs.
        inside: what a run is inside of.
        partitioner: decides for each graph in the first run.

    Attributes:
        first: the first run.
    """

    def __init__(
        self,
        roots: tuple[Any, ...],
        graphs: Callable[[Partitioner], Graphs],
        inside: Callable[[], AbstractContextManager[Any]],
        partitioner: Partitioner,
    ) -> None:
        self._roots = roots
        self._make = graphs
        self._inside = inside
        self.first = self._compiled_anew(partitioner)

    def again(self, partitioner: Partitioner) -> StepRun:
        """Run the step with other plans of its graphs; dynamo need not look at it again.

        Args:
            partitioner: decides for each graph.

        Raises:
            NotTraceableError and others: as :meth:`FakeStep.opened`.
        """
        with _told(self._roots[0]):
            try:
                self._graphs.decide_again(partitioner)
                return self._run()
            except LostValuesError:
                pass
            return self._compiled_anew(partitioner)

    def _compiled_anew(self, partitioner: Partitioner) -> StepRun:
        model, loss_fn, *_ = self._roots
        with self._inside():
            self._graphs = self._make(partitioner)
            step = whole_step(model, loss_fn)
            self._compiled = compilers.compile_apart(step, self._graphs, None)
        try:
            return self._run()
        except LostValuesError:
            raise NotTraceableError(
                f"A graph of {type(model).__name__}'s step takes or returns other values when "
                f"{'inductor' if partitioner.free is not None else 'another plan'} makes it, so "
                "that its graphs cannot be planned together. Expected graphs that are the same "
                "but for what is saved. Change no tensor in place that came over a graph break, "
                "take the break out, or plan with inner='aot_eager' or mode='eager'."
            ) from None

    def _run(self) -> StepRun:
        """Run it until dynamo makes no more graphs."""
        graphs = self._graphs
        with self._inside():
            leaves = [tensor for tensor in Reached(self._roots).tensors if tensor.is_leaf]
            for _ in range(_MOST_RUNS):
                before = len(graphs.seen)
                graphs.begin(device_type_of(leaves))
                # Each run draws what the user's next step will: layers are dropped by chance, say.
                try:
                    with random_state_restored(), graphs.watched():
                        self._step()
                finally:
                    for leaf in leaves:
                        leaf.grad = None
                if len(graphs.seen) == before:
                    break
            return graphs.found()

    def _step(self) -> None:
        model, _, args, kwargs = self._roots
        value = self._compiled(*args, **kwargs)
        self._graphs.backward = True
        differentiate(model, value)


@contextlib.contextmanager
def _told(model: nn.Module) -> Iterator[None]:
    """Whatever the model's own code raises is told with the place."""
    try:
        yield
    except CkptPassError:
        raise
    except Exception as error:
        raise_for(model, error)
