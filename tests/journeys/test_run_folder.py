"""The run folder: one recipe, enough room, and where the figures come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attnpress.config import AttentionSpec, ConfigError, RunConfig
from attnpress.recipe import load_config
from attnpress.run_folder import COPIES, check_space, claim_folder, differences, hold_folder


def test_a_new_folder_takes_the_recipe_and_knows_it_again(tmp_path: Path) -> None:
    config = dataclasses.replace(RunConfig(), seed=3)
    claim_folder(config, tmp_path / "a" / "run")
    claim_folder(config, tmp_path / "a" / "run")
    assert load_config(tmp_path / "a" / "run" / "recipe.yaml") == config
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["recipe.yaml"]


def test_the_folder_of_another_recipe_is_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    claim_folder(RunConfig(), tmp_path)
    other = dataclasses.replace(RunConfig(), seed=1, attention=AttentionSpec(sparsity=0.5))
    with pytest.raises(
        ConfigError, match=r"differs in attention\.sparsity, seed\); choose another --output, or delete"
    ):
        claim_folder(other, tmp_path)
    assert load_config(tmp_path / "recipe.yaml") == RunConfig()


def test_a_damaged_recipe_in_the_folder_is_named(tmp_path: Path) -> None:
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
