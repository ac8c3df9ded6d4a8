"""Sides of a comparison of attention: ours, existing implementations, and the bare integer product.

Each function is called in the process of its side (see `turns`) with a file of `problem.save_problem`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnpress.benchmark.machine import instructions
from attnpress.benchmark.problem import Problem, load_problem, without_tail
from attnpress.benchmark.turns import Prepared, Run, take_turn
from attnpress.core.attention import repeat_heads
from attnpress.core.quantizer import quantize
from attnpress.kernels import cpu, ops

BLOCKS = (math.inf, 512, 256)
"""Rows and keys per product: a call has a fixed cost, and large results leave the cache."""


def prepare(name: str, file: str, threads: int) -> Prepared:
    """Prepare a side by name: a peer of `PEERS`, "ours" or "product"."""
    torch.set_num_threads(1 if name == "openvino" else threads)
    problem = load_problem(Path(file))
    if name == "openvino":
        return _openvino(problem, threads)
    facts = {"instructions": instructions(), "threads": torch.get_num_threads()}
    if name == "ours":
        facts["target"] = cpu.active_target()
    return Prepared((_TORCH | _OURS)[name](problem), facts)


def _ours(problem: Problem) -> Run:
    return lambda: ops.attention(problem.call)


def _untailed(problem: Problem) -> Run:
    return _ours(without_tail(problem))


def _sdpa(problem: Problem, dtype: torch.dtype = torch.float32) -> Run:
    q, k, v = (x.to(dtype) for x in _operands(problem))
    mask, scaling = problem.call.valid, problem.call.scaling
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


def _sdpa_bf16(problem: Problem) -> Run:
    return _sdpa(problem, torch.bfloat16)


def _eager(problem: Problem) -> Run:
    q, k, v = _operands(problem)
    bias, scaling = _bias(problem.call.valid), problem.call.scaling
    if bias is None:
        return lambda: torch.softmax(q @ k.mT * scaling, -1) @ v
    return lambda: torch.softmax(q @ k.mT * scaling + bias, -1) @ v


def _product(problem: Problem) -> Run:
    """Integer Q K^T only, by torch._int_mm in the fastest of a few blockings."""
    query, key, _ = _operands(problem)
    length, spec = query.shape[2], problem.call.spec
    q_codes, k_codes = (
        quantize(x, x.abs().amax() / bound, bound).to(torch.int8).contiguous().flatten(0, 1)
        for x, bound in ((query, spec.q.qmax), (key, spec.k.qmax))
    )
    runs = [_blocked_product(q_codes, k_codes, int(min(block, length))) for block in BLOCKS]
    return min(runs, key=lambda run: min(take_turn(run, 0.05)))


def _blocked_product(query: Tensor, key: Tensor, block: int) -> Run:
    pairs = [
        (rows, keys.mT) for q, k in zip(query, key, strict=True) for rows in q.split(block) for keys in k.split(block)
    ]
    results = {(len(a), b.shape[1]): torch.empty(len(a), b.shape[1], dtype=torch.int32) for a, b in pairs}

    def run() -> Any:
        for a, b in pairs:
            torch._int_mm(a, b, out=results[len(a), b.shape[1]])
        return results

    return run


def _openvino(problem: Problem, threads: int) -> Prepared:
    """Int8 attention as fused by OpenVINO's CPU plugin: FakeQuantize on Q, K, V and P.

    Inputs are contiguous and shared, so that nothing is copied.
    """
    os.environ.setdefault("CI", "true")  # otherwise importing it sends telemetry
    import openvino as ov

    arrays = [x.contiguous().numpy() for x in _operands(problem)]
    bias = _bias(problem.call.valid)
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(_openvino_graph(problem, arrays, bias), "CPU", options)
    inputs = [*arrays, *([] if bias is None else [bias.numpy()])]
    request = compiled.create_infer_request()
    return Prepared(
        lambda: request.infer(inputs, share_inputs=True, share_outputs=True),
        {"executed": executed(compiled), "threads": compiled.get_property("INFERENCE_NUM_THREADS")},
    )


def _openvino_graph(problem: Problem, arrays: list[Any], bias: Tensor | None) -> Any:
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    def constant(value: float) -> Any:
        return op.constant(np.array(value, np.float32))

    def quantized(x: Any, low: float, high: float, levels: int) -> Any:
        bounds = [constant(bound) for bound in (low, high, low, high)]
        return op.fake_quantize(x, *bounds, levels)

    inputs = [op.parameter(array.shape, np.float32) for array in arrays]
    limits = [float(abs(array).max()) for array in arrays]
    q, k, v = (quantized(x, -limit, limit, 255) for x, limit in zip(inputs, limits, strict=True))
    scores = op.multiply(op.matmul(q, k, False, True), constant(problem.call.scaling))
    if bias is not None:
        inputs.append(op.parameter(list(bias.shape), np.float32))
        scores = op.add(scores, inputs[-1])
    probs = quantized(op.softmax(scores, 3), 0.0, 1.0, 256)
    return ov.Model([op.matmul(probs, v, False, False)], inputs)


def executed(compiled: Any) -> list[str]:
    """Nodes of OpenVINO's execution graph: kind and primitive, such as "Subgraph jit_avx512_i8".

    If attention is fused to int8, it is one such subgraph besides the quantization of Q, K and V. Otherwise MatMul and
    Softmax are separate nodes.
    """
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    named = [(node["layerType"].astype(str), node["primitiveType"].astype(str)) for node in nodes]
    return [f"{kind} {primitive}" for kind, primitive in named if kind not in ("Input", "Output")]


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V in float32, with K and V repeated for grouped queries, for peers."""
    shape = problem.call.query.shape
    query, key, value = (x.float() for x in (problem.call.query, problem.call.key, problem.call.value))
    return query, repeat_heads(key, shape[1]).expand(shape), repeat_heads(value, shape[1]).expand(shape)


def _bias(valid: Tensor | None) -> Tensor | None:
    """A mask as an additive bias: 0, or the smallest float32."""
    if valid is None:
        return None
    return torch.zeros(valid.shape).masked_fill(~valid, torch.finfo(torch.float32).min)


_TORCH: dict[str, Callable[[Problem], Run]] = {"sdpa": _sdpa, "sdpa-bf16": _sdpa_bf16, "eager": _eager}
UNTAILED = "no-tail"
"""Our own kernel on the same call without its tail."""

_OURS: dict[str, Callable[[Problem], Run]] = {"ours": _ours, "product": _product, UNTAILED: _untailed}

PEERS = (*_TORCH, "openvino")
