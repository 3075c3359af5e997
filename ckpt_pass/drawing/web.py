"""A page that opens without a network: style, script, plotting library and data are inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ckpt_pass.drawing.figures import missing_extra

_FOLDER = "page"


def write_page(title: str, data: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a plan; return its path.

    The same data give the same bytes. Whatever the data hold is shown as text: names and reasons
    of a user's are no HTML.

    Args:
        title: of the page.
        data: what its script draws (:mod:`ckpt_pass.plans.page_data`).
        path: of the page.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
    """
    with missing_extra("report"):
        from jinja2 import Environment, StrictUndefined
        from plotly.offline import get_plotlyjs
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    text = environment.from_string(_part("page.html")).render(
        title=title,
        style=_part("style.css"),
        script=_part("script.js"),
        plotly=get_plotlyjs(),
        data=json_in_html(data),
    )
    path.write_text(text, encoding="utf-8")
    return path


def json_in_html(data: Mapping[str, Any]) -> str:
    """JSON that ends no script element, whatever strings it holds."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _part(name: str) -> str:
    return files("ckpt_pass.drawing").joinpath(_FOLDER, name).read_text(encoding="utf-8")
