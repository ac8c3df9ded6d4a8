"""The rules against brute force, and thresholds against the sparsity they were fitted to."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnpress.config import AttentionSpec, RuleName
from attnpress.core.attention import Pairs, prune_and_code
from attnpress.core.exponential import exponent, exponent_rate, power
from attnpress.core.rules import Scored, rule_of
from attnpress.core.rules.base import BINS
from attnpress.core.rules.mass import mass_before
from attnpress.core.thresholds import fit_cutoff, fixed_cutoff
from tests.arrows import SOURCE
from tests.core.drawn_pairs import SPARSITIES, kept_of, make_pairs
from tests.core.factories import RULES, SEEDS, generator, make_cutoff, make_spec

GAMMAS = st.sampled_from([0.25, 0.5, 0.75, 1.0]) | st.floats(2.0**-7, 1.0, width=32)
"""With equal pairs the first ones are reached exactly."""


@dataclass(frozen=True)
class Row:
    """One row of pairs in plain numbers, as a rule sees it."""

    distance: list[int]
    probability: list[int]
    valid: list[bool]

    def ranked(self) -> list[int]:
        """Valid keys, nearest first, ties by index."""
        return sorted((i for i, real in enumerate(self.valid) if real), key=lambda i: (self.distance[i], i))

    def total(self) -> int:
        return sum(p for p, real in zip(self.probability, self.valid, strict=True) if real)


def expected_keep(spec: AttentionSpec, row: Row, alpha: float, cutoff: float | None) -> set[int]:
    """The kept keys of one row, by the words of the contract."""
    ranked = row.ranked()
    if spec.rule == "topk":
        return set(ranked[: max(1, round((1 - spec.sparsity) * len(ranked)))])
    if spec.rule == "nm":
        kept_of_four, groups = max(1, 4 - math.floor(4 * spec.sparsity)), {i // 4 for i in ranked}
        return {i for group in groups for i in [j for j in ranked if j // 4 == group][:kept_of_four]}
    if cutoff is None:
        return set(ranked)
    if spec.rule == "relative":
        cut = math.floor(np.float32(cutoff) / np.float32(alpha)) if math.isfinite(cutoff) else math.inf
        return {i for i in ranked if row.distance[i] <= cut}
    if spec.rule == "threshold":
        least = np.float32(math.exp(-cutoff)) * np.float32(row.total())
        return {i for i in ranked if row.distance[i] == 0 or np.float32(row.probability[i]) >= least}
    kept: set[int] = set()
    for i in ranked:
        if math.isfinite(cutoff) and sum(row.probability[j] for j in kept) >= Fraction(cutoff) * row.total():
            break
        kept.add(i)
    return kept


def rows_of(pairs: Pairs) -> list[Row]:
    columns = (pairs.distance.int(), pairs.probability, pairs.valid)
    return [Row(*row) for row in zip(*(column.flatten(0, 2).tolist() for column in columns), strict=True)]


@given(
    rule=st.sampled_from(RULES), sparsity=st.one_of(st.just(0.0), SPARSITIES), seed=SEEDS,
    keys=st.integers(1, 17), levels=st.sampled_from([1, 2, 5, 100]), alpha=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
)  # fmt: skip
def test_masks_are_those_of_the_contract(
    rule: RuleName, sparsity: float, seed: int, keys: int, levels: int, alpha: float
) -> None:
    spec = make_spec(rule=rule, sparsity=sparsity)
    pairs = make_pairs(spec, seed, (2, 3, 2, keys), levels=levels, alpha=alpha)
    cutoff = make_cutoff(spec, 3, seed + 2)
    per_row = [None] * 12 if cutoff is None else cutoff.view(1, 3, 1).expand(2, 3, 2).flatten().tolist()
    expected = [expected_keep(spec, row, alpha, cut) for row, cut in zip(rows_of(pairs), per_row, strict=True)]
    assert kept_of(pairs.keep) == expected


@pytest.mark.parametrize("levels", [1, 2, 1000])
@given(sparsity=SPARSITIES, seed=SEEDS, keys=st.integers(1, 40))
def test_rank_counts_are_exact_whatever_ties(levels: int, sparsity: float, seed: int, keys: int) -> None:
    pairs = make_pairs(make_spec(rule="topk", sparsity=sparsity), seed, (1, 2, 3, keys), levels=levels)
    counts = [max(1, round((1 - sparsity) * sum(row.valid))) if any(row.valid) else 0 for row in rows_of(pairs)]
    assert [len(kept) for kept in kept_of(pairs.keep)] == counts


def test_ties_go_to_the_lower_index() -> None:
    keep = make_pairs(make_spec(rule="topk", sparsity=0.6), 0, (1, 1, 1, 10), "none", levels=1).keep
    assert kept_of(keep) == [{0, 1, 2, 3}]
    distance, probability = torch.tensor([[[[5, 0, 5, 0]]]]), torch.tensor([[[[10, 40, 10, 40]]]])
    valid, alpha, gamma = torch.ones(1, 1, 1, 4, dtype=torch.bool), torch.tensor(0.2), torch.tensor(0.85)
    spec = make_spec(rule="mass", sparsity=0.5)
    assert kept_of(rule_of(spec).keep(Scored(spec, distance, probability, valid, alpha, gamma))) == [{0, 1, 3}]


@given(seed=SEEDS, keys=st.integers(1, 8), gamma=GAMMAS, levels=st.sampled_from([1, 2, 6]))
def test_mass_keeps_the_smallest_set_that_adds_up(seed: int, keys: int, gamma: float, levels: int) -> None:
    distance = torch.randint(0, levels, (1, 1, 3, keys), generator=generator(seed))
    distance = distance - distance.amin(-1, keepdim=True)
    probability = power(exponent(distance, exponent_rate(torch.tensor(0.7))))
    spec = make_spec(rule="mass", threshold=gamma)
    valid = torch.ones_like(distance, dtype=torch.bool)
    own = fixed_cutoff(spec, 1).view(1, 1, 1, 1)
    keep = rule_of(spec).keep(Scored(spec, distance, probability, valid, torch.tensor(0.7), own))
    for row, kept in zip(probability.flatten(0, 2).tolist(), kept_of(keep), strict=True):
        asked = Fraction(gamma) * sum(row)
        smallest = next(
            size for size in range(keys + 1) if any(sum(c) >= asked for c in itertools.combinations(row, size))
        )
        assert sum(row[i] for i in kept) >= asked
        assert len(kept) == smallest


@pytest.mark.parametrize("rule", RULES)
@given(
    seed=SEEDS, keys=st.integers(1, 12), levels=st.sampled_from([1, 3, 50]), alpha=st.sampled_from([1e-3, 0.3, 99.0])
)
def test_every_row_with_a_valid_key_keeps_its_maximum(
    rule: RuleName, seed: int, keys: int, levels: int, alpha: float
) -> None:
    spec = make_spec(rule=rule, sparsity=0.999)
    pairs = make_pairs(spec, seed, (2, 2, 3, keys), levels=levels, alpha=alpha)
    harshest = torch.full((1, 2, 1, 1), 1e-30)
    step = torch.tensor(alpha)
    keep = rule_of(spec).keep(Scored(spec, pairs.distance, pairs.probability, pairs.valid, step, harshest))
    for row, kept in zip(rows_of(pairs), kept_of(keep), strict=True):
        if rule == "nm":  # that of every four keys
            assert set(row.ranked()[:1]) <= kept
            continue
        assert kept == set(row.ranked()[:1]) or (kept and {row.distance[i] for i in kept} == {0})


@pytest.mark.parametrize("rule", RULES)
def test_a_row_without_a_valid_key_keeps_nothing_and_has_no_code(rule: RuleName) -> None:
    for sparsity in (0.0, 0.5):
        spec = make_spec(rule=rule, sparsity=sparsity)
        acc = torch.randint(-9, 9, (1, 2, 4, 6), generator=generator(0)).float()
        valid = torch.ones(1, 2, 4, 6, dtype=torch.bool)
        valid[:, :, 1] = False
        pairs = prune_and_code(acc, valid, torch.full((1, 1, 1, 1), 0.1), make_cutoff(spec, 2, 1), spec)
        assert not pairs.keep[:, :, 1].any()
        assert not pairs.codes[:, :, 1].any()
        assert bool((pairs.divisor > 0).all()), "so that the output is zero, not NaN"
        assert bool(pairs.keep[:, :, [0, 2, 3]].any(-1).all())


@pytest.mark.parametrize("rule", RULES)
@given(seed=SEEDS, extra=st.integers(1, 9), levels=st.sampled_from([2, 9, 200]))
def test_masks_do_not_depend_on_padding(rule: RuleName, seed: int, extra: int, levels: int) -> None:
    spec = make_spec(rule=rule, sparsity=0.6)
    acc = torch.randint(0, levels, (2, 3, 4, 7 + extra), generator=generator(seed)).float()
    valid = torch.rand(2, 3, 4, 7 + extra, generator=generator(seed + 1)) < 0.8
    valid[..., 7:] = False
    acc[..., 7:] *= 1e4  # what padding holds must not matter either
    alpha, cutoff = torch.full((1, 3, 1, 1), 0.2), make_cutoff(spec, 3, seed)
    padded = prune_and_code(acc, valid, alpha, cutoff, spec)
    plain = prune_and_code(acc[..., :7], valid[..., :7], alpha, cutoff, spec)
    assert torch.equal(padded.keep[..., :7], plain.keep)
    assert torch.equal(padded.codes[..., :7], plain.codes)
    assert not padded.keep[..., 7:].any()


@pytest.mark.parametrize("rule", RULES)
@given(seed=SEEDS)
def test_masks_do_not_depend_on_batch_mates_or_other_rows(rule: RuleName, seed: int) -> None:
    spec = make_spec(rule=rule, sparsity=0.6)
    acc = torch.randint(0, 9, (3, 2, 4, 8), generator=generator(seed)).float()
    valid = torch.rand(3, 2, 4, 8, generator=generator(seed + 1)) < 0.8
    alpha, cutoff = torch.full((1, 2, 1, 1), 0.2), make_cutoff(spec, 2, seed)
    together = prune_and_code(acc, valid, alpha, cutoff, spec).keep
    for b, i in itertools.product(range(3), range(4)):
        one = (slice(b, b + 1), slice(None), slice(i, i + 1))
        assert torch.equal(prune_and_code(acc[one], valid[one], alpha, cutoff, spec).keep, together[one])


@pytest.mark.parametrize("rule", RULES)
@given(seed=SEEDS)
def test_sparsity_zero_keeps_every_valid_pair(rule: RuleName, seed: int) -> None:
    spec = make_spec(rule=rule)
    pairs = make_pairs(spec, seed, (2, 2, 3, 9))
    assert torch.equal(pairs.keep, pairs.valid)
    infinite = fit_cutoff(spec, torch.ones(2, BINS, dtype=torch.float64), 0.0)
    assert infinite.tolist() == [math.inf] * 2
    step = torch.tensor(0.3)
    wide = infinite.view(1, 2, 1, 1)
    keep = rule_of(spec).keep(Scored(spec, pairs.distance, pairs.probability, pairs.valid, step, wide))
    assert torch.equal(keep, pairs.valid)


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_batch_gets_an_empty_mask(rule: RuleName) -> None:
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4)):
        assert make_pairs(make_spec(rule=rule, sparsity=0.5), 0, shape).keep.shape == shape


def test_two_of_every_four_keys_are_the_nearest_valid_ones() -> None:
    acc = torch.tensor([[[[1.0, 9.0, 5.0, 7.0, 2.0, 2.0, 2.0, 2.0, 3.0, 8.0]]]])
    valid = torch.tensor([True] * 5 + [False] + [True] * 4).view(1, 1, 1, 10)
    keep = prune_and_code(acc, valid, torch.ones(1, 1, 1, 1), None, make_spec(rule="nm", sparsity=0.5)).keep
    assert kept_of(keep) == [{1, 3, 4, 6, 8, 9}], "ties go to the lower key, and padding takes no place"


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(0.0, 4), (0.2, 4), (0.25, 3), (0.5, 2), (0.74, 2), (0.75, 1), (0.99, 1)]
)
def test_n_of_m_never_prunes_more_than_asked_and_keeps_one(sparsity: float, kept: int) -> None:
    spec = make_spec(rule="nm", sparsity=sparsity)
    assert int(make_pairs(spec, 3, (1, 1, 1, 4), "none", levels=100).keep.sum()) == kept
    assert rule_of(spec).pruned(spec, torch.full((2, BINS), 1.0), None).tolist() == [BINS * (1 - kept / 4)] * 2


def test_mass_before_counts_the_nearer_pairs() -> None:
    distance, probability = torch.tensor([[3, 0, 3, 1]]), torch.tensor([[5, 100, 5, 50]])
    before, total = mass_before(probability, distance)
    assert before.tolist() == [[150, 0, 155, 100]]
    assert total.tolist() == [[160]]


NEW_RULE = '''
"""Rule "nearest": only the row maximum."""

from attnpress.core.rules.base import CountingRule


class Nearest(CountingRule):
    """Pairs at distance 0."""

    def kept(self, pairs):
        """The nearest."""
        return pairs.distance == 0

    def cut(self, pairs):
        """The largest distance kept."""
        return pairs.valid.new_zeros(1, 1, 1, 1).long()

    def share(self, sparsity):
        """What is asked."""
        return sparsity


RULE = Nearest()
'''


USE_IT = """
import attnpress
from attnpress.cli import main
from tests.models.factories import make_batch, make_model

model = attnpress.bind(make_model(), attnpress.AttentionSpec(rule="nearest", sparsity=0.9))
attnpress.calibrate(model, [make_batch()])
assert model(**make_batch())[0].isfinite().all()
attnpress.deploy(model, "reference")
assert model(**make_batch())[0].isfinite().all()
main(["ls", "rules"])
"""


def test_a_rule_is_one_file_and_one_row(tmp_path: Path) -> None:
    package = shutil.copytree(SOURCE, tmp_path / "src" / "attnpress")
    (package / "core" / "rules" / "nearest.py").write_text(NEW_RULE, "utf-8")
    table = package / "config" / "rules.py"
    row = '    "nearest": RuleFacts("keep the row maximum alone", counts=True),\n'
    table.write_text(table.read_text("utf-8").replace("RULES = {\n", "RULES = {\n" + row, 1), "utf-8")
    paths = os.pathsep.join([str(tmp_path / "src"), str(SOURCE.parents[1])])
    used = subprocess.run(
        [sys.executable, "-c", USE_IT], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert used.returncode == 0, used.stderr
    assert "keep the row maximum alone" in used.stdout
