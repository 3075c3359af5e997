"""How `make docs` builds the pages: Sphinx with MyST, warnings are errors."""

from ckpt_pass.version import __version__

project = "ckpt_pass"
author = "The ckpt_pass authors"
release = version = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
html_theme = "alabaster"
html_theme_options = {"page_width": "70rem", "description": "Training steps that fit"}
html_show_sourcelink = False
