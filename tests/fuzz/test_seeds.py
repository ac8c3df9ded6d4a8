"""Seeds of the fuzzers that are kept: some of every kind, and each that failed once. And the runner itself."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.fuzz import __main__ as runner
from tests.fuzz import checkpoints, guided, input_lines, paths, recipes, records

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("target", [checkpoints, input_lines, paths, recipes, records], ids=lambda one: one.__name__)
def test_seeds_that_are_kept(target: SimpleNamespace) -> None:
    ends = {target.replay(seed) for seed in target.REGRESSIONS}
    assert "refused" in ends, "damage is refused"
    assert len(ends) > 1, "and what is sound is not"


def test_seeds_led_by_coverage() -> None:
    pytest.importorskip("atheris")
    assert {guided.replay(seed) for seed in guided.REGRESSIONS} == {"recipe", "yaml"}


def test_a_reader_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atheris")
    monkeypatch.setattr(guided, "READERS", {"nothing": lambda: None})
    with pytest.raises(AssertionError, match=r"(?s)seed 5 \(nothing\).*KeyError: 'nothing'"):
        guided.replay(5)


def test_a_failure_is_kept_and_passed_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def replay(seed: int) -> str:
        if seed == 12:
            raise AssertionError("seed 12: wrong")
        if seed == 19:
            monkeypatch.setattr(time, "monotonic", lambda: 1e9)
        return "fine"

    target = SimpleNamespace(replay=replay)
    monkeypatch.setattr(importlib, "import_module", lambda _: target)
    monkeypatch.setattr(runner, "KEPT", tmp_path / ".fuzz")
    assert runner.main(["--only", "paths", "--seed", "10", "--record", str(tmp_path / "fuzz.json")]) == 1
    assert (tmp_path / ".fuzz" / "paths-12.txt").is_file()
    assert "again: python -m tests.fuzz --only paths --replay 12" in capsys.readouterr().out
    record = json.loads((tmp_path / "fuzz.json").read_text(encoding="utf-8"))
    assert record[0]["counts"] == {"paths": {"failures": 1, "fine": 9, "cases": 10}}
    assert {"date", "commit", "machine", "cpu_targets", "minutes", "seed"} < record[0].keys()
