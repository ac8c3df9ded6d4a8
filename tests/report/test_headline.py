"""The headline table and the picture of tails, from records made up for them."""

from __future__ import annotations

import pytest

from attnpress.records.run import Record
from attnpress.report.headline import (
    UNKNOWN,
    headline_markdown,
    measured,
    rules_markdown,
    tail_lines,
    tail_words,
    untrained_goals_markdown,
    untrained_markdown,
)
from tests.report.test_evidence import record, stage

Tasks = dict[str, dict[str, list[Record]]]


def pruned(seed: int, name: str, score: float, keys: float) -> Record:
    return record(seed, stage("dense", 80.0, 0, 50), stage(name, score, 1 - keys / 50, keys))


@pytest.fixture
def tasks() -> Tasks:
    dense = [record(seed, stage("dense", 80.0, 0, 50), stage("dense_control", 84.0 + seed, 0, 50)) for seed in (0, 1)]
    return {
        "mrpc": {
            "dense": dense,
            "8888-0.95": [pruned(seed, "progressive", 83.0, 2.5) for seed in (0, 1)],
            "8888-0.98": [pruned(0, "progressive", 80.0, 1.0)],
            "8888-0.95-linear4": [pruned(0, "progressive", 70.0, 2.5)],
            "8888-0.95-linear8": [pruned(seed, "progressive", 84.0, 2.5) for seed in (0, 1)],
            "8888-0.95-mean-at-once": [pruned(0, "one_shot", 82.0, 2.4)],
            "8888-0.95-constant": [pruned(0, "progressive", 10.0, 2.5)],
            "4444-0.95": [pruned(0, "progressive", 81.0, 2.5)],
        },
        "rte": {"dense": dense, "8888-0.95": [pruned(0, "progressive", 82.0, 4.0)]},
    }


def test_a_task_has_a_row_for_each_tail_that_was_trained(tasks: Tasks) -> None:
    header, _, *rows = headline_markdown(tasks, ["mrpc", "rte", "stsb"]).splitlines()
    assert header == (
        "| task (metric) | tail | dense | 8 bits, 0.95 | 8 bits, 0.98 | 4 bits, 0.95 | 4 bits, 0.98 | keys per query |"
    )
    assert rows == [
        "| MRPC (f1) | `none` | 84.50 ± 0.71 | 83.00 ± 0.00 (-1.50) | 80.00 (-4.00, one seed) | "
        f"81.00 (-3.00, one seed) | {UNKNOWN} | 2.5, 1.0 of 50 |",
        f"| MRPC (f1) | `linear4` | 84.50 ± 0.71 | 70.00 (-14.00, one seed) | {UNKNOWN} | {UNKNOWN} | {UNKNOWN} "
        "| 2.5, ? of 50 |",
        f"| MRPC (f1) | `linear8` | 84.50 ± 0.71 | 84.00 ± 0.00 (-0.50) | {UNKNOWN} | {UNKNOWN} | {UNKNOWN} "
        "| 2.5, ? of 50 |",
        f"| RTE (f1) | `none` | 84.50 ± 0.71 | 82.00 (-2.00, one seed) | {UNKNOWN} | {UNKNOWN} | {UNKNOWN} "
        "| 4.0, ? of 50 |",
        f"| STS-B | `none` | {' | '.join([UNKNOWN] * 6)} |",
    ]


def test_variants_of_a_cell_are_not_taken_for_it(tasks: Tasks) -> None:
    cells = tasks["mrpc"]
    assert [one.stages[-1].metrics["f1"] for one, _ in measured(cells, "8888", "0.95", "linear8")] == [84.0, 84.0]
    assert measured(cells, "8888", "0.95", "mean") == []
    assert len(measured(cells, "8888", "0.95", "mean", "one_shot")) == 1


def test_the_picture_has_a_line_for_each_tail_of_tasks_that_have_one(tasks: Tasks) -> None:
    tasks["stsb"] = {"8888-0.95-mean": [pruned(0, "one_shot", 79.0, 2.0)]}
    panels = tail_lines(tasks, ["mrpc", "rte", "stsb"], "8888")
    assert list(panels) == ["MRPC, trained", "MRPC, untrained", "STS-B, trained", "STS-B, untrained"]
    trained, once, *_ = panels.values()
    assert [(line.label, line.x, line.y) for line in trained] == [
        ("none", [1.0, 2.5], [-4.0, -1.5]), ("mean", [], []), ("linear4", [2.5], [-14.0]), ("linear8", [2.5], [-0.5]),
    ]  # fmt: skip
    assert (once[1].x, once[1].y) == ([2.4], [-2.0])
    words = tail_words(panels)
    assert "MRPC, trained: none -4.0 at 1.0, -1.5 at 2.5, linear4 -14.0 at 2.5, linear8 -0.5 at 2.5;" in words
    assert f"STS-B, trained: {UNKNOWN}; STS-B, untrained: mean -1.0 at 2.0." in words


def test_losses_without_training_are_from_the_model_that_was_compressed(tasks: Tasks) -> None:
    encoder = {
        "dense": {"score": 0.8},
        "quantized": {"score": 0.799},
        "none 0.9": {"score": 0.7, "keys_per_row": 3.0},
        "linear:32 0.95": {"score": 0.79, "keys_per_row": 1.5},
    }
    header, _, *rows = untrained_markdown(tasks, {"retrieval": encoder}).splitlines()
    assert header == (
        "| task (metric) | tail | seeds | dense | quantized | 0.90 | 0.95 | 0.98 | 0.99 | keys per query |"
    )
    assert rows == [
        "| retrieval | `none` |  | 80.00 | -0.10 | -10.00 |  |  |  | 3.0, ?, ?, ? |",
        "| retrieval | `linear32` |  | 80.00 | -0.10 |  | -1.00 |  |  | ?, 1.5, ?, ? |",
        "| MRPC (f1) | `mean` | 1 | 80.00 |  |  | +2.00 |  |  | ?, 2.4, ?, ? |",
    ]
    goals = [
        ("retrieval", "linear32", "0.95", 0.9),
        ("MRPC (f1)", "mean", "0.95", 0.5),
        ("MRPC (f1)", "mean", "0.98", 1.0),
    ]
    _, _, *rows = untrained_goals_markdown(tasks, {"retrieval": encoder}, goals).splitlines()
    assert [row.split("|")[-2].strip() for row in rows] == ["-1.00: not met", "+2.00: met", "not run"]


def test_rules_are_compared_with_and_without_a_tail_seed_by_seed(tasks: Tasks) -> None:
    def one_shot(seed: int, score: float) -> Record:
        return pruned(seed, "one_shot", score, 2.5)

    others = {
        "8888-0.95-topk": [one_shot(0, 70.0), one_shot(1, 71.0)],
        "8888-0.95-topk-linear32": [one_shot(1, 72.5)],
        "8888-0.95-mass": [one_shot(0, 60.0)],
    }
    own = {"8888-0.95": [one_shot(0, 75.0)], "8888-0.95-linear32": [one_shot(0, 78.0)]}
    _, _, *rows = rules_markdown(own, others).splitlines()
    assert rows == ["| `relative` | 2.5 | 75.00 | 78.00 | +3.00 |", "| `topk` | 2.5 | 71.00 | 72.50 | +1.50 |"]
