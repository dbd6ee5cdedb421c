"""The documentation's settings: MyST Markdown pages, and a reference from the docstrings.

Built with ``sphinx-build -W docs docs/_build``: no network, no import but sparseft's own.
"""

from __future__ import annotations

from typing import Any

import sparseft

project = "sparseft"
author = "the sparseft authors"
project_copyright = "the sparseft authors, Apache-2.0"
version = release = sparseft.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "alabaster"
html_theme_options = {
    "description": "Sparse fine-tuning that is exact, composable and fast",
    "fixed_sidebar": True,
    "page_width": "1100px",
}
html_show_sourcelink = False
html_css_files = ["style.css"]
html_static_path = ["_static"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

# A name in single backticks is linked where the reference has it, and is plain code elsewhere. A
# method of several classes' name has several targets, of which none is more right.
default_role = "py:obj"
suppress_warnings = ["ref.python"]

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Numerics", "notes_style")]


def skip_what_is_said_elsewhere(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave a package's page the names that ``api/sparseft`` lacks."""
    here = app.env.docname
    if what == "module" and here.startswith("api/") and here != "api/sparseft":
        return True if name in sparseft.__all__ else None
    return None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_what_is_said_elsewhere)
