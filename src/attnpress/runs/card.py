"""The model card of a compressed model: task, metric, bits, the four sparsity figures, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from attnpress.config import LARGEST_HEAD
from attnpress.records.run import Record, StageRecord

FIGURES = {
    "sparsity": "of the valid pairs of a query and a key, those whose probability is zero: work that a kernel can skip",
    "pruned": "of the valid pairs, those that the pruning rule removed",
    "padded_sparsity": "zeros over the full rectangle of {length} tokens, padding included",
    "tile_sparsity": "of the tiles of 16 x 64 pairs, those without a survivor",
}

AUTO_CLASSES = {"qa": "AutoModelForQuestionAnswering"}
PIPELINES = {"qa": "question-answering"}

CARD = """---
{header}
---

# {task}, with compressed attention

{base}, fine-tuned on {task}, with query, key, value and attention probabilities (Q/K/V/P) at {bits} bits and
probabilities pruned by the rule `{rule}`{tail}. Made by attnpress {version}; the recipe and every figure by
layer and head are in its run folder.

| | dense | compressed |
| --- | ---: | ---: |
{scores}

{rows} evaluation rows. Weights are not compressed.

## Sparsity

| figure | | what it is |
| --- | ---: | --- |
{figures}

Each row of the attention matrix keeps {keys:.2f} keys on average.

## How to load it

```python
import attnpress  # registers with Transformers; loading fails without it
from transformers import {auto}, pipeline

model = {auto}.from_pretrained(folder)  # this folder: scales and thresholds come along
attnpress.deploy(model)  # optional: the same integers from the compiled CPU kernel

pipeline("{pipeline}", folder)
```
"""


def model_card(record: Record, kind: str, name: str = "progressive") -> str:
    """The card as Markdown, with the header that the Hugging Face Hub reads.

    Args:
        record: of the run.
        kind: of its task: "classification", "regression" or "qa".
        name: stage of the model that the card is for.

    Raises:
        ValueError: the record has no such stage.
    """
    recipe, dense, stage = record.recipe, record.stage("dense"), record.stage(name)
    if stage is None:
        raise ValueError(f"the record has no stage {name!r} to write a model card from")
    pipeline = PIPELINES.get(kind, "text-classification")
    return CARD.format(
        header=_header(recipe["data"]["task"], pipeline, stage, record.headline),
        task=recipe["data"]["task"],
        base=public_name(recipe["model"]),
        rule=recipe["attention"]["rule"],
        bits="/".join("fp" if bits is None else f"{bits:.3g}" for bits in stage.bits.values()),
        version=record.provenance["versions"]["attnpress"],
        scores=_scores(stage, dense),
        rows=record.provenance["rows"]["eval"],
        figures=_figures(stage),
        keys=stage.keys_per_row,
        auto=AUTO_CLASSES.get(kind, "AutoModelForSequenceClassification"),
        pipeline=pipeline,
        tail=_tail(recipe["attention"]),
    )


def _tail(attention: Mapping[str, Any]) -> str:
    """The tail of a record; old records do not name one."""
    name = attention.get("tail", "none")
    if name == "none":
        return ""
    rank = attention.get("tail_rank", LARGEST_HEAD)
    seen = "" if name != "linear" else ", whole score" if rank >= LARGEST_HEAD else f", {rank} directions"
    return f"; pairs without a code still count, by a tail (`{name}`{seen})"


def public_name(model: str) -> str:
    """The model's name without local folders."""
    return PurePath(model).name if model.startswith((".", "/", "~")) else model


def _header(task: str, pipeline: str, stage: StageRecord, headline: str) -> str:
    measured = {"type": headline, "value": round(stage.metrics[headline], 2)}
    result = {"task": {"type": pipeline}, "dataset": {"name": task, "type": task}, "metrics": [measured]}
    values: Mapping[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": pipeline,
        "tags": ["attnpress", "attention", "quantization", "pruning"],
        "metrics": [headline],
        "model-index": [{"name": f"{task}, compressed attention", "results": [result]}],
    }
    # JSON is YAML, and its quoting is safe for any path or task name.
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())


def _scores(stage: StageRecord, dense: StageRecord | None) -> str:
    before = {} if dense is None else dense.metrics
    return "\n".join(
        f"| {name} | {f'{before[name]:.2f}' if name in before else ''} | {value:.2f} |"
        for name, value in stage.metrics.items()
    )


def _figures(stage: StageRecord) -> str:
    return "\n".join(
        f"| {name} | {getattr(stage, name):.3f} | {text.format(length=stage.padded_length)} |"
        for name, text in FIGURES.items()
    )
