"""The examples do what they say: the same schedule object in a plain loop and in Lightning."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attnpress.models.binding import attentions

EXAMPLES = Path(__file__).parents[2] / "examples"
GUESSING = math.log(2)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_a_plain_loop_learns_while_it_prunes(example: Any) -> None:
    plain = example("plain_loop")
    loss, pruned = plain.main()
    assert loss < 0.8 * GUESSING
    assert pruned == pytest.approx(plain.TARGET, abs=0.05)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.`")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_prunes_by_the_same_schedule(accumulate: int, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_lightning")
    lightning, plain = example("lightning_loop"), example("plain_loop")
    asked: list[tuple[int, float]] = []
    driver = lightning.attnpress.SparsityDriver
    begin = driver.begin

    def watched(self: Any, step: int) -> float:
        asked.append((step, begin(self, step)))
        return asked[-1][1]

    monkeypatch.setattr(driver, "begin", watched)
    loss, pruned, model = lightning.main(accumulate)
    assert [step for step, _ in asked] == list(range(plain.STEPS)), "once a step of the optimizer"
    assert asked[0][1] == 0
    assert asked[-1][1] == plain.TARGET
    assert math.isfinite(loss)
    assert pruned == pytest.approx(plain.TARGET, abs=0.05)
    assert all(
        not module.watchers and bool(torch.isfinite(module.cutoff).all()) for module in attentions(model).values()
    )
