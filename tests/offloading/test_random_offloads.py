"""Random odd programs with every way to offload: the plain step to the bit, or our error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from ckpt_pass.offloading.saved_hooks import offload_activations
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions
from tests.regions.test_random_programs import HEALTH, build, run
from tests.zoo.odd_programs import Around, OddModel, OddProgram, odd_programs

PLACES = {to: ckpt_pass.Offload(to, min_bytes=1) for to in ("host", "disk")}
POLICIES = {
    "all": ckpt_pass.offload(),
    "some": ckpt_pass.offload(op_class=("matmul", "random"))
    | ckpt_pass.save(op_class="reduction")
    | ckpt_pass.recompute(),
    "every second": ckpt_pass.offload(op_class="pointwise", every=2) | ckpt_pass.recompute(),
}


def around(way: str, place: ckpt_pass.Offload) -> Around | None:
    kind, _, policy = way.partition(", ")
    chosen = POLICIES.get(policy)
    if kind == "checkpoint":
        return partial(ckpt_pass.checkpoint, policy=chosen, offload=place)
    if kind == "inputs":
        return partial(ckpt_pass.checkpoint, policy=chosen, offload=place, offload_inputs=True)
    if kind == "context_fn":
        contexts = ckpt_pass.context_fn(POLICIES[policy], offload=place)
        return partial(torch_checkpoint, use_reentrant=False, context_fn=contexts)
    return None


SPECS: dict[str, Callable[[ckpt_pass.Offload, tuple[str, ...]], RegionSpec]] = {
    "placed": lambda place, before: RegionSpec(offload=place, offload_inputs=True),
    "placed, all": lambda place, before: RegionSpec(policy=POLICIES["all"], offload=place),
    "saved": lambda place, before: RegionSpec(offload=place, offload_saved=True),
    "segment": lambda place, before: RegionSpec(follows=before, offload=place, offload_inputs=True),
    "nested segment": lambda place, before: RegionSpec(
        follows=before, nested=True, offload=place, offload_inputs=True
    ),
}
WAYS = (
    *(
        f"{kind}, {policy}"
        for kind in ("checkpoint", "inputs", "context_fn")
        for policy in POLICIES
    ),
    "inputs",
    "hooks",
    "hooks, one by one",
    "hooks around regions",
    *SPECS,
)
#: The others keep values, which a gradient inside or a second backward may ask for twice.
NEVER_REFUSED = ("inputs", "placed", "saved", "segment", "nested segment", "hooks")


@contextlib.contextmanager
def placed(model: OddModel, way: str, place: ckpt_pass.Offload) -> Iterator[None]:
    names = tuple(f"layers.{k}" for k in range(len(model.layers)))
    specs = {name: SPECS[way](place, names[:k]) for k, name in enumerate(names)}
    with applied_regions(model, specs):
        yield


def hooked(model: OddModel, place: ckpt_pass.Offload, in_flight: int, x: Tensor) -> Any:
    with offload_activations(model, place, in_flight=in_flight):
        return model(x)


def check(program: OddProgram, way: str, to: str) -> None:
    place = PLACES[to]
    wanted = run(build(program))
    try:
        if way in SPECS:
            model = build(program)
            with placed(model, way, place):
                got = run(model)
        elif way.startswith("hooks"):
            model = build(program, ckpt_pass.checkpoint if "regions" in way else None)
            in_flight = 0 if "one" in way else 3
            got = run(model, partial(hooked, model, place, in_flight))
        else:
            got = run(build(program, around(way, place)))
    except ckpt_pass.errors.CkptPassError as error:
        assert not way.startswith(NEVER_REFUSED) or "all" in way or "," in way, (way, error)
        assert isinstance(error, ckpt_pass.BackwardTwiceError), (way, error)
        return
    assert got.differs_from(wanted) == "", way


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=HEALTH)
@given(program=odd_programs(), way=st.sampled_from(WAYS), to=st.sampled_from(sorted(PLACES)))
def test_odd_programs(program: OddProgram, way: str, to: str) -> None:
    check(program, way, to)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=HEALTH)
@given(program=odd_programs(), way=st.sampled_from(WAYS), to=st.sampled_from(sorted(PLACES)))
def test_many_odd_programs(program: OddProgram, way: str, to: str) -> None:
    check(program, way, to)
