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

#: A sum: variable -> factor, and the constant part under -1.
Sum = dict[int, float]
_CONSTANT = -1
# Times are scaled so that the longest op takes this: HiGHS' absolute gap of 1e-6 is then far below
# the time of any op that counts.
_LONGEST = 1000.0


class Program:
    """The integer program of a contracted problem.

    Args:
        small: the problem.
        budget_bytes: the budget; ``None`` to look for the least peak instead.
        at_most_s: a recompute time that some plan within the budget is known to have.

    Attributes:
        upper, integer: of each variable; all are at least 0.
        rows: (sum, bound): the sum is at most the bound.
        cost: the sum to minimise: recompute time in units of 1 / ``second`` s, or the peak.
        save, run: the variables that make the plan.
    """

    def __init__(
        self, small: Contracted, budget_bytes: int | None, at_most_s: float | None = None
    ) -> None:
        self.small, self._problem = small, small.problem
        self._count = len(small.stages)
        self._sizes, self._unit = _scaled_bytes(small)
        self._budget = math.inf if budget_bytes is None else budget_bytes // self._unit
        self.upper: list[float] = []
        self.integer: list[bool] = []
        self.rows: list[tuple[Sum, float]] = []
        self.save: dict[int, int] = {}
        self.run: dict[tuple[int, int], int] = {}
        self.live: dict[tuple[int, int], int] = {}
        self.there: dict[tuple[int, int], int] = {}  # live, or kept although nothing reads it
        self.state: dict[tuple[int, int], int] = {}
        self.draws: dict[tuple[int, int], int] = {}
        self.forward: dict[int, int] = {}
        self._last_read = self._last_reads()
        self._readers: dict[int, list[int]] = defaultdict(list)
        for index, maker in small.makers.items():
            for storage in maker.reads:
                self._readers[storage].append(index)
        self._draw = [i for i in small.makers if small.problem.ops[i].random_state_bytes]
        self._variable(0.0)  # HiGHS wants at least one
        self._peak = self._variable(math.inf) if budget_bytes is None else None
        self._choices()
        self._flow()
        for storage, value in small.values.items():
            if (value.returned or value.gradient) and storage in self._sizes:
                self._kept(storage)
        self._forward_choices()
        self._random_states()
        self._bytes_of_forward()
        self._bytes_of_backward()
        self._objective(at_most_s)

    # -- variables and rows

    def _variable(self, upper: float = 1.0, *, integer: bool = False) -> int:
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.upper) - 1

    def _at_most(self, terms: Iterable[tuple[int | None, float]], bound: float) -> None:
        """Sum of (variable, factor) <= bound; variables that do not exist are 0."""
        total: Sum = defaultdict(float)
        for variable, factor in terms:
            if variable is not None:
                total[variable] += factor
        bound -= total.pop(_CONSTANT, 0.0)
        if total or bound < 0:
            self.rows.append((total, bound))

    def _implies(self, low: int | None, *high: int | None, slack: float = 0.0) -> None:
        """low <= sum of high + slack."""
        if low is not None:
            self._at_most([(low, 1.0), *((h, -1.0) for h in high)], slack)

    # -- the plan

    def _last_reads(self) -> dict[int, int]:
        """The last stage in which each value may be read."""
        found: dict[int, int] = {}
        for place, stage in enumerate(self.small.stages):
            found.update(dict.fromkeys(stage.reads, place))
            for index in stage.makers:
                found.update(dict.fromkeys(self.small.makers[index].reads, place))
        return found

    def _choices(self) -> None:
        small = self.small
        for place, stage in enumerate(small.stages):
            for index in stage.makers:
                self.run[place, index] = self._variable(integer=True)
        first: dict[int, int] = {}
        for place, index in self.run:
            first.setdefault(index, place)
        for storage, value in small.values.items():
            if value.saver is not None and storage in self._last_read:
                self.save[storage] = self._variable(integer=True)
            begin = 0 if storage in self.save else first.get(value.maker, self._count) + 1
            for place in range(begin, self._last_read.get(storage, -1) + 1):
                self.live[place, storage] = self._variable()

    def _flow(self) -> None:
        """What is there comes from before; who runs is needed now, and finds what it reads."""
        small = self.small
        for (place, storage), variable in self.live.items():
            maker = small.values[storage].maker
            if place == 0:
                self._implies(variable, self.save[storage])
                continue
            made = None if small.values[storage].bound else self.run.get((place - 1, maker))
            previous = self.live.get((place - 1, storage))
            self._implies(variable, previous, made)
            if made is not None and self._shares(maker) and storage in self.save:
                self._at_most([(variable, 1.0), (previous, -1.0), (self.save[storage], 1.0)], 1.0)
        for place, stage in enumerate(small.stages):
            readers: dict[int, list[int]] = defaultdict(list)
            for index in stage.makers:
                for storage in small.makers[index].reads:
                    self._find(place, storage, self.run[place, index])
                    readers[storage].append(self.run[place, index])
            for storage in stage.reads:
                self._find(place, storage, _CONSTANT)
                readers[storage].append(_CONSTANT)
            for index in stage.makers:
                self._just_in_time(place, index, readers)
        for index, repeated in small.makers.items():
            if repeated.once:
                runs = [v for (_, i), v in self.run.items() if i == index]
                self._at_most([(v, 1.0) for v in runs], 1.0)

    def _shares(self, maker: int) -> bool:
        return len(self.small.makers[maker].makes) > 1

    def _find(self, place: int, storage: int, reader: int) -> None:
        value, there = self.small.values[storage], self.live.get((place, storage))
        run = self.run.get((place, value.maker))
        # A constant reader is there in any case: -1 * constant moves to the bound.
        self._at_most([(reader, 1.0), (there, -1.0), (None if value.bound else run, -1.0)], 0.0)
        if self._shares(value.maker) and storage in self.save:
            self._at_most([(reader, 1.0), (there, -1.0), (self.save[storage], 1.0)], 1.0)

    def _just_in_time(self, place: int, index: int, readers: Mapping[int, list[int]]) -> None:
        run, makes = self.run[place, index], self.small.makers[index].makes
        wanted: list[int | None] = []
        for storage in makes:
            save, live = self.save.get(storage), self.live.get((place, storage))
            if not self._shares(index):
                self._at_most([(run, 1.0), (live, 1.0)], 1.0)
                self._at_most([(run, 1.0), (save, 1.0)], 1.0)
                wanted += readers[storage]
                continue
            self._at_most([(run, 1.0), (live, 1.0), (save, -1.0)], 1.0)
            if readers[storage]:
                want = self._variable()
                self._at_most([(want, 1.0), (save, 1.0)], 1.0)
                self._at_most([(want, 1.0), *((r, -1.0) for r in readers[storage])], 0.0)
                wanted.append(want)
        self._implies(run, *wanted)

    # -- what is alive

    def _kept(self, storage: int) -> None:
        """Outputs of the step stay: from their last making on, or all along."""
        value = self.small.values[storage]
        runs = [self.run.get((place, value.maker)) for place in range(self._count)]
        if all(run is None for run in runs) and value.returned:
            return  # among the constant bytes
        made: int | None = None
        for place in range(self._count + 1):
            there = self.there[place, storage] = self._variable()
            self._implies(self.live.get((place, storage)), there)
            self._implies(self.save.get(storage), there)
            if value.returned:
                self._at_most([(there, -1.0), *((run, -1.0) for run in runs)], -1.0)
            if place:
                earlier, made = made, self._variable()
                self._implies(earlier, made)
                self._implies(runs[place - 1], made)
                self._implies(made, there, *runs[place:])

    def _at_start(self, place: int, storage: int) -> int | None:
        """The variable for bytes that are there between stages ``place`` - 1 and ``place``."""
        kept = self.there.get((place, storage))
        return kept if kept is not None else self.live.get((place, storage))

    def _random_states(self) -> None:
        """The forward saves the state of what draws again; it stays to the last drawing."""
        for index in self._draw:
            ran = _CONSTANT if index in self.small.forward_roots else self.forward.get(index)
            later: int | None = None
            for place in reversed(range(self._count)):
                run = self.run.get((place, index))
                if run is not None and ran != _CONSTANT:
                    run = self._both(run, ran)
                if run is not None:
                    self.draws[place, index] = run
                if run is not None or later is not None:
                    state = self.state[place, index] = self._variable()
                    self._implies(run, state)
                    self._implies(later, state)
                    later = state

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
                terms = [(_CONSTANT, base), *self._while_anchor(place, there)]
                if reads:
                    ends = {s: self._at_start(place + 1, s) for s in stage.overwrites}
                    terms += self._overwritten(None, ends)
                self._fits(terms)
            base = constant + stage.before_bytes / self._unit
            after: dict[int, int | None] = {s: self._at_start(place + 1, s) for s in self._sizes}
            after.update(dict.fromkeys(stage.reads, _CONSTANT))
            for index in reversed(stage.makers):
                ends = {s: after.get(s) for s in self.small.makers[index].overwrites}
                saved = self._overwritten(self.run[place, index], ends)
                self._is_used(place, index, after)
                self._fits([(_CONSTANT, base), *self._while_maker(place, index, after), *saved])

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
            if later == _CONSTANT or value.returned or value.gradient or storage not in self._sizes:
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
            if storage in self._sizes and after[storage] != _CONSTANT:
                used = self._variable()
                self._implies(self.run[place, index], used)
                self._implies(after[storage], used)
                after[storage] = used

    def _while_anchor(
        self, place: int, reads: frozenset[int]
    ) -> Iterator[tuple[int | None, float]]:
        for storage, size in self._sizes.items():
            yield (_CONSTANT if storage in reads else self._at_start(place + 1, storage)), size
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
                yield self._at_start(place, storage), size
            elif maker < index:
                yield after[storage], size
            else:
                yield run, size
                if self._shares(maker) and storage in self.save:
                    yield self._both(after[storage], self.save[storage]), size
        for other in self._draw:
            if other == index:  # the present state, put back afterwards
                yield self.draws.get((place, index)), self._state_bytes(index)
            when = place if index <= other else place + 1
            yield self.state.get((when, other)), self._state_bytes(other)

    def _both(self, one: int | None, other: int | None) -> int | None:
        """A variable that is 1 where two are."""
        if one is None or other is None:
            return None
        both = self._variable()
        self._at_most([(one, 1.0), (other, 1.0), (both, -1.0)], 1.0)
        return both

    def _state_bytes(self, index: int) -> float:
        return self._problem.ops[index].random_state_bytes / self._unit

    # -- the forward

    def _forward_choices(self) -> None:
        """What the forward runs only because it is saved, or something made of it is."""
        small = self.small
        for index in reversed(small.makers):
            if not self._problem.ops[index].forward or index in small.forward_roots:
                continue
            ran = self.forward[index] = self._variable()
            for storage in small.makers[index].makes:
                self._implies(self.save.get(storage), ran)
                for reader in self._readers[storage]:
                    self._implies(self.forward.get(reader), ran)

    def _bytes_of_forward(self) -> None:
        small, ops, sizes = self.small, self._problem.ops, self._problem.storage_bytes
        always = sorted(small.forward_roots)
        last = {s: index for index in always for s in ops[index].touches}
        last.update(dict.fromkeys(self._problem.forward_outputs, len(ops)))
        made = [(index, s) for index in always for s in ops[index].makes if sizes[s]]
        for index in sorted({*always, *self.forward}):
            ran = _CONSTANT if index in small.forward_roots else self.forward[index]
            terms: list[tuple[int | None, float]] = [
                (_CONSTANT, sizes[s] / self._unit) for m, s in made if m <= index <= last[s]
            ]
            terms.append((ran, ops[index].workspace_bytes / self._unit))
            for storage, value in small.values.items():
                size = sizes[storage] / self._unit
                if value.maker == index and ran != _CONSTANT:
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
