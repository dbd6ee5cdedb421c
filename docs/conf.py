"""The documentation's settings: MyST Markdown pages, and a reference from the docstrings.

Built with ``sphinx-build -W docs docs/_build``: no network, no import but sparseft's own.
"""

from __future__ import annotations

import re
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


_LABEL = re.compile(r"^(\s*)(Numerics|Memory|Source|Differences to [\w. ]+|Yields):(?= \S)")


def plain_sections(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Prepare what napoleon would misread.

    A section of one paragraph, ``Numerics: text``, gets a bold label, and its hanging indent goes,
    which would make a definition of it. What is returned is text: before a colon no type stands.
    """
    label, returns = None, False
    for i, line in enumerate(lines):
        found = _LABEL.match(line)
        if found:
            label = found[1]
            lines[i] = f"{label}**{found[2]}:**{line[found.end() :]}"
        elif label is not None and line.strip():
            lines[i] = label + line.lstrip()
        else:
            label = None
        if returns and line.strip():
            lines[i] = re.sub(r":(?= )", " \N{EN DASH}", lines[i], count=1)
        returns = line.strip() in ("Returns:", "Yields:")


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_what_is_said_elsewhere)
    app.connect("autodoc-process-docstring", plain_sections, priority=400)  # napoleon: 500
