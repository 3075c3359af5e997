"""The checkpoint regions that a plan's decisions describe, for eager mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from ckpt_pass.plans.parts import Decision
from ckpt_pass.regions.keeps import Keeps, Moves
from ckpt_pass.regions.wrapping import RegionSpec


def region_specs(
    regions: Iterable[str],
    decisions: Sequence[Decision],
    random_regions: Collection[str] | None = None,
    moves: Mapping[str, Moves] | None = None,
) -> dict[str, RegionSpec]:
    """What becomes of each region: which executions of which ops it keeps.

    Executions are counted by op within the region, as the region itself counts them when it runs.

    Args:
        regions: their names.
        decisions: in the order of execution.
        random_regions: those that draw random numbers; ``None`` where that is not known.
        moves: what regions move: their arguments, or, without running again, what autograd saves.
    """
    moves = moves or {}
    counts: dict[str, Counter[str]] = {name: Counter() for name in regions}
    kept: dict[str, dict[str, list[int]]] = {name: {} for name in counts}
    for decision in decisions:
        name = decision.region
        if name not in counts:
            continue
        op = decision.site.op
        if decision.fate == "saved":
            kept[name].setdefault(op, []).append(counts[name][op])
        counts[name][op] += 1
    found = {}
    for name, ops in kept.items():
        moved = moves.get(name)
        if moved is not None and not moved.arguments:
            found[name] = RegionSpec(offload_saved=True, moves=moved)
            continue
        keeps = Keeps(tuple((op, tuple(numbers)) for op, numbers in sorted(ops.items())))
        draws = None if random_regions is None else name in random_regions
        spec = RegionSpec(keeps, draws=draws)
        found[name] = spec if moved is None else replace(spec, offload_inputs=True, moves=moved)
    return found
