"""The model card of a quantized encoder: results, data, and how to load it."""

from __future__ import annotations

import json

from attnpress.records.quantized import FILE, QuantizedRecord
from attnpress.runs.card import public_name

PIPELINES = {"embedder": "sentence-similarity", "classifier": "text-classification", "reranker": "text-ranking"}

CARD = """---
{header}
---

# {base}, compressed

{base} with query, key, value and attention probabilities at {bits} bits, {sparsity} of the probabilities zero, and
linear layers in {linear}{tail}. Made by attnpress {version} without labels{training}; every figure is in
`{file}`.

{table}

## How to load it

```python
import attnpress  # registers with Transformers; loading fails without it
{load}
attnpress.deploy(model, "cpu")  # the compiled kernel
```
"""

LOADS = {
    "SentenceTransformer": ("from sentence_transformers import SentenceTransformer", "SentenceTransformer(folder)"),
    "CrossEncoder": ("from sentence_transformers import CrossEncoder", "CrossEncoder(folder)"),
}


AGREEMENT = {
    "cosine": "cosine with the dense embedding",
    "lowest_cosine": "lowest cosine of a text",
    "same_decisions": "same decisions",
    "logit_change": "change of the logits, in norm",
    "same_order": "pairs in the same order",
    "score_change": "change of the scores, in norm",
}


def quantized_rows(record: QuantizedRecord) -> list[tuple[str, ...]]:
    """Header and rows of the table before and after, as text."""
    dense, ours = record.dense, record.compressed
    usual = {"cosine": "1", "lowest_cosine": "1", "same_decisions": "100%", "same_order": "100%"}
    rows = [
        (AGREEMENT[name], usual.get(name, "0"), f"{value:.2%}" if name.startswith("same") else f"{value:.4f}")
        for name, value in record.agreement.items()
    ]
    return [
        ("", "dense", "compressed"),
        *rows,
        ("sparsity", "0", f"{record.sparsity:.3f}"),
        ("keys per query", f"{record.dense_keys:.1f}", f"{record.keys_per_query:.1f}"),
        ("folder, MB", f"{dense.file_mb:.1f}", f"{ours.file_mb:.1f}"),
        ("peak memory, MB", f"{dense.peak_mb:.0f}", f"{ours.peak_mb:.0f}"),
        (
            "texts a second",
            f"{dense.texts_per_second:.1f}",
            f"{ours.texts_per_second:.1f} ({record.speedup:.2f} times)",
        ),
    ]


def quantized_caption(record: QuantizedRecord) -> str:
    """Data and settings of the table."""
    texts, float_products = record.texts, len(record.float_products)
    threads = f"{record.threads} thread" + ("s" if record.threads > 1 else "")
    stayed = f"; {float_products} products stayed in float" if record.linear == "int8" and float_products else ""
    taught = f"; trained on {texts.training} others for {record.distill:g} epochs" if record.distill is not None else ""
    return (
        f"{texts.judged} texts judged, of {texts.shortest} to {texts.longest} tokens (median {texts.median}), none of "
        f"them among the {texts.calibration} for calibration; {threads}, {record.target}, linear layers in "
        f"{record.linear}{stayed}{taught}."
    )


def quantized_markdown(record: QuantizedRecord) -> str:
    """The table with its caption as Markdown."""
    header, *rows = quantized_rows(record)
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{quantized_caption(record)}"


def quantized_card(record: QuantizedRecord, class_name: str) -> str:
    """The card as Markdown, with the header that the Hugging Face Hub reads.

    Args:
        class_name: of the model.
    """
    auto = "AutoModel" if record.kind == "embedder" else "AutoModelForSequenceClassification"
    usual = f"from transformers import {auto}", f"{auto}.from_pretrained(folder)"
    imported, made = LOADS.get(class_name, usual)
    bits = {record.attention[name]["bits"] for name in "qkvp"}
    tail = record.attention["tail"]
    return CARD.format(
        header=_header(record, class_name in LOADS),
        base=public_name(record.model),
        bits="/".join(map(str, sorted(bits))),
        sparsity=f"{record.sparsity:.0%}",
        linear="8 bits" if record.linear == "int8" else "floating point",
        tail="" if tail == "none" else f"; what is pruned still counts, by a tail ({tail})",
        training=" and without training" if record.distill is None else f", taught for {record.distill:g} epochs",
        version=record.provenance["versions"]["attnpress"],
        file=FILE,
        table=quantized_markdown(record),
        load=f"{imported}\n\nmodel = {made}  # this folder",
    )


def _header(record: QuantizedRecord, is_pipeline: bool) -> str:
    values: dict[str, object] = {
        "library_name": "sentence-transformers" if is_pipeline else "transformers",
        "pipeline_tag": PIPELINES[record.kind],
        "base_model": public_name(record.model),
        "tags": ["attnpress", "attention", "quantization", "pruning"],
    }
    # JSON is YAML, and its quoting is safe for any path.
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
