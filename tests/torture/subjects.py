"""What is tortured: a tiny model, its recipe, an input for `run`, and what an undisturbed run makes of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from attnpress.files import sha256_of
from attnpress.records.run import read_record

WORDS = "[PAD] [UNK] [CLS] [SEP] good fine great bad dull poor the film plot is and a".split()  # noqa: SIM905
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
COMPRESS, RUN = "compress", "run"


@dataclasses.dataclass(frozen=True)
class Subject:
    """Everything a trial needs.

    Attributes:
        place: scratch folder.
        recipe, source: of `compress`, and the input of `run`.
        whole: an undisturbed run folder, and `whole.jsonl` beside it an undisturbed output.
        seconds: that each command took, undisturbed, start of the process included.
    """

    place: Path
    recipe: Path
    source: Path
    whole: Path
    answers: Path
    seconds: dict[str, float]

    def command(self, name: str, output: Path) -> list[str]:
        """The command line of `compress` or `run`."""
        words = {
            COMPRESS: ["compress", str(self.recipe), "--output", str(output)],
            RUN: ["run", str(self.whole), "--input", str(self.source), "--output", str(output)],
        }[name]
        return [sys.executable, "-m", "attnpress.cli", *words]

    def output(self, name: str, folder: Path) -> Path:
        """Where a trial lets a command write."""
        return folder / ("run" if name == COMPRESS else "out.jsonl")

    def check(self, name: str, output: Path) -> None:
        """Is it byte for byte what an undisturbed command makes, with nothing lying beside it?

        Raises:
            AssertionError: says what differs.
        """
        if name == RUN:
            assert output.read_bytes() == self.answers.read_bytes(), "other answers than undisturbed"
            left = {path.name for path in output.parent.iterdir()} - {output.name, f".{output.name}.lock"}
            assert not left, f"left lying: {sorted(left)}"
            return
        found, expected = outcome(output), outcome(self.whole)
        different = [key for key in expected if found[key] != expected[key]]
        assert not different, f"{', '.join(different)} differ from an undisturbed run"


def outcome(run: Path) -> dict[str, Any]:
    """All that a run is judged by: record, weights, logs, names of files; not how long it took, nor on what machine."""
    record = dataclasses.asdict(read_record(run))
    for stage in record["stages"]:
        del stage["seconds"]
    del record["provenance"]["machine"]
    weights = {str(file.relative_to(run)): sha256_of(file) for file in sorted(run.rglob("*.safetensors"))}
    logs = {file.name: file.read_text(encoding="utf-8") for file in (run / "logs").iterdir()}
    return {
        "record": record,
        "weights": weights,
        "logs": logs,
        "names": {str(p.relative_to(run)) for p in run.rglob("*")},
    }


def prepare(place: Path, seed: int) -> Subject:
    """Make the model and the data, and run each command once, undisturbed.

    Raises:
        subprocess.CalledProcessError: a command fails even so.
    """
    _tiny_model(place / "model")
    recipe, source = _recipe(place, seed), _source(place / "in.jsonl", seed)
    subject = Subject(place, recipe, source, place / "whole", place / "whole.jsonl", {})
    for name, output in ((COMPRESS, subject.whole), (RUN, subject.answers)):
        begin = time.monotonic()
        subprocess.run(subject.command(name, output), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
        subject.seconds[name] = time.monotonic() - begin
    return subject


def _tiny_model(folder: Path) -> None:
    core = Tokenizer(models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names).save_pretrained(folder)
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    BertModel(
        BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.2, **size)
    ).save_pretrained(folder)


def _review(draw: random.Random, number: int) -> tuple[str, str]:
    telling = draw.choice(WORDS[4:7] if number % 2 else WORDS[7:10])
    return " ".join([*draw.choices(WORDS[10:], k=draw.randint(1, 9)), telling]), "yes" if number % 2 else "no"


def _recipe(place: Path, seed: int) -> Path:
    draw = random.Random(seed)
    for name, count in (("train.csv", 96), ("eval.csv", 40)):
        with (place / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *(_review(draw, number) for number in range(count))])
    train = {"epochs": 2, "learning_rate": 0.005, "batch_size": 16, "checkpoints": 3}
    plain = {
        "model": str(place / "model"),
        "data": {
            "task": "custom", "train_file": str(place / "train.csv"), "eval_file": str(place / "eval.csv"),
            "text": "text", "label": "label", "metric": "accuracy", "max_length": 24,
        },
        "attention": {"sparsity": 0.5}, "calibration": {"batches": 1, "batch_size": 16},
        "dense": train, "compress": train, "dense_control": True,
    }  # fmt: skip
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def _source(file: Path, seed: int) -> Path:
    draw = random.Random(seed)
    rows = [json.dumps({"text": _review(draw, number)[0], "id": number}) for number in range(5000)]
    file.write_text("\n".join([*rows, "no JSON", ""]), encoding="utf-8")
    return file
