"""Every shipped recipe can be read, and asks for a task, model and attention that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnpress.cli import main
from attnpress.config.recipe import load_config, load_spec
from attnpress.studies.leaderboard.spec import BoardSpec, plan
from attnpress.studies.sweep.spec import SweepSpec

SWEEPS = sorted((Path(__file__).parents[2] / "recipes" / "sweeps").glob("*.yaml"))
BOARD = Path(__file__).parents[2] / "recipes" / "leaderboard.yaml"
RECIPES = sorted(path for path in BOARD.parent.glob("*.yaml") if path != BOARD)


def test_recipes_are_shipped() -> None:
    assert {"demo", "mrpc-8bit", "mrpc-4bit"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_validates(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["validate", str(path)]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(printed) == load_config(path)
    assert load_config(path).attention.sparsity > 0
    assert path.read_text(encoding="utf-8").startswith("# "), "a line says what it is for"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_can_be_read(path: Path) -> None:
    spec = load_spec(SweepSpec, path)
    assert spec.search.sparsity is not None
    assert path.read_text(encoding="utf-8").startswith("# "), "a line says what it is for"


def test_the_board_of_tails_has_every_rule_with_and_without_one() -> None:
    board = load_spec(BoardSpec, BOARD.parent / "leaderboards" / "tails.yaml")
    assert board.seeds == (0, 1, 2)
    for name in ("ours", "topk", "threshold", "mass"):
        plain, tailed = board.rules[name], board.rules[f"{name}-tail"]
        rule = {key: value for key, value in tailed.attention.items() if not key.startswith("tail")}
        assert (rule, tailed.schedule) == (plain.attention, plain.schedule), name
        assert tailed.attention["tail"] == "linear"
    assert board.rules["sanger"].attention == {"rule": "threshold", "predictor_bits": 4}
    assert len({repr(cell.recipe) for cell in plan(board) if cell.seed == 0}) == 2 * len(board.rules)


def test_the_shipped_sweep_searches_the_demo() -> None:
    demo = load_config(RECIPES[0].parent / "demo.yaml")
    recipe = load_spec(SweepSpec, RECIPES[0].parent / "sweeps" / "movie.yaml").recipe
    assert (recipe.model, recipe.data, recipe.dense) == (demo.model, demo.data, demo.dense)
