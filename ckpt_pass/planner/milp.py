"""The exact solver's integer program: what to save, and what to recompute before which anchor.

In the manner of Checkmate (Jain et al., MLSys 2020), with the rules of this library's schedule:
ops are recomputed just before the anchor that needs them, what is saved stays to its last use, and
bytes are counted by storage while each op runs. Variables, for stage t, maker m and value s:

* ``save[s]``: the forward hands s to the backward;
* ``run[t, m]``: m runs before the anchor of stage t;
* ``live[t, s]``: s is there when stage t begins, and is read in it or later;
* ``state[t, m]``: m draws random numbers in stage t or later.

Only ``save`` and ``run`` are integers; with them fixed the others are 0 or 1 at the least.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from ckpt_pass.planner.contract import Contracted
from ckpt_pass.planner.plan_rows import PlanRows
from ckpt_pass.planner.rows import CONSTANT, Sum

# Times are scaled so that the longest op takes this: HiGHS' absolute gap of 1e-6 is then far below
# the time of any op that counts.
_LONGEST = 1000.0


class Program(PlanRows):
    """The integer program of a contracted problem.

    Args:
        small: the problem.
        budget_bytes: the budget; ``None`` to look for the least peak instead.
        at_most_s: a recompute time that some plan within the budget is known to have.
        at_most_bytes: where the least peak is looked for, one that some plan is known to have.

    Attributes:
        upper, integer: of each variable; all are at least 0.
        rows: (sum, bound): the sum is at most the bound.
        cost: the sum to minimise: recompute time in units of 1 / ``second`` s, or the peak.
        save, run: the variables that make the plan.
    """

    def __init__(
        self,
        small: Contracted,
        budget_bytes: int | None,
        at_most_s: float | None = None,
        at_most_bytes: int | None = None,
    ) -> None:
        self._sizes, self._unit = _scaled_bytes(small)
        super().__init__(small, self._sizes.keys())
        self._budget = math.inf if budget_bytes is None else budget_bytes // self._unit
        self._variable(0.0)  # HiGHS wants at least one
        known = math.inf if at_most_bytes is None else at_most_bytes // self._unit
        self._peak = self._variable(known) if budget_bytes is None else None
        self._plan()
        self._bytes_of_forward()
        self._bytes_of_backward()
        self._objective(at_most_s)

    # -- bytes

    def _fits(self, terms: Iterable[tuple[int | None, float]]) -> None:
        if self._peak is None:
            self._at_most(terms, float(self._budget))
        else:
            self._at_most([*terms, (self._peak, -1.0)], 0.0)

    def _bytes_of_backward(self) -> None:
        constant = self.small.constant_bytes / self._unit
        for place, stage in enumerate(self.small.stages):
            for nbytes, reads in stage.rows:
                base = constant + nbytes / self._unit
                there = stage.reads if reads else frozenset[int]()
                terms = [(CONSTANT, base), *self._while_anchor(place, there)]
                if reads:
                    ends = {s: self._at_start(place + 1, s) for s in stage.overwrites}
                    terms += self._overwritten(None, ends)
                self._fits(terms)
            base = constant + stage.before_bytes / self._unit
            after: dict[int, int | None] = {s: self._at_start(place + 1, s) for s in self._sizes}
            after.update(dict.fromkeys(stage.reads, CONSTANT))
            for index in reversed(stage.makers):
                ends = {s: after.get(s) for s in self.small.makers[index].overwrites}
                saved = self._overwritten(self.run[place, index], ends)
                self._is_used(place, index, after)
                self._fits([(CONSTANT, base), *self._while_maker(place, index, after), *saved])

    def _overwritten(
        self, run: int | None, after: Mapping[int, int | None]
    ) -> list[tuple[int | None, float]]:
        """What is not allocated since the result takes the memory of an input.

        Args:
            run: whether the op runs; ``None`` for always.
            after: for each input whose memory it may take, whether it is there afterwards.
        """
        taken: list[int] = []
        for storage, later in after.items():
            value = self.small.values[storage]
            if later == CONSTANT or value.gradient or storage not in self._sizes:
                continue
            taken.append(take := self._variable())
            self._at_most([(take, 1.0), (later, 1.0)], 1.0)
            self._at_most([(take, 1.0), (self.save.get(storage), 1.0)], 1.0)
        if not taken:
            return []
        once = self._variable()  # of several inputs one is taken
        self._implies(once, *taken)
        self._implies(once if run is not None else None, run)
        return [(once, -self._sizes[next(s for s in after if s in self._sizes)])]

    def _is_used(self, place: int, index: int, after: dict[int, int | None]) -> None:
        """From a maker on back, what it reads is used by it or later."""
        for storage in self.small.makers[index].reads:
            if storage in self._sizes and after[storage] != CONSTANT:
                used = self._variable()
                self._implies(self.run[place, index], used)
                self._implies(after[storage], used)
                after[storage] = used

    def _while_anchor(
        self, place: int, reads: frozenset[int]
    ) -> Iterator[tuple[int | None, float]]:
        for storage, size in self._sizes.items():
            there = CONSTANT if storage in reads else self._at_start(place + 1, storage)
            yield self._own(storage, there), size
        for index in self._draw:
            yield self.state.get((place + 1, index)), self._state_bytes(index)

    def _while_maker(
        self, place: int, index: int, after: Mapping[int, int | None]
    ) -> Iterator[tuple[int | None, float]]:
        small, run = self.small, self.run[place, index]
        yield run, self._problem.ops[index].workspace_bytes / self._unit
        for storage, size in self._sizes.items():
            maker = small.values[storage].maker
            if maker > index:
                yield self._own(storage, self._at_start(place, storage)), size
            elif maker < index:
                yield self._own(storage, after[storage]), size
            else:
                yield run, size
                kept = self._shares(maker) and not small.values[storage].returned
                if kept and storage in self.save:
                    yield self._both(after[storage], self.save[storage]), size
        for other in self._draw:
            if other == index:  # the present state, put back afterwards
                yield self.draws.get((place, index)), self._state_bytes(index)
            when = place if index <= other else place + 1
            yield self.state.get((when, other)), self._state_bytes(other)

    def _own(self, storage: int, there: int | None) -> int | None:
        """Whether the step has a copy of its own: what is saved of the outputs the caller holds."""
        save = self.save.get(storage) if self.small.values[storage].returned else None
        if there is None or save is None:
            return there
        own = self._variable()
        self._at_most([(there, 1.0), (save, -1.0), (own, -1.0)], 0.0)
        return own

    def _state_bytes(self, index: int) -> float:
        return self._problem.ops[index].random_state_bytes / self._unit

    # -- the forward

    def _bytes_of_forward(self) -> None:
        small, ops, sizes = self.small, self._problem.ops, self._problem.storage_bytes
        always = sorted(small.forward_roots)
        last = {s: index for index in always for s in ops[index].touches}
        last.update(dict.fromkeys(self._problem.forward_outputs, len(ops)))
        made = [(index, s) for index in always for s in ops[index].makes if sizes[s]]
        for index in sorted({*always, *self.forward}):
            ran = CONSTANT if index in small.forward_roots else self.forward[index]
            terms: list[tuple[int | None, float]] = [
                (CONSTANT, sizes[s] / self._unit) for m, s in made if m <= index <= last[s]
            ]
            terms.append((ran, ops[index].workspace_bytes / self._unit))
            for storage, value in small.values.items():
                size = sizes[storage] / self._unit
                if value.maker == index and ran != CONSTANT:
                    terms.append((ran, size))
                elif value.maker < index and last.get(storage, -1) < index:
                    terms.append((self._lasts(storage, index), size))
            terms += [
                (self.state.get((0, r)), self._state_bytes(r)) for r in self._draw if r <= index
            ]
            self._fits(terms)

    def _lasts(self, storage: int, index: int) -> int | None:
        """Whether a value is there in the forward although what always runs needs it no more."""
        save = self.save.get(storage)
        readers = [self.forward[k] for k in self._readers[storage] if k in self.forward]
        late = [variable for k, variable in self.forward.items() if k >= index]
        readers = [variable for variable in readers if variable in late]
        if not readers:
            return save
        lasts = self._variable()
        for variable in (save, *readers):
            self._implies(variable, lasts)
        return lasts

    # -- solving

    def _objective(self, at_most_s: float | None) -> None:
        ops = self._problem.ops
        longest = max((ops[index].time_s for _, index in self.run), default=0.0) or 1.0
        self.second = _LONGEST / longest
        cost: Sum = defaultdict(float)
        runs: dict[int, list[int]] = defaultdict(list)
        for (_, index), run in self.run.items():
            cost[run] += ops[index].time_s * self.second
            runs[index].append(run)
        for index, variables in runs.items():
            if not ops[index].forward and ops[index].time_s:
                once = self._variable()  # the first run of the backward's own op is free
                self._implies(once, *variables)
                cost[once] -= ops[index].time_s * self.second
        if at_most_s is not None and cost:
            # 1e-6 of the longest op: room for rounding, so that the known plan stays allowed.
            limit = at_most_s * self.second + _LONGEST * 1e-6
            self._at_most(list(cost.items()), limit)
        self.cost = cost if self._peak is None else {self._peak: 1.0}


def _scaled_bytes(small: Contracted) -> tuple[dict[int, float], int]:
    """Bytes of each value in units of the greatest common divisor of all bytes, and that unit."""
    problem = small.problem
    unit = math.gcd(
        *problem.storage_bytes,
        *(op.workspace_bytes for op in problem.ops),
        *(op.random_state_bytes for op in problem.ops),
    )
    unit = unit or 1
    may_run = {index for stage in small.stages for index in stage.makers}
    sizes = {
        storage: problem.storage_bytes[storage] / unit
        for storage, value in small.values.items()
        if problem.storage_bytes[storage] and (value.maker in may_run or not value.returned)
    }
    return sizes, unit
