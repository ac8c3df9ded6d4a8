"""Recipes: files and flags into one config, and back."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnpress.config import (
    AttentionSpec,
    ConfigError,
    DataSpec,
    Granularity,
    ObserverName,
    ProbsMode,
    ProbsSpec,
    RunConfig,
    ScheduleName,
    ScheduleSpec,
    TensorSpec,
)
from attnpress.config.recipe import dump_config, load_config, load_spec, parse_spec, spec_to_dict
from attnpress.studies.leaderboard.spec import BoardSpec

FRACTIONS = st.floats(0, 0.99)
BITS = st.integers(2, 8)
TENSORS = st.builds(
    TensorSpec, BITS, st.sampled_from([one for one in get_args(Granularity) if one in ("tensor", "head")]),
    st.none() | st.sampled_from(get_args(ObserverName)), power_of_two=st.booleans(),
)  # fmt: skip
CONFIGS = st.builds(
    RunConfig,
    checkpoint=st.none() | st.builds(Path, st.sampled_from(["runs/a", "../b c", "1"])),
    data=st.builds(DataSpec, task=st.text(max_size=9), eval_rows=st.none() | st.integers(1, 9)),
    attention=st.builds(
        AttentionSpec, TENSORS, TENSORS, TENSORS,
        st.builds(ProbsSpec, st.none() | BITS, st.sampled_from(get_args(ProbsMode))),
        sparsity=FRACTIONS, smooth_key=st.booleans(),
    ),
    schedule=st.builds(ScheduleSpec, st.sampled_from(get_args(ScheduleName)), st.just(0.0), FRACTIONS),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip


@given(CONFIGS)
def test_a_config_survives_yaml_and_plain_data(config: RunConfig) -> None:
    assert parse_spec(RunConfig, spec_to_dict(config)) == config
    assert parse_spec(RunConfig, json.loads(json.dumps(spec_to_dict(config)))) == config


@given(config=CONFIGS)
def test_a_dumped_config_loads_again(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_a_dump_names_every_key() -> None:
    plain = spec_to_dict(RunConfig())
    assert set(plain) == {field.name for field in dataclasses.fields(RunConfig)}
    assert all(f"{key}:" in dump_config(RunConfig()) for key in plain)


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_recipe_is_the_default(tmp_path: Path) -> None:
    assert load_config(recipe(tmp_path, "")) == RunConfig()


OVERRIDES: list[tuple[str, Any]] = [
    ("seed=7", dataclasses.replace(RunConfig(), seed=7)),
    ("data.data_dir=a/b=c", dataclasses.replace(RunConfig(), data=DataSpec(data_dir=Path("a/b=c")))),
    ("attention.q.bits=4", dataclasses.replace(RunConfig(), attention=AttentionSpec(TensorSpec(4)))),
    ("attention.p={bits: null}", dataclasses.replace(RunConfig(), attention=AttentionSpec(p=ProbsSpec(None)))),
    (
        "schedule.kind = step",
        dataclasses.replace(RunConfig(), attention=AttentionSpec(), schedule=ScheduleSpec("step")),
    ),
]


TEXTS: list[tuple[str, str, Any]] = [
    ("data.text=#tags", "text", "#tags"),
    ("data.label=no", "label", "no"),
    ("data.label=2024", "label", "2024"),
    ("data.label=2024-01-31", "label", "2024-01-31"),
    ("data.text=a: b", "text", "a: b"),
    ("data.text=[x]", "text", "[x]"),
    ("data.text='#1 String'", "text", "#1 String"),
    ('data.text="a\\tb"', "text", "a\tb"),
    ("data.text=null", "text", None),
    ("data.data_dir=my data #2", "data_dir", Path("my data #2")),
    ("data.train_file=yes", "train_file", Path("yes")),
]


@pytest.mark.parametrize(("override", "name", "expected"), TEXTS)
def test_a_text_or_path_is_taken_as_it_stands(override: str, name: str, expected: Any, tmp_path: Path) -> None:
    assert getattr(load_config(recipe(tmp_path, ""), [override]).data, name) == expected


def test_a_text_inside_of_changes_is_taken_as_it_stands(tmp_path: Path) -> None:
    board = recipe(tmp_path, "recipe: {}\ntasks: {mrpc: {data: {task: mrpc}}}\nrules: {topk: {source: x}}\n")
    spec = load_spec(BoardSpec, board, ["tasks.mrpc.data.data_dir=glue #2", "tasks.mrpc.data.label=no"])
    assert spec.tasks["mrpc"]["data"] == {"task": "mrpc", "data_dir": "glue #2", "label": "no"}


def test_what_an_anchor_shares_is_overridden_alone(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path, "dense: &d {epochs: 1}\ncompress: *d\n"), ["dense.epochs=2"])
    assert (config.dense.epochs, config.compress.epochs) == (2, 1)


@pytest.mark.parametrize("word", ["no", "off", "2024-01-31", "1:30", "=", "0x10", "1_000"])
def test_words_that_yaml_1_1_takes_for_something_else_are_texts(word: str, tmp_path: Path) -> None:
    assert load_config(recipe(tmp_path, f"data: {{label: {word}}}")).data.label == word


def test_yes_and_no_are_still_flags(tmp_path: Path) -> None:
    assert load_config(recipe(tmp_path, "dense_control: yes")).dense_control
    assert not load_config(recipe(tmp_path, "dense_control: yes"), ["dense_control=no"]).dense_control


def test_a_recipe_may_begin_with_a_byte_order_mark_and_end_lines_as_windows_does(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 3\r\ndata: {text: a}\r\n")
    assert (load_config(file).seed, load_config(file).data.text) == (3, "a")


BOMB = "a: &a [1, 1]\n" + "".join(f"{x}: &{x} [*{y}, *{y}]\n" for y, x in pairwise("abcdefghijklmnopq"))
HOSTILE: list[tuple[str, str]] = [
    (BOMB, r"line 1\d: more than 20,000 values"),
    ("a: [" * 40, "line 1: nested more than 32 deep"),
    ("".join(f"{' ' * n}a:\n" for n in range(40)), "line 33: nested more than 32 deep"),
    ("".join(f"key{n}: 1\n" for n in range(150_000)), "longer than 1,048,576 characters"),
    ("a: &a [*a]", "line 1: the anchor 'a' refers to a value that contains itself"),
    ("a: *b", "line 1, column 4: found undefined alias"),
    ("seed: 1\ndata:\n  task: movie\n  task: sst2\n", "line 4: duplicate key 'task'"),
    ("seed: 1\n'seed': 2", "line 2: duplicate key 'seed'"),
    ("data:\n\ttask: movie", "line 2, column 1: found character"),
    ("seed: 1\n---\nseed: 2\n", "line 2, column 1"),
    ("seed: !!timestamp 2026-13-45", "a value that cannot be made"),
    ("seed: " + "9" * 5000, "a value that cannot be made"),
    ("model: !!python/object/apply:os.system [ls]", ".*could not determine a constructor"),
    ("model: a\x07b", ".*control characters"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), HOSTILE)
def test_a_hostile_recipe_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.yaml: not valid YAML: {message}") as told:
        load_config(recipe(tmp_path, text))
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["[]", "0", "false", "''"])
def test_what_is_no_mapping_is_not_taken_for_an_empty_recipe(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a recipe is a mapping of keys, found"):
        load_config(recipe(tmp_path, text))


def test_many_mistakes_are_told_in_few_lines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        load_config(recipe(tmp_path, "".join(f"key{n}: 1\n" for n in range(500))))
    assert str(told.value).splitlines()[-1] == "and 490 more mistakes"
    assert len(str(told.value).splitlines()) == 12


@pytest.mark.parametrize("override", ["layers.².sparsty=0.5", "a..b=1", ".=1", "seed=" + "9" * 5000, "seed=[" * 50])
def test_an_odd_override_is_explained(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key|not valid YAML"):
        load_config(recipe(tmp_path, ""), [override])


@pytest.mark.parametrize(("override", "expected"), OVERRIDES)
def test_overrides_reach_any_depth(override: str, expected: RunConfig, tmp_path: Path) -> None:
    assert load_config(recipe(tmp_path, "attention: {sparsity: 0}"), [override]) == dataclasses.replace(
        expected, attention=dataclasses.replace(expected.attention, sparsity=0)
    )


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load_config(recipe(tmp_path, "seed: 1"), ["seed=2", "seed=3"]).seed == 3


BROKEN: list[tuple[str, list[str], str]] = [
    ("[1]", [], r"recipe\.yaml: a recipe is a mapping of keys, found list"),
    ("a: [", [], r"recipe\.yaml: not valid YAML"),
    ("", ["seed"], r"--set seed: write it as key=value, for example --set attention\.sparsity=0\.95"),
    ("", ["=1"], r"--set =1: write it as key=value"),
    ("", ["seed=["], r"--set seed=\[: the value is not valid YAML"),
    ("seed: 1", ["seed.x=1"], r"--set seed\.x=1: seed is a single value"),
    ("1: 2", [], r"recipe\.yaml:\n1: unknown key; known keys: model, checkpoint"),
    ("sede: 1", [], r"recipe\.yaml:\nsede: unknown key; did you mean 'seed'\?"),
    ("", ["atention.sparsity=0.5"], r"atention: unknown key; did you mean 'attention'\?"),
    ("attention:", [], r"attention: "),
]


@pytest.mark.parametrize(("text", "overrides", "message"), BROKEN)
def test_a_broken_recipe_is_explained(text: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe(tmp_path, text), overrides)


def test_a_recipe_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read \(No such file.*give the path of a recipe"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not valid YAML"):
        load_config(tmp_path / "binary.yaml")


def test_layers_say_only_what_differs(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "attention: {sparsity: 0.9, q: {granularity: tensor}}\n"
        "layers:\n  0: {q: {bits: 4}, k: {bits: 4}}\n  '*.1.*': {sparsity: 0.5}\n",
        encoding="utf-8",
    )
    config = load_config(recipe, ["layers.0.sparsity=0.2", "layers.2.p.bits=4"])
    common = config.attention
    assert config.layers == {
        "0": dataclasses.replace(common, q=TensorSpec(4, "tensor"), k=TensorSpec(4), sparsity=0.2),
        "*.1.*": dataclasses.replace(common, sparsity=0.5),
        "2": dataclasses.replace(common, p=ProbsSpec(4)),
    }
    recipe.write_text(dump_config(config), encoding="utf-8")
    assert load_config(recipe) == config


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"0": {"sparsty": 0.5}}, "layers.0.sparsty: unknown key; did you mean 'sparsity'"),
        ({"0": {"q": {"bit": 4}}}, "layers.0.q.bit: unknown key; did you mean 'bits'"),
        ({"0": {"rule": "topk"}}, r"layers.0.rule: a run has one rule; set attention.rule"),
        ({"0": {"q": {"bits": None}}}, "layers.0: q.bits, k.bits: quantize both"),
        ({"0": 3}, "layers.0: .*found 3"),
    ],
)
def test_a_mistake_in_a_layer_is_named(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(RunConfig, {"layers": layers})
