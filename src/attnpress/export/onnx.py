"""ONNX: QuantizeLinear and DequantizeLinear on Q, K, V and P, with the pruning rule in the graph, for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from attnpress.export.agreement import Served
from attnpress.export.errors import require
from attnpress.export.graph import LONGEST, quantize_dequantize, trace_graph

FILE = "model.onnx"

SETTINGS = {"session.x64quantprecision": "1"}
"""Exact int8 products on x86 processors without VNNI, whose 16-bit sums would otherwise saturate."""

NOTES = (
    "Given the same query, key and value, codes, scores, keep masks and P codes are those of the contract, bit for bit "
    f"(finite inputs, up to {LONGEST} keys).",
    "On x86 without VNNI, run it with session.x64quantprecision 1, or 16-bit sums of 8-bit products saturate.",
    "Linear layers and layer norms are the runtime's own: their last bits differ, and a value on the edge between two "
    "codes may then take the other one.",
)


def write_onnx(model: nn.Module, batch: Mapping[str, Tensor], folder: Path) -> None:
    """Write `model.onnx` for any batch size and length.

    Args:
        model: bound and calibrated.
        batch: an example, see `trace_graph`.

    Raises:
        ExportError: packages are missing, or the model cannot be exported.
    """
    require("onnx", "onnx", "onnxscript")
    trace_graph(model, batch, quantize_dequantize).save(folder / FILE)


def serve_onnx(file: Path, threads: int = 0) -> Served:
    """Load the file in ONNX Runtime on the CPU.

    Args:
        threads: of the runtime; 0 uses its default.

    Raises:
        ExportError: ONNX Runtime is not installed.
    """
    require("onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return Served(lambda inputs: session.run(names, dict(inputs)), names)
