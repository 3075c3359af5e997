"""Placements over any modules: by pattern, by class, by what they are, by how large they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import nn

from ckpt_pass._errors import nearest
from ckpt_pass.modules.choice import (
    Choice,
    ModuleChoice,
    NothingChosenError,
    PlacementError,
    Segment,
)
from ckpt_pass.modules.layers.find import find_layers

#: A pattern with shell wildcards, matched against FQNs and class names; or a class.
ModulePattern: TypeAlias = "str | type[nn.Module]"

#: What makes a module a region, or ``None``; called with its FQN and the module.
Reason: TypeAlias = Callable[[str, nn.Module], "str | None"]


def callable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below a model that have a forward of their own, parents before children."""
    for name, module in model.named_modules():
        if name and not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList)):
            yield name, module


def outermost(placement: str, model: nn.Module, reason: Reason, nothing: str) -> Choice:
    """Choose modules; of nested ones the outermost.

    Args:
        placement: as it prints.
        model: the model.
        reason: what makes a module a region.
        nothing: the reason of those that are none; empty to leave them out of the list, where
            they have submodules, or none of their parents is a region.

    Returns:
        The choice; modules inside of a region are listed only where ``reason`` holds for them too.
    """
    found: list[ModuleChoice] = []
    regions: list[str] = []
    for name, module in callable_modules(model):
        kind, why = type(module).__name__, reason(name, module)
        around = next((r for r in reversed(regions) if name.startswith(f"{r}.")), None)
        if around is not None:
            if why is not None:
                found.append(ModuleChoice(name, kind, True, f"inside {around}, a region already"))
            continue
        if why is not None:
            regions.append(name)
        found.append(ModuleChoice(name, kind, why is not None, why or nothing))
    return Choice(placement, tuple(found), tuple(Segment((name,)) for name in regions))


def demand(choice: Choice, wanted: str, model: nn.Module, what_to_do: str) -> Choice:
    """The choice, if there is anything in it.

    Raises:
        NothingChosenError: there is nothing.
    """
    if not choice:
        kinds = sorted({found.kind for found in choice.modules})
        raise NothingChosenError(
            f"{choice.placement} chose nothing in {type(model).__name__}: expected {wanted}, found "
            f"modules of the classes {', '.join(kinds) or '(none)'}. {what_to_do}"
        )
    return choice


def matches(pattern: ModulePattern, name: str, module: nn.Module) -> bool:
    """Whether a pattern fits a module: its FQN, its class name, or its class."""
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    kind = type(module).__name__
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(kind, pattern)


@dataclass(frozen=True)
class ByName:
    """Modules by patterns and classes; of nested ones the outermost.

    Attributes:
        patterns: shell wildcards over FQNs (``*.attn``) and class names (``*Attention``), and
            classes.
    """

    patterns: tuple[ModulePattern, ...]

    name: ClassVar[str] = "by-name"
    says: ClassVar[str] = "modules by patterns of names, and by classes"

    def __init__(self, *patterns: ModulePattern) -> None:
        object.__setattr__(self, "patterns", patterns)
        wrong = [p for p in patterns if not isinstance(p, (str, type))]
        if wrong or not patterns:
            raise PlacementError(
                f"Got the patterns {list(patterns)}, expected at least one: strings with shell "
                "wildcards, or module classes."
            )

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            NothingChosenError: a pattern matches no module.
        """
        modules = list(callable_modules(model))
        for pattern in self.patterns:
            if not any(matches(pattern, name, module) for name, module in modules):
                kinds = sorted({type(module).__name__ for _, module in modules})
                hint = nearest(_shown(pattern), [*kinds, *(name for name, _ in modules)])
                raise NothingChosenError(
                    f"The pattern {_shown(pattern)!r} matches no module of "
                    f"{type(model).__name__}.{hint} Expected a part of its {len(modules)} FQNs "
                    f"(as {modules[0][0] if modules else '-'}) or one of its classes: "
                    f"{', '.join(kinds)}."
                )

        def reason(name: str, module: nn.Module) -> str | None:
            fitting = [_shown(p) for p in self.patterns if matches(p, name, module)]
            return f"matches {fitting[0]!r}" if fitting else None

        shown = ", ".join(_shown(pattern) for pattern in self.patterns)
        return outermost(f"by-name({shown})", model, reason, "no pattern matches")


def _shown(pattern: ModulePattern) -> str:
    return pattern if isinstance(pattern, str) else pattern.__name__


@dataclass(frozen=True)
class Custom:
    """Modules that a function says yes to; of nested ones the outermost.

    Attributes:
        wanted: ``wanted(module) -> bool``.
    """

    wanted: Callable[[nn.Module], bool]

    name: ClassVar[str] = "custom"
    says: ClassVar[str] = "modules that a function says yes to"

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            NothingChosenError: it says yes to none.
        """
        shown = getattr(self.wanted, "__qualname__", type(self.wanted).__name__)

        def reason(name: str, module: nn.Module) -> str | None:
            return f"{shown} says yes" if self.wanted(module) else None

        choice = outermost(f"custom({shown})", model, reason, f"{shown} says no")
        return demand(choice, "a module that it says yes to", model, "Look at the classes.")


@dataclass(frozen=True)
class HeavyOps:
    """Attention, large linear layers, large convolutions.

    Attributes:
        classes: patterns of class names that count whatever their size.
        linear_features: a linear layer counts from that many inputs times outputs on.
        conv_weights: a convolution counts from that many weights on.
    """

    classes: tuple[str, ...] = ("*Attention*", "*SdpaAttention*")
    linear_features: int = 1_048_576  # 1024 x 1024: the smallest that is slower than a norm
    conv_weights: int = 147_456  # 128 x 128 x 3 x 3

    name: ClassVar[str] = "heavy-ops"
    says: ClassVar[str] = "attention, large linear layers, large convolutions"

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            NothingChosenError: nothing is that heavy.
        """
        choice = outermost(self.name, model, self._reason, "not heavy")
        return demand(
            choice,
            f"a class like {', '.join(self.classes)}, a linear layer of {self.linear_features:,} "
            f"weights or a convolution of {self.conv_weights:,}",
            model,
            "Lower the thresholds, or list other classes: HeavyOps(linear_features=...).",
        )

    def _reason(self, name: str, module: nn.Module) -> str | None:
        kind = type(module).__name__
        for pattern in self.classes:
            if fnmatch.fnmatchcase(kind, pattern):
                return f"{kind} matches {pattern!r}"
        weight = getattr(module, "weight", None)
        count = weight.numel() if isinstance(weight, nn.Parameter) else 0
        # HF's Conv1D is GPT-2's linear layer.
        if isinstance(module, nn.Linear) or kind == "Conv1D":
            return _at_least(count, self.linear_features, "weights of a linear layer")
        if isinstance(module, nn.modules.conv._ConvNd):
            return _at_least(count, self.conv_weights, "weights of a convolution")
        return None


def _at_least(count: int, threshold: int, what: str) -> str | None:
    return f"{count:,} {what}, {threshold:,} or more" if count >= threshold else None


@dataclass(frozen=True)
class Auto:
    """Layers above a number of parameters, and what stands beside them with submodules.

    Attributes:
        min_parameters: counted with submodules.
    """

    min_parameters: int = 1_000_000

    name: ClassVar[str] = "auto"
    says: ClassVar[str] = "layers of 1,000,000 parameters or more (auto-<n>)"

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            NoLayersError: the model has no layers.
            NothingChosenError: none is that large.
        """
        layers = find_layers(model).names
        most = 0

        def reason(name: str, module: nn.Module) -> str | None:
            nonlocal most
            holds_layers = any(layer.startswith(f"{name}.") for layer in layers)
            if holds_layers or not (name in layers or any(True for _ in module.children())):
                return None
            count = sum(parameter.numel() for parameter in module.parameters())
            most = max(most, count)
            return f"{count:,} parameters" if count >= self.min_parameters else None

        nothing = f"less than {self.min_parameters:,} parameters, or around layers"
        choice = outermost(f"auto-{self.min_parameters}", model, reason, nothing)
        return demand(
            choice,
            f"a layer of {self.min_parameters:,} parameters or more (the largest has {most:,})",
            model,
            "Ask for less: Auto(min_parameters=...).",
        )
