"""Markdown reads like machine-learning documentation: wrapped at 120 columns, and in the project's vocabulary."""

from __future__ import annotations

import itertools
import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRAP = runpy.run_path(str(ROOT / "docs" / "wrap.py"))
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in WRAP["PAGES"]}
VOCABULARY = {
    r"keys a (row|query)": "keys per query",
    r"goes on (where|after|from)": "resumes",
    r"unless told otherwise": "by default",
    r"trained (as long|on for)": "trained equally long",
    r"commonest": "most frequent",
    r"believe nobody": "not yet measured",
    r"the mend\b": "what to do",
    r"begun anew": "restarted",
    r"is told of": "is warned about",
    r"held against": "compared with",
    r"a word that": "a message",
}
"""Phrases that the documentation does not use, and what it says instead."""


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_wrapped(page: str) -> None:
    assert WRAP["too_long"](PAGES[page]) == [], "run: make style"


@pytest.mark.parametrize("page", PAGES)
def test_code_is_fenced(page: str) -> None:
    """Wrapping would join the lines of a block that is code by its indentation alone."""
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    in_list = False
    for before, line in itertools.pairwise(prose.split("\n")):
        if line and not line.startswith(" "):
            in_list = bool(re.match(r"([-*]|\d+\.) ", line))
        assert in_list or before or not line.startswith("    "), line


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CONTRIBUTING.md"])
def test_pages_use_the_vocabulary(page: str) -> None:
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    joined = re.sub(r"\s+", " ", prose)
    found = {said: better for said, better in VOCABULARY.items() if re.search(said, joined)}
    assert not found


def test_wrapping_keeps_the_meaning() -> None:
    long = "word " * 40
    kept = f"```sh\n{long}\n```\n\n| {long} |\n\n<!-- table: x -->\n{long}\n<!-- end -->\n"
    text = f"# {long}\n\n{long}\n\n- {long}\n  {long}\n- b\n\n{kept}"
    found = WRAP["wrapped"](text)
    assert found.split() == text.split()
    assert WRAP["wrapped"](found) == found
    assert WRAP["too_long"](text) == [long, f"- {long}", f"  {long}"]
    assert WRAP["too_long"](found) == []
    assert found.endswith(f"\n- b\n\n{kept}")


def test_wrapping_breaks_neither_code_nor_equations_nor_makes_lists() -> None:
    for span in ("`" + "code " * 10 + "x`", "$" + "a + b + " * 6 + "c$"):
        assert span in WRAP["wrapped"]("word " * 20 + span + " end")
    for count in range(100, 125):
        lines = WRAP["wrapped"]("x" * count + " - y 1. z + w " + "word " * 30).split("\n")
        assert not any(re.match(r"[-+] |\d\. ", line) for line in lines)


def test_words_are_checked_before_a_commit() -> None:
    assert "codespell" in (ROOT / "Makefile").read_text("utf-8")
    assert "codespell" in (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["codespell"]
