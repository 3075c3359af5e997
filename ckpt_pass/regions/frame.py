"""One run of an eager checkpoint region: its forward now, its recomputation when backward asks.

Autograd's saved values go through a pair of hooks (``torch.autograd.graph.saved_tensors_hooks``),
as in ``torch.utils.checkpoint`` without reentrance: the forward keeps a number for each, the first
one that the backward asks for makes the region run again, which fills them all in. What torch does
besides and a region rarely needs is left out or made cheap: the random state is kept only where
random numbers were drawn, arguments are kept by reference unless hooks are active around the
region, a saved value is described by its looks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import record_function

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import autograd, functorch, modules
from ckpt_pass._torch.dispatch import left_alone
from ckpt_pass.offloading.sharding import Sharding
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.offloading.window import AHEAD, Window
from ckpt_pass.policy.rules import Policy
from ckpt_pass.regions.ambient import RandomState, Surroundings, drawing_from, readers_for
from ckpt_pass.regions.arguments import Arguments, Keeper, MovedArguments
from ckpt_pass.regions.keeps import Moves
from ckpt_pass.regions.outside import Outside
from ckpt_pass.regions.region import RecomputeMismatchError, RegionMemory
from ckpt_pass.regions.rerun_mode import RecomputeMode
from ckpt_pass.regions.sac import selective_contexts
from ckpt_pass.regions.saved_values import Recomputation, SavedLooks
from ckpt_pass.regions.shards import ShardedArguments
from ckpt_pass.regions.tails import Tail
from ckpt_pass.regions.writes import ReadWatch, WriteWatch, known_of

Contexts = tuple[
    contextlib.AbstractContextManager[Any] | None, contextlib.AbstractContextManager[Any] | None
]
_NONE: Contexts = (None, None)


@dataclass(frozen=True)
class RegionOptions:
    """How a region runs.

    Attributes:
        name: for messages and for profilers.
        contexts: makes the modes around its forward and around its recomputation; either may be
            ``None``.
        traced: makes them where the region is traced under ``torch.compile``.
        draws: whether it draws random numbers; ``None`` to find out, run by run.
        stops_early: whether its recomputation ends with the last value that the backward needs.
        runs_on: whether it may go on to its end where that costs less than to stop, and holds a few
            values more for a moment: not where a plan says what it holds.
        checked: whether recomputed values must look like those of the forward.
        root: the module or function whose state the region reads; what it runs where ``None``.
        policy: what it keeps, where there are no ``contexts``.
        offload: where values go that are offloaded; to the host where ``None``.
        offload_inputs: whether the activations among its arguments are offloaded.
        offload_saved: whether nothing is recomputed, and what autograd saves inside is offloaded.
        moves: which of these, and how they come back; all where ``None``.
        shard_inputs: over which ranks the activations among its arguments are sharded.
    """

    name: str = "region"
    contexts: Callable[[], Contexts] | None = None
    traced: Callable[[], Any] | None = None
    draws: bool | None = None
    stops_early: bool = True
    runs_on: bool = False
    checked: bool = True
    root: Any = None
    policy: Policy | None = None
    offload: OffloadLike | None = None
    offload_inputs: bool = False
    offload_saved: bool = False
    moves: Moves | None = None
    shard_inputs: Sharding | None = None

    @property
    def moves_its_own(self) -> bool:
        """Whether anything is offloaded, or sharded, that no policy tells of."""
        return self.offload_inputs or self.offload_saved or self.shard_inputs is not None


class TransformInRegionError(CkptPassError, RuntimeError):
    """A region calls a transform of ``torch.func`` that allows no region around it."""


class _Complete(BaseException):
    """Ends a recomputation that has made all that the backward needs.

    Not an ``Exception``: a region's own ``except Exception`` must let it through.
    """


class _CompleteAmongHooks(Exception):
    """The same, among hooks of modules that are to be called always.

    ``nn.Module`` calls them for an ``Exception`` alone, as torch's early stop is. A region that
    catches it runs on, and what it saves from there on is let go.
    """


class Frame:
    """The state of one run of a region; lives as long as autograd holds one of its values."""

    __slots__ = (
        "__weakref__",
        "_ambient",
        "_arguments",
        "_complete",
        "_contexts",
        "_fn",
        "_known",
        "_memory",
        "_options",
        "_outside",
        "_random",
        "_runs_on",
        "_saved",
        "_stops_early",
        "_store",
        "_window",
    )

    def __init__(self, fn: Callable[..., Any], options: RegionOptions) -> None:
        self._fn = fn
        self._options = options
        self._saved = SavedLooks()
        asked = autograd.early_stop_asked()
        self._stops_early = options.stops_early if asked is None else asked
        self._runs_on = options.runs_on and asked is None
        self._store: list[torch.Tensor | None] = []
        self._complete = False
        self._random: RandomState | None = None
        self._contexts: Contexts = _NONE
        self._window: Window | None = None
        self._memory: RegionMemory | None = None

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the region; what autograd saves inside is not kept."""
        options = self._options
        root = self._fn if options.root is None else options.root
        known = self._known = known_of(root, *args, *kwargs.values())
        self._outside = outside = Outside(root, known)
        if options.offload_inputs or options.policy is not None:
            ahead = AHEAD if options.moves is None else options.moves.ahead
            self._memory = RegionMemory(options.offload, ahead, options.name, known.compared)
        if options.offload_inputs and self._memory is not None:
            self._window = self._memory.window_for_more()
        self._arguments = self._kept(args, kwargs)
        if self._arguments.mutable:
            outside.add(*self._arguments.mutable)
        if self._arguments.inside:
            outside.note_arguments(self._arguments, self._arguments.inside)
        devices = self._arguments.devices
        self._ambient = Surroundings(readers_for(devices))
        # Kept to the end of the forward, for backwards inside it; longer where numbers were drawn.
        before = self._random = None if options.draws is False else RandomState(devices)
        around = self._contexts = self._made_contexts((args, kwargs))
        tail = None if known.watched else Tail(self._saved.looks)
        if known.watched and around[0] is None:
            output = self._run(args, kwargs)
        else:
            with contextlib.ExitStack() as stack:
                if around[0] is not None:
                    stack.enter_context(around[0])
                if tail is not None:
                    stack.enter_context(WriteWatch(outside, tail))
                output = self._run(args, kwargs)
            if tail is not None:
                outside.learn()
                looks = self._saved.looks
                known.short_tail = (len(looks), looks[-1]) if looks and tail.is_short() else None
        outside.check_iterators()
        if self._memory is not None and self._memory.window is not None:
            self._memory.window.finish()
        if before is not None and not (options.draws or known.draws) and not before.moved():
            self._random = None
        self._complete = True
        self._store = []  # what a backward inside the region had made and left
        return output

    def _made_contexts(self, arguments: tuple[Any, ...]) -> Contexts:
        """The modes around this run's forward and recomputation."""
        if self._options.contexts is not None:
            return self._options.contexts()
        owners, policy = self._outside.owners_of_statistics(*arguments), self._options.policy
        if policy is not None:
            return selective_contexts(
                policy, owners=owners, memory=self._memory, outside=self._outside
            )
        # What keeps nothing must not change its modules' buffers twice, either.
        if not owners:
            return _NONE
        return None, RecomputeMode(RegionMemory(), owners=owners, outside=self._outside)

    def _kept(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], as_they_are: bool = False
    ) -> Arguments:
        """The arguments, offloaded or sharded as the options say, unless held ``as_they_are``."""
        keeper: Keeper | None = None
        name, sharding = self._options.name, self._options.shard_inputs
        if self._window is not None and not as_they_are:
            keeper = MovedArguments(self._window, name)
        elif sharding is not None and not as_they_are:
            keeper = ShardedArguments(sharding, name, self._known.compared, args, kwargs)
        return Arguments(args, kwargs, name, self._outside.has, keeper)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        autograd.push_saved_hooks(self._saved.pack, self._unpack)
        try:
            return self._fn(*args, **kwargs)
        except RuntimeError as error:
            if not functorch.refused_hooks(error):
                raise
            raise TransformInRegionError(
                f"{self._options.name} is a checkpoint region and calls a transform of torch.func "
                "(grad, vjp, jacrev, hessian) inside, which allows no hooks on saved values; got "
                f"{str(error)!r}. Expected torch.autograd.grad, jvp or vmap there. Use one of "
                "these, or make regions inside the transform: there they simply run."
            ) from error
        finally:
            autograd.pop_saved_hooks()
            self._outside.end_histories()

    @left_alone  # autograd calls it wherever a backward is: in code that dynamo compiles, too
    def _unpack(self, number: int) -> torch.Tensor:
        store = self._store
        value = store[number] if number < len(store) else None
        if value is None:  # not yet recomputed, or used by a backward before this one
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False):  # a backward in there; the forward was not
                    self._fill()
            else:
                self._fill()
            store = self._store
            value = store[number]
            assert value is not None
        store[number] = None
        return value

    def _fill(self) -> None:
        """Make the values that autograd saved again."""
        args, kwargs = self._arguments.again()
        self._rerun(args, kwargs)

    def _rerun(self, args: tuple[Any, ...], kwargs: dict[str, Any], to_end: bool = False) -> Any:
        """Run the region again and hold what autograd saves, in order.

        Args:
            args, kwargs: as the forward got them.
            to_end: also run what nothing that is saved needs.

        Returns:
            The region's output; ``None`` if it was not run to its end.
        """
        # A backward inside the region's own forward needs what was saved until now, and the forward
        # goes no further: it must not be overtaken.
        early = self._stops_early and not (to_end or self._known.fills)
        stops = not self._complete or early
        self._store = []
        rerun = Recomputation(
            self._options.name,
            self._saved.looks,
            _stop if stops else _go_on,
            self._options.checked,
        )
        output = None
        untouched = self._outside.put_in(differentiable=torch.is_grad_enabled())
        try:
            if self._needs_nothing_around():
                if stops and untouched and self._goes_to_its_end():
                    rerun.complete = _go_on
                output = self._run_again(rerun, args, kwargs)
            else:
                with contextlib.ExitStack() as stack:
                    self._prepare(stack)
                    output = self._run_again(rerun, args, kwargs)
        finally:
            self._outside.put_back()
            made = rerun.handed_over()
        rerun.check_count(exactly=self._complete and not self._stops_early)
        self._store = made
        if self._window is not None:
            self._window.fetch_before()
        return output

    def _goes_to_its_end(self) -> bool:
        """Whether a run does more than it has to, where to stop would cost more.

        Nobody is to see it: not where a mode or a hook looks on, or where the run writes anything.
        """
        may = self._runs_on and self._complete and self._ambient.alone
        return may and self._known.ends_shortly(self._saved.looks)

    def _run_again(
        self, rerun: Recomputation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        was_enabled = torch.is_grad_enabled()
        autograd.set_grad_enabled(True)
        autograd.push_saved_hooks(rerun.pack, rerun.unpack)
        try:
            return self._fn(*args, **kwargs)
        except (_Complete, _CompleteAmongHooks):
            return None
        except RuntimeError:
            # Code of TorchScript lets no error of Python's through, and raises one of its own.
            if rerun.refused is not None:
                raise RecomputeMismatchError(rerun.refused) from None
            if rerun.complete is _stop and rerun.has_all:
                return None
            raise
        finally:
            autograd.pop_saved_hooks()
            autograd.set_grad_enabled(was_enabled)

    def _needs_nothing_around(self) -> bool:
        bare = self._random is None and self._contexts[1] is None and not self._outside.suspects
        return bare and not functorch.profiler_is_running() and not self._ambient.changed()

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        """Enter what was around the forward, and what goes around the recomputation."""
        if functorch.profiler_is_running():
            stack.enter_context(record_function(f"recompute {self._options.name}"))
        self._ambient.restore(stack)
        if self._random is not None:
            stack.enter_context(drawing_from(self._random))
        if self._contexts[1] is not None:
            stack.enter_context(self._contexts[1])
        if self._outside.suspects:
            stack.enter_context(ReadWatch(self._outside))


def _stop() -> None:
    if modules.hooks_wait_for_errors(until=Frame._rerun.__code__):
        raise _CompleteAmongHooks
    raise _Complete


def _go_on() -> None:
    pass
