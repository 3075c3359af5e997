"""A Lightning callback that makes modules checkpoint regions while a model is fitted.

Needs the ``lightning`` extra. Everything else in this library works without it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ckpt_pass.eager.apply import RegionSpec, apply_regions, regions_of, remove_regions
from ckpt_pass.errors import CkptPassError
from ckpt_pass.graph.regions import repeated_modules
from ckpt_pass.plan import Plan
from ckpt_pass.policy import PolicyLike
from ckpt_pass.report import missing_extra

with missing_extra("lightning"):
    from lightning.pytorch.callbacks import Callback


class CallbackArgumentError(CkptPassError):
    """The callback got arguments that contradict each other, or found nothing to wrap."""


class ActivationCheckpointing(Callback):  # type: ignore[misc, unused-ignore]
    """Checkpoint regions from the beginning of ``fit`` to its end.

    Parameters, ``state_dict`` keys and checkpoints are those of the model without it.

    Args:
        policy: what each region keeps, as for :func:`ckpt_pass.context_fn`; nothing where ``None``.
        modules: FQNs of the regions; the repeated layers where ``None``.
        plan: an eager plan, in the place of both.

    Raises:
        CallbackArgumentError: ``plan`` is given together with one of the others.
    """

    def __init__(
        self,
        policy: PolicyLike | None = None,
        modules: list[str] | None = None,
        plan: Plan | None = None,
    ) -> None:
        if plan is not None and (policy is not None or modules is not None):
            raise CallbackArgumentError(
                "Got plan= together with policy= or modules=, expected one of the two: a plan "
                "says which modules are regions and what they keep."
            )
        self._policy = policy
        self._modules = modules
        self._plan = plan

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Apply the regions.

        Raises:
            CallbackArgumentError: no layers were found.
            UnknownRegionError, AlreadyAppliedError: see :meth:`ckpt_pass.Plan.apply`.
        """
        if self._plan is not None:
            apply_regions(pl_module, self._plan.region_specs())
            return
        names = self._modules if self._modules is not None else repeated_modules(pl_module)
        if not names:
            raise CallbackArgumentError(
                f"No repeated layers were found in {type(pl_module).__name__}, expected modules "
                "with an index as their name. Name the regions with modules=[...]."
            )
        apply_regions(pl_module, {name: RegionSpec(policy=self._policy) for name in names})

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Remove them."""
        self._remove(pl_module)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Remove them."""
        self._remove(pl_module)

    @staticmethod
    def _remove(module: nn.Module) -> None:
        if regions_of(module):
            remove_regions(module)
