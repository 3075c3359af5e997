"""What the code of a class of modules or objects reads, found out once."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from ckpt_pass.state.code_names import FUNCTION, ReadPlaces, Reads, functions_in, stored_in
from ckpt_pass.state.remembered import Remembered


@dataclasses.dataclass(frozen=True)
class ClassReads:
    """What is known of a class of modules.

    Attributes:
        managed: its attributes are its library's (FSDP; compiled, scripted and lazy modules).
        scripted: it is TorchScript's, which keeps attributes where Python does not see them.
        norm: its buffers are running statistics.
        bases: its classes that are not torch's own: their attributes may be state.
        places: where their methods read.
        stored: attributes that their methods may give the class itself.
    """

    managed: bool
    scripted: bool
    norm: bool
    bases: tuple[weakref.ref[type], ...]
    places: ReadPlaces
    stored: frozenset[str]


#: Names by which methods come to the class of ``self``.
_TO_A_CLASS = frozenset(("type", "__class__"))


def _find_class(cls: type) -> ClassReads:
    managed = cls.__module__.startswith(("torch.distributed.", "torch._dynamo.")) or issubclass(
        cls, LazyModuleMixin
    )
    scripted = issubclass(cls, torch.jit.ScriptModule)
    bases = tuple(
        base
        for base in cls.__mro__
        if base is not object and base.__module__.partition(".")[0] not in ("torch", "typing")
    )
    functions = [
        fn
        for base in bases
        for name, value in vars(base).items()
        for fn in functions_in(value)
        if name != "__init__"
    ]
    codes = [fn.__code__ for fn in functions if not _TO_A_CLASS.isdisjoint(fn.__code__.co_names)]
    codes += [f.__func__.__code__ for b in bases for f in vars(b).values() if _is_classmethod(f)]
    return ClassReads(
        managed or scripted,
        scripted,
        issubclass(cls, _NormBase),
        tuple(map(weakref.ref, bases)),
        ReadPlaces(functions),
        frozenset().union(*map(stored_in, codes)),
    )


def _is_classmethod(value: Any) -> bool:
    return isinstance(value, classmethod) and type(value.__func__) is FUNCTION


class_of: Remembered[type, ClassReads] = Remembered(_find_class)


def reads_of_class(cls: type) -> Reads:
    """What the methods of a class read."""
    reads = class_of(cls).places.reads()
    if reads is None:  # a method was replaced
        class_of.forget(cls)
        reads = class_of(cls).places.reads()
        assert reads is not None, "what was found just now is there"
    return reads
