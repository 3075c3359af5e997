"""What the dispatch modes do with an op, as far as the op, its arguments and a policy tell."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any, cast

import torch

from ckpt_pass._torch import selective
from ckpt_pass._torch.dispatch import caller
from ckpt_pass._torch.operators import OpOverload
from ckpt_pass.ops.taxonomy import OpClass, classify, draws_random
from ckpt_pass.policy.opinion import report_unclassified, settled
from ckpt_pass.policy.rules import Policy, is_plain_data
from ckpt_pass.policy.sites import SiteCounter

#: Ops that the modes pass through uncounted.
IGNORED = selective.ignored_ops()


class Action(Enum):
    """What to do with an op, as far as the op alone tells."""

    PASS = auto()
    SAVE = auto()
    ASK = auto()
    CHANGE = auto()
    MOVE = auto()
    #: Pass it, though autograd counts a change: of how a tensor lies, and of no value.
    RESHAPE = auto()
    #: SAVE, and nothing about a single execution can change that.
    STORE = auto()


class Actions:
    """What to do with each op under one policy; filled as ops are met."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.needs_scopes = bool(getattr(policy, "needs_scopes", True))
        #: By the op's ``id``: to hash an op is a call into Python.
        self.known: dict[int, Action] = {}
        #: Of those that are passed or stored: what calls them, and whether they are stored.
        self.quick: dict[int, tuple[Callable[..., Any], bool]] = {}
        self._ops: list[Any] = []  # so that no other op gets the same id
        #: For whoever runs regions: how they run with this policy and nothing else, by their name.
        self.options: dict[str, Any] = {}
        #: Ops of which some call draws random numbers and some call may be saved.
        self.drawing: set[Any] = set()

    def learn(self, op: Any) -> Action:
        """Find out about an op that is met for the first time."""
        if op not in IGNORED:
            report_unclassified(op)
        action = self._find(op)
        if action not in (Action.PASS, Action.RESHAPE) and draws_random(op):
            self.drawing.add(op)
        elif action is Action.SAVE and classify(op) is not OpClass.CAST and hasattr(op, "_schema"):
            action = Action.STORE
        self._ops.append(op)
        self.known[id(op)] = action
        if action in (Action.PASS, Action.STORE):
            self.quick[id(op)] = caller(op), action is Action.STORE
        return action

    def _find(self, op: Any) -> Action:
        if op in IGNORED:
            return Action.PASS
        if is_mutable(op):
            return Action.RESHAPE if is_free(op) and changes_in_place(op) else Action.CHANGE
        if is_free(op) or begins_work(op):
            return Action.PASS
        found = settled(self.policy, SiteCounter().visit(op, ()))
        if found is None or found.sharding is not None:
            return Action.ASK
        if found.offloads:
            return Action.MOVE
        return Action.SAVE if found.saves else Action.PASS


@functools.lru_cache(maxsize=256)
def _shared_actions(policy: Policy) -> Actions:
    return Actions(policy)


#: Those of policies that are code, as long as a region runs with them: code may hold a model.
_in_use: weakref.WeakValueDictionary[Any, Actions] = weakref.WeakValueDictionary()
#: Those of others by the policy's ``id``: to hash a policy is to hash all of its parts.
_latest: dict[int, Actions] = {}


def actions_for(policy: Policy) -> Actions:
    """The actions of a policy, shared by all that are equal to it."""
    found = _latest.get(id(policy))
    if found is not None and found.policy is policy:
        return found
    if not is_plain_data(policy):
        return _in_use_for(policy)
    shared = _shared_actions(cast(Any, policy))
    if shared.policy is policy:  # alive as long as what is found
        if len(_latest) >= 256:
            _latest.clear()
        _latest[id(policy)] = shared
    return shared


def _in_use_for(policy: Policy) -> Actions:
    try:
        found = _in_use.get(policy)
    except TypeError:  # not hashable: a user's own object
        return Actions(policy)
    if found is None:
        found = _in_use[policy] = Actions(policy)
    return found


def is_free(op: Any) -> bool:
    """Views and metadata are made again from their base and never saved by themselves."""
    return classify(op) in (OpClass.VIEW, OpClass.METADATA)


def is_cached_cast(op: Any, args: tuple[Any, ...]) -> bool:
    """The cast of a weight, which autocast may take from its cache instead.

    Forward and recomputation then cast it in different numbers (pytorch#193338), so such casts
    are made again and never counted. The cache holds leaves that require a gradient, no others
    (``aten/src/ATen/autocast_mode.cpp``).
    """
    if classify(op) is not OpClass.CAST or not args:
        return False
    source = args[0]
    return isinstance(source, torch.Tensor) and source.requires_grad and source.is_leaf


def is_blank(op: Any) -> bool:
    """Whether an op makes memory with no values yet, such as ``empty_like``."""
    name = op._schema.name if hasattr(op, "_schema") else ""
    return bool(name.partition("::")[2].removeprefix("new_").startswith("empty"))


def begins_work(op: Any) -> bool:
    """Whether an op returns what is to be waited for, as ``c10d.send`` does.

    A second wait for the same never ends: it runs again, on all ranks alike.
    """
    schema = getattr(op, "_schema", None)
    return schema is not None and any("c10d.Work" in str(out.type) for out in schema.returns)


def stays_where_it_is(op: Any) -> bool:
    """Whether what an op returns is not to be moved: it has no values yet, or is FSDP2's memory.

    FSDP gives the memory of gathered parameters back itself, in the middle of a region.
    """
    return is_blank(op) or getattr(op, "namespace", "") == "fsdp"


def is_mutable(op: Any) -> bool:
    schema = getattr(op, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def changes_in_place(op: Any) -> bool:
    """Whether an op is one such as ``add_`` or ``transpose_``, and none with an ``out``."""
    return bool(op._schema.name.endswith("_"))


@functools.lru_cache(maxsize=1024)
def statistics(op: Any) -> tuple[int, ...]:
    """Where the running statistics are among the arguments of a batch normalisation."""
    schema = getattr(op, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return tuple(names.index(n) for n in ("running_mean", "running_var") if n in names)


#: Ops that overwrite an argument which autograd has saved by then, for their backward: a
#: recomputation that stops with the last saved value would stop before they do
#: (``derivatives.yaml``; no other op's backward reads an argument that the op writes to).
FILL_WHAT_IS_SAVED = frozenset(
    (torch.ops.aten.rrelu_with_noise.default, torch.ops.aten.rrelu_with_noise_.default)
)

_RESIZES = frozenset((torch.ops.aten.resize_.default, torch.ops.aten.resize_as_.default))

#: By the ``id`` of ops: what calls them if they are simple; and the op, which keeps its ``id``.
SIMPLE: dict[int, tuple[Callable[..., Any] | None, Any]] = {}


def simple_call(op: Any) -> Callable[..., Any] | None:
    """What calls an op that a recomputation runs, or hands out, without a second look.

    It is counted, overwrites nothing, moves no statistics and is no cast; ``None`` for others.
    """
    found = SIMPLE.get(id(op))
    if found is None:
        simple = isinstance(op, OpOverload) and op not in IGNORED and not is_mutable(op)
        simple = simple and not statistics(op) and classify(op) is not OpClass.CAST
        found = SIMPLE[id(op)] = caller(op) if simple else None, op
    return found[0]


def returns_what_it_changes(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> bool:
    """An in-place op such as ``add_``: it changes its first argument alone and returns it.

    What is handed out for one that fills another argument, too, would leave that as it was
    (``rrelu_with_noise_`` its noise). One that resizes gives memory without values.
    """
    if op in _RESIZES or not args or not isinstance(output, torch.Tensor) or output is not args[0]:
        return False
    return all(tensor is output for tensor in overwritten(op, args, kwargs))


def overwritten(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that a mutable op overwrites."""
    for index, argument in enumerate(op._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor):
                yield item
