"""The simulator on problems written by hand: bytes over time, in units of one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckpt_pass.planner.liveness import MemoryProfile, simulate
from ckpt_pass.planner.problem import InvalidProblemError, Op, Problem
from ckpt_pass.planner.schedule import schedule
from ckpt_pass.planner.solve import Pool

MIB = 1 << 20


def op(
    name: str,
    inputs: tuple[int, ...],
    makes: tuple[int, ...],
    reads: tuple[int, ...] = (),
    *,
    late: bool = False,
    forward: bool = True,
    random: int = 0,
) -> Op:
    touches = tuple(dict.fromkeys((*makes, *reads)))
    return Op(name, inputs, makes, makes, touches, forward, late, 0, random)


def chain(random: int = 0) -> Problem:
    """x -> a -> b -> loss, each of 1 MiB; da needs a, db needs b; one gradient of 1 MiB.

    Storages: 0 the input, 1 a, 2 b, 3 loss, 4 tangent, 5 db, 6 da.
    """
    ops = (
        op("a", (), (1,), (0,), random=random),
        op("b", (0,), (2,), (1,)),
        op("loss", (1,), (3,), (2,)),
        op("db", (1,), (5,), (2, 4), forward=False, late=True),
        op("da", (0, 3), (6,), (1, 5), forward=False, late=True),
    )
    return Problem(
        ops=ops,
        storage_bytes=(0, MIB, MIB, 4, 4, MIB, MIB),
        forward_outputs=(3,),
        forward_roots=(2,),
        backward_outputs=(4,),
        output_storages=(6,),
        given=(4,),
    )


def simulated(problem: Problem, saved: tuple[int, ...]) -> MemoryProfile:
    return simulate(problem, schedule(problem, saved))


@pytest.mark.parametrize(
    ("saved", "saved_bytes", "peak_bytes", "backward"),
    [
        # a and b live until their gradients: a, b, db; then a, db, da.
        ((0, 1), 2 * MIB + 4, 3 * MIB + 8, ["db", "da"]),
        # b made again from a, just before db.
        ((0,), MIB + 4, 3 * MIB + 8, ["b", "db", "da"]),
        ((1,), MIB + 4, 3 * MIB + 8, ["db", "a", "da"]),
        ((), 4, 3 * MIB + 8, ["a", "b", "db", "da"]),
    ],
)
def test_chain(saved: tuple[int, ...], saved_bytes: int, peak_bytes: int, backward: list) -> None:
    problem = chain()
    profile = simulated(problem, saved)
    assert profile.saved_bytes == saved_bytes
    assert profile.peak_bytes == peak_bytes
    ran = [problem.ops[index].name for index in profile.schedule]
    assert ran == ["a", "b", "loss", *backward]
    assert profile.forward_length == 3


def test_a_recomputed_random_op_keeps_its_state() -> None:
    assert simulated(chain(random=5056), (0, 1)).saved_bytes == 2 * MIB + 4
    assert simulated(chain(random=5056), (1,)).saved_bytes == MIB + 4 + 5056


def test_an_impossible_order_is_refused() -> None:
    with pytest.raises(InvalidProblemError, match=r"Op 0 \(b\) takes the result of ops \(1,\)"):
        Problem((op("b", (1,), ()), op("a", (), ())), (), (), (), (), ())
    with pytest.raises(InvalidProblemError, match="negative bytes"):
        Problem((), (-1,), (), (), (), ())


def test_a_value_that_may_be_drawn_once_is_never_dropped() -> None:
    """A chain of three with a wide value idle over the peak: dropped, unless it may run once."""
    wide = 8 * MIB

    def problem(once: bool) -> Problem:
        mask = replace(op("mask", (), (1,), (0,)), time_s=1.0, once=once)
        ops = (
            mask,
            op("a", (0,), (2,), (1,)),
            op("loss", (1,), (3,), (2,)),
            op("da", (0, 1), (5,), (1, 2, 4), forward=False, late=True),
            op("big", (3,), (6,), (5,), forward=False, late=True),
            op("small", (4,), (7,), (6,), forward=False, late=True),
            op("db", (0, 5), (8,), (1, 7), forward=False, late=True),
        )
        sizes = (0, wide, MIB, 4, 4, MIB, wide, MIB, MIB)
        return Problem(ops, sizes, (3,), (2,), (6,), (8,), (4,))

    assert any(plan.drops for plan in Pool(problem(False), ()).plans.values())
    assert not any(plan.drops for plan in Pool(problem(True), ()).plans.values())
