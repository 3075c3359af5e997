"""Placements whose modules offload: what enters the regions, or what autograd saves inside."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from torch import nn

from ckpt_pass._errors import nearest
from ckpt_pass.modules.by_module import callable_modules
from ckpt_pass.modules.choice import (
    WHAT_MOVES,
    Choice,
    ModuleChoice,
    NothingChosenError,
    Placement,
    PlacementError,
    Segment,
)
from ckpt_pass.modules.layers.find import find_layers
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.stores import OffloadLike, as_offload

#: Parts of layers by Megatron Core's names, each with patterns of FQNs and class names; those of
#: the first group that fits anything count.
OFFLOAD_PARTS: MappingProxyType[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        "attn_norm": (
            ("*.input_layernorm", "*.ln_1", "*.norm1", "*.attention_norm", "*.layernorm_before"),
        ),
        "qkv_linear": (
            ("*.linear_qkv", "*.qkv", "*.qkv_proj", "*.c_attn", "*.query_key_value"),
            ("*.q_proj", "*.k_proj", "*.v_proj"),
            ("*.query", "*.key", "*.value"),
        ),
        # Most libraries compute the core inside a module that has the projections as well.
        "core_attn": (("*CoreAttention", "*DotProductAttention"), ("*Attention*",)),
        "attn_proj": (
            ("*.linear_proj", "*.o_proj", "*.out_proj"),
            ("*attn*.c_proj", "*attn*.proj", "*attention*.dense", "*attn*.out"),
        ),
        "mlp_norm": (
            ("*.pre_mlp_layernorm", "*.post_attention_layernorm", "*.ffn_norm"),
            ("*.ln_2", "*.norm2", "*.layernorm_after"),
        ),
    }
)


@dataclass(frozen=True)
class Offloaded:
    """Another placement's modules, which offload.

    Attributes:
        placement: which modules.
        offload: where values go.
        what: ``"inputs"``: the modules are recomputed, and the activations that enter them are
            offloaded (DeepSpeed's ``cpu_checkpointing``). ``"saved"``: nothing is recomputed, and
            what autograd saves inside is offloaded (Megatron's ``cpu_offloading``, TRL's
            ``OffloadActivations``).

    Raises:
        PlacementError: ``what`` is neither.
        InvalidOffloadError: ``offload`` is no place.
    """

    placement: Placement
    offload: OffloadLike = field(default_factory=Offload)
    what: str = "inputs"

    name: ClassVar[str] = "offloaded"
    says: ClassVar[str] = "another placement's modules, which offload inputs or saved values"

    def __post_init__(self) -> None:
        if self.what not in WHAT_MOVES:
            raise PlacementError(
                f"Got what={self.what!r}, expected one of {', '.join(WHAT_MOVES)}."
                f"{nearest(str(self.what), WHAT_MOVES)}"
            )
        object.__setattr__(self, "offload", as_offload(self.offload) or Offload())
        if not isinstance(self.placement, Placement) or isinstance(self.placement, type):
            raise PlacementError(
                f"Got {self.placement!r} of type {type(self.placement).__name__} as the placement "
                "of modules that offload, expected a placement: ckpt_pass.as_placement(name)."
            )

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            PlacementError: the placement does not fit the model.
        """
        return self.placement.choose(model).with_offload(self.offload, self.what)


@dataclass(frozen=True)
class OffloadParts:
    """Parts of every layer by Megatron Core's names, of nested ones the outermost.

    Attributes:
        modules: names of ``OFFLOAD_PARTS``.

    Raises:
        PlacementError: a name is not known, or there is none.
    """

    modules: tuple[str, ...]

    name: ClassVar[str] = "offload-parts"
    says: ClassVar[str] = "parts of layers by Megatron-LM's offload_modules"

    def __post_init__(self) -> None:
        for part in self.modules:
            if part not in OFFLOAD_PARTS:
                raise PlacementError(
                    f"Got the module {part!r}, expected some of {', '.join(OFFLOAD_PARTS)}."
                    f"{nearest(part, OFFLOAD_PARTS)} What is not among them can be named by its "
                    "FQN or class: ckpt_pass.ByName(...)."
                )
        if not self.modules:
            raise PlacementError(f"Got no modules, expected some of {', '.join(OFFLOAD_PARTS)}.")

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            NothingChosenError: the layers have no part of that name.
        """
        chosen: dict[str, str] = {}
        for part in self.modules:
            found = [
                name for layer in find_layers(model).names for name in _part(model, layer, part)
            ]
            if not found:
                patterns = ", ".join(p for group in OFFLOAD_PARTS[part] for p in group)
                raise NothingChosenError(
                    f"The layers of {type(model).__name__} have no {part}: expected a module like "
                    f"{patterns}. Name the modules instead: ckpt_pass.ByName(...)."
                )
            chosen.update(dict.fromkeys(found, part))
        names = [n for n in chosen if not any(n.startswith(f"{other}.") for other in chosen)]
        place = {name: number for number, (name, _) in enumerate(model.named_modules())}
        names.sort(key=place.__getitem__)
        listed = tuple(
            ModuleChoice(name, type(model.get_submodule(name)).__name__, True, chosen[name])
            for name in names
        )
        shown = ",".join(self.modules)
        return Choice(f"offload-parts({shown})", listed, tuple(Segment((n,)) for n in names))


def _part(model: nn.Module, layer: str, part: str) -> Iterator[str]:
    inside = [
        (f"{layer}.{name}", type(module).__name__)
        for name, module in callable_modules(model.get_submodule(layer))
    ]
    for group in OFFLOAD_PARTS[part]:
        found = [
            name
            for name, kind in inside
            if any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(kind, p) for p in group)
        ]
        if found:
            yield from found
            return
