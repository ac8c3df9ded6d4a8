"""Validation of the arguments of an attention call, for the reference, the training forward and the kernels.

Shapes: query [B, Hq, Sq, D]; key, value [B, Hkv, Sk, D], Hq a multiple of Hkv; valid broadcastable to [B, Hq, Sq, Sk].
`torch.ops.attnpress.*` refuses the same, so calling an operator directly gives an error, not a crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnpress.core.exponential import T_MAX
from attnpress.core.quantizer import LARGEST_SCALE, SMALLEST_SCALE
from attnpress.core.tail import DIRECTION_MAX, LARGEST_RANK, OFF, OFFSET_MAX, Tail

SMALLEST_SCALING, LARGEST_SCALING = 2.0**-32, 2.0**32
"""With scales in their range, alpha is then an ordinary float32 number."""


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that queries, keys and values match. Heads of V may have their own size.

    Raises:
        ValueError: names the tensor and its shape.
    """
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dim() != 4 or not tensor.is_floating_point() or tensor.device != query.device:
            raise ValueError(
                f"{name}: floating-point numbers [B, H, S, D] on the device of the query are needed, "
                f"found {_described(tensor)}"
            )
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    if key.shape[:3] != value.shape[:3] or (key.shape[0], key.shape[3]) != (batch, dim) or heads % max(1, kv_heads):
        raise misfit(query, key, value)
    if kv_heads == 0 or dim == 0:
        raise misfit(query, key, value)


def misfit(query: Tensor, key: Tensor, value: Tensor) -> ValueError:
    """The error for shapes that do not match."""
    return ValueError(
        f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit together: "
        "key and value are [B, Hkv, Sk, D], with Hq a multiple of Hkv"
    )


def pair_mask(valid: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """`valid` with four dimensions, each 1 or that of the call, and the last always Sk, so that all code can index it.

    Args:
        valid: bool, broadcastable to [B, Hq, Sq, Sk]; None allows all pairs.

    Returns:
        A view, bool [B or 1, Hq or 1, Sq or 1, Sk]; None for None.

    Raises:
        ValueError: another dtype or device, or a shape that does not broadcast.
    """
    if valid is None:
        return None
    pairs = (*query.shape[:3], key.shape[2])
    if not torch.compiler.is_compiling():  # comparing sizes would make them constants of a trace
        fits = all(size in (1, whole) for size, whole in zip(reversed(valid.shape), reversed(pairs), strict=False))
        if valid.dtype != torch.bool or valid.dim() > 4 or not fits or valid.device != query.device:
            raise ValueError(
                f"valid: a bool mask broadcastable to [B, Hq, Sq, Sk], here {list(pairs)}, on {query.device} is "
                f"needed, found {_described(valid)}"
            )
    return four_dims(valid).expand(-1, -1, -1, key.shape[2])


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Mask each query from later keys; the last query sees all. bool [1, 1, Sq, Sk], True = may attend."""
    rows, keys = query.shape[2], key.shape[2]
    return torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)


def with_causal(valid: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """`valid` combined with `causal_mask`."""
    before = causal_mask(query, key)
    return before if valid is None else valid & before


def four_dims(valid: Tensor) -> Tensor:
    """The mask with leading dimensions of size 1 added, up to four."""
    return valid if valid.dim() == 4 else valid[(None,) * (4 - valid.dim())]


def check_values(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scales: Mapping[str, Tensor | None],
    cutoff: Tensor | None,
    scaling: float,
) -> None:
    """Check that scales, thresholds and factors are in the ranges that calibration gives.

    Values are checked only where that is free: on the CPU, and not while a model is traced or compiled.

    Args:
        query, key, value: as for `check_tensors`.
        scales: of q, k and v by name, float32 [1, 1 or H, 1, 1], for v also [1, 1 or H, 1, D]; None is not checked.
        cutoff: float32 [Hq]: not negative, +inf keeps all pairs; None prunes nothing.
        scaling: factor of the scores.

    Raises:
        ValueError: names the argument, its range, and what to do.
    """
    heads = query.shape[1]
    for name, scale in scales.items():
        if scale is not None:
            sizes = ((1,), (1, heads if name == "q" else key.shape[1]), (1,), (1, value.shape[3] if name == "v" else 1))
            _check_scale(name, scale, sizes, query.device)
    if cutoff is not None:
        check_cutoff(cutoff, query)
    if not torch.compiler.is_compiling() and not SMALLEST_SCALING <= scaling <= LARGEST_SCALING:
        raise ValueError(f"scaling: a factor of the scores from 2^-32 to 2^32 is needed, found {scaling}")


def check_cutoff(cutoff: Tensor, query: Tensor) -> None:
    """Check that thresholds keep at least the maximum of a row; see `check_values`."""
    if cutoff.dtype != torch.float32 or cutoff.shape != (query.shape[1],) or cutoff.device != query.device:
        raise ValueError(f"cutoff: float32 [{query.shape[1]}] on {query.device} is needed, found {_described(cutoff)}")
    wrong = [x for x in _numbers(cutoff) if not x >= 0]
    if wrong:
        raise ValueError(f"cutoff: thresholds are 0 or more, up to inf, found {wrong[0]}; calibrate the model again")


def check_tail(tail: Tail, query: Tensor, key: Tensor, *, values: bool = True) -> None:
    """Check that the tail's parameters are in the ranges that its sums need; see `check_values`.

    Args:
        values: False checks only shapes, dtypes and devices.

    Raises:
        ValueError: names the parameter, its requirement, and what was found.
    """
    kv_heads, dim = key.shape[1], key.shape[3]
    _check_whole("lift", tail.lift, (query.shape[1],), (0, T_MAX), query.device, values)
    found = tail.directions
    if found is None:
        return
    rank = found.query.shape[-1] if found.query.dim() == 3 else 0
    if not 1 <= rank <= LARGEST_RANK:
        raise ValueError(
            f"tail query: directions [Hkv, D, 1 to {LARGEST_RANK}] are needed, found {_described(found.query)}"
        )
    for name in ("query", "key"):
        bounds = (-DIRECTION_MAX, DIRECTION_MAX)
        _check_whole(name, getattr(found, name), (kv_heads, dim, rank), bounds, query.device, values)
    _check_whole("offset", found.offset, (kv_heads, rank), (-int(OFFSET_MAX), int(OFFSET_MAX)), query.device, values)
    _check_parts("step", found.step, (kv_heads,), query.device)
    wrong = [x for x in _numbers(found.step) if not 0 <= x <= LARGEST_SCALE] if values else []
    if wrong:
        raise ValueError(f"tail step: 0 to 2^40 is needed, found {wrong[0]}; calibrate the model again")


def _check_whole(
    name: str, x: Tensor, shape: tuple[int, ...], bounds: tuple[int, int], device: torch.device, values: bool
) -> None:
    _check_parts(name, x, shape, device)
    if not values or not is_real(x):
        return
    inside = (x == x.round()) & (x >= bounds[0]) & (x <= bounds[1]) | ((x == OFF) if name == "lift" else False)
    if not bool(inside.all()):
        raise ValueError(
            f"tail {name}: whole numbers from {bounds[0]} to {bounds[1]} are needed, found {float(x[~inside][0])}; "
            "calibrate the model again"
        )


def _check_parts(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.dtype != torch.float32 or x.shape != shape or x.device != device:
        raise ValueError(f"tail {name}: float32 {list(shape)} on {device} is needed, found {_described(x)}")


def _check_scale(name: str, scale: Tensor, sizes: Sequence[tuple[int, ...]], device: torch.device) -> None:
    fits = scale.dim() == 4 and all(size in allowed for size, allowed in zip(scale.shape, sizes, strict=True))
    if scale.dtype != torch.float32 or not fits or scale.device != device:
        shape = ", ".join(" or ".join(map(str, sorted(set(allowed)))) for allowed in sizes)
        raise ValueError(f"{name}_scale: float32 [{shape}] on {device} is needed, found {_described(scale)}")
    wrong = [x for x in _numbers(scale) if not SMALLEST_SCALE <= x <= LARGEST_SCALE]
    if wrong:
        raise ValueError(f"{name}_scale: scales are 2^-40 to 2^40, found {wrong[0]}; calibrate the model again")


def _described(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def is_real(x: Tensor) -> bool:
    """True if values can be read for free: on the CPU, and not while a model is traced or compiled."""
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def _numbers(x: Tensor) -> list[float]:
    """The tensor as plain numbers, since comparing tensors takes longer; empty if they cannot be read for free."""
    if not is_real(x):
        return []
    numbers: list[float] = x.detach().flatten().tolist()
    return numbers


def some_key(key: Tensor, value: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The call, or, if it has no keys, the call with one masked key, since a maximum needs one.

    Args:
        valid: from `pair_mask`.
    """
    if key.shape[2] > 0:
        return key, value, valid
    key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return key, value, torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=key.device)
