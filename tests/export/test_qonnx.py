"""QONNX: the attention block, run by qonnx, is the reference bit for bit, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attnpress.config import AttentionSpec, ProbsSpec, TensorSpec
from attnpress.export import ExportError
from attnpress.export.qonnx import run_qonnx, write_qonnx
from tests.deployment.test_attention import make_batch, tiny_bert
from tests.export.factories import LAYERS, record

pytest.importorskip("qonnx")
onnx = pytest.importorskip("onnx")

FOUR = TensorSpec(bits=4)
SPECS = {
    "8 bits": AttentionSpec(sparsity=0.7),
    "few bits": AttentionSpec(
        sparsity=0.5, q=FOUR, k=TensorSpec(bits=3, granularity="tensor"), v=FOUR, p=ProbsSpec(bits=5), smooth_key=True
    ),
    "unit": AttentionSpec(sparsity=0.7, rule="threshold", p=ProbsSpec(mode="unit", renormalize=True)),
    "signed, tail mean": AttentionSpec(sparsity=0.7, p=ProbsSpec(signed=True), tail="mean"),
    "tail linear": AttentionSpec(sparsity=0.7, tail="linear", tail_rank=2),
}


@pytest.mark.parametrize("name", SPECS)
def test_qonnx_gives_the_bits_of_the_reference(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    assert write_qonnx(tiny_bert(spec), make_batch(5), tmp_path) == dict.fromkeys(LAYERS, 4)
    graph = onnx.load(tmp_path / "layer01.onnx").graph
    quants = [node for node in graph.node if node.op_type == "Quant"]
    assert [node.domain for node in quants] == ["qonnx.custom_op.general"] * 4
    stored = load_file(tmp_path / "layer01.safetensors")
    inputs = {port.name: stored[port.name].numpy() for port in graph.input}
    found = run_qonnx(tmp_path / "layer01.onnx", inputs)
    rows = record(spec)[0].layers[LAYERS[1]]["valid"].any(-1).expand(-1, 2, -1)
    assert torch.equal(torch.from_numpy(np.array(found["output"]))[rows], stored["output"][rows])
    widths = [float(found[node.input[3]]) for node in quants]
    wide = spec.p.qmax.bit_length()
    assert sorted(widths) == sorted([*(float(spec.bits[each] or 0) for each in "qkv"), float(wide)])


def test_other_bits_are_not_taken_for_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(file: Path, inputs: dict[str, np.ndarray]) -> dict[str, object]:
        found = run_qonnx(file, inputs)
        found["quants"][3] = found["quants"][3] + 1
        return found

    monkeypatch.setattr("attnpress.export.qonnx.run_qonnx", other)
    with pytest.raises(ExportError, match="qonnx gives other P codes"):
        write_qonnx(tiny_bert(SPECS["8 bits"]), make_batch(5), tmp_path)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (AttentionSpec(sparsity=0.7, rule="nm"), "rule 'nm'"),
        (AttentionSpec(sparsity=0.7, predictor_bits=4), "a predicted mask"),
        (AttentionSpec(sparsity=0.7, rule="mass"), "rule 'mass'"),
    ],
)
def test_what_a_graph_cannot_say_is_refused(spec: AttentionSpec, word: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=word):
        write_qonnx(tiny_bert(spec), make_batch(5), tmp_path)
