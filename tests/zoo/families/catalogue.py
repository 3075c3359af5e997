"""All families, by name."""

from __future__ import annotations

from collections.abc import Mapping

from tests.zoo.families import Family, images, media, own, text

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (*text.FAMILIES, *media.FAMILIES, *images.FAMILIES, *own.FAMILIES)
}
ODD = tuple(family for family in FAMILIES.values() if family.odd)
