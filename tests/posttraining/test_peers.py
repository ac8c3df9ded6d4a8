"""An encoder beside other runtimes: the same texts, the same pooling, and what each says compared with float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attnpress.benchmark.attention import BenchmarkError
from attnpress.benchmark.runtimes import RUNTIMES
from attnpress.cli.parser import main
from attnpress.models.encoders import encoder_of, load_encoder
from attnpress.posttraining import peers
from attnpress.posttraining.agreement import agreement
from attnpress.report.render import encode_rows
from tests.kernels.factories import needs_kernel
from tests.posttraining.factories import make_embedder, some_texts

ROWS = [(text,) for text in some_texts(60)]


def prepared(name: str, dense: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    """Facts of a side that is built and prepared in this process, and its answers."""
    (folder / "rows.json").write_text(json.dumps(ROWS[40:]), encoding="utf-8")
    peers.build(name, dense, ROWS[:32], folder / name)
    side = peers.prepare(name, str(folder / name), str(folder / "rows.json"), 1, 8)
    assert torch.equal(torch.as_tensor(side.run()), load_file(folder / name / peers.ANSWERS)["answers"])
    return side.facts, load_file(folder / name / peers.ANSWERS)["answers"]


@needs_kernel
@pytest.mark.parametrize("is_pipeline", [True, False])
@pytest.mark.parametrize("name", ["ours", *peers.PEERS])
def test_every_side_answers_nearly_as_float32_does(
    name: str, is_pipeline: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")  # openvino and nncf report to their makers otherwise
    for package in RUNTIMES[name].packages if name in RUNTIMES else ():
        pytest.importorskip(package)
    dense = encoder_of(make_embedder(tiny_model)) if is_pipeline else load_encoder(str(tiny_model))
    facts, answers = prepared(name, dense, tmp_path)
    cosine = agreement("embedder", dense.answer(ROWS[40:]), answers)["cosine"]
    assert cosine > (0.99999 if name == "torch" else 0.95)
    assert name == "torch" or cosine < 0.999999, "in few bits"
    assert facts["changed"] == 0 if name == "ours" and is_pipeline else 0 <= facts["changed"] <= 1
    files = [file.name for file in (tmp_path / name).iterdir()]
    assert (name in RUNTIMES) == ("model.safetensors" not in files), "a graph needs no weights beside it"


def test_peers_that_cannot_be_had_are_refused_by_name(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchmarkError, match="no peer called 'sentence-transformers-onnx'; use some of torch"):
        peers.bench_encode(str(tiny_model), "none.jsonl", peers=["sentence-transformers-onnx"])
    missing = dataclasses.replace(RUNTIMES["openvino-int8"], packages=("no_such_package",))
    monkeypatch.setitem(RUNTIMES, "openvino-int8", missing)
    with pytest.raises(BenchmarkError, match=r"peer openvino-int8: no_such_package not installed here"):
        peers.bench_encode(str(tiny_model), "none.jsonl", peers=["openvino-int8"])


def test_options_of_encode_go_together(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--encode", str(tiny_model)]) == 1
    assert "--encode needs texts: --texts FILE" in capsys.readouterr().err
    assert main(["bench", "--texts", "mine.jsonl"]) == 1
    assert "--texts and --column are those of --encode" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("\n".join(some_texts(50)), encoding="utf-8")
    assert main(["bench", "--encode", str(tiny_model), "--texts", str(tmp_path / "mine.txt"), "--peers", "torch"]) == 1
    assert "50 texts; 32 for calibration and 64 to time" in capsys.readouterr().err


def test_the_table_has_a_row_for_each_side() -> None:
    record = {
        "peer": "torch", "ours_ms": 500.0, "peer_ms": 2000.0, "ratio": 4.0, "texts": 10, "seq_len": 5, "batch": 4,
        "model": "m", "ours_agreement": {"cosine": 0.995}, "peer_agreement": {"cosine": 1.0}, "ours_changed": 0.0,
        "peer_changed": 0.5, "ours_model_mb": 50.0, "peer_model_mb": 90.0, "ours_file_mb": 40.0, "peer_file_mb": 91.0,
        "threads": 1, "target": "avx2",
    }  # fmt: skip
    assert encode_rows([record])[1:] == [
        ("attnpress", "20.0", "", "0.9950", "0%", "50", "40"),
        ("torch", "5.0", "4.00", "1.0000", "50%", "90", "91"),
    ]
