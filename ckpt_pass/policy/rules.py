"""Policies: rules from a call site to a decision, as values.

A policy is anything callable as ``policy(site) -> CheckpointPolicy | None``; ``None`` means "no
opinion". The ones built here are frozen, hashable, printable and without state, so that the same
value serves eager and compiled code, forward and recompute, and so that two can be compared.
The first opinion wins; where nobody has one, the driver recomputes (:data:`DEFAULT`). How a driver
asks a policy is in ``opinion.py``.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass._torch import selective
from ckpt_pass.offloading.sharding import Sharding, ShardLike, as_sharding
from ckpt_pass.ops.tables import STANDS_FOR
from ckpt_pass.ops.taxonomy import OpClass, functional_twin, op_name
from ckpt_pass.policy.decisions import (
    DEFAULT as DEFAULT,
)
from ckpt_pass.policy.decisions import (
    OFFLOADING as OFFLOADING,
)
from ckpt_pass.policy.decisions import (
    RECOMPUTING as RECOMPUTING,
)
from ckpt_pass.policy.decisions import (
    SAVING as SAVING,
)
from ckpt_pass.policy.decisions import (
    Ruling as Ruling,
)
from ckpt_pass.policy.decisions import (
    check_decision as check_decision,
)
from ckpt_pass.policy.sites import Scope, SiteContext


class UnknownPolicyError(CkptPassError):
    """No policy has that name, or the object given is not a policy."""

    @classmethod
    def named(cls, name: str, known: Sequence[str]) -> UnknownPolicyError:
        return cls(
            f"There is no policy named {name!r}.{nearest(name, known)} "
            f"Known policies: {', '.join(known)}."
        )


class InvalidRuleError(CkptPassError):
    """A rule was built from conditions that cannot hold."""


@runtime_checkable
class Policy(Protocol):
    """A rule from a call site to a decision, or ``None`` for no opinion."""

    def __call__(self, site: SiteContext, /) -> Ruling | None: ...


@functools.lru_cache(maxsize=4096)
def name_matches(pattern: str, name: str) -> bool:
    """``aten.mm`` matches every overload; otherwise shell wildcards."""
    return name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Rule:
    """One decision for the call sites that meet every given condition.

    Build rules with :func:`save`, :func:`recompute`, :func:`offload`, :func:`shard` and
    :func:`rule`; join them with ``|``.

    Attributes:
        decision: what becomes of a matching value.
        op: op names (``aten.mm.default``, ``aten.mm``, ``aten.*mm*``); any of them.
        op_class: op classes; any of them.
        module: FQN pattern with shell wildcards. The rule holds inside every matching module,
            its submodules included.
        nth: only the n-th match (from 1), counted within the matching module call, or within the
            region (layer, checkpoint region) where ``module`` is not given.
        every: only every n-th match: the first, the (n+1)-th, ...; counted likewise.
        min_bytes, max_bytes: bounds on the output's bytes, both inclusive.
        label: shown instead of the conditions.
    """

    decision: Ruling
    op: tuple[str, ...] = ()
    op_class: tuple[OpClass, ...] = ()
    module: str | None = None
    nth: int | None = None
    every: int | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None
    label: str = ""

    @property
    def by_op_alone(self) -> bool:
        """Whether the op decides, whatever the module, the count and the sizes."""
        return not (self.needs_scopes or self.needs_output)

    @property
    def needs_scopes(self) -> bool:
        return any(value is not None for value in (self.module, self.nth, self.every))

    @property
    def needs_output(self) -> bool:
        return self.min_bytes is not None or self.max_bytes is not None

    def __call__(self, site: SiteContext) -> Ruling | None:
        matches = self.matches_op(site) and self._place_matches(site) and self._size_matches(site)
        return self.decision if matches else None

    def matches_op(self, site: SiteContext) -> bool:
        """Whether the op is one of those that the rule is about, wherever it runs."""
        if self.op and not any(name_matches(pattern, site.site.op) for pattern in self.op):
            return False
        return not self.op_class or site.op_class in self.op_class

    def _place_matches(self, site: SiteContext) -> bool:
        scope = self._scope(site)
        if scope is None:
            return False
        index = scope.class_index if self.op_class and not self.op else scope.op_index
        if self.nth is not None and index != self.nth - 1:
            return False
        return self.every is None or index % self.every == 0

    def _scope(self, site: SiteContext) -> Scope | None:
        """The scope to count in: the innermost matching module call, else the region."""
        if self.module is None:
            return site.scopes[0] if site.scopes else Scope("", 0, 0)
        for scope in reversed(site.scopes[1:]):
            if fnmatch.fnmatchcase(scope.fqn, self.module):
                return scope
        return None

    def _size_matches(self, site: SiteContext) -> bool:
        if not self.needs_output:
            return True
        nbytes = site.nbytes
        if self.min_bytes is not None and nbytes < self.min_bytes:
            return False
        return self.max_bytes is None or nbytes <= self.max_bytes

    def __or__(self, other: Policy) -> FirstMatch:
        return first_match(self, other)

    def __str__(self) -> str:
        if self.label:
            return self.label
        shown = []
        if isinstance(self.decision, Sharding) and self.decision.group is not None:
            shown.append(f"group={self.decision.group}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = "|".join(str(item) for item in value)
            if value not in (None, ""):
                shown.append(f"{field.name}={value}")
        return f"{_verb(self.decision)}({', '.join(shown)})"


def _verb(decision: Ruling) -> str:
    if isinstance(decision, Sharding):
        return "shard"
    moves = decision in OFFLOADING
    verb = "save" if decision in SAVING else "offload" if moves else "recompute"
    usual = (CheckpointPolicy.MUST_SAVE, DEFAULT, CheckpointPolicy.MUST_CPU_OFFLOAD)
    return verb if decision in usual else f"{verb}[{decision.name}]"


@dataclass(frozen=True)
class FirstMatch:
    """Policies in order; the first with an opinion decides."""

    policies: tuple[Policy, ...]
    name: str = ""

    @property
    def by_op_alone(self) -> bool:
        return all(getattr(policy, "by_op_alone", False) for policy in self.policies)

    @property
    def needs_scopes(self) -> bool:
        return any(getattr(policy, "needs_scopes", True) for policy in self.policies)

    def __call__(self, site: SiteContext) -> Ruling | None:
        for policy in self.policies:
            decision = policy(site)
            if decision is not None:
                return decision
        return None

    def __or__(self, other: Policy) -> FirstMatch:
        return first_match(*self.policies, other)

    def __str__(self) -> str:
        body = " | ".join(str(policy) for policy in self.policies)
        return f"{self.name}: {body}" if self.name else body


@dataclass(frozen=True)
class TorchPolicy:
    """A ``policy_fn(ctx, op, *args, **kwargs)`` written for torch's selective checkpointing."""

    policy_fn: Callable[..., Ruling | bool]
    #: It sees the op and its arguments, no module.
    needs_scopes = False

    def __call__(self, site: SiteContext) -> Ruling | None:
        return self.ask(site.op, site.output, site.args, site.kwargs)

    def ask(self, op: Any, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Ruling:
        """What the function says of an op that ran with these arguments."""
        context = selective.context_of(output)
        decision = self.policy_fn(context, op, *args, **kwargs)
        if isinstance(decision, bool):  # torch accepts booleans: torch/utils/checkpoint.py
            return CheckpointPolicy.MUST_SAVE if decision else CheckpointPolicy.PREFER_RECOMPUTE
        return decision


def is_plain_data(policy: Policy) -> bool:
    """Whether a policy's ``repr`` says all about it."""
    if isinstance(policy, FirstMatch):
        return all(is_plain_data(part) for part in policy.policies)
    return type(policy) is Rule


#: What users may pass where a policy is wanted.
PolicyLike: TypeAlias = str | Policy | Callable[..., Any] | Sequence[Any]


def _names(ops: Any) -> tuple[str, ...]:
    one = isinstance(ops, str) or hasattr(ops, "overloads") or not isinstance(ops, Iterable)
    return tuple(map(_canonical_name, [ops] if one else ops))


def _canonical_name(op: Any) -> str:
    """The name that call sites carry; a packet (``torch.ops.aten.mm``) stands for its overloads."""
    if not (isinstance(op, str) or hasattr(op, "overloads")):
        return op_name(functional_twin(op))
    name = str(op)
    return STANDS_FOR.get(f"{name.removesuffix('.default')}.default", name)


def _classes(classes: Any) -> tuple[OpClass, ...]:
    known = [str(op_class) for op_class in OpClass]
    items = [classes] if isinstance(classes, str) else list(classes)
    for item in items:
        if str(item) not in known:
            raise InvalidRuleError(
                f"There is no op class {str(item)!r}.{nearest(str(item), known)} "
                f"Known classes: {', '.join(known)}."
            )
    return tuple(OpClass(item) for item in items)


def rule(
    decision: Ruling,
    *,
    op: Any = (),
    op_class: Any = (),
    module: str | None = None,
    nth: int | None = None,
    every: int | None = None,
    min_bytes: int | None = None,
    max_bytes: int | None = None,
    label: str = "",
) -> Rule:
    """Build a rule that gives ``decision`` where every given condition holds.

    Args:
        decision: one of torch's ``CheckpointPolicy``, or a :class:`ckpt_pass.Sharding`.
        op: an op, a name such as ``"aten.mm"``, or several of either.
        op_class: a class such as ``"matmul"``, or several.
        module: FQN pattern, as ``"*.mlp"``; submodules of a match are inside.
        nth: only the n-th matching op (from 1) of that module call, or of the region.
        every: only the first of every n matching ops.
        min_bytes: least output bytes.
        max_bytes: most output bytes.
        label: shown instead of the conditions when the rule is printed.

    Raises:
        InvalidRuleError: a class is unknown, a count is below 1, or ``nth`` and ``every`` are
            both given.
    """
    check_decision(decision, "rule(...)", shards=True)
    for name, value in (("nth", nth), ("every", every)):
        if value is not None and value < 1:
            raise InvalidRuleError(f"{name} counts from 1, got {value}. Give {name}=1 or more.")
    if nth is not None and every is not None:
        raise InvalidRuleError("Got both nth and every. A rule counts one way: give one of them.")
    names, classes = _names(op), _classes(op_class)
    if (nth is not None or every is not None) and not (names or classes):
        raise InvalidRuleError("nth and every count matching ops: give op= or op_class= too.")
    return Rule(decision, names, classes, module, nth, every, min_bytes, max_bytes, label)


def save(**conditions: Any) -> Rule:
    """Build a MUST_SAVE rule; the conditions are those of :func:`rule`."""
    return rule(CheckpointPolicy.MUST_SAVE, **conditions)


def recompute(**conditions: Any) -> Rule:
    """Build a PREFER_RECOMPUTE rule; the conditions are those of :func:`rule`."""
    return rule(CheckpointPolicy.PREFER_RECOMPUTE, **conditions)


def offload(**conditions: Any) -> Rule:
    """Build a MUST_CPU_OFFLOAD rule; the conditions are those of :func:`rule`.

    Where the values go is said where the policy is used: ``offload=Offload(...)`` of
    :func:`ckpt_pass.checkpoint`, :func:`ckpt_pass.context_fn` and :func:`ckpt_pass.apply`.
    """
    return rule(CheckpointPolicy.MUST_CPU_OFFLOAD, **conditions)


def shard(group: ShardLike | None = None, *, check: str = "always", **conditions: Any) -> Rule:
    """Build a rule that keeps a part of a value on each rank, in eager regions.

    Every rank of the group has to hold the value alike, and to run the same regions: the backward
    gathers it. Values below 1,024 bytes are kept whole, as by :func:`save`, where no ``min_bytes``
    is given.

    Args:
        group: the ranks, as for :class:`ckpt_pass.Sharding`; all of them where ``None``.
        check: when the ranks compare what they hold, likewise.
        conditions: those of :func:`rule`.

    Raises:
        InvalidRuleError, InvalidShardingError, ShardGroupError: see there.
    """
    found = as_sharding(True if group is None else group) or Sharding()
    least = conditions.get("min_bytes")
    options = {} if least is None else {"min_bytes": least}
    return rule(replace(found, check=check, **options), **conditions)


def first_match(*policies: Policy, name: str = "") -> FirstMatch:
    """Join policies: for each call site, the first that has an opinion decides."""
    flat: list[Policy] = []
    for policy in policies:
        if isinstance(policy, FirstMatch) and not policy.name:
            flat.extend(policy.policies)
        else:
            flat.append(policy)
    return FirstMatch(tuple(flat), name)


def takes_one_argument(function: Callable[..., Any]) -> bool:
    """Whether ``function(site)`` is a valid call; torch's policy functions need two or more."""
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def describe(policy: Callable[..., Any]) -> str:
    """A policy in words, without memory addresses."""
    if isinstance(policy, TorchPolicy):
        return f"policy_fn {describe(policy.policy_fn)}"
    if isinstance(policy, (Rule, FirstMatch)):
        return str(policy)
    name = getattr(policy, "__qualname__", None)
    return str(name) if name else type(policy).__name__
