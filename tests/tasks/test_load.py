"""The table, the checks before anything is read, and loading in every published layout."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import EvalPrediction, PreTrainedTokenizerFast

from attnpress.config import DataSpec
from attnpress.tasks import CUSTOM, TASKS, TaskData, TaskError, check_data, list_tasks, load_task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "plot", '"', "yes", "no", "a", "b", "c", "d"]
GLUE = ("sst2", "mrpc", "rte", "cola", "stsb", "qnli", "mnli", "qqp")


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[[list[str]], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer(WORDS)


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def tabs(*values: str) -> str:
    return "\t".join(values)


def publish(root: Path, task: str) -> Path:
    """Two training rows (labels 1, 0 or a, b) and two evaluation rows, as GLUE publishes them; returns the folder."""
    x, y = "good film", 'bad "plot'
    entailment = [f"0\t{x}\t{y}\tnot_entailment", f"1\t{y}\t{x}\tentailment"]
    layouts: dict[str, tuple[str, str | None, list[str]]] = {
        "sst2": ("SST-2", "sentence,label", [f"{x} \t1", f"{y} \t0"]),
        "mrpc": ("MRPC", "\ufeffQuality,#1 ID,#2 ID,#1 String,#2 String", [f"1\t7\t8\t{x}\t{y}", f"0\t7\t8\t{y}\t{x}"]),
        "rte": ("RTE", "index,sentence1,sentence2,label", entailment),
        "cola": ("CoLA", None, [f"gj04\t1\t\t{x}", f"gj04\t0\t*\t{y}"]),
        "stsb": (
            "STS-B",
            "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2,score",
            [tabs(*"0123456", x, y, "4.75"), tabs(*"0123456", y, x, "0")],
        ),
        "qnli": ("QNLI", "index,question,sentence,label", entailment),
        "mnli": (
            "MNLI",
            "index,promptID,pairID,genre,b1,b2,p1,p2,sentence1,sentence2,label1,gold_label",
            [tabs(*"01234567", x, y, "-", "neutral"), tabs(*"01234567", y, x, "-", "entailment")],
        ),
        "qqp": (
            "QQP",
            "id,qid1,qid2,question1,question2,is_duplicate",
            [f"0\t1\t2\t{x}\t{y}\t1", f"0\t1\t2\t{y}\t{x}\t0"],
        ),
    }
    folder, header, rows = layouts[task]
    lines = [header.replace(",", "\t"), *rows] if header else rows
    write_lines(root / folder / "train.tsv", *lines)
    write_lines(root / folder / ("dev_matched.tsv" if task == "mnli" else "dev.tsv"), *lines)
    return root / folder


def custom(tmp_path: Path, train: Path, held_out: Path, metric: str = "accuracy") -> DataSpec:
    return DataSpec(CUSTOM, train_file=train, eval_file=held_out, text="words", label="kind", metric=metric)


def csv_file(path: Path, *rows: Sequence[object]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def tokens(data: TaskData, row: int) -> list[str]:
    return [WORDS[number] for number in data.eval[row]["input_ids"]]


def test_every_task_of_the_table_is_listed_with_its_metrics() -> None:
    listed = dict(list_tasks())
    assert list(listed) == [*TASKS, CUSTOM]
    assert next(iter(TASKS)) == DataSpec().task
    assert all(metric in listed[task.name] for task in TASKS.values() for metric in task.metrics)
    assert {task.headline for task in TASKS.values()} == {"accuracy", "f1", "matthews", "pearson"}


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize("nested", ["", "glue"])
def test_published_glue_folders_load(
    task: str, nested: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = publish(tmp_path / nested, task)
    data = load_task(DataSpec(task, data_dir=tmp_path), tokenizer, seed=0)
    direct = load_task(DataSpec(task, data_dir=folder), tokenizer, seed=0)
    assert data.fingerprint == direct.fingerprint
    assert data.fingerprint["train"] == hashlib.sha256((folder / "train.tsv").read_bytes()).hexdigest()
    assert (len(data.train), len(data.eval)) == (2, 2)
    single = ["[CLS]", "good", "film", "[SEP]"]
    pair = [*single, "bad", '"', "plot", "[SEP]"]
    assert tokens(data, 0) == (single if len(TASKS[task].text) == 1 else pair)
    assert data.eval["labels"][:] == ([4.75, 0.0] if task == "stsb" else [1, 0])
    assert data.label_names == TASKS[task].labels


def test_hub_data_load_through_datasets(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"sentence": "good film", "label": 1}, {"sentence": "bad film", "label": 0}]
    for split in ("train", "validation"):
        write_lines(tmp_path / "sst2" / f"{split}.jsonl", *map(json.dumps, rows))
    hub = dataclasses.replace(TASKS["sst2"], hub=(str(tmp_path / "sst2"), None))
    monkeypatch.setitem(TASKS, "sst2", hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    data = load_task(DataSpec("sst2"), tokenizer, seed=0)
    assert tokens(data, 1) == ["[CLS]", "bad", "film", "[SEP]"]
    assert data.eval["labels"][:] == [1, 0]
    expected = hashlib.sha256(b'["good film", 1]\n["bad film", 0]\n').hexdigest()
    assert data.fingerprint == {"train": expected, "eval": expected}
    monkeypatch.setitem(TASKS, "sst2", dataclasses.replace(hub, text=("text",)))
    with pytest.raises(TaskError, match="no column 'text'; columns found: 'sentence', 'label'"):
        load_task(DataSpec("sst2"), tokenizer, seed=0)


def test_a_dataset_that_the_hub_does_not_give_is_explained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "sst2", dataclasses.replace(TASKS["sst2"], hub=(str(tmp_path / "absent"), None)))
    with pytest.raises(TaskError, match=r"could not be loaded from the Hub: .*set data\.data_dir"):
        load_task(DataSpec("sst2"), tokenizer, seed=0)


def test_csv_and_json_lines_of_ones_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = csv_file(
        tmp_path / "t.csv", ["kind", "words", "id"], ["10", "good,\nfilm", 1], ["9", 'a "b" c', 2], ["10", "d", 3]
    )
    held_out = write_lines(tmp_path / "e.jsonl", '{"words": "good", "kind": 9}', "", '{"words": "b", "kind": 10.0}')
    data = load_task(custom(tmp_path, train, held_out), tokenizer, seed=0)
    assert data.label_names == ("9", "10"), "integers are ordered as numbers"
    assert data.eval["labels"][:] == [0, 1]
    assert sorted(map(len, data.train["input_ids"])) == [3, 5, 7], "a quoted field may hold commas, quotes, new lines"
    assert data.majority == 50.0
    assert data.task.kind == "classification"


def test_string_labels_and_pairs_in_tab_separated_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_lines(tmp_path / "t.tsv", "l\tx\ty", 'pos\t"good\tfilm', "neg\tbad\tplot")
    spec = DataSpec(CUSTOM, train_file=path, eval_file=path, text="x", text_pair="y", label="l", metric="f1")
    data = load_task(spec, tokenizer, seed=0)
    assert data.label_names == ("neg", "pos")
    assert tokens(data, 0) == ["[CLS]", '"', "good", "[SEP]", "film", "[SEP]"]


def test_regression_on_files_of_ones_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = csv_file(tmp_path / "t.csv", ["words", "kind"], ["good", "1.5"], ["bad", "-2"])
    data = load_task(custom(tmp_path, path, path, "pearson"), tokenizer, seed=0)
    assert (data.task.kind, data.label_names, data.majority) == ("regression", (), None)
    assert data.collate([data.eval[0], data.eval[1]])["labels"].dtype == torch.float32
    scores = data.compute_metrics(EvalPrediction(np.array([[3.0], [1.0]]), np.array([1.5, -2.0])))
    assert scores == pytest.approx({"pearson": 100.0})


def test_files_of_ones_own_replace_a_named_task_split_by_split(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = publish(tmp_path, "sst2")
    train = csv_file(tmp_path / "t.csv", ["sentence", "label"], ["a", "positive"], ["b", 0], ["c", 1])
    data = load_task(DataSpec("sst2", data_dir=folder, train_file=train), tokenizer, seed=0)
    assert (len(data.train), len(data.eval)) == (3, 2)
    assert sorted(data.train["labels"]) == [0, 1, 1]
    named = DataSpec("sst2", data_dir=folder, train_file=train, text="label", label="sentence")
    with pytest.raises(TaskError, match="label 'a' is not one of those of task 'sst2'"):
        load_task(named, tokenizer, seed=0)


def test_rows_are_chosen_by_seed_in_training_and_in_order_in_evaluation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = csv_file(tmp_path / "t.csv", ["words", "kind"], *([word, n % 2] for n, word in enumerate("abcd" * 700)))
    spec = custom(tmp_path, path, path)
    whole, other = (load_task(spec, tokenizer, seed) for seed in (3, 4))
    part = load_task(dataclasses.replace(spec, train_rows=1500, eval_rows=1201), tokenizer, seed=3)
    assert part.train[:] == whole.train[:1500], "the first rows of the whole shuffle"
    assert part.eval[:] == whole.eval[:1201]
    assert whole.train["input_ids"][:] != other.train["input_ids"][:]
    assert sorted(whole.train["input_ids"]) == sorted(other.train["input_ids"]), "a shuffle keeps every row"
    assert [WORDS[row[1]] for row in part.eval["input_ids"]] == list("abcd" * 700)[:1201]


def test_a_held_out_share_is_the_same_rows_for_every_seed_and_none_is_on_both_sides(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "STS-B"
    lines = [f"{n}\ta\tb\t{n}" for n in range(23)]
    write_lines(folder / "train.tsv", "index\tsentence1\tsentence2\tscore", *lines)
    spec = DataSpec("stsb", data_dir=tmp_path, held_out=0.1, metric="spearman")
    data, other = (load_task(spec, tokenizer, seed) for seed in (0, 1))
    assert data.eval["labels"][:] == other.eval["labels"][:] == [9.0, 19.0], "every tenth row, no dev.tsv is read"
    assert sorted(data.train["labels"]) == [float(n) for n in range(23) if n not in (9, 19)]
    assert data.train["labels"][:] != other.train["labels"][:], "the seed shuffles what is trained on"
    assert (data.task.headline, data.task.metrics) == ("spearman", ("spearman", "pearson"))
    scores = data.compute_metrics(EvalPrediction(np.array([[3.0], [1.0]]), np.array([1.5, -2.0])))
    assert next(iter(scores)) == "spearman"
    third = load_task(dataclasses.replace(spec, held_out=0.3, eval_rows=4), tokenizer, seed=0)
    assert third.eval["labels"][:] == [3.0, 6.0, 9.0, 13.0], "0.3 as it is written: floor((n + 1) * 0.3) rises"
    with pytest.raises(TaskError, match=r"data\.held_out: 0\.01 of 23 rows of .* leaves none to evaluate on"):
        load_task(dataclasses.replace(spec, held_out=0.01), tokenizer, seed=0)


def test_a_file_of_ones_own_is_divided_and_places_in_it_stay(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = csv_file(tmp_path / "t.csv", ["words", "kind"], ["a", 0], ["b", 1], ["c", 1], ["d", 0])
    spec = DataSpec(CUSTOM, train_file=path, text="words", label="kind", metric="f1", held_out=0.5)
    data = load_task(spec, tokenizer, seed=0)
    assert ([WORDS[row[1]] for row in data.eval["input_ids"]], data.eval["labels"][:]) == (["b", "d"], [1, 0])
    csv_file(path, ["words", "kind"], ["a", 0], ["b", 1], ["c", 1], ["d", 2])
    with pytest.raises(TaskError, match=r"t\.csv, line 5: label '2' .*"):
        load_task(spec, tokenizer, seed=0)


def test_long_inputs_are_cut_and_batches_padded_to_their_longest(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = csv_file(tmp_path / "t.csv", ["words", "kind"], ["a " * 50, 0], ["b", 1])
    data = load_task(dataclasses.replace(custom(tmp_path, path, path), max_length=8), tokenizer, seed=0)
    assert [len(row) for row in data.eval["input_ids"]] == [8, 3]
    batch = data.collate([data.eval[0], data.eval[1]])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(-1).tolist() == [8, 3]
    assert batch["labels"].tolist() == [0, 1]


def test_majority_is_the_commonest_training_label(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = csv_file(tmp_path / "t.csv", ["words", "kind"], ["a", 1], ["b", 1], ["c", 0])
    held_out = csv_file(tmp_path / "e.csv", ["words", "kind"], ["a", 0], ["b", 0], ["c", 0], ["d", 1])
    assert load_task(custom(tmp_path, train, held_out), tokenizer, seed=0).majority == 25.0
    f1 = load_task(custom(tmp_path, train, held_out, "f1"), tokenizer, seed=0).majority
    assert f1 == pytest.approx(100 * 2 * 1 / (2 * 1 + 3))


SPECS: list[tuple[DataSpec, str]] = [
    (DataSpec("sst-2"), r"data\.task: unknown task 'sst-2'; did you mean 'sst2'"),
    (DataSpec("zzzz"), r"data\.task: .*known: movie, sst2"),
    (DataSpec("sst2", metric="f1"), r"data\.metric: task 'sst2' has its own \(accuracy\)"),
    (
        DataSpec("stsb", metric="accuracy"),
        r"data\.metric: task 'stsb' has its own \(pearson, spearman\); name one of them",
    ),
    (DataSpec("squad", metric="exact_match"), r"data\.metric: task 'squad' has its own .*remove data\.metric"),
    (DataSpec("squad", held_out=0.1), r"data\.held_out: questions of task 'squad' share their texts"),
    (DataSpec("sst2", eval_file=Path("x.csv"), held_out=0.1), r"data\.held_out, data\.eval_file: .*remove one"),
    (DataSpec(CUSTOM, text="x", held_out=0.1), r"data\.train_file, data\.label, data\.metric: needed"),
    (DataSpec("sst2", text="x", label="y"), r"data\.text, data\.label: .*set data\.train_file"),
    (DataSpec("squad", text="x"), r"data\.text: .*remove them"),
    (DataSpec("sst2", data_dir=Path("absent")), r"data\.data_dir: absent is not a folder"),
    (DataSpec("sst2", data_dir=Path()), r"data\.data_dir: no train\.tsv in \. or its folder SST-2"),
    (DataSpec("movie", data_dir=Path()), r"data\.data_dir: no vaderSentiment-3\.3\.2\.tar\.gz"),
    (DataSpec("sst2", train_file=Path("absent.csv")), r"data\.train_file: absent\.csv is not a file"),
    (DataSpec("sst2", eval_file=Path("x.xlsx")), r"data\.eval_file: x\.xlsx has none of the endings \.csv"),
    (DataSpec("squad", eval_file=Path("x.csv")), r"data\.eval_file: x\.csv has none of the endings \.json;"),
    (DataSpec(CUSTOM, text="x"), r"data\.train_file, data\.eval_file, data\.label, data\.metric: needed"),
    (DataSpec(CUSTOM, None, Path("x.csv"), Path("x.csv"), "x", None, "y", "acuracy"), "did you mean 'accuracy'"),
    (DataSpec(CUSTOM, Path(), Path("x.csv"), Path("x.csv"), "x", None, "y", "f1"), r"data\.data_dir: .*remove"),
]


@pytest.mark.parametrize(("spec", "message"), SPECS)
def test_what_cannot_work_is_refused_before_anything_is_read(
    spec: DataSpec, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.xlsx", "x.csv"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=message):
        check_data(spec)


HEADER = "words,kind"
FILES: list[tuple[str, list[str], str, str]] = [
    ("e.csv", ["text,kind", "a,0"], "accuracy", r"e\.csv, line 2: no column 'words'; columns found: 'text', 'kind'"),
    ("e.csv", [], "accuracy", r"e\.csv: the eval split is empty"),
    ("e.csv", [HEADER], "accuracy", r"e\.csv: the eval split is empty"),
    ("e.csv", [HEADER, "a,0", "b"], "accuracy", r"e\.csv, line 3: 1 fields, but 2 columns \(words, kind\)"),
    ("e.csv", [HEADER, 'a,"0'], "accuracy", r"e\.csv, line 2: not valid CSV"),
    (
        "e.csv",
        [HEADER, "a,0", "b,7"],
        "accuracy",
        r"e\.csv, line 3: label '7' is not one of those of .*t\.csv \(0, 1\)",
    ),
    ("e.csv", [HEADER, "a,"], "accuracy", r"e\.csv, line 2: label '' is not one of"),
    ("e.csv", [HEADER, "a,0", "b,high"], "pearson", r"e\.csv, line 3: label 'high' is not a finite number"),
    ("e.csv", [HEADER, "a,nan"], "pearson", r"e\.csv, line 2: label 'nan' is not a finite number"),
    ("e.tsv", ["words\tkind", "a\t0\t1"], "accuracy", r"e\.tsv, line 2: 3 fields, but 2 columns"),
    ("e.jsonl", ['{"words": "a", "kind": 0}', "{"], "accuracy", r"e\.jsonl, line 2: not valid JSON"),
    ("e.jsonl", ["[1]"], "accuracy", r"e\.jsonl, line 1: a row is a JSON object, found list"),
    ("e.jsonl", ['{"kind": 0}'], "accuracy", r"e\.jsonl, line 1: no column 'words'"),
    ("e.jsonl", ['{"words": null, "kind": 0}'], "accuracy", r"line 1: column 'words' must hold text, found None"),
    ("e.jsonl", ['{"words": "a", "kind": null}'], "pearson", r"line 1: label None is not a finite number"),
]


@pytest.mark.parametrize(("name", "lines", "metric", "message"), FILES)
def test_what_is_wrong_in_a_file_is_named_with_its_line(
    name: str, lines: list[str], metric: str, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    train = write_lines(tmp_path / "t.csv", HEADER, "a,0", "b,1")
    held_out = write_lines(tmp_path / name, *lines)
    with pytest.raises(TaskError, match=message):
        load_task(custom(tmp_path, train, held_out, metric), tokenizer, seed=0)


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"words,kind\na,0\n\xe9,1\n")
    with pytest.raises(TaskError, match=r"t\.csv, line 3: not UTF-8"):
        load_task(custom(tmp_path, path, path), tokenizer, seed=0)


def test_classes_must_occur_in_training(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    single = write_lines(tmp_path / "one.csv", HEADER, "a,0", "b,0")
    with pytest.raises(TaskError, match=r"one\.csv: all labels are '0'; classification needs at least two"):
        load_task(custom(tmp_path, single, single), tokenizer, seed=0)
    folder = publish(tmp_path, "mnli")
    lines = (folder / "dev_matched.tsv").read_text(encoding="utf-8").replace("\tneutral", "\tcontradiction")
    (folder / "dev_matched.tsv").write_text(lines, encoding="utf-8")
    with pytest.raises(TaskError, match=r"dev_matched\.tsv, line 2: label 'contradiction' never occurs"):
        load_task(DataSpec("mnli", data_dir=folder), tokenizer, seed=0)


def test_the_folder_of_another_task_is_noticed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = publish(tmp_path, "sst2")
    with pytest.raises(TaskError, match=r"no column '#1 String'.*published files of task 'mrpc'"):
        load_task(DataSpec("mrpc", data_dir=folder), tokenizer, seed=0)
    with pytest.raises(TaskError, match=r"train\.tsv, line 1: 2 fields, but 4 columns"):
        load_task(DataSpec("cola", data_dir=folder), tokenizer, seed=0)


def test_the_tokenizer_must_fit(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    spec = DataSpec("sst2", data_dir=publish(tmp_path, "sst2"), max_length=129)
    with pytest.raises(TaskError, match=r"data\.max_length: 129 exceeds the model's 128"):
        load_task(spec, tokenizer, seed=0)
    unpadded = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(TaskError, match="no padding token"):
        load_task(dataclasses.replace(spec, max_length=64), unpadded, seed=0)
