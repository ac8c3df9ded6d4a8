"""Attention alone, as a graph in its runtime: the reference's own numbers; and what cannot be said is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnpress.config import AttentionSpec, ProbsSpec, TensorSpec
from attnpress.export.errors import ExportError, require
from attnpress.export.graph import (
    OPSET,
    Coder,
    check_exportable,
    graph_attention,
    openvino_fake_quantize,
    quantize_dequantize,
)
from attnpress.export.onnx import serve_onnx
from attnpress.export.openvino import products, serve_openvino
from attnpress.kernels import cpu
from tests.core.factories import Call, make_call, make_spec
from tests.core.tails import with_tail
from tests.deployment.test_attention import tiny_bert

FOUR, BY_TOKEN = TensorSpec(bits=4), TensorSpec(bits=5, granularity="token")
CALLS: dict[str, Callable[[], Call]] = {
    "relative, row": lambda: make_call(make_spec(8, sparsity=0.8), 1, rows=24, keys=24, mask="padding"),
    "relative, unit, smooth": lambda: make_call(
        make_spec(8, sparsity=0.8, p=ProbsSpec(mode="unit"), smooth_key=True), 2, rows=9, keys=16, mask="pairs"
    ),
    "threshold, 4 bits, renormalized, GQA": lambda: make_call(
        make_spec(4, "threshold", 0.8, p=ProbsSpec(bits=4, mode="unit", renormalize=True)), 3, kv_heads=2, mask="pairs"
    ),
    "topk, Q by token, V by channel": lambda: make_call(
        make_spec(8, "topk", 0.7, q=BY_TOKEN, k=FOUR, v=TensorSpec(granularity="channel")), 4, keys=30, mask="pairs"
    ),
}
TAILED: dict[str, Callable[[], Call]] = {
    "mean": lambda: with_tail(make_call(make_spec(8, sparsity=0.9), 1, rows=24, keys=24, mask="padding"), "mean"),
    "linear, GQA": lambda: with_tail(
        make_call(make_spec(8, sparsity=0.9), 2, kv_heads=2, rows=9, keys=20, mask="pairs"), "linear", 3
    ),
    "linear, whole score, threshold": lambda: with_tail(
        make_call(make_spec(4, "threshold", 0.9), 3, keys=30, mask="causal"), "linear", 64
    ),
}


class Attention(nn.Module):
    """One call of the graph's attention, with everything but query, key, value and mask fixed."""

    def __init__(self, call: Call, coder: Coder) -> None:
        super().__init__()
        self.call, self.attend = call, graph_attention(coder)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
        call = self.call
        return self.attend(call.with_(query=query, key=key, value=value, valid=valid))


def write(call: Call, coder: Coder, file: Path) -> dict[str, Tensor]:
    """Export to `file` for any batch size, rows and keys; returns the inputs."""
    inputs = {"query": call.query, "key": call.key, "value": call.value, "valid": call.allowed()}
    keys = {0: "batch", 2: "keys"}
    shapes = {"query": {0: "batch", 2: "rows"}, "key": keys, "value": keys, "valid": {0: "batch", 2: "rows", 3: "keys"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Attention(call, coder).eval(), (), kwargs=inputs, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=list(inputs), output_names=["output"], dynamic_shapes=shapes,
        )  # fmt: skip
    assert program is not None
    program.save(file)
    return inputs


def within_64(call: Call) -> Call:
    """The same call with codes of K and V up to 64, whose products with two bytes up to 255 fit into 16 bits."""
    scales = call.scales
    assert scales.k is not None
    assert scales.v is not None
    return call.with_(scales=dataclasses.replace(scales, k=scales.k * 2, v=scales.v * 2))


@pytest.mark.parametrize("name", [*CALLS, *TAILED])
def test_onnx_runtime_gives_the_reference_bit_for_bit(name: str, tmp_path: Path) -> None:
    call = CALLS[name]() if name in CALLS else within_64(TAILED[name]())  # without VNNI its sums of two saturate
    inputs = write(call, quantize_dequantize, tmp_path / "attention.onnx")
    found = serve_onnx(tmp_path / "attention.onnx", threads=1)(**inputs)["output"]
    assert torch.equal(found, call.integer().output)


@pytest.mark.parametrize("codes", ["up to 64", "up to 127"])
def test_openvino_gives_the_reference_but_for_the_division_in_two_int8_products(codes: str, tmp_path: Path) -> None:
    if codes == "up to 127" and not cpu.has_vnni():
        pytest.skip("without VNNI, OpenVINO's own sums of such codes saturate in 16 bits")
    call = CALLS["relative, row"]()
    call = within_64(call) if codes == "up to 64" else call
    assert f"up to {call.integer().k_codes.abs().max()}" == f"up to {call.integer().v_codes.abs().max()}" == codes
    inputs = write(call, openvino_fake_quantize, tmp_path / "attention.onnx")
    served, compiled = serve_openvino(tmp_path / "attention.onnx", threads=1)
    # One code of V or P off would show as 1/127 or 1/255 of a value.
    torch.testing.assert_close(served(**inputs)["output"], call.integer().output, rtol=1e-6, atol=1e-6)
    found = products(compiled)
    assert [product.is_int8 for product in found] == [True, True], found


@pytest.mark.parametrize("name", ["mean", "linear, GQA"])
def test_openvino_has_tails_too(name: str, tmp_path: Path) -> None:
    call = within_64(TAILED[name]())
    inputs = write(call, openvino_fake_quantize, tmp_path / "attention.onnx")
    served, _ = serve_openvino(tmp_path / "attention.onnx", threads=1)
    # Its sums over a tail are of float32, not exact; a pair more or less in a tail would show far above this.
    torch.testing.assert_close(served(**inputs)["output"], call.integer().output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (AttentionSpec(v=TensorSpec(bits=None)), "needs bits"),
        (AttentionSpec(rule="mass", sparsity=0.5), "rule 'mass'"),
        (AttentionSpec(q=TensorSpec(granularity="token", power_of_two=True)), "power_of_two"),
        (AttentionSpec(p=ProbsSpec(bits=2, signed=True)), "signed"),
    ],
)
def test_what_operators_cannot_say_is_refused_with_its_module(spec: AttentionSpec, said: str) -> None:
    with pytest.raises(ExportError, match=rf"bert\.encoder\.layer\.0.*{said}"):
        check_exportable(tiny_bert(spec))


def test_openvino_refuses_topk() -> None:
    with pytest.raises(ExportError, match="only relative, threshold"):
        check_exportable(tiny_bert(AttentionSpec(rule="topk", sparsity=0.5)), "openvino")


def test_an_unbound_model_is_refused() -> None:
    with pytest.raises(ExportError, match="no compressed attention"):
        check_exportable(nn.Linear(2, 2))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> Any:
        return None if name == "onnxruntime" else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ExportError, match=r"onnxruntime.*attnpress\[onnx\]"):
        require("onnx", "onnx", "onnxruntime")
