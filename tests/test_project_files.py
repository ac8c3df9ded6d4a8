"""Rules of the files around the code: nothing of one machine in them, decision records in order, exact pins.

As in test_house_rules.py, every rule lists offences, and a table shows it what breaks and what keeps it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PINS = ("requirements.txt", "requirements-dev.txt", "requirements-docs.txt")

Files = Mapping[str, str]
"""Text by file name."""
Rule = Callable[[Files], list[str]]


def machine_paths(files: Files) -> list[str]:
    """Absolute paths of one machine; relative paths, URLs and placeholders are fine."""
    pattern = re.compile(r"(?<![\w./~$<>}-])/(?:work|root|(?:home|Users)/[\w.-]+)\b")
    return [f"{name}: {match[0]}" for name, text in files.items() for match in pattern.finditer(text)]


def unnumbered_decisions(files: Files) -> list[str]:
    offences = []
    for number, (name, text) in enumerate(sorted(files.items()), start=1):
        if not re.fullmatch(rf"{number:04}-[a-z0-9-]+\.md", name):
            offences.append(f"{name}: the next record is {number:04}-some-title.md")
        if not re.match(rf"# {number}\. \S", text):
            offences.append(f"{name}: starts with its number and title, '# {number}. Title'")
        if not is_date(re.search(r"^Date: (.*)$", text, re.MULTILINE)):
            offences.append(f"{name}: has a line 'Date: YYYY-MM-DD'")
    return offences


def is_date(match: re.Match[str] | None) -> bool:
    try:
        return match is not None and datetime.date.fromisoformat(match[1]).isoformat() == match[1]
    except ValueError:
        return False


def unpinned(files: Files) -> list[str]:
    """Lines of the requirements that are not an exact pin, and needs of pyproject.toml that no pin meets."""
    whole = [line for line in files["requirements.txt"].splitlines() if line and not line.startswith("#")]
    lines = [line.partition("; ")[0] for line in whole]  # what follows says for which systems there is one
    offences = [f"{line}: write name==version" for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    pins = {canonical(name): version for name, _, version in (line.partition("==") for line in lines)}
    for need in map(Requirement, files["needs"].splitlines()):
        version = pins.get(canonical(need.name))
        if version is None or version not in need.specifier:
            offences.append(f"{need.name}{need.specifier}: pinned {version}; regenerate requirements.txt")
    return offences


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


BREAKS: list[tuple[Rule, Files]] = [
    (machine_paths, {"README.md": "data in " + "/".join(["", "root", "data"])}),
    (machine_paths, {"record.json": '"' + "/".join(["", "home", "me", "runs"]) + '"'}),
    (machine_paths, {"notes.md": "under `" + "/".join(["", "work"]) + "`"}),
    (unnumbered_decisions, {"0002-skips-one.md": "# 2. Skips one\n\nDate: 2026-11-23\n"}),
    (unnumbered_decisions, {"0001-title.md": "# Title\n\nDate: 2026-11-23\n"}),
    (unnumbered_decisions, {"0001-title.md": "# 1. Title\n\nDate: 2026-13-23\n"}),
    (unpinned, {"requirements.txt": "rich>=15\n", "needs": ""}),
    (unpinned, {"requirements.txt": "rich @ file:rich.whl\n", "needs": ""}),
    (unpinned, {"requirements.txt": "rich==15.0.0\n", "needs": "torch>=2.10"}),
    (unpinned, {"requirements.txt": "torch==2.9.1\n", "needs": "torch>=2.10"}),
]

KEEPS: list[tuple[Rule, Files]] = [
    (machine_paths, {"README.md": "../shared/data, https://host/home/page, src/work/x, $HOME/work/x, <RUN>/root/x"}),
    (unnumbered_decisions, {"0001-title.md": "# 1. Title\n\nDate: 2026-11-23\n"}),
    (unpinned, {"requirements.txt": "# pins\nPyYAML==6.0.3\n", "needs": "pyyaml<7"}),
]


@pytest.mark.parametrize(("rule", "files"), BREAKS)
def test_rule_sees_an_offence(rule: Rule, files: Files) -> None:
    assert rule(files)


@pytest.mark.parametrize(("rule", "files"), KEEPS)
def test_rule_accepts_what_keeps_it(rule: Rule, files: Files) -> None:
    assert rule(files) == []


def test_tracked_files_name_no_place_of_one_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    files = {str(path.relative_to(ROOT)): path.read_text("utf-8", "replace") for path in paths if path.is_file()}
    assert "pyproject.toml" in files
    offences = machine_paths(files)
    assert not offences, "\n".join(offences)


def test_decision_records_are_numbered_and_dated() -> None:
    records = {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "decisions").iterdir()}
    assert records
    offences = unnumbered_decisions(records)
    assert not offences, "\n".join(offences)


def test_every_need_has_an_exact_pin() -> None:
    needs = importlib.metadata.requires("attnpress")
    assert needs
    pins = "".join((ROOT / name).read_text("utf-8") for name in PINS)
    offences = unpinned({"requirements.txt": pins, "needs": "\n".join(needs)})
    assert not offences, "\n".join(offences)
