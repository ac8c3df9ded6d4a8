"""The compiled kernel against the reference: the same integers on every target of this machine and any thread count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from attnpress.config import AttentionSpec, ProbsSpec, RuleName, TensorSpec
from attnpress.kernels import cpu, ops
from attnpress.kernels.cpu import TARGET_VARIABLE, BackendUnavailableError
from tests.kernels.agreement import assert_same
from tests.kernels.factories import Case, cases, make_case, needs_kernel

NAN = pytest.mark.filterwarnings("ignore::attnpress.core.attention.NanWarning")
"""Some calls are given NaN; the warning has tests of its own."""

pytestmark = [needs_kernel, NAN]

DENSE = AttentionSpec()
PRUNED = AttentionSpec(sparsity=0.9)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases())
def test_integers_equal_the_reference(target: str, case: Case) -> None:
    assert_same(case)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 5])
def test_thread_count_changes_nothing(target: str, batch: int, count: int) -> None:
    case = make_case((batch, 2, 2, 60, 70, 32), PRUNED, cutoff=4.0, mask="padding")
    with threads(count):
        assert_same(case)


@pytest.mark.parametrize("rule", ["relative", "topk"])
@pytest.mark.parametrize("keys", [2047, 3000])
def test_long_rows(target: str, keys: int, rule: RuleName) -> None:
    spec = AttentionSpec(sparsity=0.95, rule=rule)
    assert_same(make_case((1, 1, 1, 26, keys, 64), spec, cutoff=3.0))


# Bits of Q and K and a head size: the largest whose sums AVX2 takes in 16 bits, the next one, and usual ones.
FEW_BITS = [
    (4, 4, 64),
    (4, 4, 256),
    (2, 5, 128),
    (5, 5, 140),
    (5, 5, 144),
    (6, 2, 124),
    (6, 2, 128),
    (8, 2, 28),
    (8, 2, 32),
]


@pytest.mark.parametrize(("query_bits", "key_bits", "dim"), FEW_BITS)
@pytest.mark.parametrize("rule", ["relative", "topk"])
def test_few_bits_of_queries_and_keys(target: str, query_bits: int, key_bits: int, dim: int, rule: RuleName) -> None:
    spec = AttentionSpec(TensorSpec(bits=query_bits), TensorSpec(bits=key_bits), rule=rule, sparsity=0.8)
    assert_same(make_case((2, 4, 2, 23, 70, dim), spec, cutoff=3.0, mask="holes", transposed=False))
    largest = make_case((1, 1, 1, 8, 600, dim), spec, cutoff=3.0)
    largest.query.abs_().add_(100)  # every code is the largest there is
    largest.key.abs_().add_(100)
    largest.key[:, :, ::3].neg_()
    largest.query[:, :, ::2].neg_()
    assert_same(largest)


def test_more_keys_than_one_chunk_of_32_bit_sums_and_16_bit_indexes() -> None:
    spec = AttentionSpec(p=ProbsSpec(bits=8), q=TensorSpec(granularity="tensor"))
    case = make_case((1, 1, 1, 2, 70_000, 16), spec)
    case.query.zero_()  # all probabilities equal: the largest sums there are
    case.value.fill_(100.0)
    assert_same(case)
    assert_same(make_case((1, 1, 1, 3, 70_000, 16), PRUNED, cutoff=2.0))


def test_rows_with_rising_scores_and_far_maxima(target: str) -> None:
    case = make_case((1, 2, 2, 20, 700, 64), PRUNED, cutoff=3.0)
    case.key.mul_(torch.linspace(0.01, 8, 700).view(1, 1, -1, 1))
    assert_same(case)


def test_ties_go_to_the_lower_index(target: str) -> None:
    case = make_case((1, 1, 1, 5, 100, 32), AttentionSpec(rule="topk", sparsity=0.7), extreme="equal")
    codes = ops.compiled_integers(case)["p_codes"]
    assert torch.equal(codes[..., :30] > 0, torch.ones(1, 1, 5, 30, dtype=torch.bool))
    assert int(codes[..., 30:].sum()) == 0


def test_rows_without_a_key_give_zeros(target: str) -> None:
    case = make_case((2, 2, 1, 9, 33, 64), PRUNED, mask="all masked", cutoff=2.0)
    assert torch.equal(ops.attention(case), torch.zeros(2, 2, 9, 64))


def test_codes_do_not_depend_on_padding_or_batch_mates(target: str) -> None:
    long = make_case((2, 2, 2, 50, 50, 64), AttentionSpec(sparsity=0.9, smooth_key=True), cutoff=3.0)
    valid = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    valid[1, ..., 30:] = False
    both = ops.attention(long.with_(valid=valid))
    few = {name: getattr(long, name)[1:, :, :30] for name in ("query", "key", "value")}
    alone = ops.attention(long.with_(**few))
    assert torch.equal(both[1:, :, :30], alone)


def test_output_layout_lets_heads_be_joined_without_a_copy() -> None:
    case = make_case((2, 3, 3, 7, 7, 16), DENSE)
    output = ops.attention(case)
    assert output.transpose(1, 2).is_contiguous()
    assert ops.attention(case, backend="reference").stride() == output.stride()


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3, 16), (1, 2, 2, 0, 3, 16), (1, 2, 2, 3, 0, 16)])
def test_empty_tensors(shape: tuple[int, int, int, int, int, int]) -> None:
    case = make_case(shape, DENSE)
    output = ops.attention(case)
    assert torch.equal(output, torch.zeros(output.shape))


def test_operator_passes_the_checks_of_torch() -> None:
    for mask, causal in (("none", False), ("padding", True), ("holes", False)):
        case = make_case((2, 2, 1, 9, 11, 16), PRUNED, mask=mask, cutoff=2.0, causal=causal)
        arguments = ops.compiled_arguments(case.with_(causal=causal))
        torch.library.opcheck(torch.ops.attnpress.attention.default, arguments)
        torch.library.opcheck(torch.ops.attnpress.attention_integers.default, arguments)


def test_unknown_or_unsupported_target_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TARGET_VARIABLE, "mmx")
    with pytest.raises(BackendUnavailableError, match=r"mmx: no such target; use one of .*scalar"):
        cpu.active_target()
    case = make_case((1, 1, 1, 2, 2, 16), DENSE)
    with pytest.raises(RuntimeError, match="no such target"):
        ops.attention(case)


def test_torch_ops_reject_what_would_crash() -> None:
    case = make_case((1, 2, 2, 4, 4, 16), DENSE)
    good = list(ops.compiled_arguments(case))
    bad = {
        0: torch.zeros(1, 2, 4, 18), 1: torch.zeros(1, 2, 5, 16), 3: torch.ones(1, 1, 3, 4, dtype=torch.bool),
        6: torch.ones(2), 7: torch.ones(1, 3, 1, 1), 9: torch.ones(3), 10: "mass", 12: "rows", 13: 128, 16: 200,
    }  # fmt: skip
    for place, value in bad.items():
        arguments = [value if i == place else x for i, x in enumerate(good)]
        with pytest.raises(RuntimeError, match="attnpress"):
            torch.ops.attnpress.attention(*arguments)


@pytest.mark.parametrize("variable", [TARGET_VARIABLE, "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_process_held_below_vnni_has_none(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (TARGET_VARIABLE, *cpu.ONEDNN_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert cpu.has_vnni() == torch.backends.mkldnn.is_available()
    for value in ("avx2", "scalar") if variable == TARGET_VARIABLE else ("AVX2", "avx512_core", "SSE41"):
        monkeypatch.setenv(variable, value)
        assert not cpu.has_vnni()
    monkeypatch.setenv(variable, "avx512vnni" if variable == TARGET_VARIABLE else "AVX512_CORE_VNNI")
    assert cpu.has_vnni() == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not cpu.has_vnni()
