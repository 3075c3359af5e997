"""Sequential models in segments: torch's ``checkpoint_sequential``, with policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ckpt_pass.modules.choice import PlacementError
from ckpt_pass.modules.segments import optimal_segment_count, segment_boundaries
from ckpt_pass.policy.rules import PolicyLike
from ckpt_pass.regions.checkpointing import options_for, refuse_reentrance
from ckpt_pass.regions.running import run_region

Step = Callable[[Any], Any]


class NotSequentialError(PlacementError):
    """A chain of functions was needed."""


class _Run:
    """Some steps as one function."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self._steps:
            value = step(value)
        return value


def checkpoint_sequential(
    functions: nn.Sequential | Sequence[Step],
    segments: int | None,
    input: Any,
    policy: PolicyLike | None = None,
    preserve_rng_state: bool = True,
    use_reentrant: bool | None = False,
) -> Any:
    """Run a chain of functions in segments that are recomputed as a whole.

    As ``torch.utils.checkpoint.checkpoint_sequential(..., use_reentrant=False)``, where the last
    segment is not recomputed either; there is a policy besides.

    Args:
        functions: an ``nn.Sequential``, or a list or tuple of modules and functions; each gets what
            the one before returned.
        segments: how many, of even length; about the square root of their number where ``None``.
        input: what the first one gets.
        policy: what each segment keeps, as for :func:`ckpt_pass.context_fn`.
        preserve_rng_state: draw the same random numbers in both runs.
        use_reentrant: ``False``; there is no other way.

    Returns:
        What the last one returns.

    Raises:
        NotSequentialError: ``functions`` is no chain.
        SegmentCountError: more segments than functions.
        ReentrantRegionError: the reentrant variant was asked for.
    """
    refuse_reentrance(use_reentrant)
    steps = _steps(functions)
    count = optimal_segment_count(len(steps), 0) if segments is None else segments
    spans = segment_boundaries(len(steps), count)
    value = input
    for start, stop in spans[:-1]:
        run = steps[start:stop]
        options = options_for(
            _owner(run), policy, None, f"segment {start} to {stop - 1}", preserve_rng_state
        )
        value = run_region(_Run(run), (value,), {}, options)
    return _Run(steps[spans[-1][0] :])(value)


def _owner(steps: Sequence[Step]) -> Callable[..., Any]:
    """What holds the buffers of some steps: a region must not change them twice."""
    owners = [getattr(step, "__self__", step) for step in steps]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    return nn.ModuleList(modules) if modules else _Run(steps)


def _steps(functions: nn.Sequential | Sequence[Step]) -> list[Step]:
    if not isinstance(functions, (list, tuple, nn.Sequential, nn.ModuleList)):
        raise NotSequentialError(
            f"Got a {type(functions).__name__}, expected an nn.Sequential, or a list of functions "
            "that each take what the one before returns: segments of any other module's forward "
            "cannot be run by themselves. For layers in a model use ckpt_pass.apply(model, "
            "'segments-4')."
        )
    steps: list[Step] = list(functions)
    if not steps or not all(callable(step) for step in steps):
        raise NotSequentialError(
            f"Got {len(steps)} functions, {sum(map(callable, steps))} of them callable. Expected "
            "one or more, each a module or a function."
        )
    return steps


class CheckpointedSequential(nn.Sequential):
    """An ``nn.Sequential`` whose steps are recomputed in segments; the last one is not.

    Parameter names and ``state_dict`` keys are those of the ``nn.Sequential`` with the same steps.

    Args:
        steps: modules, or one ``OrderedDict`` of them.
        segments: how many; about the square root of the number of steps where ``None``.
        policy: what each segment keeps.

    Raises:
        SegmentCountError: more segments than steps, when it runs.
    """

    def __init__(
        self, *steps: Any, segments: int | None = None, policy: PolicyLike | None = None
    ) -> None:
        super().__init__(*steps)
        self.segments = segments
        self.policy = policy

    def forward(self, input: Any) -> Any:
        """Run the chain."""
        return checkpoint_sequential(list(self), self.segments, input, policy=self.policy)

    def extra_repr(self) -> str:
        """Segments and policy."""
        shown = "" if self.policy is None else f", policy={self.policy}"
        return f"segments={self.segments}{shown}"
