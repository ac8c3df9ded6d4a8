"""A look inside a call: the same P as the reference, no error where nothing is compressed, padding never counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from attnpress.config import DENSE, RuleName, TailName
from attnpress.core.attention import dense_attention, repeat_heads
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.probe import probe, relative_error
from attnpress.core.quantizer import dequantize, quantize
from attnpress.core.rules import rule_of
from attnpress.core.rules.base import BINS
from attnpress.core.thresholds import fit_cutoff, pair_histogram
from tests.core.factories import SEEDS, Call, calls, make_call, make_spec
from tests.core.tails import with_tail

QUERY, KEY, VALUE = (torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
REAL = (torch.arange(7) < torch.tensor([[7], [4]])).view(2, 1, 7, 1)
PADDED = AttentionCall(QUERY, KEY, VALUE, REAL.mT.expand(2, 1, 7, 7), Scales(), None, DENSE, 8**-0.5, REAL)


@given(calls())
def test_p_is_that_of_the_integer_reference(call: Call) -> None:
    found, reference = probe(call), call.integer()
    assert torch.equal(found.codes.to(torch.uint8), reference.p_codes)
    assert call.scales.v is not None
    value = dequantize(quantize(call.value, call.scales.v, call.spec.v.qmax), call.scales.v)
    output = found.after @ repeat_heads(value, call.query.shape[1])
    torch.testing.assert_close(output, reference.output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("tail", "rank"), [("mean", 1), ("linear", 3), ("linear", 8)])
def test_p_shows_the_tail(tail: TailName, rank: int) -> None:
    call = with_tail(make_call(make_spec(sparsity=0.9), keys=12, mask="padding", spread=2.0), tail, rank)
    found, reference = probe(call), call.integer()
    assert call.scales.v is not None
    value = dequantize(quantize(call.value, call.scales.v, call.spec.v.qmax), call.scales.v)
    torch.testing.assert_close(found.after @ value, reference.output, atol=1e-4, rtol=1e-4)
    sums = found.after.sum(-1)
    torch.testing.assert_close(sums[call.allowed().any(-1)], torch.ones(int(call.allowed().any(-1).sum())))


def test_dense_attention_loses_nothing_and_is_the_framework_s_own() -> None:
    found = probe(PADDED)
    assert torch.equal(found.before, found.after)
    assert all(not relative_error(loss).any() for loss in found.loss.values())
    expected = dense_attention(QUERY, KEY, VALUE, PADDED.valid, PADDED.scaling)
    torch.testing.assert_close(found.before @ VALUE, expected, atol=1e-5, rtol=1e-4)


def test_mass_is_that_of_pairs_without_a_code() -> None:
    call = make_call(make_spec(sparsity=0.9), keys=12, mask="padding", spread=2.0)
    found = probe(call)
    by_hand = torch.where(call.integer().p_codes == 0, found.before.double(), 0.0) * found.counted
    torch.testing.assert_close(found.mass[0], by_hand.sum((0, 2, 3)))
    rows = found.counted.any(-1).sum((0, 2)).double()
    torch.testing.assert_close(found.mass[1], rows, rtol=1e-5, atol=0.0)
    assert (found.mass[0] > 0).all()


def test_padding_is_in_neither_counts_nor_errors() -> None:
    spec = make_spec()
    scales = Scales(*(torch.full((1, 3, 1, 1), 0.03) for _ in range(3)))
    query, key, value = (torch.where(REAL, x, 1e3) for x in (QUERY, KEY, VALUE))
    wild = PADDED.with_(query=query, key=key, value=value)
    tame, disturbed = (probe(one.with_(scales=scales, spec=spec)) for one in (PADDED, wild))
    assert tame.histogram.sum(-1).tolist() == [7 * 7 + 4 * 4] * 3
    assert torch.equal(tame.histogram, disturbed.histogram)
    for name, loss in tame.loss.items():
        torch.testing.assert_close(disturbed.loss[name], loss)
        assert (relative_error(loss) > 0).all(), name


def test_coarser_codes_lose_more() -> None:
    def output_error(bits: int) -> torch.Tensor:
        call = make_call(make_spec(bits))
        return relative_error(probe(call.with_(cutoff=None)).loss["output"])

    assert (output_error(8) < output_error(4)).all()
    assert (output_error(4) < output_error(2)).all()


@pytest.mark.parametrize("rule", ["relative", "threshold", "mass"])
@given(seed=SEEDS)
def test_the_share_beyond_a_fitted_threshold_is_what_was_asked(rule: RuleName, seed: int) -> None:
    spec = make_spec(rule=rule)
    bins = torch.randint(0, BINS, (1, 2, 40, 50), generator=torch.Generator().manual_seed(seed))
    histogram = pair_histogram(bins, torch.ones_like(bins, dtype=torch.bool))
    for asked in (0.0, 0.3, 0.9):
        share = rule_of(spec).pruned(spec, histogram, fit_cutoff(spec, histogram, asked)) / histogram.sum(-1)
        assert share.tolist() == pytest.approx([asked, asked], abs=1e-3)
    assert not rule_of(spec).pruned(spec, histogram, None).any()
