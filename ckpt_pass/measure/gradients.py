"""Whether two steps are the same step: loss, gradients and buffers, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.state.untouched import parameters_restored, untouched


class NoLossError(CkptPassError):
    """The step was to return a loss, and returned something else."""

    def __init__(self, got: object) -> None:
        what = type(got).__name__
        if isinstance(got, Tensor):
            what += f" of shape {tuple(got.shape)}, requires_grad={got.requires_grad}"
        super().__init__(
            f"the step returned {what}; expected one scalar tensor that requires grad. Reduce the "
            "output to a loss; for measure_step, a step that calls backward itself is measured "
            "with backward=False."
        )


class GradientMismatchError(CkptPassError):
    """Two steps that should be the same step are not."""

    def __init__(self, comparison: GradientComparison) -> None:
        super().__init__(
            f"the two steps differ: {comparison}. Expected the same loss, gradients and buffers. "
            "Look first at random numbers drawn again and at values changed in place between the "
            "forward and its recomputation; if only rounding differs, pass rtol= and atol=."
        )


@dataclass(frozen=True)
class GradientComparison:
    """Loss, gradients and buffers after two steps from the same state.

    ``different`` names what is not the same (the loss as ``"loss"``). ``worst`` is the gradient or
    buffer with the largest difference, ``max_abs_diff`` that difference; it is infinite where one
    side has no gradient, another shape or type, or a NaN alone.
    """

    equal: bool
    loss_equal: bool
    max_abs_diff: float
    worst: str
    different: tuple[str, ...]
    compared: int

    def __str__(self) -> str:
        if self.equal:
            bits = "bitwise " if self.max_abs_diff == 0.0 else ""
            rest = "" if bits else f" within tolerance (at most {self.max_abs_diff:.3g} apart)"
            return f"{bits}equal{rest}: the loss and {self.compared} gradients and buffers"
        shown = ", ".join(self.different[:3]) + (", ..." if len(self.different) > 3 else "")
        return (
            f"{len(self.different)} of {self.compared + 1} differ ({shown}); worst is "
            f"{self.worst!r}, by {self.max_abs_diff:.3g}"
        )

    def raise_if_different(self) -> None:
        """Raise :class:`GradientMismatchError` unless everything is equal."""
        if not self.equal:
            raise GradientMismatchError(self)


def compare_gradients(
    plain: Callable[[], Tensor],
    other: Callable[[], Tensor],
    params: Mapping[str, Tensor] | nn.Module,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    seed: int = 0,
) -> GradientComparison:
    """Run both steps from the same seed and state; compare loss, every gradient and every buffer.

    Both return a scalar loss; backward is called here. Given a module, its buffers are compared
    too (running statistics updated twice show there). Without tolerances, equal means bit by bit;
    NaN equals NaN always. Gradients, parameters, buffers and random generators are left as they
    were.

    Raises:
        NoLossError: a step returned no scalar that requires grad.
    """
    return compare_runs(Run(plain), Run(other), params, rtol=rtol, atol=atol, seed=seed)


@dataclass(frozen=True)
class Run:
    """One side of a comparison.

    Attributes:
        forward: returns a scalar loss.
        around: what forward and backward run in. Attributes are put back after both: sharded
            modules (FSDP2) keep on themselves, in forward, what their backward needs.
    """

    forward: Callable[[], Tensor]
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def compare_runs(
    plain: Run,
    other: Run,
    params: Mapping[str, Tensor] | nn.Module,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    seed: int = 0,
) -> GradientComparison:
    """The same as :func:`compare_gradients`, of steps that run in a context.

    Raises:
        NoLossError: a step returned no scalar that requires grad.
    """
    named = dict(params.named_parameters() if isinstance(params, nn.Module) else params)
    module = params if isinstance(params, nn.Module) else None
    with gradients_restored(named.values()):
        with untouched(module, values=True):
            first_loss, first = _loss_and_state(plain, named, module, seed)
        # What the other step itself does to the module, such as making regions of it, stays.
        with buffers_restored(module), parameters_restored(named.values()):
            second_loss, second = _loss_and_state(other, named, module, seed)
    names = list(first) + [name for name in second if name not in first]
    pairs = {name: (first.get(name), second.get(name)) for name in names}
    different = [n for n, (a, b) in pairs.items() if not _same(a, b, rtol, atol)]
    diffs = {name: _max_abs_diff(a, b) for name, (a, b) in pairs.items()}
    # A difference may be of bits alone (-0.0 and 0.0): then a differing name is still the worst.
    worst = max(names, key=lambda n: (diffs[n], n in different), default="")
    loss_equal = _same(first_loss, second_loss, rtol, atol)
    return GradientComparison(
        equal=loss_equal and not different,
        loss_equal=loss_equal,
        max_abs_diff=diffs.get(worst, 0.0),
        worst=worst,
        different=tuple([] if loss_equal else ["loss"]) + tuple(different),
        compared=len(pairs),
    )


def is_loss(result: object) -> bool:
    return isinstance(result, Tensor) and result.requires_grad and result.numel() == 1


@contextmanager
def rng_restored(device: torch.device | None) -> Iterator[None]:
    """Give torch's generators their state back at the end (every CUDA device's if unknown)."""
    if device is None:
        indices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    else:
        indices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=indices):
        yield


@contextmanager
def gradients_restored(leaves: Iterable[Tensor]) -> Iterator[None]:
    kept = [(leaf, leaf.grad) for leaf in leaves]
    try:
        yield
    finally:
        for leaf, grad in kept:
            leaf.grad = grad


def _loss_and_state(
    run: Run, named: Mapping[str, Tensor], module: nn.Module | None, seed: int
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Run a step and its backward; return its loss, and gradients and buffers by name."""
    for leaf in named.values():
        leaf.grad = None
    with rng_restored(None), run.around():
        torch.manual_seed(seed)
        loss = run.forward()
        if not is_loss(loss):
            raise NoLossError(loss)
        loss.backward()
        state: dict[str, Tensor | None] = {name: leaf.grad for name, leaf in named.items()}
        if module is not None:
            state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    return loss.detach(), state


@contextmanager
def buffers_restored(module: nn.Module | None) -> Iterator[None]:
    """Give a module's buffers their values back at the end, and the very same tensors."""
    named = dict(module.named_buffers()) if module is not None else {}
    kept = {name: (buffer, buffer.clone()) for name, buffer in named.items()}
    try:
        yield
    finally:
        for name, (buffer, values) in kept.items():
            assert module is not None
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, buffer)
            with torch.no_grad():
                buffer.copy_(values)


def _comparable(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype


def _same(a: Tensor | None, b: Tensor | None, rtol: float, atol: float) -> bool:
    """Say whether two values are the same: bit by bit without tolerances; NaN equals NaN."""
    if a is None or b is None or not _comparable(a, b):
        return a is None and b is None
    if (rtol or atol) and (a.is_floating_point() or a.is_complex()):
        return torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    left, right = (t.detach().to_dense().contiguous().reshape(-1) for t in (a, b))
    bytes_differ = left.view(torch.uint8) != right.view(torch.uint8)
    if not bytes_differ.any():
        return True
    differ = bytes_differ.view(left.numel(), -1).any(dim=1)
    return not bool((differ & ~(left.isnan() & right.isnan())).any())


def _max_abs_diff(a: Tensor | None, b: Tensor | None) -> float:
    """Return the largest difference; infinite where the two cannot be compared."""
    if a is None or b is None or not _comparable(a, b):
        return 0.0 if a is None and b is None else float("inf")
    wide = torch.complex128 if a.is_complex() else torch.float64
    left, right = (t.detach().to_dense().to(wide) for t in (a, b))
    if left.numel() == 0:
        return 0.0
    same = (left == right) | (left.isnan() & right.isnan())  # inf - inf is no difference
    diff = torch.where(same, 0.0, (left - right).abs())
    return float(diff.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
