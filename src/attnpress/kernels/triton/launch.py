"""Start the kernels of `sweeps` for one call: buffers, strides, tile sizes.

Buffers hold the codes of K and V, three int32 per mask row, and the output. Memory is linear in the sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from attnpress.config.rules import RULES
from attnpress.core.arguments import check_tensors, check_values, misfit, pair_mask
from attnpress.core.quantizer import smooth_key
from attnpress.core.rules import rules_of
from attnpress.kernels import head_size
from attnpress.kernels.slices import smoothed_key
from attnpress.kernels.triton.sweeps import attention_kernel, pack_kernel, span_kernel

NARROWEST = 32
"""Codes that a tensor core multiplies at once; smaller heads are padded with zeros."""

SIGNED = 127
"""Largest code that fits a signed byte."""

MODES = ("row", "unit", "unit_renormalized")

SPAN = 32 if triton.knobs.runtime.interpret else 1024
"""Mask bytes that `span_kernel` reads at a time; few in the interpreter, so that small masks need several reads."""


@dataclass(frozen=True)
class KernelCall:
    """Validated arguments of `torch.ops.attnpress.attention_gpu`; see `ops.attention`.

    Attributes:
        query, key, value: float [B, Hq or Hkv, S, D], any strides.
        valid: bool [B or 1, Hq or 1, Sq or 1, Sk], or None.
        q_scale: float32 [1, 1 or Hq, 1, 1]; None if each row has its own.
        k_scale, v_scale: float32 [1, 1 or Hkv, 1, 1]; V also [.., D].
        cutoff: float32 [Hq], theta for rule "threshold"; None prunes nothing.
        mode: "row", "unit" or "unit_renormalized".
        bounds: int64 [sequences + 1] of packed sequences, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    causal: bool
    scaling: float
    q_scale: Tensor | None
    k_scale: Tensor
    v_scale: Tensor
    cutoff: Tensor | None
    rule: str
    sparsity: float
    mode: str
    q_max: int
    k_max: int
    v_max: int
    p_max: int
    smooth_key: bool
    power_of_two: bool
    bounds: Tensor | None = None

    def check(self) -> None:
        """Refuse arguments with which kernels would access memory outside their tensors, or would not terminate.

        Raises:
            ValueError: with the wording of the reference, if it refuses the same.
        """
        query, key, value = self.query, self.key, self.value
        check_tensors(query, key, value)
        if key.shape != value.shape or query.shape[3] > head_size.LARGEST:
            raise misfit(query, key, value)
        scales = {"q": self.q_scale, "k": self.k_scale, "v": self.v_scale}
        check_values(query, key, value, scales, self.cutoff, self.scaling)
        mask = pair_mask(self.valid, query, key)
        if mask is not None and self.valid is not None and mask.shape != self.valid.shape:
            raise ValueError("valid: a mask of four dimensions, the last as long as the keys, is needed")
        if self.rule not in rules_of("gpu") or self.mode not in MODES or not 0 <= self.sparsity < 1:
            raise ValueError(f"the kernel has no rule {self.rule!r} with mode {self.mode!r}, sparsity {self.sparsity}")
        if not all(1 <= top <= SIGNED for top in (self.q_max, self.k_max, self.v_max)) or not 1 <= self.p_max <= 255:
            raise ValueError("the largest code must be 1 to 127, for P 1 to 255")
        if self.bounds is not None and (self.bounds.dtype != torch.int64 or self.bounds.dim() != 1):
            raise ValueError(f"bounds: int64 [sequences + 1] is needed, found {self.bounds.dtype}")


@dataclass(frozen=True)
class Tiles:
    """Rows and keys per program and step, number of warps, and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """A kernel and its arguments by name, for `programs` programs."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tiles: Tiles

    def options(self) -> dict[str, Any]:
        """Compile options: products and sums must not be fused (numerics, section 6)."""
        return {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages, "enable_fp_fusion": False}

    def start(self) -> None:
        """Enqueue the kernel on the device."""
        self.kernel[(self.programs,)](**self.arguments, **self.options())


def attend(call: KernelCall) -> Tensor:
    """Compute attention; float32 [B, Hq, Sq, D], stored so that its transpose is contiguous."""
    query, keys = call.query, call.key.shape[2]
    if query.numel() == 0 or keys == 0:
        return _room(query).zero_()
    launches, found = prepare(call)
    _start(launches, query)
    return found["output"]


def integers(call: KernelCall) -> dict[str, Tensor]:
    """The integers of a call, by their names in `core.attention.IntegerAttention`; for tests, with S x S P codes."""
    launches, found = prepare(call, integers=True)
    _start(launches, call.query)
    keys, dim = call.key.shape[2:]
    packed = {"k_codes": found["k_codes"][:, :, :keys, :dim], "v_codes": found["v_codes"].mT[:, :, :keys, :dim]}
    sums = {name: found[name].long() for name in ("code_sum", "weighted")}
    return found | packed | sums


def _start(launches: list[Launch], query: Tensor) -> None:
    with torch.cuda.device_of(query):
        for launch in launches:
            launch.start()


def prepare(call: KernelCall, *, integers: bool = False) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches of a call, in order, and the tensors that they fill, by name.

    Args:
        call: with at least one row and one key.
        integers: also write the tensors that tests compare.
    """
    query, key = call.query, call.key
    (batch, heads, rows, dim), (kv_heads, keys) = query.shape, key.shape[1:3]
    tiles, width = _tiles(rows, dim), max(NARROWEST, triton.next_power_of_2(dim))
    parts = triton.cdiv(keys, tiles.keys)
    found = {
        "output": _room(query),
        "k_codes": key.new_empty(batch, kv_heads, parts * tiles.keys, width, dtype=torch.int8),
        "v_codes": key.new_empty(batch, kv_heads, width, parts * tiles.keys, dtype=torch.int8),
    }
    if call.p_max > SIGNED:
        found["v_sums"] = key.new_empty(batch, kv_heads, parts, width, dtype=torch.int32)
    if integers:
        found |= _integer_outputs(query, keys)
    spans, launches = _spans(call)
    sizes = {"DIM": dim, "WIDTH": width, "BLOCK_N": tiles.keys}
    launches += [
        Launch(pack_kernel, batch * kv_heads * parts, _pack_arguments(call, found, parts) | sizes, tiles),
        Launch(
            attention_kernel, triton.cdiv(rows, tiles.rows) * batch * heads,
            _attention_arguments(call, found, spans, parts) | sizes | {"BLOCK_M": tiles.rows, "INTEGERS": integers},
            tiles,
        ),
    ]  # fmt: skip
    return launches, found


def _tiles(rows: int, dim: int) -> Tiles:
    if triton.knobs.runtime.interpret:  # small ones, so that small shapes have several
        return Tiles(16, 32, 4, 1)
    return Tiles(64, 64, 4, 3) if rows <= 64 and dim <= 128 else Tiles(128, 64, 8, 3 if dim <= 128 else 2)


def _room(query: Tensor) -> Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty(batch, rows, heads, dim, dtype=torch.float32).transpose(1, 2)


def _integer_outputs(query: Tensor, keys: int) -> dict[str, Tensor]:
    each = query.shape[:3]
    return {
        "q_codes": query.new_empty(query.shape, dtype=torch.int8),
        "row_max": query.new_empty(*each, 1, dtype=torch.int32),
        "p_codes": query.new_zeros(*each, keys, dtype=torch.uint8),  # tiles outside all spans are skipped
        "code_sum": query.new_empty(*each, 1, dtype=torch.int32),
        "weighted": query.new_empty(query.shape, dtype=torch.int32),
    }


def _spans(call: KernelCall) -> tuple[dict[str, Tensor], list[Launch]]:
    """Per mask row: first valid key, end, whether there are holes; and the launches that compute them."""
    if call.bounds is not None:
        bounds = call.bounds.to(call.query.device).clamp(0, call.key.shape[2])
        own = torch.searchsorted(bounds, torch.arange(call.query.shape[2], device=bounds.device), right=True)
        own = own.clamp(1, bounds.numel() - 1)
        low, high = (bounds[place].int().view(1, 1, -1) for place in (own - 1, own))
        return {"low": low, "high": high}, []
    if call.valid is None:
        return {}, []
    mask = call.valid.view(torch.uint8)
    shape, keys = mask.shape[:3], mask.shape[3]
    names = ("low", "high", "holes")
    spans = {name: torch.empty(shape, dtype=torch.int32, device=mask.device) for name in names} | {"mask": mask}
    arguments = {"mask": mask, **{name: spans[name] for name in names}, **_strides("mask", mask, "bhsk")}
    sizes = {"heads": shape[1], "rows": shape[2], "keys": keys, "BLOCK": SPAN}
    return spans, [Launch(span_kernel, shape.numel(), arguments | sizes, Tiles(1, SPAN, 4, 1))]


def _pack_arguments(call: KernelCall, found: dict[str, Tensor], parts: int) -> dict[str, Any]:
    key = call.key
    if call.smooth_key:
        key = _smoothed(call)
    return {
        "key": key, "value": call.value, "k_codes": found["k_codes"], "v_codes": found["v_codes"],
        "v_sums": found.get("v_sums", found["k_codes"]), "k_scale": call.k_scale, "v_scale": call.v_scale,
        "k_max": float(call.k_max), "v_max": float(call.v_max),
        **_strides("k", key, "bhsd"), **_strides("v", call.value, "bhsd"), **_scale_strides(call),
        "kv_heads": key.shape[1], "keys": key.shape[2], "tiles": parts, "SHIFTED": "v_sums" in found,
    }  # fmt: skip


def _attention_arguments(
    call: KernelCall, found: dict[str, Tensor], spans: dict[str, Tensor], parts: int
) -> dict[str, Any]:
    query, rule = call.query, _rule(call)
    counts = rule != "none" and RULES[rule].counts
    heads, rows, keys = query.shape[1], query.shape[2], call.key.shape[2]
    unused = found["k_codes"]  # placeholder that the kernel does not read
    q_scale = call.k_scale if call.q_scale is None else call.q_scale
    outputs = {f"{name}_out": found.get(name, unused) for name in _INTEGERS}
    farthest = 2 * call.q_max * call.k_max * query.shape[3]
    return {
        "query": query, "k_codes": found["k_codes"], "v_codes": found["v_codes"],
        "v_sums": found.get("v_sums", unused), "output": found["output"],
        "q_scale": q_scale, "k_scale": call.k_scale, "v_scale": call.v_scale,
        "cutoff": call.k_scale if call.cutoff is None else call.cutoff,
        "kept_of": _kept_of(call.sparsity, keys, query.device) if counts else unused,
        **{name: spans.get(name, unused) for name in ("low", "high", "holes", "mask")}, **outputs,
        "scaling": float(call.scaling), "q_max": float(call.q_max), **_strides("q", query, "bhsd"),
        "q_scale_h": _stride(q_scale, 1), **_scale_strides(call),
        **_strides("span", spans.get("low"), "bhs"), **_strides("mask", spans.get("mask"), "bhsk"),
        "heads": heads, "group": heads // call.key.shape[1], "rows": rows, "keys": keys, "tiles": parts,
        "RULE": rule, "MODE": call.mode.partition("_")[0], "RENORMALIZE": call.mode.endswith("renormalized"),
        "P_MAX": call.p_max, "TOKEN": call.q_scale is None, "POWER_OF_TWO": call.power_of_two,
        "SPANS": "low" in spans, "BYTES": "mask" in spans, "CAUSAL": call.causal,
        "SHIFTED": "v_sums" in found, "BITS": farthest.bit_length() if counts else 0,
    }  # fmt: skip


_INTEGERS = ("q_codes", "row_max", "p_codes", "code_sum", "weighted")


def _rule(call: KernelCall) -> str:
    """The rule to use; "none" if it keeps all pairs."""
    prunes = call.sparsity > 0 if RULES[call.rule].counts else call.cutoff is not None
    return call.rule if prunes else "none"


def _kept_of(sparsity: float, keys: int, device: torch.device) -> Tensor:
    """Keys that rule "topk" keeps of 0 to `keys` valid ones, rounded like `core.rules.topk`; int32 [keys + 1]."""
    counts = torch.arange(keys + 1, dtype=torch.float64, device=device)
    return torch.round((1.0 - sparsity) * counts).clamp(min=1).int()


def _smoothed(call: KernelCall) -> Tensor:
    """K minus its mean over the keys of its sequence that some row sees."""
    if call.bounds is None:
        return smoothed_key(call.query, call.key, call.valid, call.causal)
    places = call.bounds.tolist()
    return torch.cat([smooth_key(call.key[:, :, begin:end], None) for begin, end in pairwise(places)], 2)


def _scale_strides(call: KernelCall) -> dict[str, int]:
    return {
        "k_scale_h": _stride(call.k_scale, 1),
        "v_scale_h": _stride(call.v_scale, 1),
        "v_scale_d": _stride(call.v_scale, 3),
    }


def _strides(name: str, x: Tensor | None, dims: str) -> dict[str, int]:
    """Strides by dimension name; 0 for a broadcast dimension."""
    return {f"{name}_{dim}": 0 if x is None else _stride(x, place) for place, dim in enumerate(dims)}


def _stride(x: Tensor, dim: int) -> int:
    return 0 if x.shape[dim] == 1 else x.stride(dim)
