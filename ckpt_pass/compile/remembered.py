"""What the rounds found, kept beside inductor's caches for the next process.

Torch keeps what a round compiled in its own caches, under a name that is drawn for that round
(:meth:`ckpt_pass.compile.engine.Partitioner.uuid`). A file beside them says which round was taken
for a graph and what its plan is, so that another process compiles nothing and plans nothing. What
was generated for that name is what was counted: a plan is taken from the file only together with
it. Torch looks at the graph, its own configuration and version, and the machine before it gives
anything out; what it does not have is made again by rounds, which find the same plan.

The files hold data alone. Each is put in its place as a whole. What cannot be read is ignored, and
replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import compilers
from ckpt_pass.compile.engine import Partitioner
from ckpt_pass.graph.kernels import environment
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.sites import optimization_hint

FORMAT = "ckpt_pass inductor 2"
FOLDER = "ckpt_pass"


class PlanCacheWarning(UserWarning):
    """A plan that was kept beside inductor's caches cannot be read or written; it is made again."""


@dataclass(frozen=True)
class Remembered:
    """The round that was taken for a graph.

    Attributes:
        artefacts: the name that its artefacts have in torch's caches; empty where these do not
            hold such a graph (one with an autograd Function).
        careful: whether inductor was told to fuse with care.
        plan: the plan; ``None`` where the graph has no backward.
    """

    artefacts: str
    careful: bool
    plan: Plan | None


class _NotKept(CkptPassError):
    """Torch's caches have nothing under a name; it does not leave this module."""


@dataclass(frozen=True)
class _Named(compilers.NamedPartitioner):
    """Stands for the partition function of a round: what it was asked for is in the caches."""

    artefacts: str

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        raise _NotKept(f"torch's caches have nothing under {self.artefacts}")

    def uuid(self) -> str:
        return self.artefacts


def key_of(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    partitioner: Partitioner,
    options: dict[str, Any],
    mode: str | None,
) -> str | None:
    """What a graph's entry is called; ``None`` where none is to be kept.

    That is so where torch's own caches are off, and where what was asked for is no plain data.
    """
    asked = partitioner.uuid()
    if asked is None or not compilers.keeps_artefacts(options):
        return None
    digest = hashlib.sha256()
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    devices = sorted({str(value.device): value.device for value in tensors}.items())
    modules = [(name, m) for name, m in gm.named_modules() if isinstance(m, fx.GraphModule)]
    for part in (
        FORMAT,
        asked,
        partitioner.input_names,
        sorted(options.items()),
        mode,
        [environment(device) for _, device in devices],
        torch.is_grad_enabled(),
        [_look(value) for value in inputs],
        *(f"{name}: {module.graph}" for name, module in modules),
    ):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()


def _look(value: Any) -> Any:
    """What a plan depends on of an argument; of symbolic sizes those that were traced count."""
    if isinstance(value, torch.SymInt):
        return optimization_hint(value)
    if not isinstance(value, torch.Tensor):
        return type(value)
    sizes = [optimization_hint(size) for size in value.shape]
    if value.layout is not torch.strided:
        return value.dtype, value.device, value.requires_grad, sizes, value.layout
    steps = [optimization_hint(step) for step in value.stride()]
    return value.dtype, value.device, value.requires_grad, sizes, steps


def is_passed_over(key: str) -> bool:
    """Whether it is known of a graph that torch's caches do not hold it."""
    known = _read(_path(key))
    return known is not None and not known.artefacts


def recalled(
    key: str, compile_named: Callable[[compilers.NamedPartitioner, bool], Callable[..., Any]]
) -> tuple[Callable[..., Any], Plan | None] | None:
    """The compiled graph and its plan, where both are kept.

    Args:
        key: of the graph.
        compile_named: compiles the graph with a partition function, carefully or not.
    """
    known = _read(_path(key))
    if known is None:
        return None
    try:
        return compile_named(_Named(known.artefacts), known.careful), known.plan
    except _NotKept:
        return None


def remember(key: str, found: Remembered) -> None:
    """Keep which round was taken for a graph."""
    data = {
        "format": FORMAT,
        "artefacts": found.artefacts,
        "careful": found.careful,
        "plan": found.plan.to_json() if found.plan is not None else None,
    }
    path = _path(key)
    try:
        _write(path, json.dumps(data))
    except OSError as error:
        warnings.warn(
            f"A plan cannot be kept in {path} ({error}), so that it is made again next time. "
            "TORCHINDUCTOR_CACHE_DIR names another folder, for inductor's caches too.",
            PlanCacheWarning,
            stacklevel=2,
        )


def _path(key: str) -> Path:
    return compilers.inductor_cache_folder() / FOLDER / f"{key}.json"


def _read(path: Path) -> Remembered | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}")
        artefacts, careful, plan = (data.get(name) for name in ("artefacts", "careful", "plan"))
        if not isinstance(artefacts, str) or not isinstance(careful, bool):
            raise ValueError("expected a name of artefacts, and how they were made")
        return Remembered(artefacts, careful, Plan.from_json(plan) if plan is not None else None)
    except FileNotFoundError:
        return None
    # Bad JSON and bad UTF-8 are ValueErrors, a damaged plan is one of ours.
    except (OSError, ValueError, TypeError, RecursionError, CkptPassError) as error:
        warnings.warn(
            f"{path} holds no plan ({type(error).__name__}: {error}). It is ignored, made again "
            "and replaced.",
            PlanCacheWarning,
            stacklevel=2,
        )
        return None


def _write(path: Path, text: str) -> None:
    """Write a file beside the old one and put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
