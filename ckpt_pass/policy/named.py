"""The policies that have a name, and the way from what a user passes to a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from ckpt_pass.ops.taxonomy import OpClass, is_expensive
from ckpt_pass.policy.rules import (
    FirstMatch,
    Policy,
    PolicyLike,
    Rule,
    TorchPolicy,
    UnknownPolicyError,
    first_match,
    recompute,
    save,
    takes_one_argument,
)

_EXPENSIVE = tuple(op_class for op_class in OpClass if is_expensive(op_class))
# A custom op that nobody classified may cost anything: it is saved like the expensive ones.
_UNKNOWN = (OpClass.UNCLASSIFIED,)


def _named(name: str, *rules: Rule) -> tuple[str, FirstMatch]:
    return name, first_match(*rules, recompute(), name=name)


#: Every named policy. The names are the public interface; the rules print themselves.
POLICIES: Mapping[str, FirstMatch] = MappingProxyType(
    dict(
        [
            _named("save-matmul-attention", save(op_class=_EXPENSIVE, label="save(expensive ops)")),
            _named("save-attention", save(op_class=(OpClass.ATTENTION, *_UNKNOWN))),
            _named(
                "save-matmul",
                save(op_class=(OpClass.MATMUL, OpClass.CONVOLUTION, *_UNKNOWN)),
            ),
            _named("save-nothing"),
            # torchtitan's selective "op" mode: attention, and the first of every two matmuls of
            # a layer (torchtitan/distributed/activation_checkpoint.py).
            _named(
                "every-other-matmul",
                save(op_class=(OpClass.ATTENTION, *_UNKNOWN)),
                save(op_class=(OpClass.MATMUL, OpClass.CONVOLUTION), every=2),
            ),
            ("save-everything", first_match(save(), name="save-everything")),
        ]
    )
)

DEFAULT_POLICY = "save-matmul-attention"


def policies() -> Mapping[str, FirstMatch]:
    """The named policies, by name."""
    return POLICIES


def as_policy(policy: PolicyLike) -> Policy:
    """Turn what a user passed into a policy.

    Args:
        policy: a name (:func:`policies` lists them), a policy value, a callable
            ``policy(site)``, a ``policy_fn(ctx, op, *args, **kwargs)`` written for torch's
            ``create_selective_checkpoint_contexts``, or a list of ops to save.

    Raises:
        UnknownPolicyError: no policy has that name, or the object is none of these.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise UnknownPolicyError.named(policy, tuple(POLICIES))
        return POLICIES[policy]
    if isinstance(policy, (Rule, FirstMatch, TorchPolicy)):
        return policy
    if callable(policy):
        function = cast("Callable[..., Any]", policy)
        return function if takes_one_argument(function) else TorchPolicy(function)
    if isinstance(policy, Sequence) and policy:
        return first_match(save(op=policy), recompute())
    raise UnknownPolicyError(
        f"Got {policy!r} of type {type(policy).__name__} as a policy. Give a name "
        f"({', '.join(POLICIES)}), a policy value, a callable, or a non-empty list of ops to save."
    )
