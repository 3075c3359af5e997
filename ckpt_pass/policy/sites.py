"""Call sites: which execution of which op, the same in eager and in a graph.

A call site is the module's fully qualified name (FQN), the op, and how many times that op ran
before in the same module call. In-place ops count as their functional twins, so that a program
and its functionalised graph agree. The counting is done here, by the driver that walks the ops,
and never by a policy: a policy is a value without state.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch

from ckpt_pass._torch.hints import hint_of
from ckpt_pass.ops.taxonomy import OpClass, classify, functional_twin, op_name

#: Bytes: a number, or an expression in the sizes that were left symbolic.
Bytes: TypeAlias = int | sympy.Expr
#: One call of one module: its FQN and how many calls of that FQN came before.
ModuleCall = tuple[str, int]
#: Module calls from the outermost to the innermost. The root module is not listed.
ModulePath = tuple[ModuleCall, ...]

# Dynamo names the root by the frame's variable: L['self'].layers.0, L['self']._modules['layers'].
_ROOT = re.compile(r"^[LG]\['[^']*'\]\.?")
# A wrapped forward is named by the way to it; behind it stands the module that it belongs to.
_WRAPPED = re.compile(r"\.(?:forward|__call__)\..*?\b__self__(?=\.|$)")
# A class with a __getattr__ of its own is read by way of the dict of the object's attributes.
_OWN_DICT = re.compile(r"(?:^|\.)__dict__\['([^']*)'\]")
_SUBSCRIPT = re.compile(r"(?:\._(?:modules|parameters|buffers))?\['?([^'\]]*)'?\]")


@dataclass(frozen=True, slots=True, order=True)
class CallSite:
    """The identity of one op execution.

    Attributes:
        fqn: fully qualified name of the innermost module; empty in the root module.
        op: canonical name of the op, as ``aten.mm.default``.
        occurrence: executions of that op before this one within the same module call.
        call: calls of that module before this one (within the graph or checkpoint region).
    """

    fqn: str
    op: str
    occurrence: int
    call: int = 0

    def __str__(self) -> str:
        call = f"@{self.call}" if self.call else ""
        number = f"#{self.occurrence}" if self.occurrence else ""
        return f"{self.fqn or '(root)'}{call} {self.op}{number}"


@dataclass(frozen=True, slots=True)
class Scope:
    """An enclosing module call and the counts within it, before this execution.

    Attributes:
        fqn: the module; empty for the region itself (graph, layer or checkpoint region).
        op_index: executions of the same op so far in this scope, submodules included.
        class_index: executions of any op of the same class so far in this scope.
    """

    fqn: str
    op_index: int
    class_index: int


@dataclass(frozen=True, slots=True)
class SiteContext:
    """What a policy sees of an op execution.

    Attributes:
        site: the identity.
        op: the op object (``OpOverload`` or higher-order op).
        op_class: its class in the taxonomy.
        scopes: the region first, then the enclosing module calls, innermost last.
        output: what the op returned: tensors in eager, fake tensors in a graph.
        args, kwargs: its arguments, likewise.
    """

    site: CallSite
    op: Any
    op_class: OpClass
    scopes: tuple[Scope, ...]
    output: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fqn(self) -> str:
        """FQN of the innermost module."""
        return self.site.fqn

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensors; of symbolic sizes, those at the traced shape."""
        return output_bytes(self.output)


class SiteCounter:
    """Counts executions, so that each op gets its call site.

    One counter lives for one pass over a graph or one run of a checkpoint region.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[object, object], int] = {}

    def _next(self, scope: object, key: object) -> int:
        count = self._counts.get((scope, key), 0)
        self._counts[scope, key] = count + 1
        return count

    def visit(
        self,
        op: Any,
        path: ModulePath,
        region: object = None,
        output: Any = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> SiteContext:
        """Count one execution of ``op`` inside ``path`` and return what a policy sees of it."""
        name, op_class = op_name(functional_twin(op)), classify(op)
        region_scope = ("region", region)
        scopes = [Scope("", self._next(region_scope, name), self._next(region_scope, op_class))]
        scopes += [
            Scope(call[0], self._next(call, (name, "within")), self._next(call, op_class))
            for call in path
        ]
        fqn, call_index = path[-1] if path else ("", 0)
        occurrence = self._next((fqn, call_index, region if not path else None), name)
        site = CallSite(fqn, name, occurrence, call_index)
        return SiteContext(site, op, op_class, tuple(scopes), output, args, kwargs or {})


class CallNumbers:
    """Numbers the calls of each module from 0, in the order in which they are met.

    The numbers in a graph have gaps: a trace runs the model more than once, and dynamo counts
    calls that left no op.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, dict[int, int]] = {}

    def numbered(self, path: ModulePath) -> ModulePath:
        """The path with its calls numbered anew."""
        found = []
        for fqn, call in path:
            known = self._numbers.setdefault(fqn, {})
            found.append((fqn, known.setdefault(call, len(known))))
        return tuple(found)


@functools.lru_cache(maxsize=16_384)
def clean_fqn(name: str) -> str:
    """Turn dynamo's source name (``L['self'].layers.0``) into a plain FQN (``layers.0``)."""
    name = _OWN_DICT.sub(r".\1", _WRAPPED.sub("", _ROOT.sub("", name)))
    return _SUBSCRIPT.sub(r".\1", name).lstrip(".")


def module_path(nn_module_stack: Mapping[str, tuple[str, Any]] | None) -> ModulePath:
    """Read the module calls out of ``node.meta["nn_module_stack"]``.

    Dynamo's keys carry ``@n`` from a module's second call on (``torch/_dynamo/variables``).
    """
    if not nn_module_stack:
        return ()
    path = []
    for key, (name, _cls) in nn_module_stack.items():
        fqn = clean_fqn(name)
        _, _, call = str(key).rpartition("@")
        if fqn:
            path.append((fqn, int(call) if call.isdigit() and "@" in str(key) else 0))
    return tuple(path)


def output_tensors(output: Any) -> Iterable[torch.Tensor]:
    """The tensors in an op's output (a tensor, or a tuple or list of outputs)."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from output_tensors(item)


def output_bytes(output: Any) -> int:
    """Bytes of an op's output tensors, views counted in full."""
    return sum(optimization_hint(t.numel()) * t.dtype.itemsize for t in output_tensors(output))


def optimization_hint(size: int | torch.SymInt) -> int:
    """The value that a size is taken to have, as traced mostly; a plain number is itself."""
    if isinstance(size, torch.SymInt):
        return hint_of(size)
    return int(size)
