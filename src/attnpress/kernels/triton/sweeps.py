"""The kernels: codes of K and V, spans of a mask, and attention in sweeps over the keys, without S x S buffers.

A program processes a block of rows of one head. Sweep 1 multiplies codes of Q and K and keeps the maximum of each row.
The last sweep repeats the product, prunes, computes P codes and multiplies them with V. Rules and modes that need more
of a row (its sum of p~, its k-th distance) have further sweeps in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnpress.kernels.triton.steps import (
    LOG2_E,
    codes_of,
    exact_float,
    power,
    reciprocal,
    row_code,
    token_scale,
    unit_code,
)

BLOCKED = tl.constexpr(-(2**30))
"""Score of a masked pair, below every sum of products; its distance is above all others."""

SHIFT = tl.constexpr(128)
"""Tensor cores need signed bytes: SHIFT is subtracted from P codes, and SHIFT times the sum of V is added."""


@triton.jit(do_not_specialize=["kv_heads", "keys", "tiles"])
def pack_kernel(
    key, value, k_codes, v_codes, v_sums, k_scale, v_scale, k_max, v_max,
    k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, k_scale_h, v_scale_h, v_scale_d,
    kv_heads, keys, tiles, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Codes of a tile of keys: K [.., padded keys, WIDTH], V with keys last [.., WIDTH, padded keys], sums of V."""
    tile, at = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = at // kv_heads, at % kv_heads
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, WIDTH)
    inside = (n < keys)[:, None] & (d < DIM)[None, :]
    far = n.to(tl.int64)[:, None]
    k = tl.load(key + b * k_b + h * k_h + far * k_s + d[None, :] * k_d, mask=inside, other=0.0)
    inverse = reciprocal(tl.load(k_scale + h * k_scale_h + tl.zeros([WIDTH], tl.int32)))
    tl.store(k_codes + (at * tiles * BLOCK_N + far) * WIDTH + d[None, :], codes_of(k, inverse[None, :], k_max))
    v = tl.load(value + b * v_b + h * v_h + far * v_s + d[None, :] * v_d, mask=inside, other=0.0)
    inverse = reciprocal(tl.load(v_scale + h * v_scale_h + d * v_scale_d, mask=d < DIM, other=1.0))
    codes = codes_of(v, inverse[None, :], v_max)
    tl.store(v_codes + (at * WIDTH + d[None, :]) * (tiles * BLOCK_N) + far, codes)
    if SHIFTED:
        tl.store(v_sums + (at * tiles + tile) * WIDTH + d, tl.sum(codes.to(tl.int32), 0))


@triton.jit(do_not_specialize=["heads", "rows", "keys"])
def span_kernel(
    mask, low, high, holes, mask_b, mask_h, mask_s, mask_k, heads, rows, keys, BLOCK: tl.constexpr
):  # fmt: skip
    """For each mask row: first valid key, the one after the last, and whether an invalid key lies in between."""
    at = tl.program_id(0).to(tl.int64)
    line = mask + (at // (heads * rows)) * mask_b + (at // rows % heads) * mask_h + (at % rows) * mask_s
    first = tl.full([BLOCK], 0, tl.int32) + keys
    last = tl.full([BLOCK], 0, tl.int32)
    count = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, keys, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = tl.load(line + n * mask_k, mask=n < keys, other=0) != 0
        first = tl.where(valid, tl.minimum(first, n), first)
        last = tl.where(valid, n + 1, last)
        count += valid.to(tl.int32)
    begin, end = tl.min(first, 0), tl.max(last, 0)
    tl.store(low + at, begin)
    tl.store(high + at, end)
    tl.store(holes + at, (tl.maximum(end - begin, 0) != tl.sum(count, 0)).to(tl.int32))


@triton.jit
def scores(
    q, keys_at, start, low, high, inner_first, inner_last, mask_at, mask_k, holes,
    BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Integer scores of a block of rows and a tile of keys, int32; BLOCKED for pairs that are not valid."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, WIDTH)
    acc = tl.dot(q, tl.load(keys_at + n[None, :] * WIDTH + d[:, None]), out_dtype=tl.int32)
    if (start < inner_first) | (start + BLOCK_N > inner_last):
        allowed = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        if BYTES:  # not read if all rows of the block have spans without holes
            byte = tl.load(mask_at[:, None] + n[None, :] * mask_k, mask=allowed & (holes != 0), other=1)
            allowed = allowed & (byte != 0)
        acc = tl.where(allowed, acc, BLOCKED)
    return acc


@triton.jit
def row_maximum(
    q, keys_at, first, last, low, high, inner_first, inner_last, mask_at, mask_k, holes,
    BYTES: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Largest score of each row, 0 if no key is valid; with COUNT also the number of valid keys; int32 [rows]."""
    best = tl.full([BLOCK_M], BLOCKED, tl.int32)
    count = tl.full([BLOCK_M], 0, tl.int32)
    for start in range(first, last, BLOCK_N):
        acc = scores(
            q, keys_at, start, low, high, inner_first, inner_last, mask_at, mask_k, holes, BYTES, WIDTH, BLOCK_N
        )
        best = tl.maximum(best, tl.max(acc, 1))
        if COUNT:
            count += tl.sum((acc != BLOCKED).to(tl.int32), 1)
    return tl.where(best == BLOCKED, 0, best), count


@triton.jit
def row_total(
    q, keys_at, first, last, low, high, inner_first, inner_last, mask_at, mask_k, holes, base, rate,
    BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum of p~ over the valid keys of each row, int64."""
    total = tl.full([BLOCK_M], 0, tl.int64)
    for start in range(first, last, BLOCK_N):
        acc = scores(
            q, keys_at, start, low, high, inner_first, inner_last, mask_at, mask_k, holes, BYTES, WIDTH, BLOCK_N
        )
        probability = power(base[:, None] - exact_float(acc), rate[:, None])
        total += tl.sum(tl.where(acc == BLOCKED, 0, probability), 1).to(tl.int64)
    return total


@triton.jit
def kth_distance(
    q, keys_at, first, last, low, high, inner_first, inner_last, mask_at, mask_k, holes, row_max, wanted,
    BITS: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Distance of the `wanted`-th nearest key of each row, found bit by bit, and the number of nearer keys."""
    kth = tl.full([BLOCK_M], 0, tl.int32)
    nearer = tl.full([BLOCK_M], 0, tl.int32)
    for bit in range(BITS):
        trial = kth | (tl.full([BLOCK_M], 1, tl.int32) << (BITS - 1 - bit))
        count = tl.full([BLOCK_M], 0, tl.int32)
        for start in range(first, last, BLOCK_N):
            acc = scores(
                q, keys_at, start, low, high, inner_first, inner_last, mask_at, mask_k, holes, BYTES, WIDTH, BLOCK_N
            )
            count += tl.sum((row_max[:, None] - acc < trial[:, None]).to(tl.int32), 1)
        few = count < wanted
        kth = tl.where(few, trial, kth)
        nearer = tl.where(few, count, nearer)
    return kth, nearer


@triton.jit
def tile_codes(
    acc, base, rate, limit, ratio, row_max, kth, room,
    RULE: tl.constexpr, MODE: tl.constexpr, P_MAX: tl.constexpr,
):  # fmt: skip
    """P codes of a tile, int32, and the number of ties that each row may still keep."""
    distance = base[:, None] - exact_float(acc)
    probability = power(distance, rate[:, None])
    code = row_code(probability, P_MAX) if MODE == "row" else unit_code(probability, ratio[:, None], P_MAX)
    if RULE == "relative":
        code = tl.where(distance <= limit[:, None], code, 0)
    if RULE == "threshold":
        code = tl.where((probability.to(tl.float32) >= limit[:, None]) | (distance == 0.0), code, 0)
    if RULE == "topk":
        steps = row_max[:, None] - acc
        tied = (steps == kth[:, None]).to(tl.int32)
        keep = (steps < kth[:, None]) | ((tied != 0) & (tl.cumsum(tied, 1) <= room[:, None]))
        code = tl.where(keep, code, 0)
        room -= tl.sum(tied, 1)
    return tl.where(acc == BLOCKED, 0, code), room


@triton.jit
def load_rows(
    query, q_scale, k_scale, b, h, kv, row, scaling, q_max, q_b, q_h, q_s, q_d, q_scale_h, k_scale_h,
    TOKEN: tl.constexpr, POWER_OF_TWO: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Codes of a block of rows, int8 [rows, WIDTH], and alpha and rate of each row, float32 [rows]."""
    d = tl.arange(0, WIDTH)
    places = query + b * q_b + h * q_h + row[:, None] * q_s + d[None, :] * q_d
    x = tl.load(places, mask=(d < DIM)[None, :], other=0.0).to(tl.float32)
    if TOKEN:
        step = token_scale(x, q_max, POWER_OF_TWO)
    else:
        step = tl.load(q_scale + h * q_scale_h + tl.zeros([BLOCK_M], tl.int32))
    alpha = (step * tl.load(k_scale + kv * k_scale_h)) * scaling
    return codes_of(x, reciprocal(step)[:, None], q_max), alpha, (alpha * LOG2_E) * 1024.0


@triton.jit
def row_spans(
    low, high, holes, mask, b, h, row, rows, keys, span_b, span_h, span_s, mask_b, mask_h, mask_s,
    SPANS: tl.constexpr, BYTES: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """First key of each row and the one after its last, whether any row has holes, and where its mask begins."""
    begin = tl.zeros([BLOCK_M], tl.int32)
    end = begin + keys
    hole = tl.max(begin, 0)
    mask_at = row
    span = b * span_b + h * span_h + row * span_s
    if SPANS:
        begin, end = tl.load(low + span), tl.load(high + span)
    if BYTES:
        hole = tl.max(tl.load(holes + span), 0)
        mask_at = mask + b * mask_b + h * mask_h + row * mask_s
    if CAUSAL:
        end = tl.minimum(end, row.to(tl.int32) + (keys - rows) + 1)
    return begin, end, hole, mask_at


@triton.jit
def row_limits(
    q, keys_at, first, last, low, high, inner_first, inner_last, mask_at, mask_k, holes,
    cutoff_at, kept_of, alpha, rate, row_max, count,
    RULE: tl.constexpr, MODE: tl.constexpr, P_MAX: tl.constexpr, BITS: tl.constexpr,
    BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Per-row inputs of `tile_codes`: limit of the rule, ratio of mode `unit`, k-th distance, ties to keep."""
    limit, ratio, kth, room = rate, rate, count, count
    if RULE == "relative":
        limit = tl.div_rn(tl.zeros([BLOCK_M], tl.float32) + tl.load(cutoff_at), alpha)
    if RULE == "threshold" or MODE == "unit":
        total = row_total(
            q, keys_at, first, last, low, high, inner_first, inner_last, mask_at, mask_k, holes,
            exact_float(row_max), rate, BYTES, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        ratio = tl.div_rn(tl.full([BLOCK_M], P_MAX, tl.float32), tl.maximum(total, 1).to(tl.float32))
        if RULE == "threshold":
            limit = tl.load(cutoff_at) * total.to(tl.float32)
    if RULE == "topk":
        wanted = tl.load(kept_of + count)
        kth, nearer = kth_distance(
            q, keys_at, first, last, low, high, inner_first, inner_last, mask_at, mask_k, holes, row_max, wanted,
            BITS, BYTES, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        room = wanted - nearer
    return limit, ratio, kth, room


@triton.jit
def weighted_sum(
    q, keys_at, first, last, low, high, inner_first, inner_last, mask_at, mask_k, holes,
    values_at, sums_at, p_codes_at, inside, rate, row_max, limit, ratio, kth, room, keys, tiles,
    RULE: tl.constexpr, MODE: tl.constexpr, P_MAX: tl.constexpr, SHIFTED: tl.constexpr, INTEGERS: tl.constexpr,
    BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The last sweep: sum of code * v_code, int32 [rows, WIDTH], and sum of codes, int32 [rows]."""
    d = tl.arange(0, WIDTH)
    base = exact_float(row_max)
    weighted = tl.zeros([BLOCK_M, WIDTH], tl.int32)
    code_sum = tl.zeros([BLOCK_M], tl.int32)
    shift = tl.zeros([WIDTH], tl.int32)
    for start in range(first, last, BLOCK_N):
        acc = scores(
            q, keys_at, start, low, high, inner_first, inner_last, mask_at, mask_k, holes, BYTES, WIDTH, BLOCK_N
        )
        code, room = tile_codes(acc, base, rate, limit, ratio, row_max, kth, room, RULE, MODE, P_MAX)
        code_sum += tl.sum(code, 1)
        n = start + tl.arange(0, BLOCK_N)
        v = tl.load(values_at + n[:, None] + d[None, :] * (tiles * BLOCK_N))
        if SHIFTED:
            weighted = tl.dot((code - SHIFT).to(tl.int8), v, weighted, out_dtype=tl.int32)
            shift += tl.load(sums_at + start // BLOCK_N * WIDTH + d)
        else:
            weighted = tl.dot(code.to(tl.int8), v, weighted, out_dtype=tl.int32)
        if INTEGERS:
            tl.store(p_codes_at[:, None] + n[None, :], code.to(tl.uint8), mask=inside[:, None] & (n < keys)[None, :])
    return weighted + SHIFT * shift[None, :], code_sum


@triton.jit(do_not_specialize=["heads", "group", "rows", "keys", "tiles"])
def attention_kernel(
    query, k_codes, v_codes, v_sums, output, q_scale, k_scale, v_scale, cutoff, kept_of, low, high, holes, mask,
    q_codes_out, row_max_out, p_codes_out, code_sum_out, weighted_out,
    scaling, q_max, q_b, q_h, q_s, q_d, q_scale_h, k_scale_h, v_scale_h, v_scale_d,
    span_b, span_h, span_s, mask_b, mask_h, mask_s, mask_k, heads, group, rows, keys, tiles,
    RULE: tl.constexpr, MODE: tl.constexpr, RENORMALIZE: tl.constexpr, P_MAX: tl.constexpr, TOKEN: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, SPANS: tl.constexpr, BYTES: tl.constexpr, CAUSAL: tl.constexpr,
    SHIFTED: tl.constexpr, BITS: tl.constexpr, INTEGERS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M rows of one head. With INTEGERS, also write the integers that tests compare."""
    blocks = tl.cdiv(rows, BLOCK_M)
    at = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = at // heads, at % heads
    kv, kv_at = h // group, b * (heads // group) + h // group
    own = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(own, rows - 1).to(tl.int64)  # rows beyond the last repeat it, and store nothing
    place = at * rows + row
    d = tl.arange(0, WIDTH)
    q, alpha, rate = load_rows(
        query, q_scale, k_scale, b, h, kv, row, scaling, q_max, q_b, q_h, q_s, q_d, q_scale_h, k_scale_h,
        TOKEN, POWER_OF_TWO, DIM, WIDTH, BLOCK_M,
    )  # fmt: skip
    begin, end, hole, mask_at = row_spans(
        low, high, holes, mask, b, h, row, rows, keys, span_b, span_h, span_s, mask_b, mask_h, mask_s,
        SPANS, BYTES, CAUSAL, BLOCK_M,
    )  # fmt: skip
    first, last = tl.min(begin, 0) // BLOCK_N * BLOCK_N, tl.max(end, 0)
    inner_first, inner_last = tl.max(begin, 0), tl.where(hole == 0, tl.min(end, 0), 0)
    keys_at = k_codes + kv_at * tiles * BLOCK_N * WIDTH
    row_max, count = row_maximum(
        q, keys_at, first, last, begin, end, inner_first, inner_last, mask_at, mask_k, hole,
        BYTES, RULE == "topk", WIDTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    limit, ratio, kth, room = row_limits(
        q, keys_at, first, last, begin, end, inner_first, inner_last, mask_at, mask_k, hole,
        cutoff + h, kept_of, alpha, rate, row_max, count, RULE, MODE, P_MAX, BITS, BYTES, WIDTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    weighted, code_sum = weighted_sum(
        q, keys_at, first, last, begin, end, inner_first, inner_last, mask_at, mask_k, hole,
        v_codes + kv_at * WIDTH * tiles * BLOCK_N, v_sums + kv_at * tiles * WIDTH, p_codes_out + place * keys,
        own < rows, rate, row_max, limit, ratio, kth, room, keys, tiles,
        RULE, MODE, P_MAX, SHIFTED, INTEGERS, BYTES, WIDTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    inside = (own < rows)[:, None] & (d < DIM)[None, :]
    divisor = tl.maximum(code_sum, 1).to(tl.float32)
    if MODE == "unit" and not RENORMALIZE:
        divisor = tl.full([BLOCK_M], P_MAX, tl.float32)
    scale = tl.load(v_scale + kv * v_scale_h + d * v_scale_d, mask=d < DIM, other=1.0)
    numerator = weighted.to(tl.float32) * scale[None, :]
    out = tl.div_rn(numerator, tl.zeros([BLOCK_M, WIDTH], tl.float32) + divisor[:, None])
    tl.store(output + ((b * rows + row)[:, None] * heads + h) * DIM + d[None, :], out, mask=inside)
    if INTEGERS:
        tl.store(q_codes_out + place[:, None] * DIM + d[None, :], q, mask=inside)
        tl.store(weighted_out + place[:, None] * DIM + d[None, :], weighted, mask=inside)
        tl.store(row_max_out + place, row_max, mask=own < rows)
        tl.store(code_sum_out + place, code_sum, mask=own < rows)
