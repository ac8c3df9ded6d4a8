"""Builds the documentation: `make docs`, into build/docs. Pages are Markdown that reads well on its own, too."""

import importlib.metadata

project = "attnpress"
author = "the attnpress authors"
copyright = author  # noqa: A001 - Sphinx reads it by this name
release = importlib.metadata.version("attnpress")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"attnpress {release}"
html_copy_source = False

# Docstrings are plain text with `names` in single backticks.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
