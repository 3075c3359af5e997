"""Find the layers of a model from its module tree alone: nothing runs, no hints are needed.

A layer is a module with submodules of its own that stands in a row: its name is an index
(``layers.3``) or ends in one (``down2``), and it has siblings. Of nested ones the outermost counts,
unless it only holds layers (a stage). Neighbours of the same class without an index (the
bottleneck of a U-Net) are layers too. Where a model has no such row, the steps of its longest
``nn.Sequential`` are its layers. What the tree cannot tell is a table (``presets.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.modules.layers.presets import role_of

# The halves of encoder/decoder trees, by the names that their modules usually have.
_ENCODER = re.compile(r"enc|down|contract", re.IGNORECASE)
_DECODER = re.compile(r"dec|up|expan", re.IGNORECASE)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class NoLayersError(CkptPassError):
    """A model without layers that could be found."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers that stand in one row.

    Attributes:
        parent: the FQN of the module that holds them; empty for the model itself.
        names: their FQNs, in order.
    """

    parent: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Unit:
    """Layers that belong together: one, or a bare one with weights and what follows it without.

    Attributes:
        start, stop: the number of the first layer, and that of the one after the last.
        bare: whether all of them are bare (:func:`is_bare`).
    """

    start: int
    stop: int
    bare: bool


@dataclass(frozen=True)
class Layers:
    """The layers of a model, in the order in which they are declared (encoders before decoders).

    Attributes:
        groups: the rows that they stand in.
        kinds: the class names of all of them, in order.
        units: those that belong together; one each where empty.
    """

    groups: tuple[LayerGroup, ...]
    kinds: tuple[str, ...]
    units: tuple[Unit, ...] = ()

    @property
    def has_bare(self) -> bool:
        """Whether steps of an ``nn.Sequential`` stand for layers, and some are bare."""
        return any(unit.bare for unit in self.units)

    @property
    def names(self) -> tuple[str, ...]:
        """The FQNs of all of them, in order."""
        return tuple(name for group in self.groups for name in group.names)

    @property
    def shape(self) -> str:
        """``chain`` for one row, ``encoder-decoder`` where names say so, else ``stages``."""
        if len(self.groups) == 1:
            return "chain"
        ranks = {_rank(name) for name in self.names}
        return "encoder-decoder" if {0, 2} <= ranks else "stages"

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(self.kinds).items())
        rows = [
            f"{group.parent or '(the model)'}: {group.names[0]} to {group.names[-1]}"
            for group in self.groups
        ]
        return "\n".join([f"{len(self.names)} layers, {self.shape}: {counts}", *rows])


def find_layers(model: nn.Module) -> Layers:
    """The layers of a model.

    Raises:
        NoLayersError: there are none; the message says what was looked for, and what is there.
    """
    in_rows = _groups(model, "")
    groups = in_rows or _longest_sequential(model)
    if not groups:
        raise NoLayersError(
            f"No layers were found in {type(model).__name__}. Looked for modules with submodules "
            "in a row (named by an index, such as layers.3, or ending in one, such as down2), for "
            "the classes of the presets, and for an nn.Sequential of two steps or more. It has "
            f"{_inventory(model)}. Name the modules instead: ckpt_pass.ByName('*.block*')."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    groups = sorted(groups, key=lambda group: _rank(group.names[0]))
    kinds = tuple(type(modules[name]).__name__ for group in groups for name in group.names)
    steps = [] if in_rows else [modules[name] for group in groups for name in group.names]
    return Layers(tuple(groups), kinds, _units(steps))


def is_bare(module: nn.Module) -> bool:
    """Whether a module is one of torch's that run a single op, such as ``nn.Linear``."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    return own and not isinstance(module, nn.RNNBase) and not any(True for _ in module.children())


def _units(steps: Sequence[nn.Module]) -> tuple[Unit, ...]:
    found: list[Unit] = []
    for number, step in enumerate(steps):
        bare = is_bare(step)
        last = found[-1] if found else None
        if bare and last is not None and last.bare and not _begins(step):
            found[-1] = replace(last, stop=number + 1)
        else:
            found.append(Unit(number, number + 1, bare))
    return tuple(found)


def _begins(bare: nn.Module) -> bool:
    """Whether a bare layer has weights that multiply; norms and activations follow such a one."""
    return any(parameter.dim() > 1 for parameter in bare.parameters())


def _inventory(model: nn.Module) -> str:
    children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
    shown = ", ".join(children[:6]) + (f" and {len(children) - 6} more" if children[6:] else "")
    return f"the children {shown}" if children else "no submodules"


def _rank(name: str) -> int:
    """Encoder, neither, decoder: 0, 1, 2."""
    path = re.sub(r"\d+", "", name)
    first = next(
        (part for part in path.split(".") if _ENCODER.search(part) or _DECODER.search(part)), ""
    )
    if not first:
        return 1
    # "upconv_decoder" and "encoder_up" are rare enough; "decoder" holds "dec" and no "enc".
    return 0 if _ENCODER.search(first) else 2


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _stem(name: str) -> str | None:
    """What is before the index at the end of a name; ``None`` without an index."""
    found = re.fullmatch(r"(.*?)_?\d+", name)
    return None if found is None else found[1]


def _can_be_layer(module: nn.Module) -> bool:
    role = role_of(module)
    return role == "layer" or (role != "inner" and any(True for _ in module.children()))


def _rows(module: nn.Module) -> set[str]:
    """The names of those children that stand in a row, or that the presets know as layers."""
    children = [(name, child) for name, child in _children(module) if _can_be_layer(child)]
    counts = Counter(_stem(name) for name, _ in children)
    row = {name for name, child in children if _stem(name) is not None and counts[_stem(name)] > 1}
    if row:
        kinds = {type(child) for name, child in children if name in row}
        row |= {name for name, child in children if type(child) in kinds}
    return row | {name for name, child in children if role_of(child) == "layer"}


def _groups(module: nn.Module, prefix: str) -> list[LayerGroup]:
    row = _rows(module)
    found: list[LayerGroup] = []
    mine: list[str] = []
    for name, child in _children(module):
        full = f"{prefix}.{name}" if prefix else name
        if role_of(child) == "inner":
            continue
        if name in row and role_of(child) == "layer":
            mine.append(full)
            continue
        inside = [] if name in row and not _only_holds_layers(child) else _groups(child, full)
        if inside:
            found.extend(inside)
        elif name in row and not isinstance(child, _CONTAINERS):
            mine.append(full)
    if mine:
        found.append(LayerGroup(prefix, tuple(mine)))
    return [*found, *_between(module, prefix, found)]


def _between(module: nn.Module, prefix: str, found: list[LayerGroup]) -> Iterator[LayerGroup]:
    """Children without an index that are of the class of the layers in their neighbours."""
    names = {name for group in found for name in group.names}
    depth = len(prefix) + 1 if prefix else 0
    kinds = {type(module.get_submodule(name[depth:])) for name in names}
    for name, child in _children(module):
        full = f"{prefix}.{name}" if prefix else name
        inside = any(other == full or other.startswith(f"{full}.") for other in names)
        if type(child) in kinds and not inside:
            yield LayerGroup(prefix, (full,))


def _only_holds_layers(module: nn.Module) -> bool:
    """Whether a module in a row is a stage: a container, or one around containers of one class."""
    if role_of(module) == "stage" or isinstance(module, (*_CONTAINERS, nn.Sequential)):
        return True
    if any(True for _ in module.parameters(recurse=False)):
        return False
    held = [child for _, child in _children(module)]
    if not all(isinstance(child, (*_CONTAINERS, nn.Sequential)) for child in held):
        return False
    return all(_is_row_of_one_class(child) for child in held)


def _is_row_of_one_class(container: nn.Module) -> bool:
    inside = [child for _, child in _children(container)]
    return len({type(child) for child in inside}) == 1 and all(map(_can_be_layer, inside))


def _longest_sequential(model: nn.Module) -> list[LayerGroup]:
    longest = max(_sequentials(model), key=lambda found: len(found[1]), default=None)
    if longest is None or len(longest[1]) < 2:
        return []
    prefix, names = longest
    return [LayerGroup(prefix, tuple(f"{prefix}.{n}" if prefix else n for n in names))]


def _sequentials(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            yield prefix, [name for name, _ in _children(module)]
