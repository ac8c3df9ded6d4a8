"""Compressed attention as one operation, with validation and an explicit choice of backend.

All backends compute the same integers (numerics, section 6):
    "cpu"        the compiled kernel, `torch.ops.attnpress.attention`, without S x S matrices
    "gpu"        the Triton kernel for NVIDIA GPUs, `torch.ops.attnpress.attention_gpu`, without S x S matrices
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
from attnpress.core.arguments import check_cutoff, check_tail, check_tensors, misfit, pair_mask, with_causal
from attnpress.core.attention import (
    IntegerAttention,
    checked_mask,
    integer_attention,
    warn_of_nan,
)
from attnpress.core.call import Attend, AttentionCall, Scales
from attnpress.core.fake_quantize import fake_quantize_attention
from attnpress.core.rules import rule_of, rules_of, runs_on
from attnpress.core.tail import active_tail
from attnpress.kernels import cpu, gpu, head_size
from attnpress.kernels.cpu import BackendUnavailableError
from attnpress.kernels.slices import SECOND, SHORT, products, sequences, slices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """An implementation of attention, and whether it can run here.

    Attributes:
        name: value of `backend=`.
        available: True if it can run now.
        targets: for the CPU kernel, the targets that this processor supports, best first.
        active_target: the target or GPU to use.
        reason: why it cannot run.
    """

    name: str
    available: bool
    targets: tuple[str, ...] = ()
    active_target: str | None = None
    reason: str | None = None

    def describe(self) -> str:
        """One line for users."""
        if self.name == "reference":
            return "readable Python: any device, every rule, slow"
        if self.name == "gpu":
            runs = f"runs on {self.active_target}" if self.available else f"cannot run here: {self.reason}"
            return f"the Triton kernel for NVIDIA GPUs; {runs}"
        if not self.available:
            return f"the compiled kernel; cannot run here: {self.reason}"
        return f"the compiled kernel; targets {', '.join(self.targets)}; runs {self.active_target}"


def backends() -> list[Backend]:
    """All backends, for listings. Nothing is built or selected."""
    reason = cpu.why_unavailable()
    compiled = Backend("cpu", available=False, reason=reason)
    if reason is None:
        compiled = Backend("cpu", True, tuple(cpu.supported_targets()), cpu.active_target())
    reason = gpu.why_unavailable()
    triton = Backend("gpu", reason is None, active_target=gpu.device_name() if reason is None else None, reason=reason)
    return [compiled, triton, Backend("reference", available=True)]


def attention(call: AttentionCall, *, backend: str = "cpu") -> Tensor:
    """Compute compressed attention on the requested backend, for inference.

    Args:
        call: with all four matrices quantized; for "cpu" and "gpu", D must satisfy `head_size.fits`. Tensors are on the
            CPU, or for "gpu" on an NVIDIA GPU. With `bounds`, B is 1 and each sequence attends only to itself; the
            result equals that of each sequence alone, bit for bit.
        backend: "cpu", "gpu" or "reference".

    Returns:
        float32 [B, Hq, Sq, D], stored so that its transpose [B, Sq, Hq, D] is contiguous.

    Raises:
        ValueError: the backend does not support a shape, dtype or option. The message names it.
        BackendUnavailableError: the backend cannot run here. There is no silent fallback.
    """
    run = _BACKENDS.get(backend)
    if run is None:
        raise ValueError(f"backend {backend!r} does not exist; use one of {', '.join(_BACKENDS)}")
    return run(call)


def check(spec: AttentionSpec, scales: Scales, head_dim: int, backend: str) -> None:
    """Raise now the errors that `attention` would raise at its first call."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; use one of {', '.join(_BACKENDS)}")
    if backend != "reference":
        {"cpu": cpu, "gpu": gpu}[backend].load()
        check_native(spec, head_dim, backend)
        _check_scales(spec, scales)


def _reference(call: AttentionCall) -> Tensor:
    if call.bounds is not None:
        return _reference_packed(call, _check_packed(call, call.bounds))
    valid = checked_mask(call)
    call = call.with_(valid=with_causal(valid, call.query, call.key) if call.causal else valid)
    if None in call.spec.bits.values():  # without integers, the training forward is computed
        output = fake_quantize_attention(call).float()
    else:
        output = integer_attention(call).output
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _reference_packed(call: AttentionCall, places: list[int]) -> Tensor:
    checked_mask(call)
    parts = [
        _reference(_tokens(call, slice(begin, end))).transpose(1, 2) for begin, end in pairwise(places) if begin < end
    ]
    none = call.query.new_empty(1, 0, call.query.shape[1], call.value.shape[3], dtype=torch.float32)
    return torch.cat([none, *parts], 1).transpose(1, 2)


def _tokens(call: AttentionCall, at: slice, bounds: Tensor | None = None) -> AttentionCall:
    """The call of some of the packed tokens."""
    return call.with_(query=call.query[:, :, at], key=call.key[:, :, at], value=call.value[:, :, at], bounds=bounds)


def _compiled(call: AttentionCall) -> Tensor:
    if call.bounds is not None:
        return _compiled_packed(call, call.bounds.contiguous(), _check_packed(call, call.bounds))
    arguments = compiled_arguments(call)
    if torch.compiler.is_compiling() or _is_short(products(call.query, call.key)):
        output: Tensor = _run(torch.ops.attnpress.attention, arguments, call)
        return output
    checked_mask(call)
    output = _room(call.query)
    for place, part in slices(call, _most()):
        output[place] = _run(torch.ops.attnpress.attention, compiled_arguments(part), part)
    return output


def _compiled_packed(call: AttentionCall, bounds: Tensor, places: list[int]) -> Tensor:
    arguments = compiled_arguments(call)
    of_pair = 2 * call.query.shape[1] * call.query.shape[3]
    if _is_short(of_pair * sum((end - begin) ** 2 for begin, end in pairwise(places))):
        packed = (*arguments[:3], bounds, *arguments[4:])
        output: Tensor = _run(torch.ops.attnpress.attention_packed, packed, call)
        return output
    checked_mask(call)
    output = _room(call.query)
    for first, last in sequences(places, of_pair, _most()):
        at, inner = slice(places[first], places[last]), [place - places[first] for place in places[first : last + 1]]
        own = bounds.new_tensor(inner)
        alone = last - first == 1
        output[:, :, at] = (
            _compiled(_tokens(call, at)) if alone else _compiled_packed(_tokens(call, at, own), own, inner)
        )
    return output


def _triton(call: AttentionCall) -> Tensor:
    if call.bounds is not None:
        places = _check_packed(call, call.bounds)
        gpu.check_keys(max((end - begin for begin, end in pairwise(places)), default=0))
    output: Tensor = torch.ops.attnpress.attention_gpu(*gpu_arguments(call))
    return output


def _is_short(work: int) -> bool:
    return work <= SHORT or work <= _most()


def _most() -> int:
    """Number of products that an operator may compute before Python checks for signals."""
    return SECOND.get(cpu.active_target(), SHORT) * torch.get_num_threads()


def _room(query: Tensor) -> Tensor:
    """Float32 tensor of the shape of the query, stored so that its transpose is contiguous."""
    return query.new_empty(query.transpose(1, 2).shape, dtype=torch.float32).transpose(1, 2)


def _run(operator: Callable[..., Any], arguments: tuple[Any, ...], call: AttentionCall) -> Any:
    """Run the operator, which checks its arguments; its errors have the wording of the reference."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        result = operator(*arguments)
    except RuntimeError:
        checked_mask(call)
        raise
    if torch.ops.attnpress.met_nan.default():
        warn_of_nan(call.query, call.key, call.value, pair_mask(call.valid, call.query, call.key))
    return result


_BACKENDS: dict[str, Attend] = {"cpu": _compiled, "gpu": _triton, "reference": _reference}


INTEGERS = (
    "q_codes",
    "k_codes",
    "v_codes",
    "row_max",
    "p_codes",
    "code_sum",
    "weighted",
    "output",
    "tail_count",
    "tail_exponent",
    "tail_distance",
    "tail_level",
    "tail_value",
    "tail_score",
    "tail_slope",
)
"""Results of `attention_integers`, in order."""


def compiled_integers(call: AttentionCall) -> dict[str, Tensor]:
    """The integers of the compiled kernel by their names in `IntegerAttention`, for training and tests.

    P codes are a matrix of S x S.

    With a tail, those of `TailedAttention` are included. Codes of keys that no query may attend to are 0, since the
    kernel does not compute them.
    """
    arguments = compiled_arguments(call)
    found = zip(INTEGERS, _run(torch.ops.attnpress.attention_integers, arguments, call), strict=True)
    dropped = {"none": ("tail_",), "mean": ("tail_score", "tail_slope"), "linear": ()}[cpu.tail_kind(arguments)]
    return {name: x for name, x in found if not name.startswith(dropped)}


def compiled_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """Validated arguments of `torch.ops.attnpress.attention`.

    Raises:
        ValueError: the compiled kernel does not support an argument.
        BackendUnavailableError: it is not built.
    """
    arguments = _arguments(call, "cpu")
    valid = arguments[3]
    return (*arguments[:3], None if valid is None else _rows_contiguous(valid), *arguments[4:])


def gpu_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """Validated arguments of `torch.ops.attnpress.attention_gpu`.

    Raises:
        ValueError: the Triton kernel does not support an argument.
        BackendUnavailableError: it cannot run here.
    """
    return (*_arguments(call, "gpu"), call.bounds)


def _arguments(call: AttentionCall, backend: str) -> tuple[Any, ...]:
    """Arguments of the operators of both kernels, in order."""
    query, key, value, scales, cutoff, spec = call.query, call.key, call.value, call.scales, call.cutoff, call.spec
    if not torch.compiler.is_compiling():  # under torch.compile, deploy has loaded the kernel
        {"cpu": cpu, "gpu": gpu}[backend].load()
    _check_spec(spec, backend)
    _check_scales(spec, scales)
    _check_tensors(query, key, value, backend)
    for name, tensor in {"k_scale": scales.k, "v_scale": scales.v, "q_scale": scales.q, "cutoff": cutoff}.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(
                f"{name}: backend {backend!r} takes tensors on {_place(backend)}, found one on {tensor.device}"
            )
    tail = _tail_arguments(call) if backend == "cpu" else ()
    if cutoff is not None:
        shown = rule_of(spec).kernel_cutoff(cutoff)
        if shown is not cutoff or not cutoff.is_contiguous():
            check_cutoff(cutoff, query)  # the operator does not see this tensor: -1e-30 may become 0 there
        cutoff = shown.contiguous()
    mode = "unit_renormalized" if spec.p.mode == "unit" and spec.p.renormalize else spec.p.mode
    q_scale = None if spec.q.granularity == "token" else scales.q
    return (
        _rows_contiguous(query),
        _rows_contiguous(key),
        _rows_contiguous(value),
        pair_mask(call.valid, query, key),
        call.causal,
        float(call.scaling),
        q_scale,
        scales.k,
        scales.v,
        cutoff,
        spec.rule,
        float(spec.sparsity),
        mode,
        spec.q.qmax,
        spec.k.qmax,
        spec.v.qmax,
        spec.p.qmax,
        spec.smooth_key,
        spec.q.power_of_two,
        *tail,
    )


def _tail_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """The last arguments of the operators; empty if no row has a tail."""
    query, key, cutoff, spec, tail = call.query, call.key, call.cutoff, call.spec, call.scales.tail
    if spec.tail == "none":
        return ()
    if not torch.compiler.is_compiling():  # the code below requires matching shapes
        if tail is not None:
            check_tail(tail, query, key, values=False)
        if cutoff is not None:
            check_cutoff(cutoff, query)
    tail = active_tail(spec, tail, cutoff, query)
    if tail is None:
        return ()
    found = None if spec.tail == "mean" else tail.directions
    parts = [] if found is None else [found.query, found.key, found.offset, found.step]
    return (spec.tail, *(x.contiguous() for x in (tail.lift, *parts)))


def check_native(spec: AttentionSpec, head_dim: int, backend: str = "cpu") -> None:
    """Raise ValueError if a kernel, "cpu" or "gpu", does not support a spec or a head size."""
    _check_spec(spec, backend)
    _check_head(head_dim, backend)


def _check_spec(spec: AttentionSpec, backend: str) -> None:
    if None in spec.bits.values():
        raise ValueError(
            f"backend {backend!r} multiplies integers: set bits for all of q, k, v and p; found {spec.bits}"
        )
    if backend not in rule_of(spec).kernels:
        raise ValueError(
            f"backend {backend!r} has no kernel for rule {spec.rule!r}, only for {', '.join(rules_of(backend))}; "
            "use backend 'reference'"
        )
    if not runs_on(backend, spec):
        raise ValueError(
            f"backend {backend!r} computes every score and does not support predicted masks (predictor_bits "
            f"{spec.predictor_bits}); use backend 'reference'"
        )
    if backend == "gpu" and spec.tail != "none":
        raise ValueError(f"backend 'gpu' cannot run tail {spec.tail!r}; use backend 'cpu' or 'reference'")


def _check_scales(spec: AttentionSpec, scales: Scales) -> None:
    static = {"q": scales.q, "k": scales.k, "v": scales.v}
    if spec.q.granularity == "token":
        del static["q"]
    missing = [name for name, scale in static.items() if scale is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: no scale yet; run calibrate(model, batches) first")


def _device(backend: str) -> str:
    return gpu.device().type if backend == "gpu" else "cpu"


def _place(backend: str) -> str:
    return {"cuda": "an NVIDIA GPU", "cpu": "the CPU"}[_device(backend)]


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, backend: str) -> None:
    check_tensors(query, key, value)
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dtype not in DTYPES or tensor.device.type != _device(backend):
            raise ValueError(
                f"{name}: backend {backend!r} takes float32, bfloat16 or float16 [B, H, S, D] on {_place(backend)}, "
                f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if key.shape != value.shape:
        raise misfit(query, key, value)
    _check_head(query.shape[3], backend)


def _check_packed(call: AttentionCall, bounds: Tensor) -> list[int]:
    query, key = call.query, call.key
    check_tensors(query, key, call.value)
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"packed tensors are [1, H, T, D] with as many keys as queries, found query {list(query.shape)}, "
            f"key {list(key.shape)}"
        )
    if call.valid is not None:
        raise ValueError("valid: packed sequences have no mask; leave it None, or give no bounds")
    tokens = query.shape[2]
    # As plain numbers, since comparing tensors takes longer than attention over a few short sequences.
    is_list = bounds.dtype == torch.int64 and bounds.dim() == 1 and not bounds.is_meta
    places = bounds.tolist() if is_list else []
    if not places or places != sorted(places) or (places[0], places[-1]) != (0, tokens):
        raise ValueError(f"bounds: int64, rising from 0 to the number of tokens, {tokens}, is needed; found {bounds}")
    return places


def _check_head(dim: int, backend: str) -> None:
    if not head_size.fits(dim):
        raise ValueError(
            f"head size {dim}: backend {backend!r} takes multiples of {head_size.STEP} up to {head_size.LARGEST}; "
            "use 'reference'"
        )


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


__all__ = [
    "Backend",
    "BackendUnavailableError",
    "IntegerAttention",
    "attention",
    "backends",
    "check",
    "compiled_integers",
]
