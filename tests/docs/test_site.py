"""The documentation site: whatever is public is in the API page, and its pages are within reach.

`make docs` builds it, with warnings as errors; what that needs is no part of the test environment.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import attnpress

DOCS = Path(__file__).parents[2] / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^\.\. auto\w+:: ([\w.]+)", API, re.MULTILINE)
ELSEWHERE = sorted(name for name in DOCUMENTED if "." in name)


def test_every_public_name_is_documented() -> None:
    assert sorted(name for name in DOCUMENTED if "." not in name) == sorted(attnpress.__all__)


@pytest.mark.parametrize("name", [*attnpress.__all__, *(name.removeprefix("attnpress.") for name in ELSEWHERE)])
def test_what_is_documented_has_a_docstring(name: str) -> None:
    module, _, last = f"attnpress.{name}".rpartition(".")
    found = getattr(importlib.import_module(module), last)
    assert found.__doc__, name


def test_every_page_is_listed() -> None:
    listed = set()
    for page in DOCS.glob("*.md"):
        for tree in re.findall(r"```{toctree}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {path for entry in entries for path in DOCS.glob(f"{entry}.md")}
    assert listed == set(DOCS.rglob("*.md")) - {DOCS / "index.md"}


def test_relative_links_lead_somewhere() -> None:
    pages = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 40
    missing = [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert not missing, missing


def test_wide_tables_scroll_on_a_phone() -> None:
    conf = (DOCS / "conf.py").read_text(encoding="utf-8")
    assert 'html_css_files = ["site.css"]' in conf
    assert ".table-wrapper { overflow-x: auto; }" in (DOCS / "_static" / "site.css").read_text(encoding="utf-8")
