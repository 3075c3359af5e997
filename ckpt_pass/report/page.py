"""A comparison as one HTML page that opens without a network: pictures are inside of it."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ckpt_pass.drawing.figures import MEGABYTE, missing_extra
from ckpt_pass.modules.layers.layer_profile import LayerProfile
from ckpt_pass.report.strategy_plots import save_plots
from ckpt_pass.report.strategy_table import CAPTION, HEADS, Comparison, cells
from ckpt_pass.report.sweeps import BEST
from ckpt_pass.version import __version__

#: What stands above each picture, by the name of its file.
HEADINGS = {
    "timelines": "Memory over the step",
    "tradeoff": "The trade-off",
    "bars": "Side by side",
    "layers": "Layers",
}
LAYER_HEADS = ("layer", "activations MB", "output MB", "forward ms", "backward ms", "parameters")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.87rem; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td.last { text-align: left; } tr.best td { background: #eef5fb; } .bad { color: #b00; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
p.note { color: #555; font-size: 0.87rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">ckpt_pass {{ version }}; times: medians of {{ rounds }}, all strategies in turn</p>
<h2>Strategies</h2>
<div class="scroll"><table>
<tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows -%}
<tr{% if row[-1] == best %} class="best"{% endif %}>
{%- for cell in row -%}
<td{% if loop.last %} class="last"{% elif cell == "DIFFERS" %} class="bad"{% endif %}>
{{- cell }}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>
<p class="note">{{ caption }}</p>
{% for heading, alt, data in pictures -%}
<h2>{{ heading }}</h2>
<figure><img alt="{{ alt }}" src="data:image/png;base64,{{ data }}"></figure>
{% endfor -%}
{% if layers %}
<div class="scroll"><table>
<tr>{% for head in layer_heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in layers -%}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endif %}
</body>
</html>
"""


def write_report(
    found: Comparison, path: str | Path, profiles: Sequence[LayerProfile] = ()
) -> Path:
    """Write a comparison as an HTML page: table, pictures, layers; return its path.

    Names are escaped, and nothing outside of the page is referred to.

    Args:
        found: the comparison.
        path: of the page.
        profiles: of the model's layers, if they are to be shown.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    with missing_extra("plot"):
        from jinja2 import Environment, StrictUndefined
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    with tempfile.TemporaryDirectory() as folder:
        pictures = [
            (
                HEADINGS[picture.stem],
                f"{HEADINGS[picture.stem]} of {found.title}",
                base64.b64encode(picture.read_bytes()).decode("ascii"),
            )
            for picture in save_plots(found, Path(folder), profiles)
        ]
    text = environment.from_string(_PAGE).render(
        title=found.title,
        version=__version__,
        rounds=found.rounds,
        heads=HEADS,
        rows=cells(found.rows),
        best=BEST,
        caption=CAPTION,
        pictures=pictures,
        layer_heads=LAYER_HEADS,
        layers=[_layer_cells(profile) for profile in profiles],
    )
    target = Path(path)
    target.write_text(text, encoding="utf-8")
    return target


def _layer_cells(profile: LayerProfile) -> tuple[str, ...]:
    return (
        profile.name,
        f"{profile.activation_bytes / MEGABYTE:.3f}",
        f"{profile.output_bytes / MEGABYTE:.3f}",
        f"{profile.forward_s * 1e3:.2f}",
        f"{profile.backward_s * 1e3:.2f}",
        f"{profile.parameters:,}",
    )
