"""Wrap the prose of Markdown files at 120 columns: `python docs/wrap.py [FILE ...]`, part of `make style`.

Code, tables, headings, equations and generated parts stay as they are. Code spans and equations are never broken.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 120
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ITEM = re.compile(r"^( *)([-*] |\d+\. )?")
STARTS_A_BLOCK = re.compile(r" (?=([-+*>|]|\d+[.)]|#+|=+|-+)( |$))")
"""A space before what would begin a list or another block at the beginning of a line."""
SPACE = "\0"


def wrapped(text: str) -> str:
    """The Markdown with its prose wrapped."""
    return "\n".join(line for prose, lines in parts(text) for line in (_filled(lines) if prose else lines))


def too_long(text: str) -> list[str]:
    """Lines of prose that could be shorter."""
    return [
        line for prose, lines in parts(text) if prose for line in lines if len(line) > WIDTH and _filled([line])[1:]
    ]


def parts(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Runs of lines: one paragraph or list item each (True), or a line that stays as it is (False)."""
    prose: list[str] = []
    end = ""
    for line in text.split("\n"):
        opening = re.match(r" *(```|\$\$|<!-- table)", line)
        if end or opening or not line or re.match(r" *(\||#|<!--|!\[)", line):
            if prose:
                yield True, prose
                prose = []
            if end:
                end = "" if end in line else end
            elif opening:
                closing = {"<!-- table": "<!-- end -->"}.get(opening[1], opening[1])
                end = "" if closing in line[opening.end() :] else closing
            yield False, [line]
        elif prose and not re.match(r" *([-*] |\d+\. )", line):
            prose.append(line)
        else:
            if prose:
                yield True, prose
            prose = [line]
    if prose:
        yield True, prose


def _filled(lines: list[str]) -> list[str]:
    item = ITEM.match(lines[0])
    assert item is not None
    kept = " ".join(line.strip() for line in (lines[0][item.end() :], *lines[1:]))
    whole = re.sub(r"`[^`]+`|\$[^$]+\$", lambda span: span[0].replace(" ", SPACE), kept)
    found = textwrap.wrap(
        STARTS_A_BLOCK.sub(SPACE, whole), WIDTH, initial_indent=item[0], subsequent_indent=" " * len(item[0]),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace(SPACE, " ") for line in found] or [""]


if __name__ == "__main__":
    for page in [Path(name) for name in sys.argv[1:]] or PAGES:
        before = page.read_text(encoding="utf-8")
        if wrapped(before) != before:
            page.write_text(wrapped(before), encoding="utf-8")
            print(f"wrapped {page}")
