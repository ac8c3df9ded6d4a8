"""export: a finished run becomes a checked file and a record; what fails leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnpress.cli import main
from attnpress.config import DENSE, AttentionSpec, ConfigError, ProbsSpec, RunConfig, TensorSpec
from attnpress.export import ExportError, agreement, export_run
from attnpress.export.onnx import serve_onnx
from attnpress.export.run import example_batch
from attnpress.export.trace import check_trace, write_trace
from attnpress.files import MARKER, sha256_of
from attnpress.models.binding import bind
from attnpress.runs.finished import finished_model
from attnpress.training.calibration import calibrate
from tests.deployment.test_attention import logits, make_batch, tiny_bert

DOCS = Path(__file__).parents[2] / "docs"


def test_onnx(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "exported"
    assert main(["export", str(finished), "--to", "onnx", "--output", str(folder)]) == 0
    assert '"kind": "onnx"' in capsys.readouterr().out
    record = json.loads((folder / "export.json").read_text("utf-8"))
    assert record["files"] == {"model.onnx": sha256_of(folder / "model.onnx")}
    assert record["evaluation"]["rows"] == 80
    assert record["evaluation"]["difference"] <= 0.2
    assert record["evaluation"]["same_decisions"] == 1.0
    found = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert found.count("QuantizeLinear") == found.count("DequantizeLinear") == 8  # Q, K, V and P of two layers
    assert found.count("LessOrEqual") == 2  # the rule
    for rows, length in ((1, 3), (5, 17)):
        ids = torch.full((rows, length), 8)
        served = serve_onnx(folder / "model.onnx", threads=1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        batch = {name: batch[name] for name in batch if name in {port.name for port in _inputs(folder)}}
        assert served(**batch)["logits"].shape == (rows, 2)


def _inputs(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx").graph.input


def test_openvino(finished: Path, tiny_recipe: RunConfig, tmp_path: Path) -> None:
    record = export_run(finished, tiny_recipe, "openvino", tmp_path / "exported")
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == [
        MARKER,
        "export.json",
        "model.bin",
        "model.xml",
    ]
    assert record["evaluation"]["difference"] <= 0.2
    assert record["attention_products"] == {"expected": 4, "int8": 4}
    assert all(product["int8"] and product["layer_type"] == "MatMul" for product in record["execution_graph"])


def test_trace_opens_with_the_script_of_the_docs(finished: Path, tiny_recipe: RunConfig, tmp_path: Path) -> None:
    record = export_run(finished, tiny_recipe, "trace", tmp_path / "exported", rows=3)
    assert record["batch"][0] == 3
    (script,) = re.findall(r"```python\n(.*?)```", (DOCS / "trace.md").read_text("utf-8"), re.DOTALL)
    assert len(script.splitlines()) <= 12
    arguments = [sys.executable, "-c", script, str(tmp_path / "exported" / "trace.safetensors")]
    ran = subprocess.run(arguments, capture_output=True, text=True)
    assert "scores and sums agree" in ran.stdout, ran.stderr


def test_the_layout_in_the_docs_is_complete(tmp_path: Path) -> None:
    model = tiny_bert(AttentionSpec(sparsity=0.7, p=ProbsSpec(mode="unit"), smooth_key=True))
    write_trace(model, make_batch(5), tmp_path)
    layer = "bert.encoder.layer.1.attention.self."
    tensors = load_file(tmp_path / "trace.safetensors")
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "trace.md").read_text("utf-8"), re.MULTILINE)
    described = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {name.removeprefix(layer) for name in tensors if name.startswith(layer)} == described
    assert torch.equal(tensors["model.logits"], logits(model, make_batch(5)))


@pytest.mark.parametrize("name", ["acc", "keep", "p_codes", "code_sum", "weighted", "output", "v_codes"])
def test_a_changed_bit_is_found(name: str, tmp_path: Path) -> None:
    write_trace(tiny_bert(AttentionSpec(sparsity=0.7)), make_batch(5), tmp_path)
    file = tmp_path / "trace.safetensors"
    check_trace(file)
    with safe_open(file, "pt") as trace:
        header = trace.metadata()
    tensors = load_file(file)
    changed = tensors[f"bert.encoder.layer.1.attention.self.{name}"]
    first = changed.flatten()[0]
    changed.view(-1)[0] = ~first if changed.dtype == torch.bool else first + 1
    save_file(tensors, file, header)
    with pytest.raises(ExportError, match=r"bert\.encoder\.layer\.1"):
        check_trace(file)


TAILS = {
    "mean": AttentionSpec(sparsity=0.7, tail="mean"),
    "linear": AttentionSpec(sparsity=0.7, tail="linear", tail_rank=2),
    "whole": AttentionSpec(sparsity=0.7, tail="linear", tail_rank=512),
}


@pytest.mark.parametrize("tail", TAILS)
def test_a_trace_holds_the_tail(tail: str, tmp_path: Path) -> None:
    write_trace(tiny_bert(TAILS[tail]), make_batch(5), tmp_path)
    file = tmp_path / "trace.safetensors"
    with safe_open(file, "pt") as trace:
        header = trace.metadata()
    tensors = load_file(file)
    names = [name for name in tensors if "self.tail_" in name]
    assert any(name.endswith("tail_slope") for name in names) == (tail != "mean")
    assert any(name.endswith("tail_query") for name in names) == (tail == "linear")
    described = (DOCS / "trace.md").read_text("utf-8")
    assert all(f"`{name.rsplit('.', 1)[1]}`" in described for name in names)
    for name in names:
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[0] += 999
        save_file(changed, file, header)
        with pytest.raises(ExportError, match="not what the reference gives"):
            check_trace(file)


OTHER = AttentionSpec(rule="threshold", sparsity=0.5, v=TensorSpec(bits=4), p=ProbsSpec(mode="unit"))


def relayered(finished: Path, config: RunConfig, folder: Path, own: AttentionSpec) -> Path:
    """The finished run in a folder of its own, its second layer bound with another spec."""
    shutil.copytree(finished, folder)
    model, data = finished_model(finished, config)
    bind(model, config.attention, {"1": own})
    calibrate(model, [example_batch(data, 8)])
    model.save_pretrained(folder / "progressive")
    return folder


@pytest.mark.parametrize("own", [OTHER, DENSE], ids=["other", "dense"])
def test_layers_that_differ_are_exported_as_they_are(
    own: AttentionSpec, finished: Path, tiny_recipe: RunConfig, tmp_path: Path
) -> None:
    run = relayered(finished, tiny_recipe, tmp_path / "run", own)
    record = export_run(run, tiny_recipe, "onnx")
    assert record["evaluation"]["same_decisions"] == 1.0
    first, second = record["attention"].values()
    assert (first["rule"], second["rule"]) == ("relative", own.rule)
    assert [first["v"]["bits"], second["v"]["bits"]] == [8, own.v.bits]
    found = [node.op_type for node in onnx.load(run / "export" / "onnx" / "model.onnx").graph.node]
    assert found.count("QuantizeLinear") == (4 if own.is_dense else 8)


def test_a_trace_holds_the_spec_of_each_layer(finished: Path, tiny_recipe: RunConfig, tmp_path: Path) -> None:
    run = relayered(finished, tiny_recipe, tmp_path / "run", OTHER)
    export_run(run, tiny_recipe, "trace")  # checked from its own codes, each layer by its own spec
    with safe_open(run / "export" / "trace" / "trace.safetensors", "pt") as trace:
        header = trace.metadata()
    specs = json.loads(header["attention"])
    assert list(specs) == json.loads(header["layers"])
    assert [spec["p"]["mode"] for spec in specs.values()] == ["row", "unit"]


def test_a_trace_of_a_layer_without_integers_is_refused_by_its_name(
    finished: Path, tiny_recipe: RunConfig, tmp_path: Path
) -> None:
    run = relayered(finished, tiny_recipe, tmp_path / "run", DENSE)
    with pytest.raises(ExportError, match=r"layer\.1.*needs bits for all"):
        export_run(run, tiny_recipe, "trace")


def test_another_format_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "trace.safetensors", {"format": "1"})
    with pytest.raises(ExportError, match="format '1'"):
        check_trace(tmp_path / "trace.safetensors")


def test_a_file_that_predicts_otherwise_is_not_left_behind(
    finished: Path, tiny_recipe: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opposite(file: Path) -> agreement.Served:
        assert file.is_file()
        return agreement.Served(lambda inputs: [np.zeros((len(inputs["input_ids"]), 2), np.float32)], ["logits"])

    monkeypatch.setattr("attnpress.export.onnx.write_onnx", lambda _, __, folder: (folder / "model.onnx").touch())
    monkeypatch.setattr("attnpress.export.onnx.serve_onnx", opposite)
    with pytest.raises(ExportError, match=r"more than 0\.2 points apart on 80 rows"):
        export_run(finished, tiny_recipe, "onnx", tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_unfinished_runs_unknown_kinds_and_single_rows(tiny_recipe: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished compressed model"):
        export_run(tmp_path, tiny_recipe, "trace")
    with pytest.raises(ExportError, match="onnx, openvino, trace"):
        export_run(tmp_path, tiny_recipe, "tflite")
    with pytest.raises(ExportError, match="at least two"):
        export_run(tmp_path, tiny_recipe, "trace", rows=1)
