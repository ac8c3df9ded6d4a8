"""Split long calls into slices, so that Ctrl-C works: Python checks for signals only when an operator returns.

Slices give the same integers. Batch elements, key heads with their query heads, and query rows are independent, and the
mean of K smoothing is taken over the whole call first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from attnpress.core.arguments import pair_mask, with_causal
from attnpress.core.attention import key_validity
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.quantizer import smooth_key
from attnpress.core.tail import Directions, Tail

SECOND = {"scalar": 2**30, "avx2": 2**34, "avx512vnni": 2**35, "amx": 2**36}
"""Products that one thread of a target computes in about a second, with any rule."""

SHORT = min(SECOND.values())
"""Calls with at most this many products are not split, on any target."""


def products(query: Tensor, key: Tensor) -> int:
    """Multiply-accumulates of Q K^T and P V."""
    return 2 * query.numel() * key.shape[2]


def slices(call: AttentionCall, most: int) -> Iterator[tuple[tuple[slice, ...], AttentionCall]]:
    """Split the call into parts of about `most` products each.

    Args:
        call: validated. Parts keep `causal`, with the keys that their last row sees.

    Yields:
        The place of a part in the output [B, Hq, Sq, D], and the part.
    """
    call = _smoothed(call)
    query, key = call.query, call.key
    batch, rows, keys, kv_heads = query.shape[0], query.shape[2], key.shape[2], key.shape[1]
    group = query.shape[1] // kv_heads
    row = products(query[:1, :group, :1], key)
    for b in _steps(batch, most // (row * rows * kv_heads)):
        for h in _steps(kv_heads, most // (row * rows)):
            for r in _steps(rows, most // row):
                heads = slice(h.start * group, h.stop * group)
                seen = slice(0, max(0, keys - rows + r.stop) if call.causal else keys)
                yield (b, heads, r), _part(call, b, h, heads, r, seen)


def sequences(places: Sequence[int], products_of_pair: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of packed sequences with about `most` products each, or of one sequence.

    Args:
        places: start of each sequence, and the end of the last.
        products_of_pair: products per pair of a query and a key.

    Yields:
        The first sequence, and the one after the last.
    """
    first, held = 0, 0
    for i, (begin, end) in enumerate(pairwise(places)):
        work = (end - begin) ** 2 * products_of_pair
        if i > first and held + work > most:
            yield first, i
            first, held = i, 0
        held += work
    yield first, len(places) - 1


def _steps(size: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(size, start + step)) for start in range(0, size, step))


def _smoothed(call: AttentionCall) -> AttentionCall:
    """The call with smoothed keys, as float32; their mean is over all keys that some row of the whole call sees."""
    call = call.with_(valid=pair_mask(call.valid, call.query, call.key))
    if not call.spec.smooth_key:
        return call
    key = smoothed_key(call.query, call.key, call.valid, call.causal)
    return call.with_(key=key, spec=dataclasses.replace(call.spec, smooth_key=False))


def smoothed_key(query: Tensor, key: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """K minus its mean over the keys that some row sees; float32 [B, Hkv, Sk, D].

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Sk, D].
        valid: from `pair_mask`.
        causal: as in `AttentionCall`.
    """
    if valid is not None and causal and valid.shape[2] > 1:  # otherwise the last row sees every key that some row sees
        valid = with_causal(valid, query, key)
    return smooth_key(key, key_validity(valid))


def _part(call: AttentionCall, batch: slice, kv_heads: slice, heads: slice, rows: slice, keys: slice) -> AttentionCall:
    valid = call.valid
    for dim, part in enumerate((batch, heads, rows, keys)):
        valid = _of(valid, dim, part)
    return call.with_(
        query=call.query[batch, heads, rows],
        key=call.key[batch, kv_heads, keys],
        value=call.value[batch, kv_heads, keys],
        valid=valid,
        scales=_scales(call.scales, heads, kv_heads),
        cutoff=None if call.cutoff is None else call.cutoff[heads],
    )


def _scales(scales: Scales, heads: slice, kv_heads: slice) -> Scales:
    q, k, v = _of(scales.q, 1, heads), _of(scales.k, 1, kv_heads), _of(scales.v, 1, kv_heads)
    tail = scales.tail
    if tail is None:
        return Scales(q, k, v)
    of = tail.directions
    directions = of and Directions(of.query[kv_heads], of.key[kv_heads], of.offset[kv_heads], of.step[kv_heads])
    return Scales(q, k, v, tail=Tail(tail.lift[heads], directions))


def _of(x: Any, dim: int, part: slice) -> Any:
    """Slice a tensor along a dimension that is not broadcast."""
    return x if x is None or x.shape[dim] == 1 else x.narrow(dim, part.start, part.stop - part.start)
