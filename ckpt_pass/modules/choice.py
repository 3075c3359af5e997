"""What a placement answers: which modules are checkpoint regions, and why each is or is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.policy.rules import PolicyLike
from ckpt_pass.regions.wrapping import RegionSpec


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
    """

    placement: str
    modules: tuple[ModuleChoice, ...]
    segments: tuple[Segment, ...] = ()
    policy: PolicyLike | None = None
    specs: tuple[tuple[str, RegionSpec], ...] = field(default=(), repr=False)

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
                found[name] = replace(spec, follows=before or spec.follows, nested=segment.nested)
                before = (name,)
        return found

    def with_policy(self, policy: PolicyLike | None) -> Choice:
        """The same regions with one policy for all; their own where ``None``."""
        if policy is None:
            return self
        specs = tuple((name, replace(spec, policy=policy)) for name, spec in self.specs)
        return replace(self, policy=policy, specs=specs)

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
