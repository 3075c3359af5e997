"""Regions that have run before: what they read is found by a shorter way, and no less of it."""

from __future__ import annotations

import collections
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy

import ckpt_pass
from ckpt_pass._torch import dicts
from ckpt_pass.regions import holders as regions_holders
from ckpt_pass.regions import tracks
from tests.regions.test_state_of_objects import WIDTH, Around, every_way, gradients, plain, same

GAIN = 1.5
STEPS = 4  # the first run is looked at, the second finds the way, the third takes it


class Settings:
    """As the configuration of a model: shared, and not its own."""

    def __init__(self, scale: float = 1.25) -> None:
        self.scale = scale
        self.table = {"a": 0.5}


def made() -> Any:
    """A module of a class of its own, so that a change to the class is no other test's."""

    class Gate(nn.Module):
        factor = 2.0

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.register_buffer("offset", torch.full((WIDTH,), 0.25))
            self.level = 0.5
            self.extras = [1.0]
            self.settings = Settings()
            self.act, self.sizes = torch.tanh, (1.0, None)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act(self.up(x) * self.level + self.offset) * self.sizes[0]
            extra = self.extras[0] * self.settings.scale * self.settings.table["a"]
            own = getattr(self.up.weight, "strength", 1.0)
            out = self.down(self.scaled(hidden) * own) + hidden * GAIN * extra
            return out * (1.0 if self.training else 3.0)

        def scaled(self, hidden: Tensor) -> Tensor:
            return hidden * self.factor * hidden.sigmoid()

    torch.manual_seed(0)
    return Gate()


def halved(module: Any, hidden: Tensor) -> Tensor:
    return hidden * 0.5


def tripled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 3.0


def of_another_class(module: Any) -> None:
    class Sharper(type(module)):  # type: ignore[misc]
        def scaled(self, hidden: Tensor) -> Tensor:
            return hidden * hidden

    module.__class__ = Sharper


def swapped(module: Any) -> None:
    module.up.weight.data = torch.zeros_like(module.up.weight)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number": lambda m: setattr(m, "level", 4.0),
    "a number that is gone": lambda m: delattr(m, "level"),
    "a number in a list": lambda m: m.extras.__setitem__(0, 5.0),
    "a function": lambda m: setattr(m, "act", torch.sin),
    "a tuple": lambda m: setattr(m, "sizes", (3.0, None)),
    "a list that is new": lambda m: setattr(m, "extras", [7.0]),
    "settings": lambda m: setattr(m, "settings", Settings(5.0)),
    "a setting": lambda m: setattr(m.settings, "scale", 7.0),
    "a setting in a table": lambda m: m.settings.table.update(a=9.0),
    "a flag": lambda m: m.eval(),
    "a part": lambda m: setattr(m, "down", nn.Linear(WIDTH, WIDTH)),
    "a parameter": lambda m: setattr(m.up, "weight", nn.Parameter(torch.ones(WIDTH, WIDTH))),
    "a parameter's memory": swapped,
    "a parameter's attribute": lambda m: setattr(m.up.weight, "strength", 9.0),
    "a buffer": lambda m: setattr(m, "offset", torch.ones(WIDTH)),
    "a hook": lambda m: m.up.register_forward_hook(tripled),
    "the place of hooks": lambda m: setattr(
        m.up, "_forward_hooks", collections.OrderedDict({0: tripled})
    ),
    "a number of the class": lambda m: setattr(type(m), "factor", 5.0),
    "a method of the class": lambda m: setattr(type(m), "scaled", halved),
    "a method of one module": lambda m: m.__dict__.update(scaled=lambda h: h * 0.1),
    "a global": lambda m: globals().update(GAIN=6.0),
    "requires_grad": lambda m: m.requires_grad_(False),
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@pytest.fixture(params=["versions", "identities"])
def marks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to see whether a dict was changed."""
    if request.param == "identities":
        for module in (regions_holders, tracks):
            monkeypatch.setattr(module, "marks_of", dicts._identities)
    elif sys.version_info >= (3, 12):
        pytest.skip("dicts have versions up to Python 3.11")


@every_way
@every_change
def test_a_change_before_the_backward_is_not_read(
    around: Around, change: Callable[[Any], object], marks: None
) -> None:
    def steps(way: Around) -> list[Tensor]:
        module, x = made(), torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).requires_grad_()
        parameters = list(module.parameters())
        for number in range(STEPS):
            loss = way(module, x).square().sum()
            if number == STEPS - 1:
                change(module)
            loss.backward()
        globals().update(GAIN=1.5)
        return [g for g in (x.grad, *(p.grad for p in parameters)) if g is not None]

    assert same(steps(around), steps(plain))


@every_way
@every_change
def test_a_change_between_steps_is_read(
    around: Around, change: Callable[[Any], object], marks: None
) -> None:
    if change is CHANGES["a number that is gone"] or change is CHANGES["requires_grad"]:
        pytest.skip("no step is left to be made")

    def steps(way: Around) -> list[Tensor]:
        module, x = made(), torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
        found = []
        for number in range(2 * STEPS):
            if number == STEPS:
                change(module)
            loss = way(module, x).square().sum()
            module.level += 1.0  # seen by the next step's forward alone
            loss.backward()
            module.level -= 1.0
            found += gradients(module)
            module.zero_grad()
        globals().update(GAIN=1.5)
        return found

    assert same(steps(around), steps(plain))


@every_way
def test_another_class_with_the_same_contents(around: Around) -> None:
    def steps(way: Around) -> list[Tensor]:
        module, x = made(), torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
        for number in range(2 * STEPS):
            if number == STEPS:
                of_another_class(module)
            way(module, x).square().sum().backward()
        return gradients(module)

    assert same(steps(around), steps(plain))


@every_way
@pytest.mark.parametrize("leads_back", [False, True])
def test_modules_and_their_classes_are_let_go(around: Around, leads_back: bool) -> None:
    module, x = made(), torch.ones(2, WIDTH)
    if leads_back:  # only a search for circles finds it
        module.names = [module]
        module.up.register_forward_hook(lambda *_: module.names.__len__() and None)
    for _ in range(STEPS):
        around(module, x).square().sum().backward()
    gone = [weakref.ref(module), weakref.ref(type(module)), weakref.ref(module.up.weight)]
    if not leads_back:
        del module
        assert gone[0]() is None and gone[2]() is None, "nothing but the module is to be held"
    module = None
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


def test_a_global_that_was_not_there_yet() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).tanh() * (LATER if "LATER" in globals() else 1.0)  # type: ignore[name-defined]  # noqa: F821

    def steps(way: Around) -> list[Tensor]:
        torch.manual_seed(0)
        module, x = Late(), torch.ones(2, WIDTH)
        try:
            for number in range(2 * STEPS):
                if number == STEPS:
                    globals()["LATER"] = 3.0
                loss = way(module, x).square().sum()
                if number > STEPS:
                    globals()["LATER"] += 1.0
                loss.backward()
        finally:
            del globals()["LATER"]
        return gradients(module)

    assert same(steps(ckpt_pass.checkpoint), steps(plain))


def test_what_a_way_is_kept_of_may_gain_a_circle_later() -> None:
    module, x = made(), torch.ones(2, WIDTH)
    for _ in range(STEPS):
        ckpt_pass.checkpoint(module, x).square().sum().backward()
    module.up.__dict__["around"] = module
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_a_policy_that_knows_the_module_does_not_keep_it() -> None:
    module, x = made(), torch.ones(2, WIDTH)
    for _ in range(STEPS):
        ckpt_pass.checkpoint(module, x, policy="save-matmul").square().sum().backward()
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def used_with_code(torchs: bool) -> weakref.ref[nn.Module]:
    """A module that a policy knows, once regions have run with that policy."""
    module, x = made(), torch.ones(2, WIDTH)
    known = nn.Linear(WIDTH, WIDTH)

    def policy(site: Any) -> CheckpointPolicy:
        saves = known.training and site.op is torch.ops.aten.tanh.default
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    def policy_fn(context: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        return known.training and op is torch.ops.aten.tanh.default

    for _ in range(STEPS):
        asked = policy_fn if torchs else policy
        ckpt_pass.checkpoint(module, x, policy=asked).square().sum().backward()
    return weakref.ref(known)


@pytest.mark.parametrize("torchs", [False, True])
def test_a_policy_that_is_code_does_not_keep_what_it_knows(torchs: bool) -> None:
    gone = used_with_code(torchs)
    gc.collect()
    assert gone() is None


def test_the_collector_is_left_alone() -> None:
    ours = [c for c in gc.callbacks if str(getattr(c, "__module__", "")).startswith("ckpt_pass")]
    assert ours == []


def test_a_way_is_taken_where_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Any] = []
    init = regions_holders.Holders.__init__

    def counting(self: Any, *roots: Any) -> None:
        searched.extend(roots)
        init(self, *roots)

    module, x = made(), torch.ones(2, WIDTH)
    for _ in range(STEPS):
        ckpt_pass.checkpoint(module, x).square().sum().backward()
    monkeypatch.setattr(regions_holders.Holders, "__init__", counting)
    for _ in range(STEPS):
        ckpt_pass.checkpoint(module, x).square().sum().backward()
    assert searched == []


class Grows(nn.Module):
    """Reads what may be put on it later: it has neither buffers nor children of its own."""

    def __init__(self, buffers: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, WIDTH))
        if buffers:
            self.register_buffer("other", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = (x * self.weight).tanh()
        for shift in self._buffers.values():
            h = h + shift
        for child in self._modules.values():
            assert child is not None
            h = child(h)
        for parameter in list(self._parameters.values())[1:]:
            h = h * parameter
        return (h * h).sin()


ADDED: dict[str, Callable[[nn.Module], object]] = {
    "buffer": lambda module: module.register_buffer("late", torch.full((WIDTH,), 2.0)),
    "parameter": lambda module: module.register_parameter("late", nn.Parameter(torch.ones(WIDTH))),
    "child": lambda module: module.add_module("late", nn.Tanh()),
}


@every_way
@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("added", ADDED)
def test_what_is_put_on_a_module_before_the_backward(
    around: Around, steps: int, buffers: bool, added: str, marks: None
) -> None:
    """The recomputation does not read it; afterwards it is there."""

    def run(way: Around) -> tuple[list[Tensor], list[str]]:
        module, x = Grows(buffers), torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
        for number in range(steps):
            module.zero_grad()
            loss = way(module, x).square().sum()
            if number == steps - 1:
                ADDED[added](module)
            loss.backward()
        assert module.weight.grad is not None
        held = [*module._parameters, *module._buffers, *module._modules]
        return [module.weight.grad], held

    (mine, there), (wanted, expected) = run(around), run(plain)
    assert same(mine, wanted) and there == expected and "late" in there
