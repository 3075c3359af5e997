"""Layers as regions: which repeated module each op belongs to.

A region is one call of one repeated layer, found from module names: a name that ends in an index
(``model.layers.3``) with siblings of another index. Of nested ones the outermost counts, unless it
is a mere container: a stage that holds nothing but layers is not a region, its layers are. Modules
without submodules (the linears of a sequential) are too small to be regions.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ckpt_pass.policy.sites import ModulePath


def _is_indexed(fqn: str) -> bool:
    return fqn.rpartition(".")[2].isdigit()


@dataclass(frozen=True)
class RegionFinder:
    """Tells the region of an op from the module calls around it.

    Attributes:
        layers: the FQNs of the modules that are regions.
    """

    layers: frozenset[str]

    @classmethod
    def over(
        cls, paths: Iterable[ModulePath], patterns: tuple[str, ...] | None = None
    ) -> RegionFinder:
        """Find the layers in the module paths of a graph's ops.

        Args:
            paths: one module path for each op of the forward.
            patterns: FQN patterns with shell wildcards that name the layers instead.
        """
        chains = {tuple(fqn for fqn, _ in path) for path in paths}
        if patterns is not None:
            fqns = {fqn for chain in chains for fqn in chain}
            named = {f for f in fqns if any(fnmatch.fnmatchcase(f, p) for p in patterns)}
            return cls(frozenset(named))
        return cls(frozenset(_repeated_layers(chains)))

    def region(self, path: ModulePath) -> str | None:
        """The region of an op: its outermost layer and which call of it, or ``None``."""
        for fqn, call in path:
            if fqn in self.layers:
                return f"{fqn}@{call}" if call else fqn
        return None


def _repeated_layers(chains: set[tuple[str, ...]]) -> set[str]:
    # The last of a chain is where an op runs; what stands before it has submodules.
    indexed = {fqn for chain in chains for fqn in chain[:-1] if _is_indexed(fqn)}
    siblings: dict[str, set[str]] = defaultdict(set)
    for fqn in indexed:
        siblings[fqn.rpartition(".")[0]].add(fqn)
    repeated = {fqn for group in siblings.values() if len(group) > 1 for fqn in group}
    containers = repeated - _with_ops_outside_nested_layers(chains, repeated)
    layers = set()
    for chain in chains:
        for fqn in chain:
            if fqn in repeated and fqn not in containers:
                layers.add(fqn)
                break
    return layers


def _with_ops_outside_nested_layers(chains: set[tuple[str, ...]], repeated: set[str]) -> set[str]:
    """Repeated modules that do something besides calling the repeated modules inside them."""
    found: set[str] = set()
    for chain in chains:
        layered = [fqn for fqn in chain if fqn in repeated]
        if layered:
            found.add(layered[-1])
    return found
