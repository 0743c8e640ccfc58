"""Sphinx (`make docs`). Its source folder is the repository, so that links work in both."""

import flatkern

project = "flatkern"
copyright = "flatkern's authors"
version = release = flatkern.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# Types are linked where an inventory is at hand; building needs no network.
intersphinx_mapping = {}
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "bench/results/**.md",
    "examples/README.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
]
exclude_patterns = ["**/.venv*", "build"]

myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": True}
# Docstrings are plain text: `code` in single backticks, and |W| is an absolute value.
default_role = "code"
# Attributes of the same name in several classes are no ambiguity worth a warning.
suppress_warnings = ["ref.python"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_display_short_literal_types = True

html_theme = "furo"
html_title = f"flatkern {version}"


def plain(lines):
    """A docstring as reStructuredText: markup is escaped, and indented examples are code."""
    out = []
    for i, line in enumerate(lines):
        before = next((one for one in reversed(lines[:i]) if one), " ")
        starts = line.startswith("    ") and i and not lines[i - 1] and not before.startswith(" ")
        if starts:
            out += [".. code-block:: python", ""]
        out.append(line.replace("|", r"\|").replace("**", r"\*\*"))
    return out


def setup(app):
    """Called by Sphinx."""

    def process(app, what, name, obj, options, lines):
        lines[:] = plain(lines)

    app.connect("autodoc-process-docstring", process, priority=100)
