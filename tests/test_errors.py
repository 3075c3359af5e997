"""Every error class has its place in the index of errors."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import ckpt_pass
from ckpt_pass import CkptPassError, errors


def classes() -> dict[str, type]:
    """The error and warning classes that the package's modules define, by name."""
    names = [module.name for module in pkgutil.walk_packages(ckpt_pass.__path__, "ckpt_pass.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    return {
        value.__name__: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and issubclass(value, (CkptPassError, Warning))
        and not value.__name__.startswith("_")
    }


def test_all_errors_are_in_the_index() -> None:
    found = classes()
    assert len(found) > 70
    assert {name: getattr(errors, name, None) for name in found} == found
    assert found.keys() <= set(dir(errors))


def test_an_unknown_error_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no error 'OutOfCheeseError'"):
        _ = errors.OutOfCheeseError
