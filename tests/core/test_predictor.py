"""Foretold masks: few bits decide, and what is kept is computed as if the mask had forbidden the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnpress.config import RuleName
from attnpress.core.attention import ForetoldAttention, integer_attention, repeat_heads
from attnpress.core.cost import attention_work
from attnpress.core.exponential import exponent, exponent_rate, power
from attnpress.core.predictor import foretold_scores, foretold_step
from attnpress.core.probe import probe
from tests.core.factories import MASKS, RULES, SEEDS, Call, make_call, make_spec


def short(code: int, bits: int, wanted: int) -> int:
    """numerics, section 4, one code at a time."""
    shift = max(0, bits - wanted)
    largest = 2 ** (wanted - 1) - 1
    return max(-largest, min(largest, (code + 2 ** (shift - 1)) >> shift)) if shift else code


@pytest.mark.parametrize(("bits", "wanted"), [(8, 4), (8, 7), (8, 2), (5, 4), (6, 3)])
def test_codes_are_shortened_as_the_contract_says(bits: int, wanted: int) -> None:
    spec = make_spec(bits, predictor_bits=wanted)
    codes = torch.arange(-spec.q.qmax, spec.q.qmax + 1).view(1, 1, -1, 1)
    one = torch.ones(1, 1, 1, 1)
    step = 2 ** (bits - wanted)
    for q, k in ((codes, one * step), (one * step, codes)):
        found = foretold_scores(q, k, spec)
        assert found is not None
        assert found.flatten().tolist() == [short(code, bits, wanted) for code in codes.flatten().tolist()]
    assert float(foretold_step(torch.tensor(0.75), spec)) == 0.75 * step**2
    assert float(foretold_step(torch.tensor(2.0**112), spec)) == 2.0**100


def test_of_two_matrices_the_one_with_few_bits_stays_as_it_is() -> None:
    spec = make_spec(8, predictor_bits=4, k=make_spec(3).k)
    assert foretold_scores(torch.full((1, 1, 1, 1), 100.0), torch.full((1, 1, 1, 1), 3.0), spec) == 6 * 3
    assert foretold_step(torch.tensor(1.0), spec) == 16
    assert foretold_scores(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), make_spec(8)) is None


def foretelling(rule: RuleName, seed: int, mask: str = "none", sparsity: float = 0.6) -> Call:
    spec = make_spec(8, rule, sparsity, predictor_bits=4)
    return make_call(spec, seed, mask=mask, heads=4, kv_heads=2, spread=2.0)


@given(seed=SEEDS, mask=st.sampled_from(MASKS))
def test_the_mask_of_a_threshold_is_that_of_the_foretold_scores(seed: int, mask: str) -> None:
    call = foretelling("threshold", seed, mask)
    found = call.integer()
    assert isinstance(found, ForetoldAttention)
    assert call.cutoff is not None
    k_codes = repeat_heads(found.k_codes, 4)
    q_scale, k_scale = call.scales.q, call.scales.k
    assert q_scale is not None
    assert k_scale is not None
    step = (q_scale * repeat_heads(k_scale, 4)) * torch.tensor(8**-0.5)
    for b, h, i in np.ndindex(*found.keep.shape[:3]):
        allowed = [j for j in range(found.keep.shape[3]) if call.allowed()[b, h, i, j]]
        q = [short(code, 8, 4) for code in found.q_codes[b, h, i].tolist()]
        keys = {j: [short(code, 8, 4) for code in k_codes[b, h, j].tolist()] for j in allowed}
        scores = {j: sum(x * y for x, y in zip(q, k, strict=True)) for j, k in keys.items()}
        assert all(found.foretold[b, h, i, j] == score for j, score in scores.items())
        rate = exponent_rate(step[0, h, 0, 0] * 256)
        largest = max(scores.values(), default=0)
        p = {j: int(power(exponent(torch.tensor(largest - score), rate))) for j, score in scores.items()}
        least = np.float32(math.exp(-float(call.cutoff[h]))) * np.float32(sum(p.values()))
        kept = {j for j in allowed if np.float32(p[j]) >= least or scores[j] == largest}
        assert kept == {j for j in range(found.keep.shape[3]) if found.keep[b, h, i, j]}
        exact = [int(found.acc[b, h, i, j]) for j in kept]
        assert int(found.row_max[b, h, i, 0]) == max(exact, default=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_kept_is_computed_as_if_the_mask_forbade_the_rest(rule: RuleName, mask: str) -> None:
    call = foretelling(rule, 3, mask, 0.5)
    found = call.integer()
    assert 0 < int(found.keep.sum()) < int(call.allowed().sum()) or mask == "padding"
    plain = integer_attention(
        call.with_(valid=found.keep, cutoff=None, spec=make_spec(8, rule, 0.0))
    )  # nothing of it pruned
    for name in ("row_max", "p_codes", "code_sum", "weighted", "output"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    empty = ~call.allowed().any(-1)
    assert not found.output[empty].any()


@pytest.mark.parametrize("rule", RULES)
def test_training_sees_the_integers_of_the_reference_and_learns_from_survivors_alone(rule: RuleName) -> None:
    call = foretelling(rule, 5, "padding", 0.5)
    found = call.integer()
    query, key, value = (x.detach().requires_grad_() for x in (call.query, call.key, call.value))
    output = call.with_(query=query, key=key, value=value).fake()
    assert torch.allclose(output, found.output, rtol=1e-6, atol=1e-7)
    output.square().sum().backward()
    again = [x.detach().requires_grad_() for x in (call.query, call.key, call.value)]
    plain = call.with_(
        query=again[0], key=again[1], value=again[2], valid=found.keep, cutoff=None, spec=make_spec(8, rule, 0.0)
    )
    plain.fake().square().sum().backward()
    for ours, theirs in zip((query, key, value), again, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_the_foretold_maximum_is_kept_and_not_always_the_largest_score() -> None:
    missed = 0
    for seed in range(20):
        call = foretelling("relative", seed, sparsity=0.9)
        found = call.with_(cutoff=torch.zeros(4)).integer()
        assert isinstance(found, ForetoldAttention)
        largest = found.foretold == found.foretold.amax(-1, keepdim=True)
        assert torch.equal(found.keep, largest)
        missed += int((~(found.keep & (found.acc == found.acc.amax(-1, keepdim=True)))).all(-1).sum())
    assert missed > 0


def test_where_nothing_is_pruned_nothing_is_foretold_away() -> None:
    call = foretelling("threshold", 1, "causal", 0.0)
    found, plain = call.integer(), call.with_(spec=make_spec(8, "threshold", 0.0)).integer()
    assert torch.equal(found.output, plain.output)
    assert torch.equal(found.keep, plain.keep)


def test_a_probe_shows_what_the_rule_looked_at() -> None:
    call = foretelling("threshold", 2, "padding")
    assert call.cutoff is not None
    seen, found = probe(call), call.integer()
    assert torch.equal(seen.codes.int(), found.p_codes.int())
    exact = probe(call.with_(spec=make_spec(8, "threshold", 0.6)))
    assert not torch.equal(seen.histogram, exact.histogram)
    assert torch.equal(seen.histogram.sum(-1), exact.histogram.sum(-1))


def test_work_counts_both_products() -> None:
    bits: dict[str, int | None] = {"q": 8, "k": 8, "v": 8, "p": 4}
    work = attention_work(1000, 80, 32, bits, kept=100, predictor_bits=4)
    assert work.macs_remaining == 32 * (1000 + 100 + 80)
    assert work.bit_operations_remaining == 32 * (1000 * 16 + 100 * 64 + 80 * 32)
    assert work.bytes_remaining == attention_work(1000, 80, 32, bits).bytes_remaining
    narrow = attention_work(1000, 80, 32, bits | {"k": 3}, kept=100, predictor_bits=4)
    assert narrow.bit_operations_remaining == 32 * (1000 * 12 + 100 * 24 + 80 * 32)
