"""quantize --distill: what was interrupted resumes to the same bytes, and what belongs to another call does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import attnpress
from attnpress.config import ConfigError
from attnpress.files import OutputError
from attnpress.posttraining import run as module
from attnpress.posttraining.interrupted import kept_training
from attnpress.posttraining.measure import Cost
from attnpress.training.callbacks import SparsityCallback
from tests.kernels.factories import needs_kernel
from tests.posttraining.factories import make_embedder, some_texts

TEXTS = some_texts(120)
FORM: dict[str, Any] = {"sparsity": 0.8, "linear": "float", "distill": 4}
STEPS = 4 * 6  # of 16 texts each: 32 for calibration, and two thirds of the others

pytestmark = needs_kernel


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "costs", lambda *_: (Cost(10.0, 100.0, 90.0), Cost(30.0, 60.0, 40.0), "avx2"))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that begin; at the one after `stop_at`, its process is interrupted."""
    begun: list[int] = []
    real = SparsityCallback.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, *rest: Any, **named: Any) -> None:
        begun.append(state.global_step)
        if state.global_step in stop_at:
            stop_at.clear()
            raise KeyboardInterrupt
        real(self, args, state, *rest, **named)

    monkeypatch.setattr(SparsityCallback, "on_step_begin", on_step_begin)
    return begun


stop_at: set[int] = set()


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("kind", ["transformers", "sentence-transformers"])
def test_interrupted_training_resumes_to_the_same_bytes(
    kind: str, tiny_model: Path, tmp_path: Path, steps: list[int]
) -> None:
    source: Any = tiny_model if kind == "transformers" else make_embedder(tiny_model)
    attnpress.quantize(source, TEXTS, output=tmp_path / "whole", **FORM)
    assert steps == list(range(STEPS))
    assert kept(tmp_path) == []
    stop_at.add(STEPS // 2 + 2)
    with pytest.raises(KeyboardInterrupt):
        attnpress.quantize(source, TEXTS, output=tmp_path / "fast", **FORM)
    assert kept(tmp_path) == [".fast.distill"]
    assert not (tmp_path / "fast").exists()
    steps.clear()
    said: list[str] = []
    attnpress.quantize(source, TEXTS, output=tmp_path / "fast", notify=said.append, **FORM)
    assert f"resuming the training from checkpoint {STEPS // 2}" in said
    assert steps == list(range(STEPS // 2, STEPS))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "fast")]
    assert weights[0] == weights[1]
    assert kept(tmp_path) == []


def test_what_comes_after_training_does_not_train_again(
    tiny_model: Path, tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "costs", lambda *_: [][1])
        with pytest.raises(IndexError):
            attnpress.quantize(tiny_model, TEXTS, output=tmp_path / "fast", **FORM)
    assert len(steps) == STEPS
    attnpress.quantize(tiny_model, TEXTS, output=tmp_path / "fast", **FORM)
    assert len(steps) == STEPS


def test_training_of_another_call_is_deleted_and_that_is_said(
    tiny_model: Path, tmp_path: Path, steps: list[int]
) -> None:
    stop_at.add(STEPS // 2)
    with pytest.raises(KeyboardInterrupt):
        attnpress.quantize(tiny_model, TEXTS, output=tmp_path / "fast", **FORM)
    steps.clear()
    said: list[str] = []
    attnpress.quantize(tiny_model, TEXTS, output=tmp_path / "fast", notify=said.append, **{**FORM, "sparsity": 0.7})
    assert steps[0] == 0
    assert [line for line in said if "with another model, texts or options is deleted" in line]


def test_nothing_is_kept_without_an_output(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attnpress.quantize(tiny_model, TEXTS, **FORM)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_kind_or_in_use_is_refused(tmp_path: Path) -> None:
    place, output = tmp_path / ".fast.distill", tmp_path / "fast"
    with (
        kept_training(output, {"a": 1}, print),
        pytest.raises(ConfigError, match="another run is at work there"),
        kept_training(output, {"a": 1}, print),
    ):
        pass
    assert not place.exists()
    place.mkdir()
    (place / "mine").touch()
    with pytest.raises(OutputError, match="holds mine"), kept_training(output, {}, print):
        pass
    shutil.rmtree(place)
    with kept_training(output, {}, print):
        (place / "mine").touch()
    assert [path.name for path in place.iterdir()] == ["mine"], "what a user has put there stays"
