"""Random attention calls: the kernel on every target of this machine, and the training forward, against the reference.

A seed is a call. Masks take every shape that broadcasts, and bytes that are neither 0 nor 1; scales and factors go to
the ends of their ranges; packed calls are compared with their sequences alone.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from attnpress.config import AttentionSpec, ProbsSpec, RuleName, TensorSpec
from attnpress.core.call import Scales
from attnpress.kernels import cpu, ops
from attnpress.kernels.cpu import TARGET_VARIABLE
from tests.kernels.agreement import assert_same, ulps
from tests.kernels.factories import DTYPES, EXTREMES, Case, make_case

MOST = 4_000_000
"""Products in a call, about: a second in the readable reference and on the slowest target."""

RANKS = (1, 2, 4, 8, 8, 13, 32, 256)
RULES: tuple[RuleName, ...] = ("relative", "relative", "relative", "threshold", "topk")
REGRESSIONS: list[int] = [*range(16), 117]
"""Seeds that are replayed as tests: a sample of all kinds of calls, and each that failed once."""


def replay(seed: int) -> str:
    """The call of one seed on all targets; returns its kind.

    Raises:
        AssertionError: the integers differ; names the seed and the target.
    """
    rng = random.Random(seed)
    packed = rng.random() < 0.2
    case = draw_packed(rng, seed) if packed else draw(rng, seed)
    bounds = draw_bounds(rng, case.query.shape[2]) if packed else None
    if not packed:
        _against(seed, "training forward", _assert_training, case.in_mask())
    for target in cpu.supported_targets():
        with _target(target, rng.choice((1, 1, 2, 3, 5))):
            if bounds is None:
                _against(seed, target, assert_same, case)
            else:
                _against(seed, target, _assert_packed, case, bounds)
    return "packed" if packed else "padded"


def _against(seed: int, what: str, check: object, *arguments: object) -> None:
    try:
        check(*arguments)  # type: ignore[operator]
    except Exception as error:
        raise AssertionError(f"seed {seed}, {what}: {error!r}") from error


def _assert_training(case: Case) -> None:
    assert torch.equal(case.fake(), case.integer().output)


def _assert_packed(case: Case, bounds: Tensor) -> None:
    found = ops.attention(case.with_(bounds=bounds))
    assert found.transpose(1, 2).is_contiguous()
    for begin, end in pairwise(bounds.tolist()):
        own = {name: getattr(case, name)[:, :, begin:end] for name in ("query", "key", "value")}
        assert ulps(found[:, :, begin:end], case.with_(**own).integer().output) <= 1


@contextmanager
def _target(name: str, threads: int) -> Iterator[None]:
    before, had = torch.get_num_threads(), os.environ.get(TARGET_VARIABLE)
    torch.set_num_threads(threads)
    os.environ[TARGET_VARIABLE] = name
    try:
        yield
    finally:
        torch.set_num_threads(before)
        del os.environ[TARGET_VARIABLE]
        if had is not None:
            os.environ[TARGET_VARIABLE] = had


def draw(rng: random.Random, seed: int) -> Case:
    """A call of any shape, mask, spec and values that are legal."""
    kv_heads = rng.choice((1, 1, 2, 3))
    keys = _length(rng)
    rows = keys if rng.random() < 0.5 else _length(rng)
    heads, dim = kv_heads * rng.choice((1, 1, 2, 3)), _dim(rng)
    most = max(1, MOST // max(1, heads * rows * keys * dim))
    shape = (min(most, rng.choice((0, 1, 1, 1, 2, 2, 3, 5))), heads, kv_heads, rows, keys, dim)
    return _case(rng, seed, shape).with_(valid=draw_mask(rng, (shape[0], shape[1], rows, keys)))


def draw_packed(rng: random.Random, seed: int) -> Case:
    """One row of tokens, as `ops.attention` takes it with bounds."""
    kv_heads, tokens = rng.choice((1, 2)), rng.choice((0, 1, 7, 40, 100, 200))
    return _case(rng, seed, (1, kv_heads * rng.choice((1, 2, 3)), kv_heads, tokens, tokens, _dim(rng)))


def _case(rng: random.Random, seed: int, shape: tuple[int, int, int, int, int, int]) -> Case:
    spec = with_tail(draw_spec(rng), seed)
    case = make_case(
        shape, spec, extreme=rng.choice(EXTREMES) if rng.random() < 0.3 else "none", dtype=rng.choice(DTYPES),
        causal=rng.random() < 0.3, transposed=rng.random() < 0.7, seed=seed,
    )  # fmt: skip
    query, key, value = (_laid_out(rng, x) for x in (case.query, case.key, case.value))
    scales, scaling = case.scales, case.scaling
    if rng.random() < 0.25:
        wide = rng.random() < 0.5
        q, k, v = (_spread(rng, getattr(scales, name), wide) for name in ("q", "k", "v"))
        tail = scales.tail
        scales = Scales(q, k, v, tail=tail)
        scaling = 2.0 ** rng.uniform(-32, 32) if wide else scaling * 2.0 ** rng.uniform(-4, 4)
    return case.with_(
        query=query, key=key, value=value, scales=scales, scaling=scaling, cutoff=_cutoff(rng, case.query.shape[1])
    )


def draw_bounds(rng: random.Random, tokens: int) -> Tensor:
    """Where sequences begin: some are empty, some a token long, some hold nearly all."""
    cuts = sorted(rng.choices(range(tokens + 1), k=rng.choice((0, 1, 3, 8, 20))))
    return torch.tensor([0, *cuts, tokens])


def draw_spec(rng: random.Random) -> AttentionSpec:
    """Any bits, granularities, modes and options that the kernel has."""

    def bits() -> int:
        return rng.choice((2, 3, 4, 4, 5, 6, 7, 8, 8, 8, 8))

    return AttentionSpec(
        q=TensorSpec(bits(), rng.choice(("tensor", "head", "token")), power_of_two=rng.random() < 0.3),
        k=TensorSpec(bits(), rng.choice(("tensor", "head"))),
        v=TensorSpec(bits(), rng.choice(("tensor", "head", "channel"))),
        p=ProbsSpec(bits(), rng.choice(("row", "row", "unit")), rng.random() < 0.3, rng.random() < 0.5),
        rule=rng.choice(RULES),
        sparsity=rng.choice((0.0, 0.1, 0.3, 0.5, 0.9, 0.98, 0.9999)),
        smooth_key=rng.random() < 0.4,
    )


def with_tail(spec: AttentionSpec, seed: int) -> AttentionSpec:
    """The spec, or with a tail. From numbers of its own: seeds from before there were tails are the calls they were."""
    rng = random.Random(f"tail {seed}")
    if spec.p.mode != "row" or rng.random() < 0.5:
        return spec
    return dataclasses.replace(spec, tail=rng.choice(("mean", "linear")), tail_rank=rng.choice(RANKS))


def draw_mask(rng: random.Random, pairs: tuple[int, int, int, int]) -> Tensor | None:
    """A mask of up to four dimensions, each whole or 1; its bytes are now and then neither 0 nor 1."""
    if rng.random() < 0.15:
        return None
    shape = [size if rng.random() < 0.6 else 1 for size in pairs][rng.choice((0, 0, 0, 1, 2, 3, 4)) :]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    kind = rng.choice(("holes", "few", "most", "keys", "window", "none", "all"))
    if kind == "keys" and len(shape) >= 2:
        shape[-2] = 1
    share = {"few": 0.05, "most": 0.97, "none": 0.0, "all": 1.0}.get(kind, 0.6)
    valid = torch.rand(shape, generator=generator) < share
    if kind == "window" and len(shape) >= 2:
        rows, keys = torch.arange(shape[-2]).view(-1, 1), torch.arange(shape[-1])
        valid = ((rows - keys).abs() <= rng.choice((0, 1, 5, 30))).expand(shape).clone()
    if kind == "keys" and shape:  # padding at the end, or at the front
        valid = (torch.arange(shape[-1]) < rng.randint(0, shape[-1])).expand(shape).clone()
        valid = valid.flip(-1) if rng.random() < 0.3 else valid
    if rng.random() < 0.15:
        odd = torch.randint(1, 256, valid.shape, generator=generator) * valid
        return odd.to(torch.uint8).view(torch.bool)
    return valid


def _length(rng: random.Random) -> int:
    return rng.choice(
        (0, 1, 2, 3, rng.randint(4, 40), rng.randint(4, 40), rng.randint(30, 130))
        if rng.random() < 0.97
        else (rng.randint(500, 900),)
    )


def _dim(rng: random.Random) -> int:
    return rng.choice((16, 32, 64, 64, 80, 128, 256, 4 * rng.randint(1, 64)))


def _laid_out(rng: random.Random, x: Tensor) -> Tensor:
    """The tensor by other strides: as it is, one head or token for all, or its last dimension scattered."""
    kind = rng.choice(("as it is", "as it is", "as it is", "one head", "one token", "scattered", "shifted"))
    if kind == "one head":
        return x[:, :1].expand_as(x)
    if kind == "one token":
        return x[:, :, :1].expand_as(x)
    if kind == "scattered":
        return x.mT.contiguous().mT
    if kind == "shifted":
        return torch.cat([x.flatten()[:0].new_zeros(3), x.flatten()])[3:].view(x.shape)
    return x


def _spread(rng: random.Random, scale: Tensor | None, wide: bool) -> Tensor | None:
    if scale is None:
        return None
    reach = 40 if wide else 6
    exponents = torch.tensor([rng.uniform(-reach, reach) for _ in range(scale.numel())], dtype=torch.float64)
    return torch.exp2(exponents).float().clamp(2.0**-40, 2.0**40).view(scale.shape)


def _cutoff(rng: random.Random, heads: int) -> Tensor | None:
    kind = rng.choice(("none", "some", "some", "some", "ends"))
    if kind == "none":
        return None
    values = [0.0, 1e-45, 1e-6, 24.9, 700.0, 3e38, float("inf")]
    return torch.tensor([rng.choice(values) if kind == "ends" else rng.uniform(0, 8) for _ in range(heads)])
