"""The hosted CI runs targets of the Makefile, on Python versions that the package lists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_every_command_is_a_target_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    run = [command for job in JOBS.values() for command in commands(job)]
    assert {"make check", "make test", "make test-avx2", "make test-dist", "make docs"} == set(run)
    assert all(command.removeprefix("make ") in targets for command in run)


def test_what_ci_run_does_is_done_on_hosted_machines_too() -> None:
    local = re.findall(r"^part make ([\w-]+)", (ROOT / ".ci/run").read_text("utf-8"), re.MULTILINE)
    assert {"check", "test", "test-avx2", "test-dist", "docs"} <= set(local)


def test_python_versions_are_those_of_the_classifiers() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["classifiers"]
    tested = JOBS["tests"]["strategy"]["matrix"]["python"]
    assert len(tested) == 2
    assert all(f"Programming Language :: Python :: {version}" in listed for version in tested)
