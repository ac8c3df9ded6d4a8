"""Builds the documentation: `make docs`, into build/docs. Pages are Markdown that reads well on its own, too."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported along with Transformers; speaks of its own kernels

project = "attnpress"
author = "the attnpress authors"
copyright = author  # noqa: A001 - Sphinx reads it by this name
release = importlib.metadata.version("attnpress")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"attnpress {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Docstrings are plain text with `names` in single backticks.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
autodoc_member_order = "bysource"


def setup(app: Sphinx) -> None:
    """Equations as MathML, made here by docutils: every browser draws it, without a script from the network."""

    def inline(writer: Any, node: nodes.Element) -> None:
        writer.body.append(tex2mathml(node.astext()))
        raise nodes.SkipNode

    def display(writer: Any, node: nodes.Element) -> None:
        equation = tex2mathml(node.astext(), as_block=True)
        writer.body.append(f'<div style="overflow: auto hidden; padding: 0.4em 0">{equation}</div>')
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (display, None))
