"""The exact solver against brute force: every saved set, with every way to drop and run again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ckpt_pass.planner.contract import Contracted, UnsupportedProblemError
from ckpt_pass.planner.exact import least_peak, solve_exact
from ckpt_pass.planner.problem import Op, Problem, needed_by
from ckpt_pass.planner.schedule import Drop, anchor_order
from ckpt_pass.planner.solution import InfeasibleBudgetError, Solution, evaluate
from ckpt_pass.planner.solve import solve

# Plans tried for one problem; those with more are left out (under 1 %).
_PLANS = 1500


@dataclass
class Step:
    """A step in the making."""

    ops: list[Op] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    readable: list[int] = field(default_factory=list)  # ops whose results others may take
    late: list[int] = field(default_factory=list)

    def storage(self, nbytes: int) -> int:
        self.sizes.append(nbytes)
        return len(self.sizes) - 1

    def add(
        self,
        kind: str,
        inputs: tuple[int, ...],
        makes: tuple[int, ...],
        *,
        holds: tuple[int, ...] | None = None,
        also: tuple[int, ...] = (),
        **rest: Any,
    ) -> int:
        held = makes if holds is None else holds
        single = len(inputs) == 1 and len(self.ops[inputs[0]].makes) > 1
        read = () if single else tuple(s for i in inputs for s in self.ops[i].holds)
        touches = tuple(dict.fromkeys((*held, *read, *also)))
        name = f"{kind}{len(self.ops)}"
        self.ops.append(Op(name, inputs, makes, held, touches, **rest))
        return len(self.ops) - 1


@st.composite
def steps(draw: st.DrawFn) -> Problem:
    """A random step of few ops in which every rule of the simulator can matter."""
    step = Step()
    for _ in range(draw(st.integers(1, 5))):
        _forward_op(draw, step)
    root = draw(st.sampled_from(step.readable[-2:]))
    tangent = step.storage(1)
    for _ in range(draw(st.integers(1, 5))):
        _backward_op(draw, step, tangent)
    ends = [step.late[-1], *draw(st.sets(st.sampled_from(step.late), max_size=2))]
    if draw(st.integers(0, 5)) == 0:
        ends.append(draw(st.sampled_from(step.readable)))
    holds = [s for index in ends for s in step.ops[index].holds]
    return Problem(
        ops=tuple(step.ops),
        storage_bytes=tuple(step.sizes),
        forward_outputs=step.ops[root].holds,
        forward_roots=(root,),
        backward_outputs=tuple(dict.fromkeys(ends)),
        output_storages=tuple(dict.fromkeys(holds)),
        given=(tangent,),
    )


def _sources(draw: st.DrawFn, step: Step, most: int = 2) -> tuple[int, ...]:
    if not step.readable:
        return ()
    # The first op is read often, so that values are needed again far apart.
    found = draw(st.sets(st.sampled_from([step.readable[0], *step.readable]), max_size=most))
    return tuple(sorted(found))


def _made(
    draw: st.DrawFn, step: Step, sources: tuple[int, ...], size: st.SearchStrategy[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A new storage, and those among what is read whose memory it may take."""
    read = [s for i in sources for s in step.ops[i].holds]
    if not read or draw(st.booleans()):
        return (step.storage(draw(size)),), ()
    like = step.sizes[draw(st.sampled_from(read))]
    over = tuple(dict.fromkeys(s for s in read if step.sizes[s] == like))
    return (step.storage(like),), over


def _forward_op(draw: st.DrawFn, step: Step) -> None:
    kind = draw(st.sampled_from("ooooomv"))
    if kind == "v" and step.readable:
        base = draw(st.sampled_from(step.readable))
        held = step.ops[base].holds
        step.readable.append(step.add("view", (base,), (), holds=held, forward=True))
        return
    sources, size = _sources(draw, step), st.integers(1, 9)
    tag = draw(st.sampled_from(["", "", "", "", "", "", "save", "recompute"]))
    tags: dict[str, Any] = {"must_save": tag == "save", "must_recompute": tag == "recompute"}
    costs: dict[str, Any] = {
        "time_s": float(draw(st.integers(0, 6))),
        "workspace_bytes": draw(st.sampled_from([0, 0, 0, 3])),
        "random_state_bytes": draw(st.sampled_from([0, 0, 0, 2])),
    }
    if kind == "m":
        outputs = (step.storage(draw(size)), step.storage(draw(size)))
        several = step.add("multi", sources, outputs, forward=True, **costs, **tags)
        for storage in outputs:
            own = tag or draw(st.sampled_from(["", "", "save", "recompute"]))
            tags = {"must_save": own == "save", "must_recompute": own == "recompute"}
            output = step.add(
                "output", (several,), (), holds=(storage,), forward=True, savable=True, **tags
            )
            step.readable.append(output)
        return
    savable = tag == "save" or draw(st.integers(0, 7)) > 0
    makes, over = _made(draw, step, sources, size)
    tags["overwrites"] = over
    step.readable.append(
        step.add("op", sources, makes, forward=True, savable=savable, **costs, **tags)
    )


def _backward_op(draw: st.DrawFn, step: Step, tangent: int) -> None:
    size = st.integers(1, 6)
    if draw(st.integers(0, 5)) == 0:  # of the backward alone, without a tangent
        step.readable.append(
            step.add(
                "apart",
                _sources(draw, step),
                (step.storage(draw(size)),),
                forward=False,
                time_s=float(draw(st.integers(0, 3))),
                ordered=draw(st.booleans()),
            )
        )
    previous = (step.late[-1],) if step.late else ()
    sources = (*_sources(draw, step), *previous)
    makes, over = _made(draw, step, sources, size)
    step.late.append(
        step.add(
            "late",
            sources,
            makes,
            overwrites=over,
            also=() if previous else (tangent,),
            forward=False,
            late=True,
            workspace_bytes=draw(st.sampled_from([0, 0, 2])),
        )
    )


def every_plan(problem: Problem) -> Iterator[tuple[frozenset[int], tuple[Drop, ...]]]:
    """All saved sets and drops that differ in what runs when, and that run nothing forbidden."""
    ops = problem.ops
    anchors = (*anchor_order(problem), *problem.backward_outputs)
    needed = needed_by(ops, anchors, frozenset())
    open_ops = [i for i in sorted(needed) if ops[i].savable and not ops[i].must_recompute]
    below = [needed_by(ops, anchors[k:], frozenset()) for k in range(len(anchors) + 1)]
    for size in range(len(open_ops) + 1):
        for saved in itertools.combinations(open_ops, size):
            walk = _Walk(problem, anchors, frozenset(saved), below)
            for drops in walk.drops(0, frozenset(saved), frozenset()):
                yield frozenset(saved), drops


@dataclass(frozen=True)
class _Walk:
    """All ways through the backward for one saved set."""

    problem: Problem
    anchors: tuple[int, ...]
    saved: frozenset[int]
    below: list[set[int]]

    def drops(
        self, place: int, present: frozenset[int], ran: frozenset[int]
    ) -> Iterator[tuple[Drop, ...]]:
        while place < len(self.anchors) and self.anchors[place] in present:
            place += 1
        if place == len(self.anchors):
            yield ()
            return
        ops, anchor = self.problem.ops, self.anchors[place]
        missing = needed_by(ops, (anchor,), present)
        if any(self._forbidden(index, ran) for index in missing):
            return
        present, ran = present | missing, ran | missing
        makers = self.problem.makers
        touched = {makers[s] for i in missing for s in ops[i].touches if s in makers}
        again = [
            i
            for i in sorted(touched & self.below[place + 1])
            if self.problem.may_repeat(i) and (present - self.saved) & self._held_of(i)
        ]
        for size in range(len(again) + 1):
            for chosen in itertools.combinations(again, size):
                gone = frozenset[int]().union(*(self._held_of(i) for i in chosen)) - self.saved
                for rest in self.drops(place + 1, present - gone, ran):
                    yield (*((anchor, i) for i in chosen), *rest)

    def _held_of(self, index: int) -> frozenset[int]:
        found = (self.problem.holders[s] for s in self.problem.ops[index].makes)
        return frozenset[int]().union(*found)

    def _forbidden(self, index: int, ran: frozenset[int]) -> bool:
        op = self.problem.ops[index]
        if op.forward:
            return (op.must_save and bool(op.makes or op.savable)) or op.ordered
        return index in ran and (op.late or op.ordered)


def brute_force(problem: Problem) -> list[Solution]:
    """Every plan, simulated; problems with too many are left out."""
    plans = list(itertools.islice(every_plan(problem), _PLANS + 1))
    assume(len(plans) <= _PLANS)
    return [evaluate(problem, saved, "brute force", drops) for saved, drops in plans]


def budgets_to_try(plans: list[Solution]) -> list[int]:
    """The least peak, the largest one that matters, and two between."""
    peaks = sorted({plan.peak_bytes for plan in plans})
    return sorted({peaks[0], peaks[len(peaks) // 3], peaks[2 * len(peaks) // 3], peaks[-1]})


def agrees_with_brute_force(problem: Problem) -> None:
    plans = brute_force(problem)
    if not plans:  # what must be saved cannot be
        with pytest.raises(InfeasibleBudgetError):
            solve_exact(problem, sum(problem.storage_bytes) * 10)
        return
    for budget in budgets_to_try(plans):
        best = min(plan.recompute_time_s for plan in plans if plan.peak_bytes <= budget)
        found = solve_exact(problem, budget)
        assert found.peak_bytes <= budget
        assert found.status == "optimal"
        assert found.recompute_time_s == found.lower_bound_s == best
    least = min(plan.peak_bytes for plan in plans)
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve_exact(problem, least - 1)
    assert caught.value.least_feasible_bytes == least == least_peak(problem)


QUIET = list(HealthCheck)


@settings(max_examples=350, deadline=None, suppress_health_check=QUIET)
@given(problem=steps())
def test_equals_brute_force(problem: Problem) -> None:
    agrees_with_brute_force(problem)


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(problem=steps())
def test_no_plan_is_faster_than_the_bound(problem: Problem) -> None:
    """What the layered solver says of all plans, where all are known."""
    plans = brute_force(problem)
    for budget in budgets_to_try(plans) if plans else ():
        best = min(plan.recompute_time_s for plan in plans if plan.peak_bytes <= budget)
        with contextlib.suppress(InfeasibleBudgetError):
            assert solve(problem, budget).lower_bound_s <= best * (1 + 1e-6)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=QUIET)
@given(problem=steps())
def test_equals_brute_force_on_many(problem: Problem) -> None:
    agrees_with_brute_force(problem)


def read_twice_far_apart() -> Problem:
    """A large, cheap value, read by the first and by the last anchor, around a high moment."""
    ops = (
        Op("cheap", (), (0,), (0,), (0,), True, time_s=1.0, savable=True),
        Op("loss", (0,), (1,), (1,), (0, 1), True),
        Op("first", (0,), (2,), (2,), (0, 2, 5), False, late=True),
        Op("high", (2,), (3,), (3,), (2, 3), False, late=True, workspace_bytes=10),
        Op("last", (0, 3), (4,), (4,), (0, 3, 4), False, late=True),
    )
    return Problem(ops, (10, 1, 1, 1, 1, 1), (1,), (1,), (4,), (4,), given=(5,))


def test_recomputes_twice_where_that_alone_fits() -> None:
    problem = read_twice_far_apart()
    found = solve_exact(problem, 14)
    assert (found.saved, found.drops) == (frozenset(), frozenset({(2, 0)}))
    assert (found.recompute_time_s, found.peak_bytes, found.status) == (2.0, 14, "optimal")
    assert solve_exact(problem, 24).recompute_time_s == 0.0
    with pytest.raises(InfeasibleBudgetError, match="the least that was found is 14 bytes"):
        solve_exact(problem, 13)


def test_nothing_runs_before_it_is_needed() -> None:
    """Making the small value early would spare a second run of the large one; no plan can."""
    ops = (
        Op("large", (), (0,), (0,), (0,), True, time_s=5.0, savable=True),
        Op("small", (0,), (1,), (1,), (0, 1), True, time_s=1.0),
        Op("mixed", (1,), (2,), (2,), (1, 2), True, time_s=20.0, savable=True),
        Op("loss", (2,), (3,), (3,), (2, 3), True),
        Op("first", (0, 2), (4,), (4,), (0, 2, 4, 7), False, late=True),
        Op("high", (4,), (5,), (5,), (4, 5), False, late=True, workspace_bytes=10),
        Op("last", (1, 5), (6,), (6,), (1, 5, 6), False, late=True),
    )
    problem = Problem(ops, (10, 1, 1, 1, 1, 1, 1, 1), (3,), (3,), (6,), (6,), given=(7,))
    plans = [evaluate(problem, saved, "any", drops) for saved, drops in every_plan(problem)]
    for budget, time_s in ((24, 1.0), (23, 11.0)):
        assert solve_exact(problem, budget).recompute_time_s == time_s
        assert min(p.recompute_time_s for p in plans if p.peak_bytes <= budget) == time_s


def test_a_limit_gives_the_best_so_far_and_a_bound() -> None:
    problem = read_twice_far_apart()
    known = evaluate(problem, (), "known", {(2, 0)})
    found = solve_exact(problem, 14, time_limit_s=1e-9, known=known)
    assert found.status == "time limit"
    assert found.peak_bytes <= 14
    assert 0.0 <= found.lower_bound_s <= found.recompute_time_s == 2.0


def test_what_it_cannot_describe_is_named() -> None:
    ops = (
        Op("a", (), (0,), (0,), (0,), True, time_s=1.0, savable=True),
        Op("b", (0,), (1,), (0, 1), (0, 1), True, time_s=1.0, savable=True),
        Op("db", (1,), (2,), (2,), (0, 1, 2), False, late=True),
    )
    problem = Problem(ops, (1, 1, 1), (1,), (1,), (2,), (2,))
    with pytest.raises(UnsupportedProblemError, match=r"Op 1 \(b\) holds storages that others"):
        Contracted.of(problem)


@given(problem=steps(), above=st.sampled_from([0, 1, 1 << 40]))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_known_peak_spares_the_search_and_changes_nothing(problem: Problem, above: int) -> None:
    try:
        least = least_peak(problem)
    except UnsupportedProblemError:
        return
    assert least_peak(problem, known_bytes=least + above) == least
