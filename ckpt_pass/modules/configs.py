"""Read other libraries' configurations: a key that is unknown, or not supported, is an error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from ckpt_pass._errors import nearest
from ckpt_pass.modules.choice import PlacementError


class ConfigKeyError(PlacementError):
    """A configuration has a key, or a value, that has no counterpart here."""


def as_mapping(config: Any, of: str) -> dict[str, Any]:
    """The keys and values of a configuration: a mapping, a dataclass, or an object with attributes.

    Raises:
        ConfigKeyError: it is none of these.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: getattr(config, field.name) for field in fields(config)}
    if hasattr(config, "__dict__") and not isinstance(config, type):
        return {key: value for key, value in vars(config).items() if not key.startswith("_")}
    raise ConfigKeyError(
        f"Got {config!r} of type {type(config).__name__} as a {of} configuration, expected a "
        "mapping or a configuration object."
    )


def check_keys(config: Mapping[str, Any], known: Collection[str], of: str) -> None:
    """Refuse keys that are not known.

    Raises:
        ConfigKeyError: there is one.
    """
    for key in config:
        if key not in known:
            raise ConfigKeyError(
                f"The {of} configuration has the key {key!r}, which is not known here."
                f"{nearest(key, known)} Expected some of {', '.join(sorted(known))}. Leave it out, "
                "or say with a placement of this library what it means."
            )


def refuse(config: Mapping[str, Any], unsupported: Mapping[str, str], of: str) -> None:
    """Refuse values that ask for something that is not supported; ``None`` and ``False`` do not.

    Args:
        config: the configuration.
        unsupported: for each such key what to do instead.
        of: whose configuration it is.

    Raises:
        ConfigKeyError: there is one.
    """
    for key, instead in unsupported.items():
        value = config.get(key)
        if value not in (None, False, "none"):
            raise ConfigKeyError(
                f"The {of} configuration has {key}={value!r}, which is not supported here. "
                f"{instead}"
            )


def switched(config: Mapping[str, Any], key: str, of: str) -> bool:
    """Whether a configuration switches something on.

    Args:
        config: the configuration.
        key: of the switch; off where it is missing or ``None``.
        of: whose configuration it is.

    Raises:
        ConfigKeyError: the value is neither true nor false.
    """
    value = config.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ConfigKeyError(
        f"The {of} configuration has {key}={value!r}, expected true or false. A text is neither, "
        "whatever it says: write it without quotation marks."
    )
