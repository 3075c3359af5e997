"""Placements from the configurations of DeepSpeed and torchtitan."""

from __future__ import annotations

from typing import Any

from ckpt_pass.modules.by_layer import AllLayers, EveryN, NoLayers
from ckpt_pass.modules.choice import Placement
from ckpt_pass.modules.configs import ConfigKeyError, as_mapping, check_keys, refuse, switched
from ckpt_pass.modules.offloaded import Offloaded
from ckpt_pass.modules.segments import Segments
from ckpt_pass.modules.sharded import Sharded
from ckpt_pass.offloading.sharding import Sharding, ShardLike, as_sharding
from ckpt_pass.policy.named import as_policy
from ckpt_pass.policy.rules import FirstMatch, first_match, recompute

# https://www.deepspeed.ai/docs/config-json/#activation-checkpointing
_DEEPSPEED = {
    "synchronize_checkpoint_boundary": "Regions do not synchronise the device: set it to false.",
    "profile": "Use ckpt_pass.profile_layers(model, ...) instead, and set it to false.",
}
_DEEPSPEED_OFFLOADS = ("cpu_checkpointing", "contiguous_memory_optimization")
_DEEPSPEED_SHARDS = "partition_activations"


def from_deepspeed(config: Any, *, group: ShardLike | None = None) -> Placement:
    """The placement that DeepSpeed's ``activation_checkpointing`` section describes.

    ``number_checkpoints`` is the number of segments that all layers are cut into; without it every
    layer is a region (DeepSpeed itself leaves this to the model's code).
    ``cpu_checkpointing`` offloads what enters the regions to the host. With it
    ``contiguous_memory_optimization`` asks for what is so anyway: values lie in one pool, which is
    used again in every step. ``partition_activations`` keeps a part of what enters the regions on
    each rank of ``group``.

    Args:
        config: the section, or a whole configuration that has it.
        group: the ranks of model parallelism, for ``partition_activations``; all ranks where
            ``None``.

    Raises:
        ConfigKeyError: an unknown key or value, or one that asks for what is not supported here.
    """
    found = as_mapping(config, "DeepSpeed")
    if "activation_checkpointing" in found:
        found = as_mapping(found["activation_checkpointing"], "DeepSpeed")
    known = ("number_checkpoints", _DEEPSPEED_SHARDS, *_DEEPSPEED_OFFLOADS, *_DEEPSPEED)
    check_keys(found, known, "DeepSpeed")
    refuse(found, _DEEPSPEED, "DeepSpeed")
    moves, one_buffer = (switched(found, key, "DeepSpeed") for key in _DEEPSPEED_OFFLOADS)
    if one_buffer and not moves:
        raise ConfigKeyError(
            "The DeepSpeed configuration has contiguous_memory_optimization=True "
            "without cpu_checkpointing, which is not supported here: values that stay on the "
            "device are not copied into one buffer. Set it to false, or both to true."
        )
    placement = _segments_of(found.get("number_checkpoints"))
    if switched(found, _DEEPSPEED_SHARDS, "DeepSpeed"):
        if moves:
            raise ConfigKeyError(
                "The DeepSpeed configuration has partition_activations together with "
                "cpu_checkpointing, which is not supported here: what enters a region is kept in "
                "one place. Set one of them to false."
            )
        return Sharded(placement, as_sharding(True if group is None else group) or Sharding())
    return Offloaded(placement) if moves else placement


def _segments_of(count: Any) -> Placement:
    if count is None:
        return AllLayers()
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigKeyError(
            f"The DeepSpeed configuration has number_checkpoints={count!r}, expected a number of "
            "segments, 1 or more."
        )
    return Segments(count)


_TITAN_UNSUPPORTED = {
    "visualize_memory_budget_pareto": "Use ckpt_pass.sweep(model, ...) for the trade-off curve.",
    "debug": "A mismatch between forward and recomputation is always described: leave it out.",
}
# What these say holds here whatever their value: regions stop early, look at shapes, and draw the
# same random numbers again where any were drawn.
_TITAN_WITHOUT_EFFECT = ("early_stop", "preserve_rng_state", "determinism_check", "memory_budget")
_TITAN_SHAPES = (
    "per_op_sac_force_recompute_mm_shapes_by_fqns",
    "force_recompute_mm_shapes_by_fqns",
)
# Newer versions have a class each instead of a mode.
_TITAN_CLASSES = {"SelectiveAC": "selective", "FullAC": "full", "MemoryBudgetAC": "memory_budget"}


def from_torchtitan(config: Any) -> Placement:
    """The placement that torchtitan's activation checkpointing configuration describes.

    ``full`` is every layer; ``selective`` with a number n the n-th of every n layers; with ``op``
    (or without an option, as in newer versions) every layer with the policy
    ``every-other-matmul``, less the matmuls in modules that it lists as recomputed.

    Args:
        config: the section (``mode``, ``selective_ac_option``, ...), as a mapping or an object, or
            an object of one of the newer classes (``SelectiveAC.Config``, ``FullAC.Config``).

    Raises:
        ConfigKeyError: an unknown key or value, or one that asks for what is not supported here.
    """
    found = as_mapping(config, "torchtitan")
    known = ("mode", "selective_ac_option", *_TITAN_SHAPES, *_TITAN_WITHOUT_EFFECT)
    check_keys(found, (*known, *_TITAN_UNSUPPORTED), "torchtitan")
    refuse(found, _TITAN_UNSUPPORTED, "torchtitan")
    mode = found.get("mode", _mode_of_class(config))
    if mode == "none":
        return NoLayers()
    if mode == "full":
        return AllLayers()
    if mode != "selective":
        raise ConfigKeyError(
            f"The torchtitan configuration has mode={mode!r}, expected none, selective or full. "
            "For a memory budget use ckpt_pass.apply(model, budget=..., example_inputs=...), or "
            "ckpt_pass.make_backend(budget=...) under torch.compile."
        )
    option = found.get("selective_ac_option", "op")
    if option == "op":
        return AllLayers(_op_policy(found))
    if not str(option).isdigit():
        raise ConfigKeyError(
            f"The torchtitan configuration has selective_ac_option={option!r}, expected op or a "
            "number of layers."
        )
    n = int(option) or 1  # torchtitan takes 0 for every layer
    return EveryN(n, offset=n - 1)


def _mode_of_class(config: Any) -> str | None:
    return _TITAN_CLASSES.get(type(config).__qualname__.partition(".")[0])


def _op_policy(config: dict[str, Any]) -> FirstMatch:
    names = [name for key in _TITAN_SHAPES for name in config.get(key) or ()]
    again = [recompute(op_class="matmul", module=f"*{name}*") for name in names]
    base = as_policy("every-other-matmul")
    return first_match(*again, base, name="torchtitan-op")
