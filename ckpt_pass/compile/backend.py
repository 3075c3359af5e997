"""The ``torch.compile`` backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ckpt_pass import _torch
from ckpt_pass.budget import BudgetLike, check_budget
from ckpt_pass.compile.engine import Partitioner, policy_for
from ckpt_pass.compile.symbolic import watch_sizes
from ckpt_pass.errors import CkptPassError, nearest
from ckpt_pass.plan import Plan
from ckpt_pass.policies import as_policy
from ckpt_pass.policy import Policy, PolicyLike, describe

INNER = ("inductor", "aot_eager")
#: Plans kept by a backend value: the newest ones, so that a backend shared by a whole process
#: does not grow without bound. A model has one plan a graph and shape.
PLANS_KEPT = 1024


class UnknownOptionError(CkptPassError):
    """An option of the backend is unknown, or its value is not one that it takes."""


@dataclass(eq=False)  # not frozen: torch writes its tags on a backend that it registers
class Backend:
    """A backend for ``torch.compile(model, backend=...)``.

    Build one with :func:`make_backend`; ``ckpt_backend`` is the default one.

    Attributes:
        policy: what to save; ``None`` for the default, which depends on there being a budget.
        inner: the compiler of both halves, ``inductor`` or ``aot_eager``.
        regions: FQN patterns of the layers; found from the module names where ``None``.
        inner_options: inductor's own options, as ``torch.compile(options=...)`` takes them.
        budget: the peak to stay within (:func:`make_backend`), if any.
        plans: the plans made so far, one for each graph, oldest first (1,024 at most).
    """

    policy: Policy | None = None
    inner: str = "inductor"
    regions: tuple[str, ...] | None = None
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    budget: BudgetLike | None = None
    plans: deque[Plan] = field(default_factory=lambda: deque(maxlen=PLANS_KEPT), repr=False)

    #: Read by torch.compile to name the compiler in its logs.
    compiler_name = "ckpt"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one of dynamo's graphs; called by ``torch.compile``.

        Raises:
            UnknownOptionError: an unknown option, or ``mode`` with an inner other than inductor.
        """
        backend = self.with_options(options or {})
        names = tuple(
            _torch.placeholder_source(node) for node in gm.graph.find_nodes(op="placeholder")
        )
        made: list[Plan] = []

        def on_plan(plan: Plan) -> None:
            made.append(plan)
            self.plans.append(plan)

        partition = Partitioner(
            policy_for(backend.policy, backend.budget),
            backend.regions,
            names,
            backend.budget,
            on_plan,
        )
        if backend.inner == "aot_eager":
            if mode is not None:
                raise UnknownOptionError(
                    f"Got mode={mode!r} with inner='aot_eager', which has no modes. "
                    "Leave mode out, or use inner='inductor'."
                )
            compiled = _torch.compile_eager(gm, example_inputs, partition)
        else:
            compiled = _torch.compile_inductor(
                gm, example_inputs, partition, dict(backend.inner_options), mode
            )
        return watch_sizes(compiled, made[-1], example_inputs) if made else compiled

    def with_options(self, options: Mapping[str, Any]) -> Backend:
        """This backend with some options changed; the list of plans stays shared.

        Args:
            options: ``policy``, ``inner``, ``regions``, ``inner_options``, ``budget``.

        Raises:
            UnknownOptionError: an option is unknown or has a value that it does not take.
            UnknownPolicyError: no policy has that name.
        """
        known = ("policy", "inner", "regions", "inner_options", "budget")
        for key in options:
            if key not in known:
                raise UnknownOptionError(
                    f"The ckpt backend has no option {key!r}.{nearest(key, known)} Known options: "
                    f"{', '.join(known)}. Inductor's own options go into 'inner_options'."
                )
        changed = dict(options)
        if changed.get("policy") is not None:
            changed["policy"] = as_policy(changed["policy"])
        if changed.get("budget") is not None:
            check_budget(changed["budget"])
        if "regions" in changed:
            changed["regions"] = _as_patterns(changed["regions"])
        _check_inner(changed.get("inner", self.inner), changed.get("inner_options", {}))
        return replace(self, **changed) if changed else self

    def __str__(self) -> str:
        return f"ckpt backend: {describe(policy_for(self.policy, self.budget))}; inner {self.inner}"


def _as_patterns(regions: Any) -> tuple[str, ...] | None:
    patterns = (regions,) if isinstance(regions, str) else regions
    if patterns is None:
        return None
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise UnknownOptionError(
            f"Got regions={regions!r}, expected module name patterns such as ['model.layers.*'], "
            "[] for no regions, or None to find the repeated layers."
        )
    return tuple(patterns)


def _check_inner(inner: Any, inner_options: Mapping[str, Any]) -> None:
    if inner not in INNER:
        raise UnknownOptionError(
            f"Got inner={inner!r}, expected one of {', '.join(INNER)}.{nearest(str(inner), INNER)}"
        )
    if inner_options and inner != "inductor":
        raise UnknownOptionError(
            f"Got inner_options={dict(inner_options)!r} with inner={inner!r}, which takes none. "
            "Leave them out, or use inner='inductor'."
        )
    known = _torch.inductor_option_names() if inner_options else frozenset()
    for key in inner_options:
        if key not in known:
            raise UnknownOptionError(
                f"Inductor has no option {key!r}.{nearest(key, known)} "
                "torch._inductor.list_options() lists them."
            )


def make_backend(
    policy: PolicyLike | None = None,
    *,
    budget: BudgetLike | None = None,
    inner: str = "inductor",
    regions: str | Sequence[str] | None = None,
    inner_options: Mapping[str, Any] | None = None,
) -> Backend:
    """Build a backend for ``torch.compile(model, backend=...)``.

    Args:
        policy: what to save: a name, a policy value, a callable or a list of ops
            (:func:`ckpt_pass.as_policy`). By default ``save-matmul-attention``; with a budget,
            whatever the solver finds best. A policy's MUST_* decisions bind under a budget too.
        budget: the peak of forward and backward, above what was allocated when the step began:
            ``"6GiB"``, a number of bytes, a fraction of the peak without recomputation, or
            ``"device"`` (what the accelerator has free). The plan's peak is exact for
            ``inner="aot_eager"``; inductor fuses and reorders afterwards.
        inner: the compiler of forward and backward: ``inductor`` or ``aot_eager``.
        regions: module name patterns of the layers whose borders are saved under every policy;
            found from repeated module names where ``None``; ``[]`` for none.
        inner_options: options for inductor.

    Raises:
        UnknownPolicyError, UnknownOptionError, InvalidBudgetError: an argument is not one of
            these. ``InfeasibleBudgetError`` comes when a graph is compiled.
    """
    options: dict[str, Any] = {"inner": inner, "inner_options": dict(inner_options or {})}
    options |= {"policy": policy, "budget": budget}
    return Backend(regions=_as_patterns(regions)).with_options(options)


#: The default backend: ``torch.compile(model, backend=ckpt_backend)``.
ckpt_backend = make_backend()
