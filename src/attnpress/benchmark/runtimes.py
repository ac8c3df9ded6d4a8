"""Whole int8 models in other runtimes: ONNX Runtime with dynamic ranges, OpenVINO quantized by NNCF.

Files are written in one process and timed in another, so that writing them does not count as memory.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnpress.benchmark.turns import Prepared

OPSET = 21


@dataclass(frozen=True)
class Session:
    """A graph that is ready to run.

    Attributes:
        run: function from tensors by name, of any batch size and length, to the outputs.
        facts: reported by the runtime.
    """

    run: Callable[[Mapping[str, Tensor]], Any]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Runtime:
    """A peer that runs a file.

    Attributes:
        extra: of attnpress, which installs `packages`.
        file: below the folder of the side.
        write: writes that file for a float32 model and calibration inputs.
        session: opens that file, for a number of threads.
    """

    extra: str
    packages: tuple[str, ...]
    file: str
    write: Callable[[nn.Module, Mapping[str, Tensor], Path], None]
    session: Callable[[Path, int], Session]

    def serve(self, file: Path, inputs: Mapping[str, Tensor], threads: int) -> Prepared:
        """Run the graph in that file repeatedly on the same inputs."""
        session = self.session(file, threads)
        return Prepared(lambda: session.run(inputs), session.facts)


def export(model: nn.Module, inputs: Mapping[str, Tensor], file: Path) -> None:
    """Write a model as ONNX for any batch size and length; `inputs` give the names and dtypes of its arguments."""
    example = {name: torch.ones(2, 8, dtype=x.dtype) for name, x in inputs.items()}  # 1 would become a constant
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about itself
        program = torch.onnx.export(
            model,
            (),
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=list(example),
            dynamic_shapes={name: {0: "batch", 1: "length"} for name in example},
        )
    assert program is not None
    program.save(file)


def _write_onnxruntime(model: nn.Module, inputs: Mapping[str, Tensor], file: Path) -> None:
    """Int8 weights per output, dynamic activations: the recipe of the runtime's documentation."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as scratch:
        export(model, inputs, Path(scratch) / "model.onnx")
        quantize_dynamic(Path(scratch) / "model.onnx", file, per_channel=True, weight_type=QuantType.QInt8)


def _open_onnxruntime(file: Path, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # no spinning in other sides' turns
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    known = {each.name for each in session.get_inputs()}

    def run(inputs: Mapping[str, Tensor]) -> Any:
        return session.run(None, {name: x.numpy() for name, x in inputs.items() if name in known})

    return Session(run, {"threads": threads})


def _write_openvino(model: nn.Module, inputs: Mapping[str, Tensor], file: Path) -> None:
    """NNCF's post-training quantization for transformers, with ranges from the inputs."""
    _keep_to_ourselves()
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        export(model, inputs, Path(scratch) / "model.onnx")
        graph = openvino.Core().read_model(Path(scratch) / "model.onnx")
        shown = nncf.Dataset([{name: x.numpy() for name, x in inputs.items()}])
        quantized = nncf.quantize(graph, shown, model_type=nncf.ModelType.TRANSFORMER)
        openvino.save_model(quantized, file)


def _open_openvino(file: Path, threads: int) -> Session:
    """Uses the plugin's default precision for operations that are not int8, and memory shared with the caller."""
    _keep_to_ourselves()
    import openvino

    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()
    known = {name for each in compiled.inputs for name in each.get_names()}
    facts = {name: str(compiled.get_property(name)) for name in ("INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT")}

    def run(inputs: Mapping[str, Tensor]) -> Any:
        arrays = {name: x.numpy() for name, x in inputs.items() if name in known}
        return request.infer(arrays, share_inputs=True, share_outputs=True)

    return Session(run, facts)


def _keep_to_ourselves() -> None:
    os.environ.setdefault("CI", "true")  # otherwise importing it sends telemetry
    os.environ.setdefault("NNCF_CI", "1")


RUNTIMES = {
    "onnxruntime-int8": Runtime(
        "onnx", ("onnx", "onnxruntime", "onnxscript"), "model.onnx", _write_onnxruntime, _open_onnxruntime
    ),
    "openvino-int8": Runtime(
        "openvino", ("nncf", "onnx", "onnxscript", "openvino"), "model.xml", _write_openvino, _open_openvino
    ),
}
"""Peers of whole models, by name."""
