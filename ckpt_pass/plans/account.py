"""The account of a training job as a value: what stands there, and what each part of it adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_pass.drawing.bars import plot_bars
from ckpt_pass.plans.wording import format_bytes

#: The names of the phases, in the order of a job.
FIRST_PASS = "first forward and backward"
PASS = "forward and backward"
UNSCALING = "gradients unscaled"
CLIPPING = "gradients clipped"
FIRST_UPDATE = "first optimizer step"
UPDATE = "optimizer step"
PHASES = (FIRST_PASS, FIRST_UPDATE, PASS, UNSCALING, CLIPPING, UPDATE)

#: What a library of matrix products keeps.
WORKSPACES = "products' workspace"
#: Characters of a bar in the text.
_WIDTH = 56
_STANDS, _ADDS, _EMPTY, _TOTAL = "█", "▒", " ", "│"


@dataclass(frozen=True)
class JobPhase:
    """A part of a job.

    Attributes:
        name: of the part.
        standing_bytes: what is there when it begins.
        above_bytes: the most that it allocates above that; ``None`` where it is not planned yet.
    """

    name: str
    standing_bytes: int
    above_bytes: int | None

    @property
    def peak_bytes(self) -> int:
        """The most bytes while it runs."""
        return self.standing_bytes + (self.above_bytes or 0)

    @property
    def is_pass(self) -> bool:
        """Whether it is a forward and backward."""
        return self.name in (FIRST_PASS, PASS)


@dataclass(frozen=True)
class Account:
    """The memory of a training job on its device; prints and draws itself.

    Attributes:
        device: the device, in words.
        job: the optimizers and how gradients are kept, in words.
        parameters_bytes: of the model's parameters.
        buffers_bytes: of buffers, and of other tensors that the model holds.
        inputs_bytes: of one batch.
        gradients_bytes: of all gradients, when the backward has run.
        states_bytes: of the optimizers' states, once they have stepped.
        states_now_bytes: of those that are there already.
        outputs_bytes: what the step returns, there until the next one has returned.
        phases: the parts of the job, in order; of parts that come again the highest.
        total_bytes: what was asked for, if anything.
        workspaces_bytes: what a library of matrix products keeps, of a device on paper.
    """

    device: str
    job: str
    parameters_bytes: int
    buffers_bytes: int
    inputs_bytes: int
    gradients_bytes: int
    states_bytes: int
    states_now_bytes: int
    outputs_bytes: int
    phases: tuple[JobPhase, ...]
    total_bytes: int | None = None
    workspaces_bytes: int = 0

    @property
    def standing_bytes(self) -> int:
        """What stands there all the time, from the second step on: all but gradients."""
        return self.before_bytes - self.states_now_bytes + self.states_bytes

    @property
    def before_bytes(self) -> int:
        """What stands there before the first step."""
        return self._held_bytes + self.states_now_bytes

    @property
    def _held_bytes(self) -> int:
        """What stands there whatever happens."""
        own = self.parameters_bytes + self.buffers_bytes + self.inputs_bytes
        return own + self.workspaces_bytes

    @property
    def pass_standing_bytes(self) -> int:
        """The most that stands there when a forward begins."""
        return max(phase.standing_bytes for phase in self.phases if phase.is_pass)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients stand there when a forward begins."""
        beside = self.standing_bytes + self.outputs_bytes
        return self.pass_standing_bytes >= beside + self.gradients_bytes

    @property
    def updates(self) -> tuple[JobPhase, ...]:
        """The parts between a backward and the next forward."""
        return tuple(phase for phase in self.phases if not phase.is_pass)

    @property
    def peak_phase(self) -> JobPhase:
        """The part in which the job's peak is: the first of those that are as high."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The peak of the whole job."""
        return self.peak_phase.peak_bytes

    def with_step(self, peak_bytes: int, outputs_bytes: int, beside_bytes: int = 0) -> Account:
        """This account with a planned forward and backward.

        Args:
            peak_bytes: its peak above what was allocated when it began.
            outputs_bytes: what it returns.
            beside_bytes: what gradients keep besides themselves.
        """
        more = outputs_bytes - self.outputs_bytes
        phases = []
        for phase in self.phases:
            held = 0 if phase.name == FIRST_PASS else more
            if self.keeps_gradients or not phase.is_pass:
                held += beside_bytes
            above = peak_bytes if phase.is_pass else phase.above_bytes
            phases.append(JobPhase(phase.name, phase.standing_bytes + held, above))
        return replace(
            self,
            outputs_bytes=outputs_bytes,
            gradients_bytes=self.gradients_bytes + beside_bytes,
            phases=tuple(phases),
        )

    def with_workspaces(self, nbytes: int) -> Account:
        """This account with what stands there for products, from the start to the end."""
        phases = (
            replace(phase, standing_bytes=phase.standing_bytes + nbytes) for phase in self.phases
        )
        return replace(self, workspaces_bytes=nbytes, phases=tuple(phases))

    def within(self, total_bytes: int | None) -> Account:
        """This account with the total that was asked for."""
        return replace(self, total_bytes=total_bytes)

    def rows(self) -> tuple[tuple[str, int], ...]:
        """What there is, in order: name and bytes."""
        found = (
            ("parameters", self.parameters_bytes),
            ("buffers", self.buffers_bytes),
            ("inputs", self.inputs_bytes),
            ("optimizer states", self.states_bytes),
            ("gradients", self.gradients_bytes),
            (WORKSPACES, self.workspaces_bytes),
        )
        return tuple(row for row in found if row[1])

    def plot(self, path: str | Path) -> Path:
        """Draw a bar for each part of the job as a PNG; return its path.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        bars = {phase.name: self.parts(phase) for phase in self.phases}
        title = f"memory of a training job on {self.device}"
        return plot_bars(title, self.job, bars, self.total_bytes, Path(path))

    def parts(self, phase: JobPhase) -> tuple[tuple[str, int], ...]:
        """What is there in a part of the job, in order: name and bytes; they add up to its peak."""
        outputs = 0 if phase.name == FIRST_PASS else self.outputs_bytes
        stands = not phase.is_pass or self.keeps_gradients
        gradients = self.gradients_bytes if stands else 0
        return (
            ("parameters", self.parameters_bytes),
            ("buffers", self.buffers_bytes),
            ("inputs", self.inputs_bytes),
            (WORKSPACES, self.workspaces_bytes),
            ("optimizer states", phase.standing_bytes - self._held_bytes - gradients - outputs),
            ("gradients", gradients),
            ("outputs", outputs),
            ("added while it runs", phase.above_bytes or 0),
        )

    def lines(self) -> Iterator[str]:
        """The account as a table, and a bar for each part of the job."""
        yield f"the job on {self.device}: {self.job}"
        yield from (f"  {name:28} {format_bytes(nbytes):>11}" for name, nbytes in self.rows())
        yield f"{'':30} {'stands':>11} {'adds':>11} {'peak':>11}"
        highest = self.peak_phase
        for phase in self.phases:
            adds = "not planned" if phase.above_bytes is None else format_bytes(phase.above_bytes)
            mark = "  <- the job's peak" if phase is highest else ""
            yield (
                f"  {phase.name:28} {format_bytes(phase.standing_bytes):>11} {adds:>11} "
                f"{format_bytes(phase.peak_bytes):>11}{mark}"
            )
            yield f"    {self._bar(phase)}".rstrip()
        if self.total_bytes is not None:
            rest = self.total_bytes - self.peak_bytes
            words = f"{format_bytes(abs(rest))} are {'left' if rest >= 0 else 'missing'}"
            yield f"  {'total':28} {format_bytes(self.total_bytes):>11}, of which {words}"

    def _bar(self, phase: JobPhase) -> str:
        """What stands and what is added, to the scale of the highest; where the total is."""
        total = self.total_bytes or 0
        most = max(self.peak_bytes, total, 1)
        stands, peak = (-(-n * _WIDTH // most) for n in (phase.standing_bytes, phase.peak_bytes))
        cells = _STANDS * stands + _ADDS * (peak - stands) + _EMPTY * (_WIDTH - peak)
        limit = min(total * _WIDTH // most, _WIDTH)
        return cells[:limit] + _TOTAL + cells[limit:] if total else cells

    def __str__(self) -> str:
        return "\n".join(self.lines())
