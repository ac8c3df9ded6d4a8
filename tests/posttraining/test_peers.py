"""An encoder beside other runtimes: the same texts, the same pooling, and what each says compared with float32."""

from __future__ import annotations

import dataclasses
import json
import statistics
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
from attnpress.report.encode import encode_caption, encode_rows
from attnpress.tasks.texts import Text, Texts
from tests.conftest import VOCABULARY, TokenizerFactory
from tests.kernels.factories import needs_kernel
from tests.posttraining.factories import make_embedder, save_reranker, some_pairs, some_texts

ROWS = [(text,) for text in some_texts(60)]
PAIRS = some_pairs(60)


def prepared(name: str, dense: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    """Facts of a side that is built and prepared in this process, and its answers."""
    rows = PAIRS if dense.kind == "reranker" else ROWS
    (folder / peers.TEXTS).write_text(json.dumps({"timed": rows[40:50], "judged": rows[40:]}), encoding="utf-8")
    facts = peers.build(name, dense, rows[:32], folder / name)
    side = peers.prepare(name, str(folder), 1, 8, judged=True)
    answers = load_file(folder / name / peers.ANSWERS)["answers"]
    if name == "ours":
        assert torch.equal(torch.as_tensor(side.run()), answers[:10])
    else:
        torch.testing.assert_close(torch.as_tensor(side.run()), answers[:10], atol=0.05, rtol=0.05)
    return facts | side.facts, answers


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
    assert facts["file_mb"] > 0
    again = peers.prepare(name, str(tmp_path), 1, 8, judged=False)
    assert torch.equal(torch.as_tensor(again.run()), answers[:10]) or name != "ours", "built once, prepared often"


@needs_kernel
@pytest.mark.parametrize("name", ["ours", *peers.PEERS])
def test_rerankers_have_the_same_peers(
    name: str, tmp_path: Path, make_tokenizer: TokenizerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    for package in RUNTIMES[name].packages if name in RUNTIMES else ():
        pytest.importorskip(package)
    dense = load_encoder(str(save_reranker(tmp_path / "reranker", make_tokenizer(VOCABULARY))))
    assert (type(dense.model).__name__, dense.kind) == ("CrossEncoder", "reranker")
    _, answers = prepared(name, dense, tmp_path)
    assert agreement("reranker", dense.answer(PAIRS[40:]), answers)["same_order"] > (0.999 if name == "torch" else 0.9)


@needs_kernel
def test_the_command_says_what_each_side_keeps_of_float32(tiny_model: Path, tmp_path: Path) -> None:
    texts = some_texts(120)
    rows = [{"a": texts[2 * n], "b": texts[2 * n + 1], "gold": n % 6} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["--texts", str(tmp_path / "pairs.jsonl"), "--column", "a", "b", "--scores", "gold", "--peers", "torch"]
    few = ["--count", "8", "--judged", "20", "--seconds", "0.05", "--sparsity", "0"]
    assert main(["bench", "--encode", str(tiny_model), *words, *few, "--json", str(tmp_path / "found.json")]) == 0
    (record,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert record["quality"]["measure"] == "Spearman"
    assert record["quality"]["peer"] == record["quality"]["float32"] != record["quality"]["ours"]
    assert (record["threads"], record["texts"], record["peer"]) == (1, 8, "torch")
    assert record["judged"] == 40, "texts of 20 pairs"
    assert len(record["ratios"]) == peers.ROUNDS
    assert record["ratio"] == statistics.median(record["ratios"])
    assert record["provenance"]["form"]["sparsity"] == 0
    assert record["sparsity"] < 0.05, "zeros by rounding alone"
    assert record["ours_changed"] == 0
    assert record["ours_file_mb"] > 0


def test_pairs_are_divided_by_what_the_model_takes() -> None:
    pairs: list[Text] = list(some_pairs(60))
    calibration, asked = peers.divided("embedder", Texts(pairs))
    assert (len(calibration), set(map(len, calibration))) == (32, {1})
    assert asked.measure == "MRR@10"
    assert set(asked.timed) == {(passage,) for _, passage in pairs[32:]}
    calibration, asked = peers.divided("reranker", Texts(pairs, scores=dict.fromkeys(pairs, 1.0)))
    assert (calibration, asked.timed, asked.measure) == (pairs[:32], pairs[32:], "Spearman")


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
    assert main(["bench", "--judged", "5"]) == 1
    assert "and so are --scores, --count, --judged and --seconds" in capsys.readouterr().err
    assert main(["bench", "--threads", "1", "2"]) == 1
    assert "--threads: several numbers are for --encode MODEL" in capsys.readouterr().err
    assert main(["bench", "--encode", str(tiny_model), "--texts", "mine.jsonl", "--seq-len", "8"]) == 1
    assert "--encode takes no --seq-len" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("\n".join(some_texts(50)), encoding="utf-8")
    assert main(["bench", "--encode", str(tiny_model), "--texts", str(tmp_path / "mine.txt"), "--peers", "torch"]) == 1
    assert "50 texts; 32 for calibration and 64 to time" in capsys.readouterr().err
    (tmp_path / "mine.csv").write_text("text,mark\n" + "".join(f"{text},1\n" for text in some_texts(50)))
    words = ["--texts", str(tmp_path / "mine.csv"), "--column", "text", "--scores", "mark", "--peers", "torch"]
    assert main(["bench", "--encode", str(tiny_model), *words]) == 1
    assert "--scores: are those of pairs" in capsys.readouterr().err


def test_the_table_has_a_row_for_each_side() -> None:
    record = {
        "peer": "torch", "ours_ms": 500.0, "peer_ms": 2000.0, "ratio": 4.0, "texts": 10, "seq_len": 5, "batch": 4,
        "model": "m", "ours_agreement": {"cosine": 0.995}, "peer_agreement": {"cosine": 1.0}, "ours_changed": 0.0,
        "peer_changed": 0.5, "ours_model_mb": 50.0, "peer_model_mb": 90.0, "ours_file_mb": 40.0, "peer_file_mb": 91.0,
        "threads": 1, "target": "avx2", "provenance": {},
    }  # fmt: skip
    assert encode_rows([record])[1:] == [
        ("attnpress", "20.0", "", "0.9950", "0%", "50", "40"),
        ("torch", "5.0", "4.00", "1.0000", "50%", "90", "91"),
    ]
    record |= {"ratios": [3.9, 4.0, 4.25], "judged": 9}
    record["quality"] = {"measure": "Spearman", "float32": 0.8, "ours": 0.796, "peer": 0.8}
    twice = record | {"threads": 2, "ours_ms": 250.0, "ratio": 8.0, "ratios": [8.0, 8.0]}
    assert encode_rows([twice, record]) == [
        (
            "", "texts a second, 1 thread", "ours is faster, times, 1 thread", "texts a second, 2 threads",
            "ours is faster, times, 2 threads", "cosine", "Spearman, share of float32's", "changed by the batch",
            "peak memory, MB", "folder, MB",
        ),
        ("attnpress", "20.0", "", "40.0", "", "0.9950", "99.50%", "0%", "50", "40"),
        ("torch", "5.0", "4.00 (3.90 to 4.25)", "5.0", "8.00 (8.00 to 8.00)", "1.0000", "100.00%", "50%", "90", "91"),
    ]  # fmt: skip
    assert "Spearman of float32 0.8000, on 9 texts" in encode_caption([record])
