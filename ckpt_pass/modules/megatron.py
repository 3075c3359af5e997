"""Megatron-LM's recomputation: granularity, method, number of layers, and lists of modules.

Names and meanings are those of Megatron Core's ``TransformerConfig`` (``recompute_*``). Its
"output-discarding" checkpoints (layer norms, activations) free the *output* of a module, which the
linear layer after it saves. Here a layer norm and the linear layers after it are regions in a row:
the norm's output is made again when a linear layer's backward asks for it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn

from ckpt_pass._errors import nearest
from ckpt_pass.modules.by_layer import ChosenLayers, by_position
from ckpt_pass.modules.by_module import callable_modules
from ckpt_pass.modules.choice import (
    Choice,
    ModuleChoice,
    NothingChosenError,
    PlacementError,
    Segment,
)
from ckpt_pass.modules.configs import ConfigKeyError, as_mapping, check_keys, refuse, switched
from ckpt_pass.modules.layers.find import Layers, find_layers
from ckpt_pass.modules.offloaded import OFFLOAD_PARTS, Offloaded, OffloadParts
from ckpt_pass.modules.segments import by_segments, segments_of_length
from ckpt_pass.modules.sharded import Sharded
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.sharding import Sharding, ShardLike, as_sharding
from ckpt_pass.policy.rules import FirstMatch, first_match, recompute, save
from ckpt_pass.regions.wrapping import RegionSpec

#: Keeps the products with weights, and so makes again what is between them: scores, softmax and
#: their product with the values in an attention, the activation function in an MLP.
SAVE_LINEARS: FirstMatch = first_match(
    save(op=("aten.mm", "aten.addmm", "aten._grouped_mm")), recompute(), name="save-linears"
)


@dataclass(frozen=True)
class Part:
    """A part of a layer that can be named.

    Attributes:
        classes: patterns of its class names; of nested modules the outermost.
        policy: what its regions keep.
    """

    classes: tuple[str, ...]
    policy: FirstMatch | None = None


_MLP = ("*MLP", "*Mlp", "*FeedForward*", "*FFN", "T5LayerFF", "*DenseActDense")
_NORMS = ("*LayerNorm*", "*RMSNorm*")
_LINEARS = ("Linear", "Conv1D", "*ParallelLinear", "TE*Linear")

#: What `modules` may list. The first pattern class of the first part that is there counts.
PARTS: MappingProxyType[str, tuple[Part, ...]] = MappingProxyType(
    {
        "core_attn": (
            Part(("*CoreAttention", "*DotProductAttention")),
            # Most libraries compute the core inside a module that has the projections as well.
            Part(("*Attention*",), SAVE_LINEARS),
        ),
        "mlp": (Part(_MLP),),
        "mlp_act": (Part(_MLP, SAVE_LINEARS),),
        "moe_act": (Part(("*Experts", *_MLP), SAVE_LINEARS),),
        "moe": (Part(("*MoE*", "*MoeBlock", "*SparseMoe*", "*MoELayer")),),
        "shared_experts": (Part(("*SharedExpert*",)),),
        "layernorm": (Part(_NORMS),),
    }
)
_GRANULARITIES = ("selective", "full")
_METHODS = ("uniform", "block")


@dataclass(frozen=True)
class Megatron:
    """Recomputation as Megatron-LM describes it.

    Attributes:
        granularity: ``selective`` (parts of every layer) or ``full`` (layers).
        method: for ``full``: ``uniform`` (segments of ``num_layers`` layers) or ``block`` (the
            first ``num_layers`` layers, each by itself).
        num_layers: see there; 1 with ``uniform`` where ``None``.
        modules: for ``selective``: names of ``PARTS``.

    Raises:
        PlacementError: values that do not exist or contradict each other.
    """

    granularity: str = "selective"
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = ("core_attn",)

    name: ClassVar[str] = "megatron"
    says: ClassVar[str] = "Megatron-LM's (megatron-selective, megatron-full)"

    def __post_init__(self) -> None:
        _one_of("granularity", self.granularity, _GRANULARITIES)
        if self.granularity == "full":
            _one_of("method", self.method or "uniform", _METHODS)
            if self.method == "block" and self.num_layers is None:
                raise PlacementError(
                    "Got method='block' without num_layers=, expected how many layers from the "
                    "first on are recomputed."
                )
            return
        if self.method is not None or self.num_layers is not None:
            raise PlacementError(
                f"Got granularity='selective' with method={self.method!r} and num_layers="
                f"{self.num_layers!r}, expected neither: they are for granularity='full'."
            )
        for part in self.modules:
            _one_of("modules", part, tuple(PARTS))
        if not self.modules:
            raise PlacementError(f"Got no modules, expected some of {', '.join(PARTS)}.")

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            SegmentCountError: more layers asked for than there are.
            NothingChosenError: the layers have no part of that name.
        """
        layers = find_layers(model)
        if self.granularity == "selective":
            return _selective(model, layers, self.modules)
        count = len(layers.names)
        if self.method == "block":
            number = segments_of_length(count, self.num_layers or 1)[0][1]
            return by_position(
                f"megatron-full-block-{number}",
                layers,
                lambda n: f"of the first {number} layers" if n < number else None,
            )
        length = self.num_layers or 1
        spans = segments_of_length(count, length)
        return by_segments(f"megatron-full-uniform-{length}", layers, spans)


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PlacementError(
            f"Got {what} {value!r}, expected one of {', '.join(known)}.{nearest(str(value), known)}"
        )


def _selective(model: nn.Module, layers: Layers, wanted: tuple[str, ...]) -> Choice:
    found: dict[str, ModuleChoice] = {}
    specs: dict[str, RegionSpec] = {}
    for part in wanted:
        chosen = dict(_of_part(model, layers, part))
        if not chosen:
            patterns = ", ".join(c for option in PARTS[part] for c in option.classes)
            kinds = sorted({type(model.get_submodule(n)).__name__ for n in layers.names})
            raise NothingChosenError(
                f"The layers of {type(model).__name__} ({', '.join(kinds)}) have no {part}: "
                f"expected a module of a class like {patterns}. Name the modules instead: "
                "ckpt_pass.ByName(...)."
            )
        for name, (spec, why) in chosen.items():
            if any(name == other or name.startswith(f"{other}.") for other in specs):
                continue
            kind = type(model.get_submodule(name)).__name__
            specs[name] = spec
            found[name] = ModuleChoice(name, kind, True, why)
    _drop_nested(specs, found)
    for name, kind in zip(layers.names, layers.kinds, strict=True):
        count = sum(other.startswith(f"{name}.") for other in specs)
        found[name] = ModuleChoice(name, kind, False, f"{count} regions inside")
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    ordered = tuple(sorted(found.values(), key=lambda one: place[one.name]))
    # Regions that others follow come first.
    names = sorted(specs, key=lambda name: (bool(specs[name].follows), place[name]))
    segments = tuple(Segment((name,)) for name in names)
    shown = ",".join(wanted)
    return Choice(f"megatron-selective({shown})", ordered, segments, specs=tuple(specs.items()))


def _drop_nested(specs: dict[str, RegionSpec], found: dict[str, ModuleChoice]) -> None:
    """Leave out regions inside of regions that a later part has named, and links to them."""
    for name in [n for n in specs if any(n.startswith(f"{o}.") for o in specs)]:
        del specs[name], found[name]
    for name, spec in list(specs.items()):
        follows = tuple(other for other in spec.follows if other in specs)
        specs[name] = RegionSpec(policy=spec.policy, follows=follows)


def _of_part(
    model: nn.Module, layers: Layers, part: str
) -> Iterator[tuple[str, tuple[RegionSpec, str]]]:
    """The modules of a part in every layer, with what becomes of each and why."""
    for layer in layers.names:
        inside = [
            (f"{layer}.{name}", module)
            for name, module in callable_modules(model.get_submodule(layer))
        ]
        for option in PARTS[part]:
            names = list(_outermost(inside, option.classes))
            if names and part == "layernorm":
                yield from _norms(names, list(_outermost(inside, _LINEARS)))
            else:
                for name in names:
                    yield name, (RegionSpec(policy=option.policy), f"{part} of {layer}")
            if names:
                break


def _norms(norms: list[str], linears: list[str]) -> Iterator[tuple[str, tuple[RegionSpec, str]]]:
    for name in norms:
        yield name, (RegionSpec(), "layernorm: its output is made again")
    for name in linears:
        spec = RegionSpec(follows=tuple(norms))
        yield name, (spec, "layernorm: may take a norm's output, which is not kept then")


def _outermost(inside: list[tuple[str, nn.Module]], classes: tuple[str, ...]) -> Iterator[str]:
    taken: list[str] = []
    for name, module in inside:
        if any(name.startswith(f"{other}.") for other in taken):
            continue
        kind = type(module).__name__
        if any(fnmatch.fnmatchcase(kind, pattern) for pattern in classes):
            taken.append(name)
            yield name


_UNSUPPORTED = {
    "cpu_offloading_weights": "Parameters stay on the device: set it to False.",
}
_KEYS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "distribute_saved_activations",
)
_OFFLOADS = (
    "cpu_offloading",
    "cpu_offloading_num_layers",
    "cpu_offloading_activations",
    "cpu_offloading_double_buffering",
    "fine_grained_activation_offloading",
    "offload_modules",
    "min_offloaded_tensor_size",
)
_OF = "Megatron"
#: Megatron Core counts elements, of bfloat16 in most of its models.
_ELEMENT_BYTES = 2


def _offloaded(found: dict[str, Any]) -> Offloaded | None:
    """What a configuration offloads; ``None`` where it offloads nothing."""
    activations = switched(
        {"cpu_offloading_activations": True, **found}, "cpu_offloading_activations", _OF
    )
    if switched(found, "cpu_offloading", _OF) and activations:
        number = found.get("cpu_offloading_num_layers")
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigKeyError(
                f"The Megatron configuration has cpu_offloading_num_layers={number!r}, expected "
                "how many layers from the first on are offloaded, 1 or more."
            )
        return Offloaded(ChosenLayers(tuple(range(number))), what="saved")
    if not switched(found, "fine_grained_activation_offloading", _OF):
        return None
    modules = found.get("offload_modules") or ()
    if isinstance(modules, str) or not modules or any(m not in OFFLOAD_PARTS for m in modules):
        raise ConfigKeyError(
            f"The Megatron configuration has offload_modules={modules!r}, expected a list of "
            f"{', '.join(OFFLOAD_PARTS)}. What is not among them is not supported here."
        )
    least = found.get("min_offloaded_tensor_size", 1024 * 1024) * _ELEMENT_BYTES
    return Offloaded(OffloadParts(tuple(modules)), Offload(min_bytes=least), "saved")


def _distributed(group: ShardLike | None) -> Sharding:
    """Megatron takes apart what the tensor-parallel ranks hold alike: a layer's first argument."""
    sharding = as_sharding(True if group is None else group) or Sharding()
    return replace(sharding, arguments="first")


def from_megatron(
    config: Any, *, group: ShardLike | None = None
) -> Megatron | Offloaded | Sharded | None:
    """The placement that a Megatron Core configuration describes.

    Args:
        config: the ``recompute_*`` and offloading keys of a ``TransformerConfig``, as a mapping or
            an object.
        group: the ranks of tensor parallelism, for ``distribute_saved_activations``; all ranks
            where ``None``.

    Returns:
        The placement; ``None`` where the configuration recomputes and offloads nothing.

    Raises:
        ConfigKeyError: an unknown key, or one that asks for what is not supported.
        PlacementError: values that contradict each other.
    """
    found = as_mapping(config, _OF)
    check_keys(found, (*_KEYS, *_OFFLOADS, *_UNSUPPORTED), _OF)
    refuse(found, _UNSUPPORTED, _OF)
    granularity = found.get("recompute_granularity")
    distributes = switched(found, "distribute_saved_activations", _OF)
    if distributes and granularity != "full":
        raise ConfigKeyError(
            "The Megatron configuration has distribute_saved_activations=True with "
            f"recompute_granularity={granularity!r}, expected 'full', as in Megatron: it is the "
            "first argument of each layer that is distributed. Set one of them otherwise."
        )
    offloaded = _offloaded(found)
    if offloaded is not None:
        if granularity is not None:
            raise ConfigKeyError(
                f"The Megatron configuration has recompute_granularity={granularity!r} together "
                "with offloading, which is not supported here (nor, of cpu_offloading, in "
                "Megatron). Expected one of the two. A policy can do both: "
                "ckpt_pass.offload(...) | ckpt_pass.save(...) | ckpt_pass.recompute()."
            )
        return offloaded
    if granularity is None:
        return None
    modules = found.get("recompute_modules") or ("core_attn",)
    if isinstance(modules, str) or not all(part in PARTS for part in modules):
        raise ConfigKeyError(
            f"The Megatron configuration has recompute_modules={modules!r}, expected a list of "
            f"{', '.join(PARTS)}. What is not among them is not supported here."
        )
    method, number = found.get("recompute_method"), found.get("recompute_num_layers")
    if granularity == "full":
        layers = Megatron("full", method, number)
        return Sharded(layers, _distributed(group)) if distributes else layers
    return Megatron(granularity, method, number, tuple(modules))
