"""Training with sentence-transformers' own Trainer: the callback prunes, and what was trained is saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset

import attnpress
from attnpress.models.binding import attentions
from tests.posttraining.factories import make_embedder, some_texts

sentence_transformers = pytest.importorskip("sentence_transformers")


def test_the_callback_prunes_an_embedder_while_it_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    model, texts = make_embedder(tiny_model), some_texts(64)
    attnpress.bind(model, attnpress.AttentionSpec())
    attnpress.calibrate(model, [model.preprocess(texts[:16])])
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rows = {"a": texts[::2], "b": texts[1::2], "label": [0.9, 0.1] * 16}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "st"), num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    callback = attnpress.SparsityCallback(model, attnpress.ScheduleSpec("linear", end=0.5), 0.7)
    SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(rows), loss=CosineSimilarityLoss(model), callbacks=[callback]
    ).train()
    assert {state.spec.sparsity for state in attentions(model).values()} == {0.7}
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    model.save(str(tmp_path / "trained"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    expected = model.eval().encode(texts, convert_to_tensor=True)
    assert torch.equal(loaded.encode(texts, convert_to_tensor=True), expected)


def test_processes_of_encode_multi_process_run_the_deployed_model(tiny_model: Path) -> None:
    model, texts = make_embedder(tiny_model), some_texts(24)
    attnpress.bind(model, attnpress.AttentionSpec(sparsity=0.5))
    attnpress.calibrate(model, [model.preprocess(texts)])
    attnpress.deploy(model, "reference", linear="int8")
    expected = model.encode(texts)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        found = model.encode(texts, pool=pool)
    finally:
        model.stop_multi_process_pool(pool)
    assert (found == expected).all()
