"""The messages of the troubleshooting page are texts of the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
MESSAGES = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
GAP = "\0"
"""Stands for a value in an f-string."""


def texts(source: str) -> Iterator[str]:
    """Every string of a module, pieces that stand beside each other joined."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_printed(message: str, known: list[str]) -> bool:
    """Whether one text holds the fixed parts of a message in their order, with values between them."""
    parts = [re.escape(part) for part in message.split("…")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in known)


@pytest.fixture(scope="module")
def known() -> list[str]:
    files = [ROOT / "setup.py", *(ROOT / "src").rglob("*.py")]
    return [text for file in files for text in texts(file.read_text("utf-8"))]


def test_the_page_has_twenty_messages() -> None:
    assert len(MESSAGES) == len(set(MESSAGES)) == 20


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_one_of_the_source(message: str, known: list[str]) -> None:
    assert is_printed(message, known)


def test_other_messages_are_seen() -> None:
    found = list(texts('raise ValueError(f"{name}: no such thing; "\n    f"use one of {names}")'))
    assert is_printed("…: no such thing; use one of …", found)
    assert not is_printed("…: no such thing; use two of …", found)
