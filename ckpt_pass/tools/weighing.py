"""Candidates that fit, weighed by their times: predicted, and measured where that may pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ckpt_pass.job.totals import JobAsked
from ckpt_pass.report.tunings import Tuned, TuneRow
from ckpt_pass.tools.calibrating import (
    Candidate,
    best_of,
    next_to_measure,
    predicted_pass_s,
    step_s,
)
from ckpt_pass.tools.candidates import Planned, bandwidth_of, modelled_update_s
from ckpt_pass.tools.timed_steps import Stopwatch

#: Candidates that are measured at the most, where nobody says.
MOST = 5
#: How much longer than the fastest those may take that are timed again in turn, before each block
#: of rounds. Single medians of five differ by 10 % from run to run where others share the machine
#: (two cores, steps of 45 ms); medians in turn by less with each block.
_CLOSE = (1.15, 1.08, 1.05, 1.03)


@dataclass
class Weighed:
    """The candidates that fit, with what is known of their times.

    Attributes:
        planned: their plans.
        candidates: their times, in the same order.
        update_s: seconds of the optimizer's step.
        asked: the job.
        failures: why a candidate could not be measured.
    """

    planned: list[Planned]
    candidates: list[Candidate]
    update_s: float
    asked: JobAsked
    failures: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, planned: list[Planned], asked: JobAsked) -> Weighed:
        """With modelled times alone."""
        account = planned[0].account
        bandwidth = bandwidth_of(asked, account)
        times = [
            Candidate(one.kind, one.microbatch, one.accumulate, one.pass_s(bandwidth))
            for one in planned
        ]
        return cls(planned, times, modelled_update_s(account, asked.job, bandwidth), asked)

    def measure(self, stopwatch: Stopwatch, most: int | None, tell: Callable[[str], None]) -> None:
        """Time the optimizer's step, and the candidates that may be the fastest.

        Args:
            stopwatch: it is opened.
            most: so many of them; fewer than a third, but one, where ``None``.
            tell: called before each.
        """
        if most is None:
            most = min(max((len(self.planned) - 1) // 3, 1), MOST)
        tell("timing the optimizer's step")
        took = stopwatch.update_s(self.asked.job, self.planned[0].account)
        self.update_s = self.update_s if took is None else took
        for _ in range(most):
            number = self._next()
            if number is None:
                break
            one = self.planned[number]
            tell(f"timing {one.accumulate} x {one.microbatch}, {one.way}")
            self._time(number, stopwatch.pass_s(one))
        self._time_again(stopwatch)

    def _next(self) -> int | None:
        left = [n for n in range(len(self.planned)) if n not in self.failures]
        found = next_to_measure([self.candidates[n] for n in left], self.update_s)
        return None if found is None else left[found]

    def _time(self, number: int, seconds: float | None) -> None:
        if seconds is None:
            self.failures[number] = "out of memory when it was measured"
            return
        self.candidates[number] = replace(self.candidates[number], measured_s=seconds)

    def _time_again(self, stopwatch: Stopwatch) -> None:
        """Those that were about as fast as the fastest, in turn: they meet the same machine.

        What they took alone no longer counts. Those that fall behind drop out; to the end they take
        as many times as long as the fastest as they did then, whatever the machine does since.
        """
        left = [n for n, one in enumerate(self.candidates) if one.measured_s is not None]
        stopwatch.forget(self.planned[n] for n in left)
        behind: dict[int, float] = {}
        for share in _CLOSE:
            took = {n: self._step_s(n) for n in left}
            times = {n: seconds / min(took.values()) for n, seconds in took.items()}
            behind |= {n: many for n, many in times.items() if many > share}
            left = [n for n in left if n not in behind]
            if len(left) < 2:
                break
            again = stopwatch.in_turn(self.planned[n] for n in left)
            for number in left:
                self._time(number, again[self.planned[number]])
        fastest_s = min((self._step_s(n) for n in left), default=0.0)
        for number, many in behind.items():
            rest_s = many * fastest_s - self.update_s
            self._time(number, rest_s / self.candidates[number].accumulate)

    def _step_s(self, number: int) -> float:
        one = self.candidates[number]
        assert one.measured_s is not None
        return step_s(one, one.measured_s, self.update_s)

    def tuned(self, found: Sequence[Planned], model: str, rounds: int) -> Tuned:
        """The answer.

        Args:
            found: all candidates, those among them that do not fit.
            model: in words.
            rounds: timings of each that was measured.
        """
        left = [n for n in range(len(self.planned)) if n not in self.failures]
        best = self.planned[left[best_of([self.candidates[n] for n in left], self.update_s)]]
        rows = {id(one): self._row(n) for n, one in enumerate(self.planned)}
        measured = any(one.measured_s is not None for one in self.candidates)
        return Tuned(
            rows=tuple(rows.get(id(one)) or _unfit(one) for one in found),
            chosen=next(n for n, one in enumerate(found) if one is best),
            model=model,
            job=str(self.asked.job),
            device=best.account.device,
            total_bytes=best.account.total_bytes or 0,
            global_batch=best.microbatch * best.accumulate,
            update_s=self.update_s,
            rounds=rounds if measured else 0,
        )

    def _row(self, number: int) -> TuneRow:
        one, times = self.planned[number], self.candidates[number]
        predicted = predicted_pass_s(times, self.candidates)
        took = times.measured_s
        return TuneRow(
            microbatch=one.microbatch,
            accumulate=one.accumulate,
            way=str(one.way),
            peak_bytes=one.account.peak_bytes,
            recompute_share=one.recompute_share,
            modelled_s=step_s(times, times.modelled_s, self.update_s),
            predicted_s=step_s(times, predicted, self.update_s),
            measured_s=None if took is None else step_s(times, took, self.update_s),
            failure=self.failures.get(number, ""),
            plan=one.plan,
        )


def _unfit(one: Planned) -> TuneRow:
    row = TuneRow(one.microbatch, one.accumulate, str(one.way))
    if one.refused is not None:
        return replace(row, failure="cannot be traced")
    if one.error is None:
        return replace(row, failure="does not fit, as a smaller one does not")
    return replace(row, peak_bytes=one.error.needed_bytes, failure="does not fit")
