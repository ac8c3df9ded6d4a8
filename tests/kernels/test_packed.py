"""Sequences end to end in one row: each gets what it gets alone, on every target and thread count."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.kernels import ops
from tests.kernels.factories import DTYPES, EXTREMES, Case, make_case, needs_kernel, specs

pytestmark = pytest.mark.filterwarnings("ignore::attnpress.core.attention.NanWarning")

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=9)
BACKENDS = [pytest.param("cpu", marks=needs_kernel), "reference"]


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(case: Case, bounds: Tensor, backend: str) -> Tensor:
    return ops.attention(case.with_(bounds=bounds), backend=backend)


def some_tokens(case: Case, begin: int, end: int) -> Case:
    return case.with_(**{name: getattr(case, name)[:, :, begin:end] for name in ("query", "key", "value")})


def alone(case: Case, bounds: Tensor, backend: str) -> Tensor:
    parts = [
        ops.attention(some_tokens(case, begin, end), backend=backend)
        for begin, end in pairwise(bounds.tolist())
        if begin < end
    ]
    return torch.cat(parts, 2) if parts else torch.empty(case.query.shape)


@needs_kernel
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=LENGTHS, spec=specs(), draw=st.data())
def test_each_sequence_gets_what_it_gets_alone(
    target: str, lengths: list[int], spec: AttentionSpec, draw: st.DataObject
) -> None:
    kv_heads, group = draw.draw(st.integers(1, 2)), draw.draw(st.integers(1, 3))
    tokens, dim = sum(lengths), draw.draw(st.sampled_from((16, 20, 32, 64)))
    case = make_case(
        (1, kv_heads * group, kv_heads, tokens, tokens, dim), spec, extreme=draw.draw(st.sampled_from(EXTREMES)),
        dtype=draw.draw(st.sampled_from(DTYPES)), cutoff=draw.draw(st.sampled_from((None, 0.5, 3.0))),
        causal=draw.draw(st.booleans()), transposed=draw.draw(st.booleans()), seed=draw.draw(st.integers(0, 2**31)),
    )  # fmt: skip
    bounds = bounds_of(lengths)
    torch.set_num_threads(draw.draw(st.integers(1, 3)))
    found = packed(case, bounds, "cpu")
    assert torch.equal(found, alone(case, bounds, "cpu"))
    assert found.transpose(1, 2).is_contiguous()
    assert torch.equal(torch.isnan(found), torch.isnan(packed(case, bounds, "reference")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_batch_is_a_padded_one_without_its_padding(backend: str) -> None:
    lengths = [7, 19, 1, 12]
    case = make_case((4, 2, 2, 19, 19, 32), AttentionSpec(sparsity=0.8, smooth_key=True), cutoff=3.0)
    real = torch.arange(19) < torch.tensor(lengths).view(4, 1)
    padded = ops.attention(case.with_(valid=real[:, None, None, :]), backend=backend)
    q, k, v = (x.transpose(1, 2)[real].transpose(0, 1).unsqueeze(0) for x in (case.query, case.key, case.value))
    found = packed(case.with_(query=q, key=k, value=v), bounds_of(lengths), backend)
    assert torch.equal(found[0].transpose(0, 1), padded.transpose(1, 2)[real])


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_one_product_are_taken_as_they_lie(backend: str) -> None:
    case = make_case((1, 2, 2, 12, 12, 16), AttentionSpec(), cutoff=None)
    merged = torch.randn(1, 12, 3, 2, 16)
    views = merged.permute(2, 0, 3, 1, 4)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed(case.with_(query=q, key=k, value=v), bounds_of([5, 7]), backend)

    assert torch.equal(attend(*views), attend(*views.contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [[0, 5], [1, 12], [0, 9, 5, 12], [], [0, 13]])
def test_bounds_that_do_not_fit_are_refused(bounds: list[int], backend: str) -> None:
    case = make_case((1, 2, 2, 12, 12, 16), AttentionSpec())
    with pytest.raises(ValueError, match="bounds: int64, rising from 0 to the number of tokens, 12"):
        packed(case, torch.tensor(bounds, dtype=torch.int64), backend)
    with pytest.raises(ValueError, match="packed tensors are"):
        packed(make_case((2, 2, 2, 12, 12, 16), AttentionSpec()), bounds_of([12]), backend)


@needs_kernel
def test_whoever_reaches_the_operator_directly_gets_an_error_not_a_crash() -> None:
    case = make_case((1, 2, 2, 12, 12, 16), AttentionSpec())
    arguments = ops.compiled_arguments(case)
    for bounds in (torch.tensor([0, 99]), torch.tensor([0, 9, 5, 12]), torch.tensor([0.0, 12.0])):
        with pytest.raises(RuntimeError, match="bounds must"):
            torch.ops.attnpress.attention_packed(*arguments[:3], bounds, *arguments[4:])
