"""A Lightning callback that makes modules checkpoint regions while a model is fitted.

Needs the ``lightning`` extra. Everything else in this library works without it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.drawing.memory import missing_extra
from ckpt_pass.modules.applying import apply, remove
from ckpt_pass.modules.placement import PlacementLike
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.rules import PolicyLike
from ckpt_pass.regions.wrapping import RegionSpec, apply_regions, regions_of

with missing_extra("lightning"):
    from lightning.pytorch.callbacks import Callback


class CallbackArgumentError(CkptPassError):
    """The callback got arguments that contradict each other."""


class ActivationCheckpointing(Callback):  # type: ignore[misc, unused-ignore]
    """Checkpoint regions from the beginning of ``fit`` to its end.

    Parameters, ``state_dict`` keys and checkpoints are those of the model without it.

    Args:
        policy: what each region keeps, as for :func:`ckpt_pass.context_fn`; nothing where ``None``.
        modules: FQNs of the regions; what the placement says where ``None``.
        plan: an eager plan, in the place of all others.
        placement: which modules are regions, as for :func:`ckpt_pass.apply`; every layer where
            ``None``.

    Raises:
        CallbackArgumentError: ``plan`` is given together with one of the others, or ``modules``
            together with ``placement``.
    """

    def __init__(
        self,
        policy: PolicyLike | None = None,
        modules: list[str] | None = None,
        plan: Plan | None = None,
        placement: PlacementLike | None = None,
    ) -> None:
        others = [value for value in (policy, modules, placement) if value is not None]
        if plan is not None and others:
            raise CallbackArgumentError(
                "Got plan= together with policy=, modules= or placement=, expected one of the two: "
                "a plan says which modules are regions and what they keep."
            )
        if modules is not None and placement is not None:
            raise CallbackArgumentError(
                "Got modules= together with placement=, expected one of the two: both say which "
                "modules are regions."
            )
        self._placement = placement
        self._policy = policy
        self._modules = modules
        self._plan = plan

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Apply the regions.

        Raises:
            NoLayersError: no layers were found.
            UnknownRegionError, AlreadyAppliedError: see :meth:`ckpt_pass.Plan.apply`.
        """
        if self._plan is not None:
            apply_regions(pl_module, self._plan.region_specs())
        elif self._modules is not None:
            specs = {name: RegionSpec(policy=self._policy) for name in self._modules}
            apply_regions(pl_module, specs)
        else:
            apply(pl_module, self._placement, self._policy)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Remove them."""
        self._remove(pl_module)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Remove them."""
        self._remove(pl_module)

    @staticmethod
    def _remove(module: nn.Module) -> None:
        if regions_of(module):
            remove(module)
