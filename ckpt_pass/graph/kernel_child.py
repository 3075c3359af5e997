"""Runs kernels that are not trusted in a child process, which may die of them.

The child is forked, so that it knows every op that is registered here. It runs the kernels in a
thread of its own: the threads of OpenMP do not come along, and the thread that forked would wait
for them for ever; a new one starts new ones.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any

from ckpt_pass._torch import functorch
from ckpt_pass.graph.kernel_cache import KernelFacts, outputs_as_json, outputs_of_json
from ckpt_pass.graph.kernel_call import Call
from ckpt_pass.graph.kernel_run import Facts, Reasons, measure

#: A kernel that takes longer is given up; a forked process may wait for a lock that nobody holds.
PATIENCE_S = 60.0


def measure_apart(calls: Mapping[str, Call], what: frozenset[str]) -> tuple[Facts, Reasons]:
    """Measure calls as :func:`ckpt_pass.graph.kernel_run.measure` does, in child processes.

    A child that dies takes one call with it, and the next child goes on with the rest.
    """
    if not hasattr(os, "fork"):
        return {}, dict.fromkeys(calls, "made-up data may crash it, and there is no fork() here")
    if "workspace" in what and functorch.profiler_is_running():
        reason = "a profiler is running already; torch has one at a time"
        return {}, dict.fromkeys(calls, reason)
    found: Facts = {}
    failed: Reasons = {}
    todo = list(calls)
    while todo:
        answers, end = _ask_child([calls[key] for key in todo], what)
        for key, answer in zip(todo, answers, strict=False):
            if isinstance(answer, str):
                failed[key] = answer
            else:
                found[key] = answer
        todo = todo[len(answers) :]
        if todo:
            failed[todo.pop(0)] = end
    return found, failed


def _ask_child(calls: list[Call], what: frozenset[str]) -> tuple[list[KernelFacts | str], str]:
    """The facts of the first calls, or why they have none, and how the child ended."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # Python warns of threads; see above
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os.close(reading)
        _answer_and_exit(calls, what, writing)
    os.close(writing)
    try:
        lines, ended = _read_lines(reading)
        if not ended:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    waited = f"it did not end within {PATIENCE_S:.0f} s"
    return [_answer(line) for line in lines], (
        f"the process that ran it died ({how})" if ended else waited
    )


def _answer_and_exit(calls: list[Call], what: frozenset[str], writing: int) -> None:
    """The child: measure one call after the other, and leave without any of the parent's exits."""
    try:
        faulthandler.disable()  # its death is expected, and reported by the parent
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)

        def work() -> None:
            for call in calls:
                found, failed = measure({"": call}, what)
                line = failed[""] if failed else _as_json(found[""])
                os.write(writing, (json.dumps(line) + "\n").encode())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        os._exit(0)


def _read_lines(reading: int) -> tuple[list[bytes], bool]:
    """What the child writes, and whether it came to an end in time."""
    data = b""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        ready, _, _ = select.select([reading], [], [], max(deadline - time.monotonic(), 0))
        chunk = os.read(reading, 1 << 16) if ready else b""
        if not chunk:
            return data.split(b"\n")[:-1], bool(ready)
        data += chunk
        deadline = time.monotonic() + PATIENCE_S


def _as_json(facts: KernelFacts) -> list[Any]:
    outputs = None if facts.outputs is None else outputs_as_json(facts.outputs)
    return [facts.workspace_bytes, facts.time_s, outputs]


def _answer(line: bytes) -> KernelFacts | str:
    value = json.loads(line)
    if isinstance(value, str):
        return value
    workspace_bytes, time_s, outputs = value
    known = None if outputs is None else outputs_of_json(outputs)
    return KernelFacts(workspace_bytes, time_s, known)
