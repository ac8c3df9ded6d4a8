"""Tails on the compiled kernel: the integers of the reference on every target, with every mask, rule and rank."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnpress.config import AttentionSpec, ProbsSpec, RuleName, TailName, TensorSpec
from attnpress.core.attention import TailedAttention
from attnpress.core.call import Scales
from attnpress.core.tail import OFF, Directions, Tail
from attnpress.kernels import cpu, ops
from tests.kernels.agreement import assert_same
from tests.kernels.factories import MASKS, Case, cases, make_case, needs_kernel
from tests.kernels.test_cpu import FEW_BITS, threads

pytestmark = [needs_kernel, pytest.mark.filterwarnings("ignore::attnpress.core.attention.NanWarning")]

TAILS: list[tuple[TailName, int]] = [("mean", 1), ("linear", 3), ("linear", 8), ("linear", 64)]
"""Kinds and ranks; the last sees the whole score of a head of 64."""


def make_spec(tail: TailName, rank: int, **changes: Any) -> AttentionSpec:
    return AttentionSpec(tail=tail, tail_rank=rank, **{"sparsity": 0.9, **changes})


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases().filter(lambda case: case.spec.tail != "none"))
def test_integers_equal_the_reference(target: str, case: Case) -> None:
    assert_same(case)


@pytest.mark.parametrize(("tail", "rank"), TAILS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_mask(target: str, mask: str, tail: TailName, rank: int, causal: bool) -> None:
    case = make_case((2, 4, 2, 70, 70, 64), make_spec(tail, rank), mask=mask, cutoff=3.0, causal=causal)
    assert isinstance(case.integer(), TailedAttention)
    assert_same(case)


@pytest.mark.parametrize(("tail", "rank"), TAILS)
@pytest.mark.parametrize("rule", ["relative", "threshold", "topk"])
@pytest.mark.parametrize("smooth", [False, True])
def test_every_rule(target: str, rule: RuleName, tail: TailName, rank: int, smooth: bool) -> None:
    spec = make_spec(tail, rank, rule=rule, smooth_key=smooth, v=TensorSpec(granularity="channel"))
    assert_same(make_case((2, 4, 2, 41, 90, 64), spec, cutoff=2.5, mask="padding"))


@pytest.mark.parametrize(("tail", "rank"), TAILS)
@pytest.mark.parametrize(("keys", "dim"), [(600, 64), (1500, 32), (700, 128)])
def test_long_rows(target: str, keys: int, dim: int, tail: TailName, rank: int) -> None:
    assert_same(make_case((1, 2, 1, 30, keys, dim), make_spec(tail, rank), cutoff=3.0))


@pytest.mark.parametrize(("query_bits", "key_bits", "dim"), FEW_BITS)
@pytest.mark.parametrize(("tail", "rank"), [("mean", 1), ("linear", 8), ("linear", 256)])
def test_few_bits(target: str, query_bits: int, key_bits: int, dim: int, tail: TailName, rank: int) -> None:
    few = {"q": TensorSpec(bits=query_bits), "k": TensorSpec(bits=key_bits), "p": ProbsSpec(bits=4)}
    assert_same(make_case((1, 4, 2, 23, 70, dim), make_spec(tail, rank, **few), cutoff=3.0))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("tail", "rank"), TAILS)
def test_thread_count_changes_nothing(target: str, batch: int, count: int, tail: TailName, rank: int) -> None:
    case = make_case((batch, 4, 2, 60, 70, 64), make_spec(tail, rank), cutoff=4.0, mask="padding")
    with threads(count):
        assert_same(case)


@pytest.mark.parametrize(("tail", "rank"), [("mean", 1), ("linear", 8), ("linear", 256)])
@pytest.mark.parametrize("rule", ["relative", "topk"])
def test_the_largest_sums_there_are(target: str, rule: RuleName, tail: TailName, rank: int) -> None:
    case = make_case((1, 1, 1, 9, 700, 256), make_spec(tail, rank, rule=rule), cutoff=0.01)
    case.query.abs_().add_(100)  # every code is the largest there is
    case.key.abs_().add_(100)
    case.value.abs_().add_(100)
    case.query[:, :, ::2].neg_()
    case.key[:, :, ::3, 1:].neg_()
    assert case.scales.tail is not None
    if (found := case.scales.tail.directions) is not None:
        found.query.fill_(32767)
        found.key.fill_(-32767)
    assert_same(case)


@pytest.mark.parametrize(("tail", "rank"), [("mean", 1), ("linear", 2), ("linear", 16)])
def test_more_keys_than_one_chunk(tail: TailName, rank: int) -> None:
    case = make_case((1, 1, 1, 2, 70_000, 16), make_spec(tail, rank), cutoff=2.0)
    case.value.fill_(100.0)
    assert_same(case)


@pytest.mark.parametrize(("tail", "rank"), TAILS)
def test_one_key_no_key_and_a_head_that_prunes_nothing(target: str, tail: TailName, rank: int) -> None:
    spec = make_spec(tail, rank)
    case = make_case((2, 4, 2, 4, 6, 64), spec, cutoff=0.5)
    assert case.cutoff is not None
    case.cutoff[1] = math.inf
    bare = case.with_(spec=dataclasses.replace(spec, tail="none"))
    assert torch.equal(ops.attention(case)[:, 1], ops.attention(bare)[:, 1])
    for keys in (0, 1):
        few = {name: getattr(case, name)[:, :, :keys] for name in ("key", "value")}
        output = ops.attention(case.with_(**few))
        assert torch.equal(output, ops.attention(bare.with_(**few)))
    assert_same(case)
    assert_same(case.with_(cutoff=torch.full((4,), math.inf)))
    assert_same(case.with_(cutoff=None))


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_has_its_own_tail(target: str, causal: bool) -> None:
    for tail, rank in TAILS:
        case = make_case((1, 4, 2, 90, 90, 64), make_spec(tail, rank), cutoff=2.0)
        bounds = [0, 0, 1, 30, 90]
        found = ops.attention(case.with_(bounds=torch.tensor(bounds), causal=causal))
        for begin, end in pairwise(bounds):
            own = {name: getattr(case, name)[:, :, begin:end] for name in ("query", "key", "value")}
            assert torch.equal(found[:, :, begin:end], case.with_(**own, causal=causal).integer().output)


@pytest.mark.parametrize(("tail", "rank"), [("mean", 1), ("linear", 8)])
def test_a_level_of_zero_adds_nothing_whatever_the_scales(target: str, tail: TailName, rank: int) -> None:
    case = make_case((1, 2, 2, 20, 40, 16), make_spec(tail, rank), cutoff=3.0)
    wide: dict[str, Any] = {name: torch.full_like(getattr(case.scales, name), 2.0**40) for name in ("q", "k", "v")}
    case = case.with_(
        scales=dataclasses.replace(case.scales, **wide), scaling=2.0**32,
        **{name: getattr(case, name) * 2.0**44 for name in ("query", "key", "value")},
    )  # fmt: skip
    assert bool(ops.attention(case).isfinite().all())
    assert torch.equal(case.fake(), case.integer().output)
    assert_same(case)


def test_operator_passes_the_checks_of_torch() -> None:
    for tail, rank in TAILS:
        case = make_case((2, 2, 1, 9, 11, 64), make_spec(tail, rank), mask="padding", cutoff=2.0)
        arguments = ops.compiled_arguments(case)
        torch.library.opcheck(torch.ops.attnpress.attention.default, arguments)
        torch.library.opcheck(torch.ops.attnpress.attention_integers.default, arguments)


def spoiled(case: Case, part: str, value: Any) -> Case:
    tail = case.scales.tail
    assert tail is not None
    assert tail.directions is not None
    whole = {"lift": tail.lift, **vars(tail.directions)}
    x = whole[part].clone()
    whole[part] = (
        value if isinstance(value, torch.Tensor) else x.flatten().index_fill(0, torch.tensor(1), value).view(x.shape)
    )
    lift = whole.pop("lift")
    return case.with_(scales=dataclasses.replace(case.scales, tail=Tail(lift, Directions(**whole))))


@pytest.mark.parametrize("rule", ["relative", "topk"])
@pytest.mark.parametrize(
    ("part", "value"),
    [("lift", -1.0), ("lift", 0.5), ("lift", math.nan), ("lift", 20000.0), ("lift", torch.zeros(3)),
     ("query", 40000.0), ("query", 0.25), ("query", torch.zeros(2, 16, 300)), ("query", torch.zeros(2, 3)),
     ("key", math.inf), ("key", torch.zeros(2, 16, 2)), ("offset", 2.0**21), ("offset", torch.zeros(4, 3)),
     ("step", math.nan), ("step", -1.0), ("step", torch.zeros(2, dtype=torch.float64))],
)  # fmt: skip
def test_what_no_calibration_gives_is_refused_in_the_words_of_the_reference(
    part: str, value: Any, rule: RuleName
) -> None:
    case = make_case((1, 4, 2, 5, 9, 16), make_spec("linear", 3, rule=rule), cutoff=2.0)
    case = spoiled(case, part, value)
    said = []
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=f"^tail {part}: ") as caught:
            ops.attention(case, backend=backend)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_whoever_reaches_the_operator_directly_gets_an_error() -> None:
    case = make_case((1, 4, 2, 5, 9, 16), make_spec("linear", 3), cutoff=2.0)
    good = list(ops.compiled_arguments(case))
    at = cpu.TAIL_AT
    bad = {
        12: "unit", at: "median", at + 1: torch.zeros(3), at + 2: torch.zeros(2, 16), at + 3: torch.zeros(2, 16, 4),
        at + 4: None, at + 5: torch.zeros(2, 1),
    }  # fmt: skip
    for place, value in bad.items():
        arguments = [value if i == place else x for i, x in enumerate(good)]
        with pytest.raises(RuntimeError, match="attnpress"):
            torch.ops.attnpress.attention(*arguments)


def test_linear_without_directions_says_what_to_do() -> None:
    case = make_case((1, 2, 2, 5, 9, 16), make_spec("linear", 3), cutoff=2.0)
    bare = case.with_(scales=Scales(case.scales.q, case.scales.k, case.scales.v))
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=r"tail 'linear' has no directions yet: run calibrate"):
            ops.attention(bare, backend=backend)


def test_a_head_that_is_off_has_the_lift_for_it() -> None:
    case = make_case((1, 2, 2, 5, 9, 16), make_spec("mean", 1), cutoff=2.0).with_(cutoff=torch.tensor([math.inf, 1.0]))
    arguments = ops.compiled_arguments(case)
    assert arguments[cpu.TAIL_AT] == "mean"
    assert float(arguments[cpu.TAIL_AT + 1][0]) == OFF


@given(st.sampled_from(TAILS), st.integers(1, 3))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_take_their_part_of_the_tail(kind: tuple[TailName, int], seed: int) -> None:
    case = make_case((2, 4, 2, 13, 17, 64), make_spec(*kind), mask="padding", cutoff=2.0, seed=seed)
    whole = ops.attention(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "SHORT", 0)
        patch.setattr(ops, "_most", lambda: 20_000)
        assert torch.equal(ops.attention(case), whole)
