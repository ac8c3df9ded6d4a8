"""Each observer against a slow, direct computation on all the values it was shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpress.core.observer import BINS_PER_OCTAVE, EMA_MOMENTUM, HIGH_OCTAVE, LOW_OCTAVE, PERCENTILE, Observer, Reduce
from tests.core.factories import SEEDS, generator, normal

NAMES = ("absmax", "ema", "percentile", "mse")
GRANULARITIES = ("tensor", "head", "channel")
BIN = 2 ** (1 / BINS_PER_OCTAVE)
"""Ratio of neighbouring edges of the histogram."""

Batch = tuple[Tensor, Tensor | None]


def heavy_tailed(seed: int, *shape: int) -> Tensor:
    """Mostly small values and a few large ones, as in trained models."""
    spread = torch.where(torch.rand(shape, generator=generator(seed)) < 0.01, 20.0, 1.0)
    return normal(seed + 1, *shape) * spread


def make_batches(seed: int, count: int = 3, lengths: Sequence[int] = (7, 4)) -> list[Batch]:
    """Batches of different lengths, the last sequence of each padded."""
    batches: list[Batch] = []
    for index in range(count):
        keys = max(lengths) + 2 * index
        valid = (torch.arange(keys) < torch.tensor(lengths).view(-1, 1)).view(len(lengths), 1, keys, 1)
        batches.append((heavy_tailed(seed + 10 * index, len(lengths), 3, keys, 4), valid))
    return batches


def observe(
    name: str, granularity: str, batches: Sequence[Batch], qmax: int = 7, power_of_two: bool = False
) -> Observer:
    observer = Observer(name, granularity, qmax, power_of_two=power_of_two)
    for batch in batches:
        observer.update(*batch)
    return observer


def groups(x: Tensor, valid: Tensor | None, granularity: str) -> dict[tuple[int, int], list[float]]:
    """Magnitudes of real tokens by (head, channel); index 0 where all share one scale."""
    mask = torch.ones_like(x, dtype=torch.bool) if valid is None else valid.expand_as(x)
    found: dict[tuple[int, int], list[float]] = {}
    for b, h, s, d in product(*map(range, x.shape)):
        if mask[b, h, s, d]:
            key = (0 if granularity == "tensor" else h, d if granularity == "channel" else 0)
            found.setdefault(key, []).append(abs(float(x[b, h, s, d])))
    return found


def pooled(batches: Sequence[Batch], granularity: str) -> dict[tuple[int, int], list[float]]:
    found: dict[tuple[int, int], list[float]] = {}
    for batch in batches:
        for key, values in groups(*batch, granularity).items():
            found.setdefault(key, []).extend(values)
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_absmax_is_the_largest_magnitude(granularity: str) -> None:
    batches = make_batches(0)
    scale = observe("absmax", granularity, batches, qmax=127).scale()
    for (h, d), values in pooled(batches, granularity).items():
        assert float(scale[0, h, 0, d]) == float(torch.tensor(max(values)) / 127)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ema_is_the_moving_average_of_batch_maxima(granularity: str) -> None:
    batches = make_batches(1, count=5)
    scale = observe("ema", granularity, batches, qmax=127).scale()
    for h, d in pooled(batches, granularity):
        maxima = [max(groups(*batch, granularity)[h, d]) for batch in batches]
        average = maxima[0]
        for largest in maxima[1:]:
            average = EMA_MOMENTUM * average + (1 - EMA_MOMENTUM) * largest
        assert float(scale[0, h, 0, d]) == pytest.approx(average / 127, rel=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_percentile_is_that_of_nonzero_magnitudes_within_a_bin(granularity: str) -> None:
    batches = [(heavy_tailed(seed, 2, 2, 60, 3 if granularity == "channel" else 100), None) for seed in (2, 30)]
    scale = observe("percentile", granularity, batches, qmax=1).scale()
    for (h, d), values in pooled(batches, granularity).items():
        ranked = sorted(values)
        wanted = ranked[math.ceil(len(ranked) * PERCENTILE / 100) - 1]
        found = float(scale[0, h, 0, d])
        assert wanted <= found * (1 + 1e-6)
        assert found <= min(wanted * BIN, ranked[-1]) * (1 + 1e-6)


def squared_error(values: Tensor, scale: Tensor, qmax: int) -> float:
    codes = (values / scale).round().clamp(max=qmax)
    return float(((codes * scale - values) ** 2).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_mse_is_the_clipping_of_least_squared_error(granularity: str, bits: int) -> None:
    qmax, batches = 2 ** (bits - 1) - 1, [(heavy_tailed(3, 2, 2, 50, 6), None)]
    scale = observe("mse", granularity, batches, qmax).scale()
    for (h, d), magnitudes in pooled(batches, granularity).items():
        values = torch.tensor(magnitudes, dtype=torch.float64)
        candidates = torch.linspace(0.002, 1, 500, dtype=torch.float64) * values.max() / qmax
        best = min(squared_error(values, candidate, qmax) for candidate in candidates)
        # The observer knows values to within a bin and tries a hundred ratios: near the flat minimum that is little.
        assert squared_error(values, scale[0, h, 0, d].double(), qmax) <= 1.1 * best


@given(SEEDS)
def test_mse_beats_absmax_on_heavy_tails_at_four_bits(seed: int) -> None:
    x = normal(seed, 1, 1, 200, 10).exp()
    mse, absmax = (
        squared_error(x.double(), observe(name, "tensor", [(x, None)]).scale().double(), 7)
        for name in ("mse", "absmax")
    )
    assert mse < 0.9 * absmax


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(max_examples=4)
@given(seed=SEEDS, filler=st.sampled_from([0.0, 1e6, math.nan, math.inf]))
def test_padding_never_enters_a_statistic(name: str, granularity: str, seed: int, filler: float) -> None:
    batches = make_batches(seed)
    filled: list[Batch] = [(torch.where(valid, x, filler), valid) for x, valid in batches if valid is not None]
    alone = [
        (x[i : i + 1, :, : int(valid[i].sum())], None) for x, valid in batches if valid is not None for i in (0, 1)
    ]
    scale = observe(name, granularity, batches).scale()
    assert torch.equal(observe(name, granularity, filled).scale(), scale), "whatever the padding holds"
    if name != "ema":  # an average of batch maxima depends on what was batched
        assert torch.equal(observe(name, granularity, alone).scale(), scale), "as without padding"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (0, 3, 5, 4)], ids=["padding only", "empty"])
def test_a_batch_without_a_real_token_changes_nothing(name: str, shape: tuple[int, ...]) -> None:
    batches = make_batches(4)
    nothing: Batch = (torch.full(shape, 9.0), torch.zeros(shape[0], 1, shape[2], 1, dtype=torch.bool))
    scale = observe(name, "head", batches).scale()
    for place in (0, 1, 3):
        assert torch.equal(observe(name, "head", [*batches[:place], nothing, *batches[place:]]).scale(), scale)


@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite_are_left_out(name: str) -> None:
    x = heavy_tailed(5, 1, 2, 30, 4)
    x[0, :, :3] = 0
    spoilt = x.clone()
    spoilt[0, :, :3] = torch.tensor([math.nan, math.inf, -math.inf]).view(3, 1)
    assert torch.equal(observe(name, "head", [(spoilt, None)]).scale(), observe(name, "head", [(x, None)]).scale())


class Offers:
    """A reduction over ranks, played in two rounds: first every rank offers its tensors, then each gets them merged."""

    def __init__(self) -> None:
        self.tensors: list[list[Tensor]] = []

    def collect(self, observer: Observer) -> None:
        self.tensors.append([])
        observer.scale(self._keep)

    def _keep(self, tensor: Tensor, _: str) -> Tensor:
        self.tensors[-1].append(tensor)
        return tensor

    def merged(self) -> Reduce:
        turns = iter(zip(*self.tensors, strict=True))

        def reduce(_: Tensor, how: str) -> Tensor:
            shares = torch.stack(next(turns))
            return shares.amax(0) if how == "max" else shares.sum(0)

        return reduce


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_two_ranks_get_the_scale_of_one_process(name: str, granularity: str) -> None:
    batches = make_batches(6, lengths=(7, 4, 1, 6))
    shares = [[(x[rank::2], valid[rank::2]) for x, valid in batches if valid is not None] for rank in (0, 1)]
    ranks = [observe(name, granularity, share) for share in shares]
    scale = observe(name, granularity, batches).scale()
    assert not all(torch.equal(rank.scale(), scale) for rank in ranks), "one share alone would give another scale"
    offers = Offers()
    for rank in ranks:
        offers.collect(rank)
    for rank in ranks:
        assert torch.equal(rank.scale(offers.merged()), scale)


@pytest.mark.parametrize("name", NAMES)
def test_power_of_two_scales_are_not_smaller_than_the_plain_ones(name: str) -> None:
    batches = make_batches(7)
    plain, power = (observe(name, "channel", batches, power_of_two=flag).scale() for flag in (False, True))
    assert bool((torch.frexp(power).mantissa == 0.5).all())
    if name != "mse":  # which looks for the best power of two, above or below
        assert torch.equal(power, torch.exp2(plain.double().log2().ceil()).float())


def test_mse_with_power_of_two_scales_finds_the_best_of_them() -> None:
    x = heavy_tailed(8, 1, 1, 200, 10)
    scale = observe("mse", "tensor", [(x, None)], 7, True).scale()
    powers = [torch.tensor(2.0**exponent, dtype=torch.float64) for exponent in range(-12, 4)]
    best = min(powers, key=lambda power: squared_error(x.abs().double(), power, 7))
    assert float(scale) == float(best)


@pytest.mark.parametrize("name", NAMES)
def test_all_zero_data_get_a_scale_of_one(name: str) -> None:
    assert observe(name, "head", [(torch.zeros(1, 2, 3, 4), None)]).scale().flatten().tolist() == [1, 1]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(exponent=st.integers(LOW_OCTAVE + 6, HIGH_OCTAVE - 3))
def test_scales_follow_the_data_over_all_octaves_of_the_histogram(name: str, exponent: int) -> None:
    x = normal(9, 1, 1, 50, 10)
    asked = float(observe(name, "tensor", [(x * 2.0**exponent, None)]).scale())
    assert asked == pytest.approx(2.0**exponent * float(observe(name, "tensor", [(x, None)]).scale()), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_observed_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        Observer(name, "head", 7).scale()
