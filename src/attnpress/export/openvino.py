"""OpenVINO: an IR whose attention products run in int8 on the CPU plugin, and its execution graph."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attnpress.export.agreement import Served
from attnpress.export.errors import require
from attnpress.export.graph import LONGEST, openvino_fake_quantize, trace_graph

FILE = "model.xml"
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}
"""On processors with bf16, the plugin would round the integer scores to 8 bits by default."""

INT8 = ("i8", "u8")

NOTES = (
    "Run it with INFERENCE_PRECISION_HINT f32: integer scores do not survive bf16.",
    "Given the same query, key and value, codes, scores, keep masks and P codes are those of the contract on "
    f"processors with 8-bit dot products (finite inputs, up to {LONGEST} keys).",
    "The last division may differ in its last bits; K smoothing takes its mean in float32 instead of float64.",
    "Linear layers and layer norms are the plugin's own: their last bits differ, and a value on the edge between two "
    "codes may then take the other one.",
    "The pruning rule needs the row maximum (or total) and the probabilities at once, so the plugin does not fuse the "
    "two products of a layer into one kernel: they run as two int8 products with element-wise work between them.",
)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two activations in the plugin's execution graph, with its precision on this machine."""

    name: str
    layer_type: str
    precision: str
    inputs: tuple[str, ...]
    kernel: str

    @property
    def is_int8(self) -> bool:
        """True if both operands are bytes."""
        return all(kind in INT8 for kind in self.inputs[:2]) and self.precision in INT8


def write_openvino(model: nn.Module, batch: Mapping[str, Tensor], folder: Path) -> None:
    """Write `model.xml` and `model.bin` for any batch size and length.

    Args:
        model: bound and calibrated.
        batch: an example, see `trace_graph`.

    Raises:
        ExportError: packages are missing, or the model cannot be exported.
    """
    require("openvino", "openvino", "onnx", "onnxscript")
    import openvino

    program = trace_graph(model, batch, openvino_fake_quantize, "openvino")
    with tempfile.TemporaryDirectory() as scratch:
        program.save(Path(scratch) / "model.onnx")
        converted = openvino.Core().read_model(Path(scratch) / "model.onnx")
        openvino.save_model(converted, folder / FILE, compress_to_fp16=False)  # scales keep full precision


def serve_openvino(file: Path, threads: int = 0) -> tuple[Served, Any]:
    """Compile the IR for the CPU. Also returns the compiled model for `products`, complete after its first run.

    Raises:
        ExportError: OpenVINO is not installed.
    """
    require("openvino", "openvino")
    import openvino

    compiled = openvino.Core().compile_model(file, "CPU", {**SETTINGS, "INFERENCE_NUM_THREADS": threads})
    names = [output.get_any_name() for output in compiled.outputs]

    def infer(inputs: Mapping[str, Any]) -> list[Any]:
        found = compiled(dict(inputs), share_outputs=False)
        return [found[output] for output in compiled.outputs]

    return Served(infer, names), compiled


def products(compiled: Any) -> list[Product]:
    """Products of two activations in the execution graph; products with constant weights have another layer type."""
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        kind, origin = (facts[key].astype(str) if key in facts else "" for key in ("layerType", "originalLayersNames"))
        if kind == "MatMul" or (kind == "Subgraph" and "matmul" in origin.lower()):
            inputs = tuple(port.get_element_type().get_type_name() for port in node.inputs())
            precision, kernel = (facts[key].astype(str) for key in ("runtimePrecision", "primitiveType"))
            found.append(Product(node.get_friendly_name(), kind, precision, inputs, kernel))
    return found
