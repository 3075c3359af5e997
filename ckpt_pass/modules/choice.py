"""What a placement answers: which modules are checkpoint regions, and why each is or is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.offloading.sharding import Sharding
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.policy.rules import PolicyLike
from ckpt_pass.regions.wrapping import RegionSpec

#: What modules can offload besides what a policy says.
WHAT_MOVES = ("inputs", "saved")


class PlacementError(CkptPassError):
    """A placement got an argument that makes no sense, or does not fit the model."""


class NothingChosenError(PlacementError):
    """A placement that names or describes modules matched none of the model's."""


@dataclass(frozen=True)
class ModuleChoice:
    """The answer for one module.

    Attributes:
        name: its FQN.
        kind: the name of its class.
        inside: whether it is (part of) a checkpoint region.
        why: the reason, either way.
    """

    name: str
    kind: str
    inside: bool
    why: str


@dataclass(frozen=True)
class Segment:
    """Modules that are recomputed together: all but the first take their predecessor's output.

    Attributes:
        names: FQNs in the order of execution; of most segments there is one.
        nested: make the values between the modules first and then one module at a time, instead of
            all at once: less is held in the backward, most modules run three times.
    """

    names: tuple[str, ...]
    nested: bool = False


@dataclass(frozen=True)
class Choice:
    """What a placement chose for a model; prints itself, and is true where there is a region.

    Attributes:
        placement: the placement, as it prints.
        modules: every module that was considered, in order.
        segments: what is recomputed, in order.
        policy: what the regions keep; nothing where ``None``.
        specs: what becomes of single regions, where it is not the same for all.
        offload: where values go that are offloaded; to the host where ``None``.
        moves: what is offloaded besides what the policy says: the regions' ``"inputs"``, or, where
            nothing is recomputed, what is ``"saved"`` inside; nothing where ``None``.
        shards: over which ranks what enters the regions is sharded; kept whole where ``None``.
    """

    placement: str
    modules: tuple[ModuleChoice, ...]
    segments: tuple[Segment, ...] = ()
    policy: PolicyLike | None = None
    specs: tuple[tuple[str, RegionSpec], ...] = field(default=(), repr=False)
    offload: OffloadLike | None = None
    moves: str | None = None
    shards: Sharding | None = None

    def __bool__(self) -> bool:
        return bool(self.names)

    def __iter__(self) -> Iterator[ModuleChoice]:
        return iter(self.modules)

    @property
    def names(self) -> tuple[str, ...]:
        """The FQNs of all modules in regions, in order."""
        return tuple(name for segment in self.segments for name in segment.names)

    @property
    def regions(self) -> dict[str, RegionSpec]:
        """The regions by FQN, as :func:`ckpt_pass.regions.wrapping.apply_regions` takes them."""
        given = dict(self.specs)
        found = {}
        for segment in self.segments:
            before: tuple[str, ...] = ()
            for name in segment.names:
                spec = given.get(name, RegionSpec(policy=self.policy))
                spec = replace(spec, follows=before or spec.follows, nested=segment.nested)
                found[name] = self._moving(spec)
                before = (name,)
        return found

    def with_policy(self, policy: PolicyLike | None) -> Choice:
        """The same regions with one policy for all; their own where ``None``."""
        if policy is None:
            return self
        specs = tuple((name, replace(spec, policy=policy)) for name, spec in self.specs)
        return replace(self, policy=policy, specs=specs)._checked()

    def _moving(self, spec: RegionSpec) -> RegionSpec:
        if self.shards is not None:
            spec = replace(spec, shard_inputs=self.shards)
        if self.offload is None and self.moves is None:
            return spec
        return replace(
            spec,
            offload=spec.offload if self.offload is None else self.offload,
            offload_inputs=spec.offload_inputs or self.moves == "inputs",
            offload_saved=spec.offload_saved or self.moves == "saved",
        )

    def with_offload(self, offload: OffloadLike | None, moves: str | None = None) -> Choice:
        """The same regions with a place for what is offloaded, and what is offloaded anyway.

        Args:
            offload: the place; what was said before where ``None``.
            moves: ``"inputs"`` or ``"saved"``, likewise.

        Raises:
            PlacementError: regions that recompute nothing, with a policy.
        """
        found = replace(
            self,
            offload=self.offload if offload is None else offload,
            moves=self.moves if moves is None else moves,
        )
        return found._checked()

    def with_shards(self, shards: Sharding | None) -> Choice:
        """The same regions, with what enters them sharded; as was said before where ``None``.

        Raises:
            PlacementError: it is offloaded.
        """
        return self if shards is None else replace(self, shards=shards)._checked()

    def _checked(self) -> Choice:
        offloads = self.moves is not None or any(
            spec.offload_inputs or spec.offload_saved for _, spec in self.specs
        )
        if self.shards is not None and offloads:
            raise PlacementError(
                f"{self.placement} shards what enters its regions, and offloads "
                f"{self.moves or 'what enters some'}. Expected one of the two: what enters a "
                "region is kept in one place. Leave one out."
            )
        policies = [self.policy, *(spec.policy for _, spec in self.specs)]
        if self.moves == "saved" and any(policy is not None for policy in policies):
            raise PlacementError(
                f"{self.placement} offloads what its modules save and recomputes nothing, and has "
                "a policy, which is about what is recomputed. Expected one of the two. Leave the "
                "policy out, or offload by it: ckpt_pass.offload(...)."
            )
        return self

    def inside(self, prefix: str) -> Choice:
        """The same for a module that holds the model under the name ``prefix``."""

        def full(name: str) -> str:
            return ".".join(part for part in (prefix, name) if part)

        return replace(
            self,
            modules=tuple(replace(found, name=full(found.name)) for found in self.modules),
            segments=tuple(
                replace(segment, names=tuple(full(name) for name in segment.names))
                for segment in self.segments
            ),
            specs=tuple(
                (full(name), replace(spec, follows=tuple(map(full, spec.follows))))
                for name, spec in self.specs
            ),
        )

    def __str__(self) -> str:
        count = len(self.segments)
        head = f"placement {self.placement}: {len(self.names)} modules in {count} regions"
        name_width = max((len(found.name) for found in self.modules), default=0)
        kind_width = max((len(found.kind) for found in self.modules), default=0)
        if self.moves is not None:
            what = "inputs are" if self.moves == "inputs" else "nothing recomputed, saved values"
            head += f"; {what} offloaded"
        if self.shards is not None:
            what = "first arguments" if self.shards.arguments == "first" else "inputs"
            over = "all ranks" if self.shards.group is None else f"group {self.shards.group}"
            head += f"; {what} are sharded over {over}"
        rows = [
            f"{found.name:<{name_width}}  {found.kind:<{kind_width}}  "
            f"{'in ' if found.inside else 'out'}  {found.why}"
            for found in self.modules
        ]
        return "\n".join([head, *rows])


@runtime_checkable
class Placement(Protocol):
    """Which modules of a model are checkpoint regions; a frozen value without state."""

    #: In kebab case.
    name: ClassVar[str]
    #: What it does, in a few words.
    says: ClassVar[str]

    def choose(self, model: nn.Module) -> Choice:
        """Decide for a model.

        Raises:
            PlacementError: it does not fit the model.
        """
        ...
