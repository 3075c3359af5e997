"""Kinds of values that a region's state is made of."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import torch
from torch import nn

from ckpt_pass.state.code_names import is_users_name
from ckpt_pass.state.objects import keeper_for
from ckpt_pass.state.remembered import Remembered
from ckpt_pass.state.shown import SHOWING

#: Standard modules whose instances are containers.
_PLAIN_OBJECTS = frozenset({"argparse", "collections", "types", "weakref"})

#: Where torch has objects, no modules, with numbers that they draw from.
_TORCHS_OBJECTS = "torch.quasirandom"

#: Types of values that hold nothing.
ATOMS: frozenset[type] = frozenset(
    (
        *(int, float, bool, complex, str, bytes, type(None), type(...), slice, range, type),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
        *(torch.finfo, torch.iinfo, staticmethod, classmethod, property),
        *(types.ModuleType, types.GetSetDescriptorType),
        *(types.MemberDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType),
    )
)


class Kind(Enum):
    """What is done with a value that is met among a region's state."""

    IGNORED = auto()
    TENSOR = auto()
    MODULE = auto()
    DICT = auto()
    LIST = auto()
    TUPLE = auto()
    SET = auto()
    FUNCTION = auto()
    METHOD = auto()
    PARTIAL = auto()
    REFERENCE = auto()
    SHOWING = auto()
    STATE = auto()
    OBJECT = auto()


_KINDS: tuple[tuple[type | tuple[type, ...], Kind], ...] = (
    (torch.Tensor, Kind.TENSOR),
    (nn.Module, Kind.MODULE),
    (dict, Kind.DICT),
    ((list, collections.deque), Kind.LIST),
    ((tuple, frozenset), Kind.TUPLE),
    (set, Kind.SET),
    (types.FunctionType, Kind.FUNCTION),
    (types.MethodType, Kind.METHOD),
    (functools.partial, Kind.PARTIAL),
    (weakref.ref, Kind.REFERENCE),
    (SHOWING, Kind.SHOWING),
)


def _find_kind(cls: type) -> Kind:
    if cls in ATOMS or issubclass(cls, type):
        return Kind.IGNORED
    for base, kind in _KINDS:
        if issubclass(cls, base):
            return kind
    if keeper_for(cls) is not None:
        return Kind.STATE
    plain = _library(cls) in _PLAIN_OBJECTS or dataclasses.is_dataclass(cls)
    plain = plain or cls.__module__ == _TORCHS_OBJECTS
    return Kind.OBJECT if plain or is_users(cls) else Kind.IGNORED


def _library(thing: Any) -> str:
    return (thing.__module__ or "").partition(".")[0]


def is_users(thing: Any) -> bool:
    """Whether a class or function is of no library whose objects are no state of a region."""
    return is_users_name(thing.__module__)


#: Class attributes that are values, not code.
VALUES = frozenset((int, float, bool, complex, str, bytes, type(None), slice, range)) | frozenset(
    (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
)
#: Looked up for every value that is met.
kind_of: Callable[[Any], Kind] = Remembered(_find_kind)
