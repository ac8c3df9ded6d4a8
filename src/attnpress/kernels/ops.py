"""Compressed attention as one operation: validation, and an explicit choice of backend.

Backends compute the same integers (numerics, section 6):
    "cpu"        the compiled kernel, `torch.ops.attnpress.attention`: never holds an S x S matrix
    "reference"  `core.attention.integer_attention`: readable, any device, every rule, memory of S x S
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.attention import IntegerAttention, Scales, integer_attention
from attnpress.core.pruner import least_probability
from attnpress.kernels import cpu
from attnpress.kernels.cpu import BackendUnavailableError

LARGEST_HEAD = 256
NATIVE_RULES = ("relative", "threshold", "topk")
NATIVE_TAILS = ("none",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One way to run attention here: its name, whether it can run now, and the CPU targets it may use, best first."""

    name: str
    available: bool
    targets: tuple[str, ...] = ()
    active_target: str | None = None

    def describe(self) -> str:
        """One line for people."""
        if self.name == "reference":
            return "readable Python: any device, every rule, slow"
        if not self.available:
            return "the compiled kernel; not built here: make kernel"
        return f"the compiled kernel; targets {', '.join(self.targets)}; runs {self.active_target}"


def backends() -> list[Backend]:
    """All backends, for listings; nothing is built or chosen by asking."""
    if not cpu.is_built():
        return [Backend("cpu", available=False), Backend("reference", available=True)]
    return [
        Backend("cpu", True, tuple(cpu.supported_targets()), cpu.active_target()),
        Backend("reference", available=True),
    ]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    scales: Scales,
    cutoff: Tensor | None,
    spec: AttentionSpec,
    scaling: float,
    *,
    causal: bool = False,
    backend: str = "cpu",
) -> Tensor:
    """Compressed attention on the backend asked for, for inference.

    Args:
        query: float32, bfloat16 or float16 [B, Hq, Sq, D], D a multiple of 4 up to 256; any strides.
        key, value: [B, Hkv, Sk, D], Hq a multiple of Hkv.
        valid: bool broadcastable to [B, Hq, Sq, Sk], True where the query may attend to the key; None allows all.
        scales: static scales; Q has none with granularity "token".
        cutoff: float32 [Hq] (`pruner.fit_cutoff`), or None to prune nothing.
        spec: all four matrices quantized.
        scaling: factor of the scores, usually 1 / sqrt(D).
        causal: also keep each query from the keys after it; the last query sees all.
        backend: "cpu" or "reference".

    Returns:
        float32 [B, Hq, Sq, D], stored so that its transpose [B, Sq, Hq, D] is contiguous.

    Raises:
        ValueError: shapes, dtypes or options that the backend cannot take; the message names them.
        BackendUnavailableError: the backend cannot run here. Nothing falls back silently.
    """
    run = _BACKENDS.get(backend)
    if run is None:
        raise ValueError(f"backend {backend!r} does not exist; use one of {', '.join(_BACKENDS)}")
    return run(query, key, value, valid, scales, cutoff, spec, scaling, causal)


def attention_packed(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scales: Scales, cutoff: Tensor | None,
    spec: AttentionSpec, scaling: float, *, causal: bool = False, backend: str = "cpu",
) -> Tensor:  # fmt: skip
    """`attention` of sequences that lie end to end, each to itself alone: a batch without padding.

    Args:
        query: float [1, Hq, T, D], T tokens of all sequences together.
        key, value: float [1, Hkv, T, D].
        bounds: int64 [sequences + 1], from 0 to T, never falling: sequence i is tokens bounds[i] to bounds[i + 1].

    Returns:
        float32 [1, Hq, T, D], stored so that its transpose is contiguous; bit for bit what each sequence gives alone.

    Raises:
        ValueError, BackendUnavailableError: see `attention`.
    """
    _check_packed(query, key, bounds)
    if backend == "cpu":
        arguments = compiled_arguments(query, key, value, None, scales, cutoff, spec, scaling, causal)
        output: Tensor = torch.ops.attnpress.attention_packed(*arguments[:3], bounds, *arguments[4:])
        return output
    places = [slice(*pair) for pair in pairwise(bounds.tolist())]
    parts = [
        attention(
            query[:, :, at], key[:, :, at], value[:, :, at], None, scales, cutoff, spec, scaling,
            causal=causal, backend=backend,
        ).transpose(1, 2)
        for at in places if at.start < at.stop
    ]  # fmt: skip
    return torch.cat([query.new_empty(1, 0, *query.shape[1::2], dtype=torch.float32), *parts], 1).transpose(1, 2)


def check(spec: AttentionSpec, scales: Scales, head_dim: int, backend: str) -> None:
    """Raise now what `attention` would raise at its first call; see there."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; use one of {', '.join(_BACKENDS)}")
    if backend == "cpu":
        cpu.load()
        _check_spec(spec, scales)
        _check_head(head_dim)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scales: Scales, cutoff: Tensor | None,
    spec: AttentionSpec, scaling: float, causal: bool,
) -> Tensor:  # fmt: skip
    allowed = causal_pairs(query, key, valid) if causal else valid
    output = integer_attention(query, key, value, allowed, scales, cutoff, spec, scaling).output
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _compiled(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scales: Scales, cutoff: Tensor | None,
    spec: AttentionSpec, scaling: float, causal: bool,
) -> Tensor:  # fmt: skip
    arguments = compiled_arguments(query, key, value, valid, scales, cutoff, spec, scaling, causal)
    output: Tensor = torch.ops.attnpress.attention(*arguments)
    return output


_BACKENDS: dict[str, Callable[..., Tensor]] = {"cpu": _compiled, "reference": _reference}


def compiled_integers(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scales: Scales, cutoff: Tensor | None,
    spec: AttentionSpec, scaling: float, *, causal: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """The integers that the compiled kernel works with, by their names in `IntegerAttention`; holds S x S P codes.

    For tests, and to look into a kernel. Codes of keys that no query may attend to are 0: they are never made.
    """
    arguments = compiled_arguments(query, key, value, valid, scales, cutoff, spec, scaling, causal)
    names = ("q_codes", "k_codes", "v_codes", "row_max", "p_codes", "code_sum", "weighted", "output")
    return dict(zip(names, torch.ops.attnpress.attention_integers(*arguments), strict=True))


def compiled_arguments(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scales: Scales, cutoff: Tensor | None,
    spec: AttentionSpec, scaling: float, causal: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `torch.ops.attnpress.attention`, checked.

    Raises:
        ValueError: what the compiled kernel cannot take.
        BackendUnavailableError: it is not built.
    """
    if not torch.compiler.is_compiling():  # what is being compiled was loaded by deploy
        cpu.load()
    _check_spec(spec, scales)
    _check_tensors(query, key, value)
    if cutoff is not None and spec.rule == "threshold":
        cutoff = least_probability(cutoff)
    mode = "unit_renormalized" if spec.p.mode == "unit" and spec.p.renormalize else spec.p.mode
    q_scale = None if spec.q.granularity == "token" else scales.q
    return (
        _rows_contiguous(query), _rows_contiguous(key), _rows_contiguous(value), _four_dims(valid, key), causal,
        float(scaling), q_scale, scales.k, scales.v, cutoff, spec.rule, float(spec.sparsity), mode,
        spec.q.qmax, spec.k.qmax, spec.v.qmax, spec.p.qmax, spec.smooth_key, spec.q.power_of_two,
    )  # fmt: skip


def causal_pairs(query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
    """`valid` without the keys after each query, where the last query sees all; bool [.., Sq, Sk]."""
    rows, keys = query.shape[2], key.shape[2]
    before = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    return before if valid is None else valid & before


def _check_spec(spec: AttentionSpec, scales: Scales) -> None:
    if None in spec.bits.values():
        raise ValueError(f"backend 'cpu' multiplies integers: set bits for all of q, k, v and p; found {spec.bits}")
    if spec.rule not in NATIVE_RULES:
        raise ValueError(
            f"backend 'cpu' has no kernel for rule {spec.rule!r}, only for {', '.join(NATIVE_RULES)}; "
            "use backend 'reference'"
        )
    if spec.tail not in NATIVE_TAILS:
        raise ValueError(f"backend 'cpu' cannot run tail {spec.tail!r} yet; use backend='reference'")
    static = {"q": scales.q, "k": scales.k, "v": scales.v}
    if spec.q.granularity == "token":
        del static["q"]
    missing = [name for name, scale in static.items() if scale is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: no scale yet; run calibrate(model, batches) first")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dim() != 4 or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            raise ValueError(
                f"{name}: backend 'cpu' takes float32, bfloat16 or float16 [B, H, S, D] on the CPU, "
                f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    batch, heads, _, dim = query.shape
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != dim or heads % key.shape[1] != 0:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit together: "
            "key and value are [B, Hkv, Sk, D], with Hq a multiple of Hkv"
        )
    _check_head(dim)


def _check_packed(query: Tensor, key: Tensor, bounds: Tensor) -> None:
    if query.dim() != 4 or query.shape[0] != 1 or key.shape[2:] != query.shape[2:]:
        raise ValueError(
            f"packed tensors are [1, H, T, D] with as many keys as queries, found query {list(query.shape)}, "
            f"key {list(key.shape)}"
        )
    tokens = query.shape[2]
    # As plain numbers: comparing tensors takes longer than the attention of a few short sequences.
    places = bounds.tolist() if bounds.dtype == torch.int64 and bounds.dim() == 1 else []
    if not places or places != sorted(places) or (places[0], places[-1]) != (0, tokens):
        raise ValueError(f"bounds: int64 that rise from 0 to the number of tokens, {tokens}; found {bounds}")


def _check_head(dim: int) -> None:
    if dim % 4 != 0 or not 4 <= dim <= LARGEST_HEAD:
        raise ValueError(f"head size {dim}: backend 'cpu' takes multiples of 4 up to {LARGEST_HEAD}; use 'reference'")


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _four_dims(valid: Tensor | None, key: Tensor) -> Tensor | None:
    if valid is None:
        return None
    if valid.dtype != torch.bool or valid.dim() > 4:
        raise ValueError(f"valid: a bool mask of up to four dimensions, found {valid.dtype} {list(valid.shape)}")
    valid = valid[(None,) * (4 - valid.dim())]
    if valid.shape[-1] != key.shape[2]:
        valid = valid.expand(*valid.shape[:-1], key.shape[2])
    return _rows_contiguous(valid)


__all__ = [
    "Backend",
    "BackendUnavailableError",
    "IntegerAttention",
    "attention",
    "attention_packed",
    "backends",
    "check",
    "compiled_integers",
]
