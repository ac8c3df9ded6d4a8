"""Builds of the package without its kernel: an error, unless asked for. `make test-dist` builds it with the kernel."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
META = PROJECT["project"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds, without a kernel that was built before."""
    folder = tmp_path / "source"
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(source: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATTNPRESS_")}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=source, env=environment | variables, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is built on Linux only")
def test_a_build_without_a_compiler_fails_and_says_what_to_do(source: Path) -> None:
    done = build(source, "bdist_wheel", CXX="no-such-compiler", CC="no-such-compiler")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: attnpress: the CPU kernel could not be built: .*no-such-compiler", last), done.stderr
    assert "Install a C++17 compiler" in last
    assert "ATTNPRESS_WITHOUT_KERNEL=1" in last
    assert not (source / "dist").exists()


def test_a_build_without_the_kernel_on_request_is_pure_python(source: Path) -> None:
    done = build(source, "bdist_wheel", ATTNPRESS_WITHOUT_KERNEL="1")
    assert done.returncode == 0, done.stderr
    assert "building without the CPU kernel" in done.stderr
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name == f"attnpress-{META['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(archive.read(next(name for name in names if name.endswith("/METADATA"))))
    assert not [name for name in names if name.endswith(".so")]
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert modules <= set(names)
    assert {"attnpress/py.typed", "attnpress/report/page.html.j2"} <= set(names)
    assert metadata["Requires-Python"] == META["requires-python"]


def test_python_versions_agree() -> None:
    allowed = SpecifierSet(META["requires-python"])
    listed = {match[1] for each in META["classifiers"] if (match := re.search(r"Python :: (3\.\d+)$", each))}
    lowest = min(listed, key=lambda version: int(version.partition(".")[2]))
    assert all(version in allowed for version in listed)
    assert f"3.{int(lowest.partition('.')[2]) - 1}" not in allowed
    assert f'LOWEST_PYTHON = "cp{lowest.replace(".", "")}"' in (ROOT / "setup.py").read_text("utf-8")
    assert PROJECT["tool"]["mypy"]["python_version"] == lowest
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"


def test_the_kernel_is_built_with_the_torch_that_the_package_runs_on() -> None:
    from attnpress.kernels.cpu import OLDEST_TORCH

    built, run = (
        next(need for need in map(Requirement, needs) if need.name == "torch").specifier
        for needs in (PROJECT["build-system"]["requires"], META["dependencies"])
    )
    oldest = ".".join(map(str, OLDEST_TORCH))
    assert built == run == SpecifierSet(f">={oldest}")
    target = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}{0:012x}"
    assert f"TORCH_TARGET_VERSION={target}" in (ROOT / "setup.py").read_text("utf-8")


def test_the_changelog_is_cut_for_the_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(META['version'])}\] - \d{{4}}-\d\d-\d\d", headings[1])
