"""Write down what was decided for an eager step as a plan."""

from __future__ import annotations

import hashlib
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.eager.contents import contents
from ckpt_pass.eager.step_record import EagerTrace, OpRecord
from ckpt_pass.ops.taxonomy import classify, op_name
from ckpt_pass.planner.eager_problem import EagerProblem, EagerProfile
from ckpt_pass.planner.eager_solve import EagerSolution
from ckpt_pass.plans.goal import Goal
from ckpt_pass.plans.link_use import LinkUse, MovedActivation
from ckpt_pass.plans.parts import Decision, SavedActivation, SavedActivations, Signature
from ckpt_pass.plans.record import Asked, EagerExecution, Predicted, Proven
from ckpt_pass.plans.timeline import Timeline
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.sites import output_tensors
from ckpt_pass.regions.keeps import Moves
from ckpt_pass.version import __version__

#: The tag for what becomes of an op.
_TAGS = {
    "saved": CheckpointPolicy.MUST_SAVE,
    "offloaded": CheckpointPolicy.MUST_CPU_OFFLOAD,
    "sharded": CheckpointPolicy.MUST_SAVE,
    "recomputed": CheckpointPolicy.PREFER_RECOMPUTE,
    "unused": CheckpointPolicy.PREFER_RECOMPUTE,
}


class Writer:
    """Writes a solution down as a plan.

    Args:
        trace: the record of the step.
        problem: what was made of it.
        solution: what was decided.
    """

    def __init__(self, trace: EagerTrace, problem: EagerProblem, solution: EagerSolution) -> None:
        self._trace = trace
        self._problem = problem
        self._solution = solution
        self._region_of: dict[int, str] = {}
        self._again: set[int] = set(problem.rerun_ops(solution.plan))
        for index in sorted(solution.plan.regions | solution.plan.moved):
            region = problem.regions[index]
            self._region_of |= dict.fromkeys(range(*region.ops), region.name)
        self._run_twice = {problem.regions[index].name for index in solution.plan.regions}
        #: By storage, the module that moves it.
        self._mover_of: dict[int, str] = {}
        for index in sorted(solution.plan.moved):
            region = problem.regions[index]
            for storage in (problem.values[number].storage for number in region.moves):
                self._mover_of.setdefault(storage, region.name)
        for index in sorted(solution.plan.sends):
            region = problem.regions[index]
            for storage in region.sent:
                self._mover_of.setdefault(storage, region.name)

        #: By storage, a region whose arguments ranks share out, and the bytes of a part.
        self._shared: dict[int, tuple[str, int]] = {}
        for index in sorted(solution.plan.shards):
            region = problem.regions[index]
            for storage, part, _ in region.parts:
                self._shared.setdefault(storage, (region.name, part))

    def plan(self, asked: Asked, signature: Signature, plain: EagerProfile) -> Plan:
        """The plan."""
        chosen = self._solution.plan
        regions = [self._problem.regions[i] for i in sorted(chosen.regions | chosen.moved)]
        again = [self._problem.regions[index] for index in sorted(chosen.regions)]
        return Plan(
            fingerprint=_fingerprint(self._trace, asked.words, str(asked.goal), __version__),
            decisions=tuple(self._decisions()),
            saved=SavedActivations(self._saved()),
            regions=tuple(dict.fromkeys(region.name for region in regions)),
            sites=frozenset(op.site for op in self._trace.ops if op.site is not None),
            asked=asked,
            predicted=self._predicted(plain, asked.goal),
            proven=Proven(
                f"eager (the fastest of {self._solution.tried} simulated plans that fits)",
                self._solution.status,
                lower_bound_s=0.0,
            ),
            execution=EagerExecution(
                signature,
                frozenset(region.name for region in again if region.draws),
                self._moves(),
                frozenset(self._problem.regions[index].name for index in chosen.shards),
            ),
        )

    def _moves(self) -> tuple[tuple[str, Moves], ...]:
        """What moves, by module: its saved values as the module itself counts them."""
        chosen, found = self._solution.plan, []
        for index in sorted(chosen.moved | chosen.sends):
            region, sends = self._problem.regions[index], index in chosen.sends
            numbers = (number - region.values[0] for number in region.moves if not sends)
            found.append((region.name, Moves(frozenset(numbers), chosen.ahead, sends)))
        return tuple(found)

    def _offloaded(self, goal: Goal | None) -> LinkUse | None:
        """What the link does; ``None`` where there is none."""
        problem, found = self._problem, self._solution.profile
        if problem.link is None or goal is None:
            return None
        copies = found.copies
        ways = problem.transfers(found)
        makers = [problem.ops[problem.storages[way.storage].born] for way in ways]
        return LinkUse(
            where=str(goal.offload).removeprefix("offload "),
            out_bytes_per_s=problem.link.out_bytes_per_s,
            in_bytes_per_s=problem.link.in_bytes_per_s,
            step_time_s=problem.step_time_s + found.overhead_s,
            stall_s=found.stall_s,
            out_busy_s=sum(copies.out_s) if copies is not None else 0.0,
            in_busy_s=sum(copies.in_s) if copies is not None else 0.0,
            host_peak_bytes=found.away_bytes,
            values=tuple(
                MovedActivation(maker.name, maker.time_s, way)
                for maker, way in zip(makers, ways, strict=True)
            ),
        )

    def _predicted(self, plain: EagerProfile, goal: Goal | None) -> Predicted:
        problem, found = self._problem, self._solution.profile
        return Predicted(
            peak_bytes=found.peak_bytes,
            peak_at=self._place(found),
            output_bytes=self._trace.output_bytes,
            recompute_flops=found.recompute_flops,
            step_flops=sum(op.flops for op in problem.ops),
            recompute_time_s=found.recompute_time_s,
            step_time_s=problem.step_time_s,
            timeline=self._timeline(found),
            plain_timeline=self._timeline(plain),
            measured_workspaces=sum(1 for op in problem.ops if op.workspace_bytes),
            offloaded=self._offloaded(goal),
            gathered_bytes=found.gathered_bytes,
            gather_s=found.gather_s,
            beside_gradients_bytes=self._trace.beside_gradients_bytes,
            contents=contents(self._trace, problem, self._solution),
        )

    def _timeline(self, profile: EagerProfile) -> Timeline:
        seconds = tuple(self._problem.ops[int(op)].time_s for op in profile.ops)
        at = tuple(int(nbytes) for nbytes in profile.bytes_at)
        return Timeline(at, profile.backward_begins, seconds)

    def _place(self, profile: EagerProfile) -> str:
        op = int(profile.ops[profile.peak_index])
        if op >= self._trace.forward_length:
            return f"in the backward ({self._problem.ops[op].name})"
        again = profile.peak_index >= profile.backward_begins
        return f"in the {'recomputation' if again else 'forward'} of {self._problem.ops[op].name}"

    def _held_by_autograd(self) -> set[int]:
        """The ops outside regions whose outputs autograd holds."""
        inside: set[int] = set()
        for index in self._solution.plan.regions:
            inside |= set(range(*self._problem.regions[index].values))
        for index in self._solution.plan.moved:
            inside |= set(self._problem.regions[index].moves)
        return {
            self._problem.storages[value.storage].born
            for number, value in enumerate(self._problem.values)
            if value.storage >= 0 and number not in inside
        }

    def _decisions(self) -> list[Decision]:
        held, kept = self._held_by_autograd(), self._solution.plan.kept
        found = []
        for index, op in enumerate(self._trace.ops[: self._trace.forward_length]):
            assert op.site is not None and callable(op.call.target)
            region = self._region_of.get(index)
            saved = index in (kept if region in self._run_twice else held)
            again = index in self._again
            fate = "saved" if saved else "recomputed" if again else "unused"
            mover = next((self._mover_of[s] for s in op.makes if s in self._mover_of), None)
            rule = "solver (eager)" if region is not None else "not in a region: autograd's own"
            if mover is not None and fate == "unused":
                fate, rule = "offloaded", f"solver (eager): moved by {mover}"
            sharer = next((self._shared[s][0] for s in op.makes if s in self._shared), None)
            if sharer is not None and fate == "unused":
                fate, rule = "sharded", f"solver (eager): shared out by {sharer}"
            found.append(
                Decision(
                    site=op.site,
                    op_class=str(classify(op.call.target)),
                    nbytes=sum(self._trace.storages[s].nbytes for s in op.makes),
                    decision=_TAGS[fate],
                    rule=rule,
                    fate=fate,
                    region=region,
                    times=int(again),
                    time_s=self._problem.ops[index].time_s,
                )
            )
        return found

    def _saved(self) -> list[SavedActivation]:
        """What is held from forward to backward: by regions, and by autograd outside of them."""
        reasons: dict[int, str] = {}
        for op in self._held_by_autograd():
            reasons |= dict.fromkeys(self._problem.ops[op].makes, "autograd, outside of regions")
        for index in sorted(self._solution.plan.regions):
            region = self._problem.regions[index]
            sent = set(region.sent if index in self._solution.plan.sends else ())
            if index in self._solution.plan.shards:
                sent |= {storage for storage, _, _ in region.parts}
            for storage in set(region.arguments) - sent:
                reasons.setdefault(storage, f"argument of region {region.name}")
        for op in sorted(self._solution.plan.kept):
            reasons |= dict.fromkeys(self._problem.ops[op].makes, "kept by its region")
        moved = {s: f"moved by {name}" for s, name in self._mover_of.items() if s not in reasons}
        kinds = dict.fromkeys(moved, "offloaded")
        for storage, (name, _) in self._shared.items():
            if storage not in reasons:
                moved[storage], kinds[storage] = f"a part of it, by region {name}", "sharded"
        found = {**reasons, **moved}
        return [self._activation(s, found[s], kinds.get(s, "activation")) for s in sorted(found)]

    def _activation(self, storage: int, reason: str, kind: str) -> SavedActivation:
        record = self._trace.storages[storage]
        op = self._trace.ops[record.born]
        tensors = list(output_tensors(op.call.meta["val"]))
        tensor = tensors[min(op.makes.index(storage), len(tensors) - 1)]
        return SavedActivation(
            kind=kind,
            site=op.site,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            nbytes=self._shared[storage][1] if kind == "sharded" else record.nbytes,
            provenance=f"output of {op.site}",
            reason=reason,
        )


def _fingerprint(trace: EagerTrace, *extra: str) -> str:
    """A hash of the step's ops, call sites, shapes, dtypes, and of ``extra``; always the same."""
    return hashlib.sha256(step_words(trace, *extra).encode()).hexdigest()


def step_words(trace: EagerTrace, *extra: str) -> str:
    """A step's ops, call sites, shapes and dtypes as a text, after ``extra``; always the same."""
    found = ["\0".join(("eager", *extra))]
    described: dict[Any, str] = {}
    for op in trace.ops:
        text = described.get(op.call)
        if text is None:
            text = described[op.call] = _described(op)
        found.append(f"{op.site}{text}{op.uses}{op.makes}\n")
    return "".join(found)


def _described(op: OpRecord) -> str:
    tensors = output_tensors(op.call.meta.get("val"))
    shapes = [f"{tensor.dtype}{list(tensor.shape)}" for tensor in tensors]
    target = op_name(op.call.target) if callable(op.call.target) else str(op.call.target)
    return f"{target}{shapes}"
