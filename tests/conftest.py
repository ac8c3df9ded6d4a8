"""What tests share: no hub, a cache of their own, reproducible property tests, and a tiny model, task and run."""

from __future__ import annotations

import atexit
import csv
import dataclasses
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from attnpress.config import AttentionSpec, CalibrationSpec, DataSpec, RunConfig, TrainSpec
from tests.not_tested import not_tested

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Set before anything imports transformers or datasets, which read these once; subprocesses of tests inherit them.
_cache = tempfile.TemporaryDirectory(prefix="attnpress-tests-")
atexit.register(_cache.cleanup)
os.environ["HF_HOME"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{_cache.name}/inductor"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Examples are derived from the test itself, so a red run is red again; no deadline, since machines are shared.
settings.register_profile("attnpress", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("attnpress")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """After all else: what was not tested, and how to get what it needs."""
    yield
    reports = terminalreporter.stats.get("skipped", [])
    for line in not_tested(str(report.longrepr[-1]) for report in reports if isinstance(report.longrepr, tuple)):
        terminalreporter.write_line(line)


TokenizerFactory = Callable[[Sequence[str]], "PreTrainedTokenizerFast"]
"""From a vocabulary to a tokenizer that knows its words (and, as in BERT, pieces of words that begin with ##)."""

VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", "."),
    *("good", "fine", "great", "bad", "dull", "poor"),
    *("the", "a", "film", "plot", "actor", "scene", "is", "was", "and", "with", "one", "two", "of", "story"),
]
GOOD, BAD, FILLER = VOCABULARY[6:9], VOCABULARY[9:12], VOCABULARY[12:]


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """What one test sets, the next does not inherit."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_tokenizer() -> TokenizerFactory:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
        numbers = {word: number for number, word in enumerate(vocabulary)}
        words = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=128, **special)

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerFactory) -> Path:
    """Folder of a random BERT of two layers with two heads, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("model") / "tiny-bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.2,  # so small a model learns nothing from weights as small as BERT's
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    make_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.csv and eval.jsonl: is a review mostly of good words? Also `stars`, from -3 to 3."""
    folder, draw = tmp_path_factory.mktemp("reviews"), random.Random(0)
    rows = [_review(draw) for _ in range(320)]
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows[:240])
    held_out = "".join(json.dumps(row) + "\n" for row in rows[240:])
    (folder / "eval.jsonl").write_text(held_out, encoding="utf-8")
    return folder


def _review(draw: random.Random) -> dict[str, str | int]:
    stars = draw.choice([-3, -2, -1, 1, 2, 3])
    telling = draw.choices(GOOD if stars > 0 else BAD, k=abs(stars))
    words = [*telling, *draw.choices(FILLER, k=draw.randint(2, 16))]
    return {"review": " ".join(draw.sample(words, len(words))), "verdict": "yes" if stars > 0 else "no", "stars": stars}


@pytest.fixture(scope="session")
def tiny_recipe(tiny_model: Path, reviews: Path) -> RunConfig:
    """A whole run of a few seconds: stages of 30 steps, two epochs; checkpoints after steps 8, 16, 24 and 30."""
    train = TrainSpec(epochs=2, learning_rate=1e-2, batch_size=16, checkpoints=4)
    return RunConfig(
        model=str(tiny_model),
        data=DataSpec(
            "custom", train_file=reviews / "train.csv", eval_file=reviews / "eval.jsonl", text="review",
            label="verdict", metric="accuracy", max_length=32,
        ),
        attention=AttentionSpec(sparsity=0.8),
        calibration=CalibrationSpec(batches=4, batch_size=16),
        dense=train,
        compress=train,
    )  # fmt: skip


@pytest.fixture(scope="session")
def from_dense(tiny_recipe: RunConfig, finished: Path) -> RunConfig:
    """Half an epoch of compression only, from the dense model of `finished`."""
    short = TrainSpec(epochs=0.5, learning_rate=1e-3, batch_size=16, checkpoints=1)
    return dataclasses.replace(tiny_recipe, checkpoint=finished / "dense", compress=short)


@pytest.fixture(scope="session")
def finished(tiny_recipe: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of `tiny_recipe`, run to its end once; tests leave it as it is."""
    from attnpress.runs.compression import compress

    folder = tmp_path_factory.mktemp("runs") / "finished"
    compress(tiny_recipe, folder, notify=lambda _: None)
    return folder
