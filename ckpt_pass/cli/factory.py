"""Find a user's model: ``path/to/file.py:name`` or ``package.module:name``.

The name is that of a function without arguments, the factory. It returns ``(model, inputs)``:
the module, and its arguments as one tensor or as a tuple.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError, nearest

Built: TypeAlias = tuple[nn.Module, tuple[Any, ...]]

EXAMPLE = "Expected path/to/file.py:factory or package.module:factory."


class FactoryError(CkptPassError):
    """The factory cannot be found, fails, or does not return a model and its inputs."""


def build(target: str) -> Built:
    """Load the factory that ``target`` names, call it, and check what it returns.

    While it is loaded and called, the folder of its file (for a module: the working directory)
    is the last place where Python looks for modules, so that it can import its neighbours and
    none of them hides a module of Python's own.

    Args:
        target: ``path/to/file.py:name`` or ``package.module:name``.

    Returns:
        The model and the tuple of its arguments.

    Raises:
        FactoryError: there is no such file, module or name; it cannot be called without
            arguments; it raises; or it returns something else.
    """
    where, colon, name = target.rpartition(":")
    if not (colon and where and name):
        raise FactoryError(f"Got {target!r} as a factory, without a name after ':'. {EXAMPLE}")
    path = Path(where) if where.endswith(".py") or "/" in where or "\\" in where else None
    with _searched_last(path.parent if path else Path()):
        module = _load_file(path) if path else _load_module(where)
        factory = _factory_in(module, name, target)
        with _reported(f"The factory {target}"):
            built = factory()
    return _checked(built, target)


@contextlib.contextmanager
def _searched_last(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.append(entry)
    try:
        yield
    finally:
        # Ours is the last such entry; the loaded code may have appended others behind it.
        for index in reversed(range(len(sys.path))):
            if sys.path[index] == entry:
                del sys.path[index]
                break


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into one message, with the place where it happened."""
    try:
        yield
    except FactoryError:
        raise
    except (Exception, SystemExit) as error:  # a user's code may raise anything; it is chained
        raise FactoryError(
            f"{what} raised {type(error).__name__}{_place(error)}: {error or 'no message'}. "
            "Expected it to run through; call it by itself to see the whole traceback."
        ) from error


def _place(error: BaseException) -> str:
    """The innermost frame outside this library, torch and Python's import system."""
    outside = ("torch", "importlib", __name__.partition(".")[0])
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in outside:
            return f" at {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
    return ""


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise FactoryError(f"The file {str(path)!r} {what}. {EXAMPLE}")
    # The prefix keeps a file named like a module of Python's own, types.py say, apart from it.
    name = f"_ckpt_pass_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise FactoryError(f"The file {str(path)!r} is no Python source. {EXAMPLE}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up by name while the file runs and later.
    sys.modules[name] = module
    with _reported(f"The file {str(path)!r}"):
        spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    with _reported(f"The module {name!r}"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # found, but something that it imports is missing
            raise FactoryError(
                f"There is no module {name!r} ({error}). {EXAMPLE} A module is looked for in the "
                "environment and in the working directory."
            ) from error


def _factory_in(module: ModuleType, name: str, target: str) -> Callable[[], object]:
    names = [known for known in vars(module) if not known.startswith("__")]
    factory = getattr(module, name, None)
    if factory is None:
        raise FactoryError(
            f"{target.rpartition(':')[0]} has no name {name!r}.{nearest(name, names)} Expected a "
            "function without arguments that returns (model, inputs)."
        )
    if not callable(factory):
        raise FactoryError(
            f"{target} is {_described(factory)} and cannot be called. Expected a function "
            "without arguments that returns (model, inputs)."
        )
    try:
        with contextlib.suppress(ValueError):  # a builtin without a signature: the call will tell
            inspect.signature(factory).bind()
    except TypeError as error:
        raise FactoryError(
            f"{target} cannot be called without arguments ({error}). Expected a function without "
            "arguments that returns (model, inputs); wrap it in one."
        ) from error
    found: Callable[[], object] = factory
    return found


def _checked(built: object, target: str) -> Built:
    expected = "Expected (model, inputs): an nn.Module, and a tensor or a tuple of arguments."
    if not isinstance(built, tuple) or len(built) != 2:
        raise FactoryError(f"{target} returned {_described(built)}. {expected}")
    model, inputs = built
    if not isinstance(model, nn.Module):
        raise FactoryError(f"{target} returned {_described(model)} as the model. {expected}")
    if isinstance(inputs, torch.Tensor):
        return model, (inputs,)
    if not isinstance(inputs, tuple):
        raise FactoryError(f"{target} returned {_described(inputs)} as the inputs. {expected}")
    return model, inputs


def _described(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else ""
    return f"an object of type {type(value).__name__}{size}"
