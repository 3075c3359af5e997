"""Record an eager training step on fake tensors: what it runs, allocates, saves and lets go.

The model's own Python runs, and torch's autograd engine, as in a real step; nothing is computed.
Autograd's saved values are described and not kept, so that the record tells how long Python alone
holds each storage; when autograd would have let go is recorded beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ckpt_pass._torch import autograd, functorch
from ckpt_pass._torch.random_states import told_of_states
from ckpt_pass._torch.storages import told_of_resizes
from ckpt_pass._torch.switches import autocast_caches
from ckpt_pass._torch.wrappers import awaited, shapes_of_the_whole_aside, wraps
from ckpt_pass.eager.answers import Answers, asks
from ckpt_pass.eager.constants import Constants
from ckpt_pass.eager.masks import Masks
from ckpt_pass.eager.module_calls import ModuleCalls
from ckpt_pass.eager.packed import Packed
from ckpt_pass.eager.real_numbers import Maker, RealNumbers, is_number
from ckpt_pass.eager.real_paths import RealPaths
from ckpt_pass.eager.step_memory import StepMemory
from ckpt_pass.eager.step_record import (
    LOCAL,
    EagerTrace,
    OpRecord,
    StorageRecord,
)
from ckpt_pass.eager.trace_ops import (
    HeldNumbers,
    Sums,
    as_really,
    buffers_moved,
    differentiate,
    fresh_ids,
    has_effects,
    is_taken_over,
    saved_record,
    stand_ins,
    storage_ids,
    tensors_in,
    with_known_shape,
)
from ckpt_pass.eager.two_ways import Formulas
from ckpt_pass.graph.calls import Calls
from ckpt_pass.graph.kernels import Kernels
from ckpt_pass.graph.watching import Watcher
from ckpt_pass.ops.taxonomy import draws_random, op_name
from ckpt_pass.policy.module_stack import ModuleStack
from ckpt_pass.policy.sites import CallSite, ModulePath, SiteCounter, output_tensors
from ckpt_pass.regions.actions import is_cached_cast, is_mutable, overwritten

#: Ops that compute nothing and hold no memory: questions, and marks for a profiler.
_UNSEEN = ("prim.", "profiler.")
#: What stands in a record until its call is written down.
_NO_CALL = fx.Graph()._root
#: The call of an op that does nothing but come to others.
_APART = fx.Graph().call_function(torch.ops.aten.detach.default)


class Recorder(Watcher):
    """Records every op below autograd, and what becomes of the memory."""

    supports_higher_order_operators = True

    def __init__(
        self,
        model: nn.Module,
        fakes: Any,
        buffers: frozenset[int],
        statistics: frozenset[int],
        kernels: Kernels,
        answers: Answers | None = None,
        faked: frozenset[Maker] = frozenset(),
        constants: Constants | None = None,
    ) -> None:
        super().__init__()
        self._kernels = kernels
        self._answers = answers
        self._numbers = RealNumbers(faked)
        self._constants = Constants() if constants is None else constants
        self._fakes = fakes
        self._buffers, self._statistics = buffers, statistics
        self._model = model
        self.trace = EagerTrace()
        self._stack = ModuleStack(model)
        self._sites = SiteCounter()
        self._local_sites = SiteCounter()
        self.memory = StepMemory(self.trace)
        self._asked: dict[int, int] = {}  # when last
        self._written = Calls(fakes)
        self._sums = Sums()
        self._held = HeldNumbers()
        self._masks = Masks()
        self._formulas = Formulas(self.trace)
        self._calls = ModuleCalls(
            model,
            self.trace,
            self._stack,
            self._storages,
            self.memory.number_of,
            self._buffers_among,
        )
        self._backward = False
        self._apart = 0  # ops on tensors that wrap others, in each other
        self._begun = False

    @property
    def moment(self) -> int:
        """How many ops have begun."""
        return len(self.trace.ops)

    def record(self, step: Callable[[], Any], received: bool = False) -> EagerTrace:
        """Run the step and record it.

        A scalar is a loss. Of anything else every output gets a gradient of its own size, as from
        a loss that is computed elsewhere; one that is ``received`` lies where it lay before.

        Raises:
            NothingToDifferentiateError: nothing that it returns requires a gradient.
        """
        with self._following():
            value = self._forward(step)
            returned = self._storages(value)
            self.trace.output_bytes = sum(self.trace.storages[n].nbytes for n in returned)
            self._calls.objects.settle()
            self._backward = True
            differentiate(self._model, value, self._rest() if received else None)
        end = self.moment
        for saved in self.trace.saved:
            saved.released = min(saved.released, end)
        for storage in self.trace.storages:
            storage.dies = min(storage.dies, end)
            storage.born = min(storage.born, max(end - 1, 0))
        self.trace.leave_out_resized()
        return self.trace

    def record_forward(self, step: Callable[[], Any]) -> EagerTrace:
        """Run the forward alone and record it."""
        with self._following():
            self._forward(step)
        return self.trace

    @contextmanager
    def _following(self) -> Iterator[None]:
        states = told_of_states(self._state_read)
        sizes = told_of_resizes(self._resized)
        aside = shapes_of_the_whole_aside()
        with self._stack.followed(), self._calls.followed(), states, sizes, aside, self:
            yield

    def _forward(self, step: Callable[[], Any]) -> Any:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        with hooks, RealPaths(asks=self._answers is not None):
            value = step()
        self.trace.forward_length = self.moment
        return value

    def _storages(self, value: Any) -> tuple[int, ...]:
        """The storages of the step among the tensors of a value."""
        return self.memory.among(storage_ids(tensors_in(value)))

    def _pack(self, value: torch.Tensor) -> Packed:
        self.trace.saved.append(saved_record(value, self.memory.number_of(value), self.moment))
        number = len(self.trace.saved) - 1
        self._masks.pack(value, number)
        return Packed(self.trace, number, value, self._written.maker_of(value), self._real(value))

    def _real(self, value: torch.Tensor) -> torch.Tensor | None:
        """A copy of a real mask or index: the backward asks it for its values as the forward did.

        Autograd's own would keep the storage from dying where Python lets go of it.
        """
        if is_number(value) or autograd.is_fake(value) or value.layout is not torch.strided:
            return None
        if wraps([type(value)]):
            return None
        with self._rest():
            return value.detach().clone()

    def _unpack(self, packed: Packed) -> torch.Tensor:
        if packed.number in self._asked:
            self.trace.asked_again[packed.number] = self._asked[packed.number]
        self._asked[packed.number] = self.moment
        self.trace.asked.setdefault(packed.number, self.moment)
        if packed.real is not None:
            return packed.real
        with self._rest(), self._fakes:  # the value is described again, not allocated
            value = packed.look()
            self._masks.unpack(value, packed.number)
        if packed.made_by is not None:
            self._written.note_maker(value, packed.made_by)
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._resting or op_name(func).startswith(_UNSEEN):
            return func(*args, **kwargs)
        if wraps(types):
            return self._taken_apart(func, args, kwargs)
        if not self._apart and self._sums.adds_up(func, args, kwargs):
            func = torch.ops.aten.add_.Tensor
        elif is_taken_over(func, args):
            func, kwargs = torch.ops.aten.detach.default, {}
        given = [t for t in output_tensors((*args, *kwargs.values()))]
        known = storage_ids(given)
        uses = self.memory.among(known)
        changes = tuple(self._changed(func, args, kwargs))
        unknown = [tensor for tensor in given if not self._constants.knows(tensor)]
        self._numbers.check(unknown, changes, self.memory.number_of)
        self._formulas.note(func, given)
        self._held.begins()
        site = self._site(func)
        index = self.moment
        draws = draws_random(func, args, kwargs)
        cast = is_cached_cast(func, args)
        caches = cast and autocast_caches()
        record = OpRecord(site, _NO_CALL, (), uses, changes, draws, False, cast, caches)
        self.trace.ops.append(record)
        output = self._run(func, args, kwargs, given)
        if draws:
            with self._rest():  # fake tensors draw nothing, and regions look whether anything was
                torch.rand(())
        numbers = self._held.bytes_of(func, args, given)
        if numbers:
            self._hold(StorageRecord(numbers, index, of_graph=not self._backward))
        self._held.ran(func, given, output)
        with self._rest():
            known |= stand_ins(self._fakes, given, output)
            record.call = self._written.node(func, args, kwargs, output)
            output = self._as_really(record.call, output, known)
        self._sums.note(output)
        record.makes = tuple(self.memory.made(output, known - fresh_ids(func, args), index))
        record.effects = has_effects(record, func, args, kwargs, self._buffers)
        record.buffers = self._buffers_among(given)
        if record.buffers and -1 in changes:
            record.moves = tuple(buffers_moved(func, args, kwargs, record.buffers))
        self._numbers.note(record.makes, func, self._stack.running)
        return output

    def _buffers_among(self, tensors: Iterable[torch.Tensor]) -> frozenset[int]:
        """The buffers among some tensors, running statistics apart."""
        return frozenset(storage_ids(tensors) & self._buffers - self._statistics)

    def _taken_apart(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op on tensors that wrap others, as the ops that it comes to on those.

        A region sees the op itself, and counts it: so there is a record of it, which does nothing.
        """
        if self._begun:
            self._begun = False
            return NotImplemented  # the class of the tensors goes on
        site = self._site(func)
        self.trace.ops.append(OpRecord(site, _APART, (), (), (), False, False))
        numbers = self._held.bytes_of(func, args, output_tensors((*args, *kwargs.values())))
        if numbers:
            self._hold(StorageRecord(numbers, self.moment - 1, of_graph=not self._backward))
        self._begun, self._apart = True, self._apart + 1
        try:
            with self:
                return func(*args, **kwargs)
        finally:
            self._begun, self._apart = False, self._apart - 1

    def _state_read(self, state: Tensor) -> None:
        """Count a state of random numbers as long as a region, say, keeps it."""
        if not self._resting:
            storage = state.untyped_storage()
            record = StorageRecord(storage.nbytes(), self.moment, of_graph=not self._backward)
            self.memory.beside(record, storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if not self._resting:
            self.memory.resized(storage)

    def _hold(self, numbers: StorageRecord) -> None:
        """Count what autograd holds of Python's numbers; the graphs of the backward are run."""
        let_go = self.memory.held(numbers)
        if self._backward:
            self._held.hold(let_go)

    def _run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[torch.Tensor]
    ) -> Any:
        """Run an op on fake tensors, and on real ones where it makes whole numbers of such."""
        if self._answers is not None and not self._backward:
            self._masks.note(func, args, self._answers)
        if self._answers is not None and not self._backward and asks(func):
            return self._answered(self._answers, func, args, kwargs, given)
        if any(autograd.is_fake(tensor) for tensor in given):
            found = awaited(op_name(func), given[0])
            if found is not None:
                return found
            if self._backward:  # no Python of the model's runs that could look at values
                chosen = self._masks.chosen(func, args)
                return with_known_shape(func, args, kwargs) if chosen is None else chosen
            return self._constants.run(func, args, kwargs, given)
        if self._numbers.has_to_fake(func, self._stack.running):
            with self._fakes:
                return func(*args, **kwargs)
        if not given:
            with self._fakes:
                output = func(*args, **kwargs)
            if any(is_number(tensor) for tensor in output_tensors(output)):
                self._constants.of_nothing(func, args, kwargs, output)
                return output
        return func(*args, **kwargs)

    def _answered(
        self,
        answers: Answers,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
    ) -> Any:
        """What an op that asks for values answered in the real forward, of fake tensors."""
        with self._fakes:
            answer = answers.next(func)
        if any(autograd.is_fake(tensor) for tensor in given) or not list(output_tensors(answer)):
            return answer
        return func(*args, **kwargs)

    def _as_really(self, call: fx.Node, output: Any, known: set[int]) -> Any:
        with self._fakes:
            found = as_really(call, output, self._kernels, known)
        if found is not output:
            self._written.returns(call, found)
        self._written.note_outputs(call, found)
        return found

    def _site(self, func: Any) -> CallSite | None:
        if self._backward:
            return None
        path: ModulePath = self._stack.path
        if self._apart:  # no op that a region sees
            found = self._local_sites.visit(func, path).site
            return replace(found, op=f"{LOCAL}{found.op}")
        return self._sites.visit(func, path).site

    def _changed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[int]:
        """The storages that an op overwrites."""
        for tensor in overwritten(func, args, kwargs) if is_mutable(func) else ():
            for storage in functorch.storages_of(tensor):
                yield self.memory.number(storage)
