"""Where a recomputation ends: with the last value that is needed, or a little later."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop

import ckpt_pass
from ckpt_pass.regions.checkpointing import RegionSpec
from ckpt_pass.regions.wrapping import applied_regions

WIDTH = 8
WARM = 3  # the first run is looked at, the second finds the way, the third takes it

Way = Callable[[nn.Module, Tensor], Tensor]


class Ending(nn.Module):
    """A module that tells, past the last value that its backward needs, that it has come so far."""

    def __init__(self, dropped: float = 0.0) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(dropped)
        self.register_buffer("total", torch.zeros(()))
        self.level = 1.0
        # Such an object is no state of a region: what is put there stays.
        self.ends: queue.SimpleQueue[int] = queue.SimpleQueue()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.drop(self.fc(x)) * self.level)
        self.ends.put(1)
        return self._added(x, hidden)

    def _added(self, x: Tensor, hidden: Tensor) -> Tensor:
        if x.detach().sum() > 1e3:
            self.total.add_(1.0)
        return x + hidden


class Looking(TorchDispatchMode):
    """A mode that only looks on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def region(module: nn.Module, x: Tensor) -> Tensor:
    return ckpt_pass.checkpoint(module, x)  # type: ignore[no-any-return]


def step(module: nn.Module, x: Tensor, way: Way = region) -> list[Tensor]:
    """The gradients of one step."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    way(module, x).square().sum().backward()
    return [g for g in (x.grad, *(p.grad for p in module.parameters())) if g is not None]


def made(dropped: float = 0.0) -> tuple[Ending, Tensor]:
    """A module whose regions have run before, and an input."""
    torch.manual_seed(0)
    module, x = Ending(dropped), torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
    for _ in range(WARM):
        step(module, x)
    while not module.ends.empty():
        module.ends.get()
    return module, x


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_what_is_left_is_run_where_it_is_little() -> None:
    module, x = made()
    found = step(module, x)
    assert module.ends.qsize() == 2
    assert same(found, step(module, x, way=lambda m, v: m(v)))


def test_much_is_not_run() -> None:
    torch.manual_seed(0)
    module, x = Ending(), torch.ones(1 << 12, WIDTH)
    for _ in range(WARM + 1):
        found = step(module, x)
    assert module.ends.qsize() == WARM + 1
    assert same(found, step(module, x, way=lambda m, v: m(v)))


def test_more_than_at_first_is_not_run() -> None:
    module, _ = made()
    step(module, torch.ones(1 << 12, WIDTH))
    assert module.ends.qsize() == 1


@pytest.mark.parametrize("around", [Looking, lambda: set_checkpoint_early_stop(True)])
def test_nothing_is_run_that_others_would_see_or_forbid(
    around: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    module, x = made()
    with around():
        found = step(module, x)
    assert module.ends.qsize() == 1
    assert same(found, step(module, x, way=lambda m, v: m(v)))


def test_no_hook_is_called_again() -> None:
    module, x = made()
    module.drop.register_forward_hook(lambda *_: None)
    step(module, x)
    assert module.ends.qsize() == 1


def test_a_profiler_sees_what_is_needed() -> None:
    module, x = made()
    with torch.profiler.profile():
        step(module, x)
    assert module.ends.qsize() == 1


def test_what_draws_random_numbers_stops() -> None:
    module, x = made(dropped=0.5)
    step(module, x)
    assert module.ends.qsize() == 1


def test_state_that_has_changed_is_put_back_and_no_more() -> None:
    def changed(module: Any, x: Tensor) -> Tensor:
        out = ckpt_pass.checkpoint(module, x)
        module.level = 5.0
        return out  # type: ignore[no-any-return]

    module, x = made()
    found = step(module, x, way=changed)
    assert module.ends.qsize() == 1 and module.level == 5.0
    module.level = 1.0
    assert same(found, step(module, x, way=lambda m, v: m(v)))


def test_a_buffer_that_is_written_to_late_and_for_the_first_time() -> None:
    module, x = made()
    x = x + 1e3
    found = step(module, x)
    assert module.total == 1.0
    assert same(found, step(module, x, way=lambda m, v: m(v)))


def test_regions_of_plans_hold_what_the_plan_says() -> None:
    module, x = Ending(), torch.ones(3, WIDTH)
    model = nn.Sequential(module)
    with applied_regions(model, {"0": RegionSpec()}):
        for _ in range(WARM + 1):
            step(model, x, way=lambda m, v: m(v))
    assert module.ends.qsize() == WARM + 1


def test_a_backward_inside_the_forward() -> None:
    class Inside(Ending):
        def _added(self, x: Tensor, hidden: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(hidden.sum(), x, retain_graph=True)
            return x + hidden * slope.detach()

    torch.manual_seed(0)
    module, x = Inside(), torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
    found = [step(module, x) for _ in range(WARM + 1)][-1]
    assert same(found, step(module, x, way=lambda m, v: m(v)))
