"""Kernels, measured: what they really return, what they allocate besides, how long they take.

A kernel is run alone, on made-up data (:mod:`ckpt_pass.graph.kernel_call`), one that is not trusted
with such in a child process (:mod:`ckpt_pass.graph.kernel_child`). Calls that are equal are
measured once, and remembered (:mod:`ckpt_pass.graph.kernel_cache`).
"""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ckpt_pass.graph.cost import at_traced_shape, storage_sizes
from ckpt_pass.graph.formulas import formula_call
from ckpt_pass.graph.inner_graphs import inner_bytes, inner_graphs
from ckpt_pass.graph.kernel_cache import KernelCache, KernelFacts, OutputFacts
from ckpt_pass.graph.kernel_call import NOTHING, Call, KernelError, call_of
from ckpt_pass.graph.kernel_child import measure_apart
from ckpt_pass.graph.kernel_ops import is_runnable, is_trusted, may_have_workspace, why_not_run
from ckpt_pass.graph.kernel_run import Facts, Measure, Reasons, measure
from ckpt_pass.graph.kernel_scale import carried_on, made_small
from ckpt_pass.graph.real_looks import looks_of
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.policy.sites import output_tensors

WORKSPACE = frozenset({"workspace"})
TIME = frozenset({"time"})
WORKSPACE_AND_TIME = WORKSPACE | TIME
_OUTPUTS = frozenset({"outputs"})


class WorkspaceWarning(UserWarning):
    """The peak of a plan holds a guess of what kernels allocate for themselves."""


@dataclass(frozen=True)
class Unmeasured:
    """An op without facts, and why."""

    name: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.op}): {self.reason}"


class Kernels:
    """Measures the kernels of graphs.

    Attributes:
        cache: what is known from before.
        unmeasured: the ops that were asked for and could not be measured.
    """

    def __init__(self, cache: KernelCache | None = None) -> None:
        self.cache = KernelCache() if cache is None else cache
        self.unmeasured: list[Unmeasured] = []
        self._outputs: dict[str, tuple[OutputFacts, ...] | None] = {}

    def facts(
        self, nodes: Sequence[fx.Node], what: frozenset[str] = WORKSPACE
    ) -> dict[fx.Node, KernelFacts]:
        """Measure the kernels of nodes; those that are equal, or known, are not run again.

        The random state is left as it was. May be called while torch compiles.

        Args:
            nodes: of any kind, in the order of their graph, with fake tensors in ``meta["val"]``.
            what: ``"workspace"``, ``"time"`` or both. Where the workspace alone is asked for, ops
                that can have none (:func:`may_have_workspace`) are left out.

        Returns:
            The facts of each node that was measured: what was asked for, even where more is known,
            so that a plan of modelled times does not depend on what was timed before. What cannot
            be measured is noted, and its workspace taken to be as large as its outputs.
        """
        really: Mapping[fx.Node, Any] = NOTHING
        while True:
            found, reasons = self._facts(nodes, what, really)
            known, really = really, looks_of(nodes, found)
            # What a kernel returns in another layout than its fake one says, others are given.
            if _texts(really) == _texts(known):
                break
        for node, reason in reasons.items():
            assert callable(node.target)
            self.unmeasured.append(Unmeasured(node.name, op_name(node.target), reason))
            found[node] = KernelFacts(_output_bytes(node) if "workspace" in what else None)
        if "workspace" in what:
            found |= self._facts_of_inner_graphs(nodes)
        return found

    def _facts_of_inner_graphs(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, KernelFacts]:
        """Those of ops that run graphs, of which each kernel is measured."""
        found = {}
        for node in nodes:
            graphs = inner_graphs(node) if node.op == "call_function" else ()
            if graphs:
                inside = [inner for graph in graphs for inner in graph.nodes]
                known = self.facts(inside).items()
                workspaces = {inner: facts.workspace_bytes or 0 for inner, facts in known}
                found[node] = KernelFacts(inner_bytes(node, workspaces))
        return found

    def _facts(
        self, nodes: Sequence[fx.Node], what: frozenset[str], really: Mapping[fx.Node, Any]
    ) -> tuple[dict[fx.Node, KernelFacts], dict[fx.Node, str]]:
        calls, reasons = _calls(nodes, what, really)
        names = {node: (environment(call.device), str(call)) for node, call in calls.items()}
        missing: dict[str, dict[str, Call]] = {}
        for node, (place, key) in names.items():
            known = self.cache.get(place, key)
            if known is None or not known.knows(what):
                missing.setdefault(place, {})[key] = calls[node]
        failed: dict[tuple[str, str], str] = {}
        for place, todo in missing.items():
            measured, why = _measure(todo, what)
            self.cache.add(place, measured)
            failed |= {(place, key): reason for key, reason in why.items()}
        found = {}
        for node, name in names.items():
            if name in failed:
                reasons[node] = failed[name]
            else:
                known = self.cache.get(*name)
                assert known is not None
                found[node] = _for_real(node, known.only(what))
        return found, reasons

    def formula_bytes(self, node: fx.Node, needs: tuple[bool, ...]) -> int | None:
        """What the formula for an op's backward allocates at the most, what it returns included.

        Args:
            node: calls the op.
            needs: which of its tensors require a gradient.

        Returns:
            ``None`` where it cannot be run.
        """
        try:
            call = formula_call(node, needs)
        except KernelError:
            return None
        place, key = environment(call.device), str(call)
        known = self.cache.get(place, key)
        if known is None or not known.knows(WORKSPACE):
            self.cache.add(place, measure({key: call}, WORKSPACE)[0])
            known = self.cache.get(place, key)
        if known is None or known.workspace_bytes is None:
            return None
        return known.workspace_bytes + sum(o.storage_bytes or 0 for o in known.outputs or ())

    def outputs(self, node: fx.Node) -> tuple[OutputFacts, ...] | None:
        """What a kernel really returns; ``None`` where its fake outputs are to be believed.

        It is run at once, without a profiler, where it is not known.
        """
        if not may_have_workspace(node):
            return None
        try:
            call = call_of(node)
        except KernelError:
            return None
        key = str(call)
        known = self.cache.get(environment(call.device), key)
        if known is not None and known.outputs is not None:
            return known.outputs
        if key not in self._outputs:
            found, _ = _measure({key: call}, _OUTPUTS)
            self._outputs[key] = found[key].outputs if key in found else None
        return self._outputs[key]


def warn_of_unmeasured(kernels: Kernels) -> None:
    """Say which kernels of a plan are not measured, and what stands in the place of that."""
    if not kernels.unmeasured:
        return
    first = kernels.unmeasured[0]
    more = f" and {len(kernels.unmeasured) - 1} more" if len(kernels.unmeasured) > 1 else ""
    warnings.warn(
        f"The kernel of {first.name} ({first.op}){more} could not be run alone ({first.reason}). "
        "The plan's peak takes it to allocate as much again as its outputs while it runs; where it "
        "needs more, the measured peak may exceed the budget. Give a budget with some room.",
        WorkspaceWarning,
        stacklevel=3,
    )


def _calls(
    nodes: Sequence[fx.Node], what: frozenset[str], really: Mapping[fx.Node, Any]
) -> tuple[dict[fx.Node, Call], dict[fx.Node, str]]:
    """The calls that are to be measured, and why others cannot be."""
    calls: dict[fx.Node, Call] = {}
    reasons: dict[fx.Node, str] = {}
    for node in nodes:
        reason = why_not_run(node)
        if reason:
            reasons[node] = reason
        elif is_runnable(node) and ("time" in what or may_have_workspace(node)):
            try:
                calls[node] = call_of(node, really)
            except KernelError as error:
                reasons[node] = error.reason
    return calls, reasons


def _measure(calls: Mapping[str, Call], what: frozenset[str]) -> tuple[Facts, Reasons]:
    """Measure calls on one kind of device, those that are too large to run by smaller ones."""
    small = {key: one for key, call in calls.items() if (one := made_small(call)) is not None}
    names = {key: [f"{key} in small {call}" for call in one.calls] for key, one in small.items()}
    todo = {key: call for key, call in calls.items() if key not in small}
    for key, one in small.items():
        todo |= dict(zip(names[key], one.calls, strict=True))
    found, failed = _run(todo, what)
    for key, one in small.items():
        reasons = [failed.pop(name) for name in names[key] if name in failed]
        facts = [found.pop(name) for name in names[key] if name in found]
        carried = None if reasons else carried_on(one, facts)
        if carried is None:
            failed[key] = next(iter(reasons), "too large to run, and of no one shape when smaller")
        else:
            found[key] = carried
    return found, failed


def _run(calls: Mapping[str, Call], what: frozenset[str]) -> tuple[Facts, Reasons]:
    """Measure calls on one kind of device, those that are not trusted apart."""
    found: Facts = {}
    failed: Reasons = {}
    for trusted in (True, False):
        some = {key: call for key, call in calls.items() if is_trusted(call) is trusted}
        if some:
            facts, reasons = _way(trusted, next(iter(some.values())).device)(some, what)
            found |= facts
            failed |= reasons
    return found, failed


def _way(trusted: bool, device: torch.device) -> Measure:
    """A forked process cannot use a GPU that its parent uses."""
    if trusted:
        return measure
    return measure_apart if device.type == "cpu" else _measure_without_indices


def _measure_without_indices(
    calls: Mapping[str, Call], what: frozenset[str]
) -> tuple[Facts, Reasons]:
    """Measure here what takes no whole numbers or bytes, which kernels may follow anywhere."""
    safe = {key: call for key, call in calls.items() if not call.has_whole_numbers}
    found, failed = measure(safe, what)
    reason = "made-up whole numbers may lead it out of its memory, and the device down"
    return found, failed | {key: reason for key in calls if key not in safe}


def _output_bytes(node: fx.Node, number: int | None = None) -> int:
    output: Any = node.meta.get("val")
    output = output if number is None else output[number]
    return sum(at_traced_shape(size) for size in storage_sizes(output).values())


def _texts(really: Mapping[fx.Node, Any]) -> dict[fx.Node, str]:
    return {node: str(list(map(_described, output_tensors(look)))) for node, look in really.items()}


def _described(look: torch.Tensor) -> tuple[object, ...]:
    return look.shape, look.stride(), look.dtype, look.untyped_storage().nbytes()


def measure_kernel(node: fx.Node) -> KernelFacts:
    """Measure workspace and time of one node's kernel, whatever is known of it.

    Raises:
        KernelError: it cannot be run on its own.
    """
    measured, failed = _measure({"": call_of(node)}, WORKSPACE_AND_TIME)
    if failed:
        raise KernelError(node, failed[""])
    return measured[""]


def environment(device: torch.device) -> str:
    """Everything besides the call that a kernel's workspace and time depend on."""
    settings = [f"torch {torch.__version__}"]
    if device.type == "cuda":
        cudnn = torch.backends.cudnn
        settings += [
            torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no device",
            f"cuda {torch.version.cuda}, cudnn {cudnn.version()}, benchmark {cudnn.benchmark}",
        ]
    else:
        mkldnn = torch.backends.mkldnn
        settings += [
            cpu_model() if device.type == "cpu" else device.type,
            f"{torch.get_num_threads()} threads",
            f"mkldnn {mkldnn.enabled}",
        ]
    settings += [
        f"deterministic {torch.are_deterministic_algorithms_enabled()}",
        f"matmul precision {torch.get_float32_matmul_precision()}",
    ]
    return ", ".join(settings)


@functools.cache
def cpu_model() -> str:
    """The processor's name, as the system tells it, with its instruction set as torch sees it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def _for_real(node: fx.Node, facts: KernelFacts) -> KernelFacts:
    """Facts of a kernel that works in as much memory, however little it returns in the end.

    ``unique`` sorts all values that it gets, and returns some. Made-up ones are all different: what
    it returns of them is what it works in. Where it counts them, what it counts with is more.
    """
    if node.target is not torch.ops.aten._unique2.default or facts.workspace_bytes is None:
        return facts
    counts = node.args[3:] == (True,) or node.kwargs.get("return_counts", False)
    if counts or not facts.outputs:
        return facts
    made, real = facts.outputs[0].storage_bytes or 0, _output_bytes(node, 0)
    return replace(facts, workspace_bytes=facts.workspace_bytes + max(made - real, 0))
