"""What is in memory at each moment of an eager step that was planned."""

from __future__ import annotations

from ckpt_pass.eager.step_record import EagerTrace, OpRecord
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.planner.eager_problem import EagerProblem
from ckpt_pass.planner.eager_solve import EagerSolution
from ckpt_pass.plans.contents import Contents, OpName, contents_of, layer_of


def contents(trace: EagerTrace, problem: EagerProblem, solution: EagerSolution) -> Contents:
    """What is in memory when.

    Args:
        trace: the record of the step.
        problem: what was made of it.
        solution: what was decided.
    """
    profile = solution.profile
    ran, at = profile.ops.tolist(), profile.bytes_at.tolist()
    names = _names(trace, problem)
    return contents_of(names, ran, problem.alive(solution.plan), at)


def _names(trace: EagerTrace, problem: EagerProblem) -> list[OpName]:
    """Of the problem's ops, by number as they were recorded."""
    assert len(problem.ops) == len(trace.ops)
    forward = [_of_forward(op) for op in trace.ops[: trace.forward_length]]
    modules = _modules_of_backward(trace)
    places = range(trace.forward_length, len(trace.ops))
    return forward + [_of_backward(trace.ops[place], modules.get(place, "")) for place in places]


def _of_forward(op: OpRecord) -> OpName:
    assert op.site is not None
    return OpName(layer_of(None, op.site.fqn), str(op.site))


def _of_backward(op: OpRecord, module: str) -> OpName:
    target = op_name(op.call.target) if callable(op.call.target) else str(op.call.target)
    return OpName(layer_of(None, module), f"{module} {target}".strip())


def _modules_of_backward(trace: EagerTrace) -> dict[int, str]:
    """By op of the backward the module that made what autograd has asked for last."""
    asks = sorted((moment, number) for number, moment in trace.asked.items())
    found: dict[int, str] = {}
    module, done = "", 0
    for place in range(trace.forward_length, len(trace.ops)):
        while done < len(asks) and asks[done][0] <= place:
            maker = trace.ops[max(trace.saved[asks[done][1]].saved_at - 1, 0)].site
            module = module if maker is None else maker.fqn
            done += 1
        found[place] = module
    return found
