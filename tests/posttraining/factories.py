"""Tiny random encoders in the folders that libraries save them in, and texts for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from tests.conftest import VOCABULARY


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 2 to 20 words, all different."""
    draw, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        found[" ".join(draw.choices(VOCABULARY[6:], k=2 + len(found) % 19))] = None
    return list(found)


def some_pairs(count: int) -> list[tuple[str, str]]:
    """Pairs of a query and a passage, four passages a query."""
    passages = some_texts(count)
    return [(" ".join(passages[number // 4 * 4].split()[:3]), passage) for number, passage in enumerate(passages)]


def bert_config(**options: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.2, **options,
    )  # fmt: skip


def save_classifier(folder: Path, tokenizer: PreTrainedTokenizerFast, labels: int = 3) -> Path:
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(num_labels=labels)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reranker(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A CrossEncoder of one score, as sentence-transformers saves it."""
    from sentence_transformers import CrossEncoder

    save_classifier(folder.with_name("classifier"), tokenizer, labels=1)
    CrossEncoder(str(folder.with_name("classifier")), device="cpu").save_pretrained(str(folder))
    return folder


def make_embedder(folder: Path, pooling: str = "mean", **options: Any) -> Any:
    """A SentenceTransformer on the Transformers model of a folder: pooled, made smaller, normalized."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    modules = [Transformer(str(folder)), Pooling(32, pooling), Dense(32, 16), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", **options)
