"""Random odd programs under every way to have regions: the plain step, or an error of ours."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions
from tests.zoo.odd_programs import ROWS, WIDTH, Around, OddModel, OddProgram, odd_programs

STEPS = 3


def hooked(policy: str) -> Around:
    contexts = ckpt_pass.context_fn(policy)
    return partial(torch_checkpoint, use_reentrant=False, context_fn=contexts)


AROUND: dict[str, Around | None] = {
    "plain": None,
    "checkpoint": ckpt_pass.checkpoint,
    "checkpoint, policy": partial(ckpt_pass.checkpoint, policy="save-matmul"),
    "context_fn": hooked("save-nothing"),
    "context_fn, policy": hooked("save-matmul"),
}
PLACED = ("placement", "placement, policy", "segment", "nested segment")
#: The others keep values, which a gradient inside or a second backward may ask for twice.
NEVER_REFUSED = ("checkpoint", "context_fn", "placement", "segment", "nested segment")


#: Steps whose later runs need more than the one that is planned.
LATER_STEPS_DIFFER = frozenset(("cache", "containers"))
#: Scalars that autograd makes while it runs; values here have 128 bytes.
SCALARS_BYTES = 240


@dataclass
class Seen:
    """What some steps leave behind."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    buffers: list[dict[str, Tensor]] = field(default_factory=list)
    attributes: list[Any] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)

    def differs_from(self, other: Seen) -> str:
        """What is not the same; empty where all is."""
        for step in range(STEPS):
            if not same_numbers(self.losses[step], other.losses[step]):
                return f"loss of step {step}"
            for mine, theirs in (
                (self.gradients[step], other.gradients[step]),
                (self.buffers[step], other.buffers[step]),
            ):
                if mine.keys() != theirs.keys():
                    return f"names of step {step}"
                for name, value in theirs.items():
                    if not same_numbers(mine[name], value):
                        return f"{name} of step {step}"
            if self.attributes[step] != other.attributes[step]:
                return f"attributes of step {step}"
        return "" if self.alive == other.alive else f"alive: {self.alive}, {other.alive}"


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """To the last bit; a program whose numbers grow without bound ends in NaN in either way."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def build(program: OddProgram, around: Around | None = None) -> OddModel:
    torch.manual_seed(0)
    return OddModel(program, around)


def state_of(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()


def values_of(held: Any) -> Any:
    """Attributes as values that compare."""
    if isinstance(held, Tensor):
        return held.tolist()
    if isinstance(held, torch.Generator):
        return state_of(held)
    if isinstance(held, dict):
        return {key: values_of(value) for key, value in held.items()}
    if isinstance(held, (list, tuple)):
        return [values_of(value) for value in held]
    return values_of(vars(held)) if hasattr(held, "calls") else repr(held)


def attributes_of(model: nn.Module) -> Any:
    internal = {*vars(nn.Module()), "forward", "around"}
    return [
        {name: values_of(value) for name, value in vars(module).items() if name not in internal}
        for module in model.modules()
        if type(module).__module__.startswith("tests.")
    ]


def run(model: OddModel, step: Callable[[Tensor], Tensor] | None = None) -> Seen:
    """Some steps; no collector, so that what is not let go stays seen."""
    seen, made = Seen(), []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        made.extend(weakref.ref(t.untyped_storage()) for t in (*args, *output))

    hooks = [layer.register_forward_hook(watch) for layer in model.layers]
    torch.manual_seed(1)
    with collector_rests():
        for _ in range(STEPS):
            model.zero_grad()
            loss = (model if step is None else step)(torch.randn(ROWS, WIDTH))
            loss.backward()
            seen.losses.append(loss.detach())
            del loss
            seen.alive.append(sum(ref() is not None for ref in made))
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            seen.gradients.append({n: g.to_dense().clone() for n, g in found.items()})
            seen.buffers.append({n: b.clone() for n, b in model.named_buffers()})
            seen.attributes.append((attributes_of(model), state_of(torch.default_generator)))
    for hook in hooks:
        hook.remove()
    return seen


@contextlib.contextmanager
def collector_rests() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def placed(model: OddModel, way: str) -> Iterator[None]:
    names = [f"layers.{k}" for k in range(len(model.layers))]
    specs = {name: RegionSpec() for name in names}
    if way == "placement, policy":
        specs = dict.fromkeys(names, RegionSpec(policy="save-matmul"))
    elif "segment" in way:
        specs = {
            name: RegionSpec(follows=tuple(names[:k]), nested=way == "nested segment")
            for k, name in enumerate(names)
        }
    with applied_regions(model, specs):
        yield


def check_regions(program: OddProgram, way: str) -> str:
    """Run a program plainly and with regions; return the error's name where it is refused."""
    wanted = run(build(program))
    try:
        if way in PLACED:
            model = build(program)
            with placed(model, way):
                got = run(model)
        else:
            got = run(build(program, AROUND[way]))
    except ckpt_pass.errors.CkptPassError as error:
        assert way not in NEVER_REFUSED, (way, error)
        assert isinstance(error, ckpt_pass.BackwardTwiceError), error
        return type(error).__name__
    assert got.differs_from(wanted) == ""
    return ""


def check_plan(program: OddProgram, fraction: float) -> str:
    """The same for an eager plan, which also keeps to its budget."""
    wanted, model = run(build(program)), build(program)
    before = attributes_of(model)
    x = torch.randn(ROWS, WIDTH)
    budget: float | int = fraction
    try:
        plan = ckpt_pass.plan(model, x, budget=budget, mode="eager")
    except ckpt_pass.InfeasibleBudgetError as error:
        plan = ckpt_pass.plan(model, x, budget=error.least_feasible_bytes, mode="eager")
    assert attributes_of(model) == before
    with plan.applied(model) if plan.regions else contextlib.nullcontext():
        assert run(model).differs_from(wanted) == ""
        measured = ckpt_pass.measure_step(lambda: model(x), repeats=1).peak_bytes
    # The cache grows up to the second step, the first one is planned.
    assert plan.budget_bytes is not None
    if not program.steps & LATER_STEPS_DIFFER:
        assert measured <= plan.budget_bytes + SCALARS_BYTES, (measured, plan.budget_bytes)
    return ""


def check_backend(program: OddProgram, fraction: float) -> str:
    """The same for the backend around ``aot_eager``, beside ``aot_eager`` itself."""
    torch._dynamo.reset()
    model = build(program)
    try:
        wanted = run(model, torch.compile(model, backend="aot_eager"))
    except Exception as error:
        return f"torch: {type(error).__name__}"
    torch._dynamo.reset()
    model = build(program)
    backend = ckpt_pass.make_backend(budget=fraction, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = run(model, compiled)
    except BackendCompilerFailed as error:
        assert isinstance(error.inner_exception, ckpt_pass.errors.CkptPassError), error
        return type(error.inner_exception).__name__
    except ckpt_pass.errors.CkptPassError as error:
        return type(error).__name__
    got.alive = wanted.alive  # dynamo's own frames decide
    assert got.differs_from(wanted) == ""
    return ""


WAYS: dict[str, Callable[[OddProgram, float], str]] = {
    **{
        way: (lambda program, _, way=way: check_regions(program, way))  # type: ignore[misc]
        for way in (*(name for name in AROUND if name != "plain"), *PLACED)
    },
    "eager plan": check_plan,
}
FRACTIONS = st.floats(0.4, 1.0)
HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=HEALTH)
@given(program=odd_programs(), way=st.sampled_from(sorted(WAYS)), fraction=FRACTIONS)
def test_odd_programs(program: OddProgram, way: str, fraction: float) -> None:
    WAYS[way](program, fraction)


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=HEALTH)
@given(program=odd_programs(), fraction=FRACTIONS)
def test_odd_programs_compiled(program: OddProgram, fraction: float) -> None:
    check_backend(program, fraction)


#: 200 programs take some minutes a slice, each of which has a verdict of its own.
SLICES, SLICE = 10, 20


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SLICES))
def test_two_hundred_odd_programs_compiled(part: int) -> None:
    verdicts: Counter[str] = Counter()

    @seed(part)
    @settings(max_examples=SLICE, deadline=None, database=None, suppress_health_check=HEALTH)
    @given(program=odd_programs(), fraction=FRACTIONS)
    def check(program: OddProgram, fraction: float) -> None:
        started = time.perf_counter()
        verdict = check_backend(program, fraction) or "right"
        verdicts[verdict] += 1
        print(f"{time.perf_counter() - started:5.1f} s  {verdict:24}  {program.blocks}", flush=True)

    check()
    print(f"slice {part}: {dict(verdicts)}")
    assert verdicts["right"]
