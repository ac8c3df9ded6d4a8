"""Pages, docstrings, comments and messages read like machine-learning documentation, in the project's vocabulary."""

from __future__ import annotations

import ast
import io
import itertools
import re
import runpy
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRAP = runpy.run_path(str(ROOT / "docs" / "wrap.py"))
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in WRAP["PAGES"]}
VOCABULARY = {
    r"keys a (row|query)": "keys per query",
    r"go(es|ne)? on (where|after|from|with)": "resume",
    r"unless told otherwise": "by default",
    r"trained (as long|on for)": "trained equally long",
    r"commonest": "most frequent",
    r"believe nobody": "not yet measured",
    r"the mend\b": "what to do",
    r"\banew\b": "again",
    r"(is|are) told of": "is warned about",
    r"held against": "compared with",
    r"a word that": "a message",
    r"without a word": "silently",
    r"in force\b": "current",
    r"(is|are|was) let go": "is freed",
    r"hands? (out|over)\b": "output, pass",
    r"else than": "other than",
    r"to be had\b": "available",
    r"what is ours": "attnpress's tensors",
    r"(some|no)body": "a user, nothing",
    r"for whoever": "for",
    r"so many (tokens|texts|rows)": "this many",
    r"(as|what) \w+ has it\b": "as defined in",
    r"half of a surrogate": "unpaired surrogate",
    r"(?<!there )is no (number|text|file)\b": "is not a",
    r"stands (there|in it) twice": "duplicate",
    r"what is asked of": "the requested",
}
"""Phrases that pages, docstrings, comments and messages do not use, and what they say instead."""


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
    assert not wordings(re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))


def test_code_uses_the_vocabulary() -> None:
    found = {path.name: wordings(*spoken(path.read_text("utf-8"))) for path in (ROOT / "src").rglob("*.py")}
    assert not {name: phrases for name, phrases in found.items() if phrases}


def test_docstrings_messages_and_comments_are_looked_at() -> None:
    code = '''"""Scales in force."""\nx = f"begun {1} anew"\ny = 1  # nobody\n"""A doc of y."""\n'''
    assert wordings(*spoken(code)) == {said: VOCABULARY[said] for said in (r"\banew\b", r"in force\b", "(some|no)body")}
    assert not wordings(*spoken("nobody = 1\n"))


def wordings(*texts: str) -> dict[str, str]:
    joined = [re.sub(r"\s+", " ", text) for text in texts]
    return {said: better for said, better in VOCABULARY.items() if any(re.search(said, text) for text in joined)}


def spoken(code: str) -> list[str]:
    """All strings and comments of a module; comments as one text, since they may be several lines."""
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return [*(text for text in strings if isinstance(text, str)), " ".join(comments)]


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
