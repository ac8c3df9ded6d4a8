"""The run folder: one recipe, enough room, and where the figures come from."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attnpress.config import AttentionSpec, ConfigError, RunConfig
from attnpress.config.recipe import dump_config, load_config
from attnpress.files import MARKER, mark
from attnpress.runs.folder import COPIES, check_space, claim_folder, differences, hold_folder


def test_a_new_folder_takes_the_recipe_and_knows_it_again(tmp_path: Path) -> None:
    config = dataclasses.replace(RunConfig(), seed=3)
    claim_folder(config, tmp_path / "a" / "run")
    claim_folder(config, tmp_path / "a" / "run")
    assert load_config(tmp_path / "a" / "run" / "recipe.yaml") == config
    assert {path.name for path in (tmp_path / "a" / "run").iterdir()} == {MARKER, "recipe.yaml"}


@pytest.mark.parametrize("name", ["dense", "checkpoints", "config.json", "recipe.yaml", ".git", "notes.txt"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_was(name: str, tmp_path: Path) -> None:
    """Also one with a recipe of the user's own, and one that another part of attnpress made."""
    if "." in name[1:]:
        (tmp_path / name).write_text(dump_config(RunConfig()) if name == "recipe.yaml" else "mine", encoding="utf-8")
    else:
        (tmp_path / name / "checkpoint-1").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    message = rf"holds {re.escape(name)} and no run of attnpress, .*; choose another --output, or an empty folder"
    with pytest.raises(ConfigError, match=message):
        claim_folder(RunConfig(), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    mark(tmp_path, "export")
    with pytest.raises(ConfigError, match=message):
        claim_folder(RunConfig(), tmp_path)


def test_a_claim_that_was_killed_is_made_again(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text('{"made', encoding="utf-8")
    (tmp_path / ".recipe.yaml.0123456789abcdef.unfinished").write_text("model:", encoding="utf-8")
    claim_folder(RunConfig(), tmp_path)
    claim_folder(RunConfig(), tmp_path)
    assert load_config(tmp_path / "recipe.yaml") == RunConfig()


def test_a_run_from_before_folders_were_marked_goes_on(finished: Path, tiny_recipe: RunConfig, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "record.json"):
        shutil.copy(finished / name, tmp_path)
    (tmp_path / "dense").mkdir()
    claim_folder(tiny_recipe, tmp_path)
    with pytest.raises(ConfigError, match=r"differs in seed\)"):
        claim_folder(dataclasses.replace(tiny_recipe, seed=1), tmp_path)


def test_the_folder_of_another_recipe_is_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    claim_folder(RunConfig(), tmp_path)
    other = dataclasses.replace(RunConfig(), seed=1, attention=AttentionSpec(sparsity=0.5))
    with pytest.raises(
        ConfigError, match=r"differs in attention\.sparsity, seed\); choose another --output, or delete"
    ):
        claim_folder(other, tmp_path)
    assert load_config(tmp_path / "recipe.yaml") == RunConfig()


def test_a_damaged_recipe_in_the_folder_is_named(tmp_path: Path) -> None:
    claim_folder(RunConfig(), tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: not valid YAML"):
        claim_folder(RunConfig(), tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run: cannot be written \(.*\); choose another --output"):
        claim_folder(RunConfig(), tmp_path / "file" / "run")


def test_two_runs_never_work_in_one_folder(tmp_path: Path) -> None:
    claim_folder(RunConfig(), tmp_path)
    with hold_folder(tmp_path), pytest.raises(ConfigError, match="another run is at work there"), hold_folder(tmp_path):
        pass
    with hold_folder(tmp_path):
        pass  # let go of


def test_a_run_that_cannot_be_saved_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1024, 1024, bias=False)
    needed = COPIES * 4 * 1024**2
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    check_space(model, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(ConfigError, match=r"needs about 32 MiB of disk, 31 MiB are free"):
        check_space(model, tmp_path)


NESTED = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3))


@given(NESTED, NESTED)
def test_differences_are_empty_for_equals_only(before: object, now: object) -> None:
    assert differences(before, before) == []
    assert (differences(before, now) == []) == (before == now)


def test_differences_are_dotted_keys() -> None:
    before = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert differences(before, {"a": {"b": 1, "c": {"d": 4}}, "f": 3}) == ["a.c.d", "e", "f"]


def test_a_rank_that_has_no_effect_does_not_make_another_recipe(tmp_path: Path) -> None:
    """A run that an earlier version began, with another default, resumes."""
    before = RunConfig(attention=AttentionSpec(sparsity=0.5, tail_rank=8))
    claim_folder(before, tmp_path)
    claim_folder(RunConfig(attention=AttentionSpec(sparsity=0.5)), tmp_path)
    with pytest.raises(ConfigError, match=r"differs in attention\.tail, attention\.tail_rank\)"):
        claim_folder(RunConfig(attention=AttentionSpec(sparsity=0.5, tail="linear")), tmp_path)
