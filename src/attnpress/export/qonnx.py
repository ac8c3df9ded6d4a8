"""`--to qonnx`: the attention block of each layer as a QONNX graph with static scales, run by qonnx and verified.

It follows the reference, like `graph`. Q, K, V and P pass through QONNX's Quant nodes at scale 1, after a product with
the stored 1 / scale, as the contract requires. Shapes are fixed to those of the example batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.onnx import ops

from attnpress.core.attention import repeat_heads
from attnpress.core.call import AttentionCall
from attnpress.export.errors import ExportError, require
from attnpress.export.graph import OPSET, check_exportable, graph_attention
from attnpress.export.recording import record_batch
from attnpress.models.binding import attentions

MODEL, INPUTS = "layer{number:02d}.onnx", "layer{number:02d}.safetensors"
DOMAIN = "qonnx.custom_op.general"

NOTES = (
    "layerNN.onnx takes query, key, value [B, H, S, D] in floating point and a mask; layerNN.safetensors holds those "
    "of the batch it was made with, and the output of the reference.",
    "Run by qonnx, the codes of Q, K, V and P of every real row are those of the reference, bit for bit, and so is the "
    "output; checked before the files were left here.",
)


def quant_node(x: Tensor, dtype: torch.dtype, qmax: int) -> Tensor:
    """QONNX's Quant at scale 1: round half to even, `qmax` as its largest value."""
    signed = dtype.is_signed
    one, zero, bits = (
        torch.full((), float(value), device=x.device) for value in (1, 0, qmax.bit_length() + int(signed))
    )
    return ops.symbolic(
        f"{DOMAIN}::Quant",
        (x, one, zero, bits),
        {"signed": int(signed), "narrow": int(signed), "rounding_mode": "ROUND"},
        dtype=torch.float32,
        shape=x.shape,
        version=1,
    )


class _Block(nn.Module):
    """Attention of one call, with its scales and thresholds as constants."""

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.attend, self.made = graph_attention(quant_node), call

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
        """[B, Hq, S, D]."""
        return self.attend(self.made.with_(query=query, key=key, value=value, valid=valid))


def write_qonnx(model: nn.Module, batch: Mapping[str, Tensor], folder: Path) -> dict[str, int]:
    """Write the block of each layer, with the data that it was verified with.

    Args:
        model: bound and calibrated, on the CPU.
        batch: keyword arguments of its forward.

    Returns:
        Quant nodes of each layer, by name.

    Raises:
        ExportError: packages are missing, an option is not supported (`graph.check_exportable`), or qonnx does not
            reproduce the reference.
    """
    require("qonnx", "qonnx", "onnx", "onnxscript")
    check_exportable(model)
    recorded, found = record_batch(model, batch), {}
    for number, name in enumerate(attentions(model)):
        inputs = _inputs(recorded.calls[name])
        _write_block(name, recorded.calls[name], inputs, folder / MODEL.format(number=number))
        context = run_qonnx(folder / MODEL.format(number=number), {key: x.numpy() for key, x in inputs.items()})
        found[name] = _compare(name, context, recorded.layers[name])
        outputs = {"output": recorded.layers[name]["output"]}
        save_file({key: x.contiguous() for key, x in (inputs | outputs).items()}, folder / INPUTS.format(number=number))
    return found


def run_qonnx(file: Path, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Every tensor of a graph by name, computed by qonnx; the output is named "output".

    Args:
        file: a graph that `write_qonnx` wrote.
        inputs: by name.

    Raises:
        ExportError: qonnx is not installed.
    """
    require("qonnx", "qonnx")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of qonnx and its imports
        wrapped = ModelWrapper(str(file))
        context = execute_onnx(wrapped, dict(inputs), return_full_exec_context=True)
    quants = [context[node.output[0]] for node in wrapped.graph.node if node.op_type == "Quant"]
    return {**context, "quants": quants}


def _inputs(call: AttentionCall) -> dict[str, Tensor]:
    query, key, value, valid = call.query, call.key, call.value, call.valid
    pairs = torch.ones(1, 1, 1, 1, dtype=torch.bool) if valid is None else valid
    shape = len(query), pairs.shape[1], query.shape[2], key.shape[2]
    return {"query": query, "key": key, "value": value, "valid": pairs.expand(shape).contiguous()}


def _write_block(name: str, call: AttentionCall, inputs: dict[str, Tensor], file: Path) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about itself
        try:
            program = torch.onnx.export(
                _Block(call).eval(),
                (),
                kwargs=inputs,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=list(inputs),
                output_names=["output"],
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{name}: could not be traced into a graph: {error}") from error
    assert program is not None
    program.save(file)


def _compare(name: str, context: Mapping[str, Any], t: Mapping[str, Tensor]) -> int:
    """Compare codes and output with the reference on rows of real tokens; returns the number of Quant nodes."""
    heads, rows = t["q_codes"].shape[1], t["valid"].any(-1).expand(-1, t["q_codes"].shape[1], -1)
    k, v = (repeat_heads(t[part], heads) for part in ("k_codes", "v_codes"))
    expected = {"Q codes": t["q_codes"], "K codes": k.mT, "V codes": v, "P codes": t["p_codes"], "output": t["output"]}
    found = [torch.from_numpy(np.array(x)) for x in (*context["quants"], context["output"])]
    if len(found) != len(expected):
        raise ExportError(f"{name}: {len(found) - 1} Quant nodes in place of 4; please report it")
    for (what, reference), ours in zip(expected.items(), found, strict=True):
        a, b = (reference.float(), ours) if what in ("K codes", "V codes") else (reference.float()[rows], ours[rows])
        if not torch.equal(a, b):
            raise ExportError(f"{name}: qonnx gives other {what} than the reference, so nothing was written")
    return len(context["quants"])
