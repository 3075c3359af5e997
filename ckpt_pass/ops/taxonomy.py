"""The op taxonomy: what each operator is, as data.

``classify`` gives every operator exactly one ``OpClass``; the other functions answer what a policy
must know of a call: is it dear to recompute, does it draw random numbers, may it run twice at all,
and which functional op does an in-place or ``out=`` variant stand for. The rules are the table
``RULES``, tried in order, first match wins; the names they consult are in ``_op_tables.py``.
"""

from __future__ import annotations

import enum
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch.operators import (
    CACHE_SIZE,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    all_higher_order_ops,
    all_overloads,
    argument_value,
    arguments_of,
    functional_overload,
    load_late_registrations,
    packet_of,
    split_name,
    subgraphs,
)
from ckpt_pass.ops import tables

Op: TypeAlias = Callable[..., Any]
"""An ``OpOverload``, a ``HigherOrderOperator``, or a Python callable found in an FX graph."""


class NotAnOpError(CkptPassError):
    """An object that is no operator was given where one is needed."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"cannot classify {got!r} of type {type(got).__name__}: expected an operator overload "
            "(such as torch.ops.aten.mm.default), a higher-order operator, or a Python function "
            "that an FX graph calls; pass an overload of a packet, and the target of an FX node"
        )


class OpClass(enum.StrEnum):
    """What an operator does; one class for each. The documentation of ops describes them all."""

    MATMUL = "matmul"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    POINTWISE = "pointwise"
    REDUCTION = "reduction"
    NORMALISATION = "normalisation"
    VIEW = "view"
    CAST = "cast"
    COPY = "copy"
    CREATION = "creation"
    INDEXING = "indexing"
    POOLING = "pooling"
    SCAN_SORT = "scan-sort"
    LOSS = "loss"
    LINALG_FFT = "linalg-fft"
    RECURRENT = "recurrent"
    RANDOM = "random"
    COLLECTIVE = "collective"
    EFFECTFUL = "effectful"
    METADATA = "metadata"
    MULTI_OUTPUT_ACCESS = "multi-output-access"
    CONTROL = "control"
    QUANTISED = "quantised"
    BACKWARD = "backward"
    UNCLASSIFIED = "unclassified"


#: Classes of which :func:`is_expensive` is true.
EXPENSIVE_CLASSES: frozenset[OpClass] = frozenset(map(OpClass, tables.EXPENSIVE))


@dataclass(frozen=True, slots=True)
class OpFacts:
    """What the rules look at: the functional twin's name, tags and schema."""

    namespace: str
    base: str
    overload: str
    tags: frozenset[torch.Tag]
    is_mutable: bool
    returns_alias: bool

    @property
    def is_builtin(self) -> bool:
        """Whether the op is torch's own, so that its name may be relied on."""
        return self.namespace in tables.BUILTIN_NAMESPACES

    def lookup(self, table: Mapping[str, OpClass]) -> OpClass | None:
        """Return the table's entry for this op, the most qualified name first."""
        qualified = f"{self.namespace}::{self.base}"
        found = table.get(f"{qualified}.{self.overload}") or table.get(qualified)
        if found is None and self.is_builtin and self.namespace not in tables.QUANTISED_NAMESPACES:
            found = table.get(self.base)
        return found


class Rule(NamedTuple):
    """One row of the decision table: a name, and a function with an opinion or None."""

    name: str
    decide: Callable[[OpFacts], OpClass | None]


def _index(table: Mapping[str, str]) -> dict[str, OpClass]:
    """Turn ``{class: names}`` into ``{name: class}``."""
    return {name: OpClass(value) for value, names in table.items() for name in names.split()}


def _from_table(name: str, table: Mapping[str, str]) -> Rule:
    index = _index(table)
    return Rule(name, lambda facts: facts.lookup(index))


def _from_pattern(name: str, value: str, pattern: str) -> Rule:
    op_class, compiled = OpClass(value), re.compile(pattern)

    def decide(facts: OpFacts) -> OpClass | None:
        return op_class if facts.is_builtin and compiled.search(facts.base) else None

    return Rule(name, decide)


def _from_namespaces(name: str, op_class: OpClass, namespaces: frozenset[str]) -> Rule:
    return Rule(name, lambda facts: op_class if facts.namespace in namespaces else None)


def _from_tag(name: str, op_class: OpClass, tag: torch.Tag) -> Rule:
    return Rule(name, lambda facts: op_class if tag in facts.tags else None)


def _random(facts: OpFacts) -> OpClass | None:
    """A custom op with the tag may hold anything besides its draw: it stays unclassified."""
    tagged = torch.Tag.nondeterministic_seeded in facts.tags
    return OpClass.RANDOM if tagged and facts.is_builtin else None


def _view(facts: OpFacts) -> OpClass | None:
    return OpClass.VIEW if facts.returns_alias and not facts.is_mutable else None


RULES: tuple[Rule, ...] = (
    _from_table("exceptions", tables.EXCEPTIONS),
    _from_namespaces("collective-namespace", OpClass.COLLECTIVE, tables.COLLECTIVE_NAMESPACES),
    _from_namespaces("effectful-namespace", OpClass.EFFECTFUL, tables.EFFECTFUL_NAMESPACES),
    *(_from_pattern(*row) for row in tables.NAME_PATTERNS),
    _from_namespaces("quantised-namespace", OpClass.QUANTISED, tables.QUANTISED_NAMESPACES),
    _from_pattern("quantised-name", OpClass.QUANTISED, tables.QUANTISED_PATTERN),
    *(_from_pattern(*row) for row in tables.LATER_PATTERNS),
    Rule("returns-view", _view),
    _from_tag("view-copy-tag", OpClass.COPY, torch.Tag.view_copy),
    Rule("random-tag", _random),
    _from_tag("reduction-tag", OpClass.REDUCTION, torch.Tag.reduction),
    _from_tag("pointwise-tag", OpClass.POINTWISE, torch.Tag.pointwise),
    _from_table("names", tables.NAMES),
    _from_pattern("linalg-fft-name", OpClass.LINALG_FFT, tables.LINALG_FFT_PATTERN),
    Rule("mutable-schema", lambda facts: OpClass.EFFECTFUL if facts.is_mutable else None),
    Rule("otherwise", lambda facts: OpClass.UNCLASSIFIED),
)

_HIGHER_ORDER = _index(tables.HIGHER_ORDER)
_PYTHON_CALLABLES = _index(tables.PYTHON_CALLABLES)


def _plain_base(base: str) -> str:
    """Strip what marks a variant: ``_``, ``_foreach_`` and ``special_``."""
    stem = base if base.endswith("__") else base.removesuffix("_")
    return stem.removeprefix("_foreach_").removeprefix("special_")


@functools.lru_cache(maxsize=CACHE_SIZE)
def _twin(op: OpOverload) -> OpOverload:
    stands_for = tables.STANDS_FOR.get(op_name(op))
    if stands_for is not None:
        namespace, base, overload = stands_for.split(".")
        op = getattr(packet_of(namespace, base), overload, op)  # itself in a torch that lacks it
    return functional_overload(op)


@functools.lru_cache(maxsize=CACHE_SIZE)
def _facts(op: OpOverload) -> OpFacts:
    twin = _twin(op)
    schema = twin._schema
    namespace, base, overload = split_name(twin.name())
    return OpFacts(
        namespace=namespace,
        base=_plain_base(base),
        overload=overload,
        tags=frozenset(twin.tags) | frozenset(op.tags),
        is_mutable=schema.is_mutable,
        returns_alias=any(value.alias_info is not None for value in schema.returns),
    )


def _classify_callable(op: Op) -> OpClass:
    """Class of a Python function in an FX graph; arithmetic on sizes is metadata."""
    name = op_name(op)
    module, _, function = name.rpartition(".")
    if name in _PYTHON_CALLABLES:
        return _PYTHON_CALLABLES[name]
    on_sizes = module == "torch" and function.startswith(("sym_", "_sym_"))  # also `_sym_sqrt`
    if on_sizes or module in {"operator", "math", "builtins"}:
        return OpClass.METADATA
    return OpClass.UNCLASSIFIED


@functools.lru_cache(maxsize=CACHE_SIZE)
def explain_class(op: Op) -> tuple[OpClass, str]:
    """Return the class of ``op`` and the name of the rule that gave it.

    Raises ``NotAnOpError`` for a string, an operator packet, or anything not callable.
    """
    if isinstance(op, OpOverload):
        opinions = ((rule.decide(_facts(op)), rule.name) for rule in RULES)  # the last has one
        return next((op_class, name) for op_class, name in opinions if op_class is not None)
    if isinstance(op, HigherOrderOperator):
        return _HIGHER_ORDER.get(op.name(), OpClass.UNCLASSIFIED), "higher-order"
    return _classify_callable(op), "python-callable"


@functools.lru_cache(maxsize=CACHE_SIZE)
def classify(op: Op) -> OpClass:
    """Return the class of ``op``: an overload, a higher-order op, or a function in an FX graph.

    Cached. In-place and ``out=`` variants have the class of their functional twin. A custom op has
    the class that its tags or schema tell (pointwise, reduction, view, effectful), else
    ``OpClass.UNCLASSIFIED``. Raises ``NotAnOpError`` for what is no operator.
    """
    return explain_class(op)[0]


def is_expensive(op_class: OpClass) -> bool:
    """Whether recomputing an op of this class costs enough that policies would rather save it."""
    return op_class in EXPENSIVE_CLASSES


@functools.lru_cache(maxsize=CACHE_SIZE)
def op_name(op: Op) -> str:
    """Return a short, stable name: ``aten.mm.default``, ``higher_order.cond``, ``operator.mul``.

    Raises ``NotAnOpError`` for what is no operator.
    """
    if isinstance(op, OpOverload):
        return ".".join(split_name(op.name()))
    if isinstance(op, HigherOrderOperator):
        return f"higher_order.{op.name()}"
    module, name = getattr(op, "__module__", None), getattr(op, "__name__", None)
    if isinstance(op, OpOverloadPacket) or not callable(op) or module is None or name is None:
        raise NotAnOpError(op)
    return f"{module.removeprefix('_')}.{name}"


def functional_twin(op: Op) -> Op:
    """Return the op that a functionalised graph has in the place of ``op``; ``op`` if the same.

    ``add_.Tensor`` and ``add.out`` give ``add.Tensor``; ``_unsafe_view`` gives ``view``. The twin
    has the same arguments (less ``out=``) and mutates nothing; where none exists ``op`` is its own.
    An op of another library that stands for one of aten's gives that.
    """
    return _twin(op) if isinstance(op, OpOverload) else op


def _is_number(value: object, number: float) -> bool:
    """Whether a flag is the plain Python number; an FX node or a symbol never is."""
    return isinstance(value, int | float) and value == number


def _switched_off(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call's flags say that nothing is drawn: not training, or no dropout at all."""
    value = functools.partial(argument_value, op, args=args, kwargs=kwargs)
    if any(value(flag) is False for flag in ("train", "training")):
        return True
    names = arguments_of(op)
    if "noise" in names or op.name().startswith("aten::rrelu"):
        return False
    base = op.name().removesuffix("_")
    if "dropout" in base and "p" in names and base not in tables.DRAWS_AT_ZERO:
        return _is_number(value("p"), 0)
    # between the layers of a recurrent net, so that one layer has none
    one_layer = "dropout" in names and _is_number(value("num_layers"), 1)
    return one_layer or any(_is_number(value(name), 0) for name in ("dropout_p", "dropout"))


@functools.lru_cache(maxsize=CACHE_SIZE)
def _may_draw(op: OpOverload) -> bool:
    """Whether some call of the op draws."""
    name = _qualified(op)[0]
    tagged = torch.Tag.nondeterministic_seeded in _facts(op).tags
    return name in tables.UNTAGGED_RANDOM or (tagged and name not in tables.TAGGED_BUT_STATELESS)


def _subgraph_draws(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a graph among a higher-order op's arguments draws."""
    return any(
        draws_random(node.target, node.args, node.kwargs)
        for graph in subgraphs([*args, *kwargs.values()])
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


def _qualified(op: OpOverload) -> tuple[str, str]:
    """The op's name as in the tables, without and with its overload."""
    namespace, base, overload = split_name(op.name())
    return f"{namespace}::{base}", f"{namespace}::{base}.{overload}"


def draws_random(op: Op, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether this very call advances a random generator's state.

    ``args`` and ``kwargs`` may hold FX nodes; a flag that is no plain Python value counts as on.
    Attention with ``dropout_p`` 0, dropout outside training and ops that are given their seed draw
    nothing, though tagged as random. A higher-order op draws if a graph given to it does.
    """
    kwargs = {} if kwargs is None else kwargs
    if isinstance(op, HigherOrderOperator):
        named = f"higher_order::{op.name()}" in tables.UNTAGGED_RANDOM
        return named or _subgraph_draws(args, kwargs)
    if not isinstance(op, OpOverload):
        return False
    return _may_draw(op) and not _switched_off(op, args, kwargs)


def is_sized_by_values(op: object) -> bool:
    """Whether what an op returns is as large as values say: made-up ones tell nothing of it."""
    by_lengths = torch.ops.aten._pack_padded_sequence.default  # torch has no tag for it
    return op is by_lengths or torch.Tag.dynamic_output_shape in getattr(op, "tags", ())


_DATA_DEPENDENT_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


def _may_be_mask(index: object) -> bool:
    """Whether an index of ``aten.index`` is boolean; an FX node without a value may be."""
    value = index.meta.get("val") if isinstance(index, torch.fx.Node) else index
    if not isinstance(value, torch.Tensor):
        return index is not None
    return value.dtype in (torch.bool, torch.uint8)


def _cleared_by_arguments(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments show that an op that may be wrong to repeat is right in this call."""
    value = functools.partial(argument_value, op, args=args, kwargs=kwargs)
    if op is torch.ops.aten.index.Tensor:
        return not any(map(_may_be_mask, value("indices")))
    if _qualified(op)[0] in tables.HIDDEN_MUTATIONS:
        return value("training") is False or value("running_mean") is None
    return False


@functools.lru_cache(maxsize=CACHE_SIZE)
def _may_not_repeat(op: Op) -> bool:
    return has_side_effects(op) or _depends_on_data(op)


@functools.lru_cache(maxsize=CACHE_SIZE)
def has_side_effects(op: Op) -> bool:
    """Whether an op may do more than compute its outputs: effects, collectives, mutations.

    Unlike :func:`never_recompute` of ops whose Python value or shape depends on the data: run again
    by Python on the same values, they find the same.
    """
    if classify(op) in (OpClass.EFFECTFUL, OpClass.COLLECTIVE):
        return True
    if not isinstance(op, OpOverload):
        return False
    return bool(op._schema.is_mutable or set(_qualified(op)) & tables.HIDDEN_MUTATIONS)


def _depends_on_data(op: Op) -> bool:
    """Whether an output's shape, or a Python value, depends on the data."""
    if not isinstance(op, OpOverload):
        return False
    listed = set(_qualified(op)) & tables.UNTAGGED_DATA_DEPENDENT
    return bool(listed or _DATA_DEPENDENT_TAGS & _facts(op).tags)


def never_recompute(
    op: Op, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> bool:
    """Whether running ``op`` a second time is wrong whatever it costs.

    So for effects, collectives, mutations (``out=`` and hidden ones, such as running statistics,
    included) and shapes that depend on the data. ``aten.index`` has such a shape only if an index
    is a mask, and batch norms mutate only in training: the call's arguments (tensors, or FX nodes
    with ``meta["val"]``) tell. Without arguments both answer True.
    """
    if not _may_not_repeat(op):
        return False
    if isinstance(op, OpOverload) and (args or kwargs):
        return not _cleared_by_arguments(op, args, kwargs or {})
    return True


def taxonomy_counts() -> dict[OpClass, int]:
    """Count the installed torch's operators, higher-order ones included, in each class.

    Imports what registers operators late, so that the figures do not depend on what ran before
    (a few seconds the first time).
    """
    load_late_registrations()
    builtin = tables.BUILTIN_NAMESPACES
    ops: list[Op] = [op for op in all_overloads() if op.namespace in builtin]
    counts = Counter(classify(op) for op in [*ops, *all_higher_order_ops()])
    return {op_class: counts[op_class] for op_class in OpClass}
