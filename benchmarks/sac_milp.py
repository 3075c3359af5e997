"""Plans of an FSDP2 Llama beside those of torch's ``sac_milp``, at the same budgets.

``sac_milp`` (torch.distributed._tools.sac_ilp; it needs ``pulp`` and ``pwlf``) says which share of
a module's activations to discard; ``get_optimal_checkpointing_policy_per_module`` which ops that
are; torch's selective checkpointing carries it out. Plans of both are then run: one rank of torch's
fake process group, which does all but exchange, so that peaks are exact.

Torch's estimators want a GPU's figures for their roofline; here it has those of one of our devices.
Attention is written out, since torch's estimator would see other ops of a fused one than those that
run on a CPU. Of the model's rotary table, which has no backward, torch's tools know nothing, and
stop: it is left out of what they are told.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools import runtime_estimator
from torch.distributed._tools.ilp_utils import Graph, aggregate_stats, parse_module_info
from torch.distributed._tools.mem_tracker import MemTracker, _ModState
from torch.distributed._tools.sac_estimator import OPS_TO_ALWAYS_SKIP, SACEstimator, SACStats
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

import ckpt_pass
from benchmarks.common import Bar, Ran, Result, SacRow
from benchmarks.eager_budgets import least_budget
from ckpt_pass.measure.step import Measurement
from ckpt_pass.planner.devices import as_device
from tests.distributed.ranks import simulated
from tests.zoo import Built, checkpoint_blocks
from tests.zoo.hf import VOCAB, TrainStep, next_token_loss, text_ids

RANKS, LAYERS = 2, 6
#: Where the budgets lie between the least that ours takes and the peak with nothing recomputed.
PARTS = (0.1, 0.3, 0.5, 0.7, 0.9)
_GIB = 2**30  # sac_milp's unit
_ROOF = as_device("h100")
_FLOPS_PER_S = min(rate for _, rate in _ROOF.flops_per_s)  # of fp32, the slowest
_ROOT = f"{TrainStep.__name__}."  # torch's tools name modules with it
_MISSING = "sac-milp needs pulp and pwlf, which torch's tools ask for: pip install -e '.[bench]'"


@dataclass(frozen=True)
class _Told:
    """What torch's estimators found out, and the units that FSDP shards."""

    graph: Graph
    stats: dict[str, SACStats]
    units: list[str]


def run(parts: Sequence[float] = PARTS, layers: int = LAYERS) -> Result:
    """Plan, run and measure both at each budget.

    Raises:
        SystemExit: ``pulp`` or ``pwlf`` is not there.
    """
    try:
        from torch.distributed._tools.sac_ilp import sac_milp
    except ImportError as error:
        raise SystemExit(_MISSING) from error
    told = _told(layers)
    with simulated(RANKS):
        step, args = _sharded(layers)
        held = sum(_own(parameter).untyped_storage().nbytes() for parameter in step.parameters())
        plain = _measured(step, args)
        least = least_budget(step, args)
        rows = []
        for part in parts:
            budget = int(least + part * (plain.peak_bytes - least))
            # Torch's budget has a rank's parameters in it, ours what the step adds to them.
            shares, _, claimed = sac_milp(
                copy.deepcopy(told.graph),
                (budget + held) / _GIB,
                world_size=RANKS,
                fsdp_units=told.units,
            )
            torchs = None
            if claimed >= 0:  # -1: it found none
                torchs = _ran(claimed - held, _discarding(layers, shares, told.stats), plain)
            rows.append(SacRow(budget, torchs, _planned(layers, budget, plain)))
    return Result(
        name="sac-milp",
        title=f"FSDP2 Llama, {layers} layers, {RANKS} simulated ranks: peaks, and what runs again",
        rows=tuple(rows),
        bars=tuple(_bars(rows)),
    )


def _bars(rows: Sequence[SacRow]) -> list[Bar]:
    both = [(row.ours.flops_share, row.torch.flops_share) for row in rows if row.torch is not None]
    filled = max(row.ours.peak_bytes / row.budget_bytes for row in rows)
    more = max((ours - torchs for ours, torchs in both), default=0.0)
    return [
        Bar("ours: measured peak / budget, worst", filled, 1.0),
        Bar("recomputed, ours less sac_milp's, worst, of the step's flops", more, 0.0),
    ]


def _built(layers: int) -> Built:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return TrainStep(LlamaForCausalLM(config), next_token_loss), (text_ids(4, 256),)


def _sharded(layers: int) -> Built:
    step, args = _built(layers)
    for layer in step.get_submodule("model.model.layers").children():
        fully_shard(layer)
    fully_shard(step)
    return step, args


def _own(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _measured(step: nn.Module, args: tuple[Any, ...]) -> Measurement:
    return ckpt_pass.measure_step(
        lambda: step(*args), warmup=0, repeats=1, params=step.parameters()
    )


def _ran(claimed_bytes: int, found: Measurement, plain: Measurement) -> Ran:
    return Ran(claimed_bytes, found.peak_bytes, (found.flops - plain.flops) / plain.flops)


def _told(layers: int) -> _Told:
    """Run torch's three estimators, as its own tests of ``sac_milp`` do, on fake tensors."""
    roofline = mock.patch.object(
        runtime_estimator.RuntimeEstimator, "_roofline_estimate", classmethod(_roofline)
    )
    with FakeTensorMode(), roofline:
        step, args = _built(layers)
        memory, times, trade = MemTracker(), runtime_estimator.RuntimeEstimator(), SACEstimator()
        memory.track_external(step, *args)
        with memory:
            for index in range(2):  # the first makes the gradients
                step(*args).backward()
                step.zero_grad()
                if index == 0:
                    memory.reset_mod_stats()
        with redirect_stdout(None), times("operator-level-cost-model"):  # it prints what it found
            step(*args).backward()
        with trade("operator-level-cost-model"):
            step(*args)
        _leave_out_what_has_no_backward(memory, times)
        info = aggregate_stats(step, memory, times, trade, torch.device("cpu"))
    units = [f"{_ROOT}model.model.layers.{index}" for index in range(layers)]
    return _Told(parse_module_info(info), trade.sac_mod_stats, units)


def _leave_out_what_has_no_backward(memory: MemTracker, times: Any) -> None:
    tracked = memory.memory_tracking
    without = [m for m, stats in tracked.items() if _ModState.PRE_BW not in stats.snapshots]
    names = {tracked.pop(module).mod_fqn for module in without}
    orders = (
        times.mod_fw_pre_order, times.mod_bw_pre_order,
        times.mod_fw_post_order, times.mod_bw_post_order,
    )  # fmt: skip
    for order in orders:
        order[:] = [name for name in order if name not in names]


def _roofline(_: type, func: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
    """What an op returns, and its milliseconds: torch's rule, with the figures of one device."""
    kwargs = kwargs or {}
    out = func(*args, **kwargs)
    packet = func._overloadpacket
    if packet in runtime_estimator._IGNORE_OPS:
        return out, 0.0
    tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    count = flop_registry.get(packet)
    flops = count(*args, **kwargs, out_val=out) if count is not None else 0
    return out, 1e3 * max(moved / _ROOF.bytes_per_s, flops / _FLOPS_PER_S)


def _discarding(layers: int, shares: dict[str, float], stats: dict[str, SACStats]) -> Measurement:
    """A step that does what ``sac_milp`` says."""
    from torch.distributed._tools.sac_ilp import get_optimal_checkpointing_policy_per_module

    step, args = _sharded(layers)
    for name, share in shares.items():
        saved = get_optimal_checkpointing_policy_per_module(stats[name], 1 - share)
        contexts = partial(_contexts, stats[name].func_names, saved)
        checkpoint_blocks(step, [name.removeprefix(_ROOT)], context_fn=contexts)
    return _measured(step, args)


def _planned(layers: int, budget: int, plain: Measurement) -> Ran:
    step, args = _sharded(layers)
    plan = ckpt_pass.plan(step, *args, budget=budget, mode="eager")
    plan.apply(step)
    return _ran(plan.peak_bytes, _measured(step, args), plain)


def _contexts(names: Sequence[str], saved: Sequence[int]) -> Any:
    """Contexts of a region whose ops are told by their place."""
    seen = {False: 0, True: 0}

    def policy(context: Any, func: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if func in OPS_TO_ALWAYS_SKIP:
            return CheckpointPolicy.PREFER_RECOMPUTE
        place = seen[context.is_recompute]
        seen[context.is_recompute] += 1
        assert names[place] == func._overloadpacket.__name__, (place, names[place], func)
        return CheckpointPolicy.MUST_SAVE if saved[place] else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
