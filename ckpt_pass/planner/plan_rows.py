"""What a plan may do, as rows of the exact solver's integer program: see ``milp``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from ckpt_pass.planner.contract import Contracted
from ckpt_pass.planner.rows import CONSTANT, Rows


class PlanRows(Rows):
    """What is saved, what runs when, and what is there: variables, and how they hang together.

    Args:
        small: the contracted problem.
        sized: the values whose bytes count.

    Attributes:
        save, run: the variables that make the plan.
        live, there, state, draws, forward: those that follow from them.
    """

    def __init__(self, small: Contracted, sized: Collection[int]) -> None:
        super().__init__()
        self.small, self._problem = small, small.problem
        self._count = len(small.stages)
        self._sized = sized
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

    def _plan(self) -> None:
        """All variables and rows of the plan; none of its bytes."""
        self._choices()
        self._flow()
        for storage, value in self.small.values.items():
            if value.gradient and storage in self._sized:
                self._kept(storage)
        self._forward_choices()
        self._random_states()

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
                self._find(place, storage, CONSTANT)
                readers[storage].append(CONSTANT)
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
        """Gradients stay: from their last making on, or all along."""
        maker = self.small.values[storage].maker
        runs = [self.run.get((place, maker)) for place in range(self._count)]
        made: int | None = None
        for place in range(self._count + 1):
            there = self.there[place, storage] = self._variable()
            self._implies(self.live.get((place, storage)), there)
            self._implies(self.save.get(storage), there)
            if place:
                earlier, made = made, self._variable()
                self._implies(earlier, made)
                self._implies(runs[place - 1], made)
                self._implies(made, there, *runs[place:])

    def _at_start(self, place: int, storage: int) -> int | None:
        """The variable for bytes that are there between stages ``place`` - 1 and ``place``."""
        kept = self.there.get((place, storage))
        return kept if kept is not None else self.live.get((place, storage))

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

    def _random_states(self) -> None:
        """The forward saves the state of what draws again; it stays to the last drawing."""
        for index in self._draw:
            ran = CONSTANT if index in self.small.forward_roots else self.forward.get(index)
            later: int | None = None
            for place in reversed(range(self._count)):
                run = self.run.get((place, index))
                if run is not None and ran != CONSTANT:
                    run = self._both(run, ran)
                if run is not None:
                    self.draws[place, index] = run
                if run is not None or later is not None:
                    state = self.state[place, index] = self._variable()
                    self._implies(run, state)
                    self._implies(later, state)
                    later = state
