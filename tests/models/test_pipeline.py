"""Pipelines of sentence-transformers, by the real library: calibrated, deployed, saved, the same bits in any batch."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnpress
from attnpress.deployment.linear import linear_layers
from attnpress.models.pipeline import ordered_norm, ordered_pooling
from tests.kernels.factories import needs_kernel
from tests.posttraining.factories import make_embedder, some_pairs, some_texts

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = some_texts(60)
BACKENDS = [pytest.param("cpu", marks=needs_kernel), "reference"]


def compressed(model: Any, rows: Any = TEXTS) -> Any:
    """Bound, calibrated on its own preprocessing, not deployed."""
    attnpress.bind(model, attnpress.AttentionSpec(sparsity=0.5))
    batches = [model.preprocess(rows[begin : begin + 8]) for begin in range(0, 24, 8)]
    attnpress.calibrate(model, batches)
    attnpress.calibrate_linear(model, batches)
    return model


def encoded(model: Any, texts: list[str] = TEXTS, **options: Any) -> Tensor:
    found: Tensor = model.encode(texts, convert_to_tensor=True, **options)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "mean_sqrt_len_tokens", "cls", "max", "lasttoken"])
def test_a_text_gets_the_same_bits_in_any_batch(tiny_model: Path, pooling: str, backend: str) -> None:
    model = attnpress.deploy(compressed(make_embedder(tiny_model, pooling)), backend, linear="int8")
    assert linear_layers(model).library == 0
    together = encoded(model)
    for size in (1, 7, 60):
        assert torch.equal(encoded(model, batch_size=size), together)
    assert torch.equal(torch.stack([encoded(model, [text])[0] for text in TEXTS]), together)
    assert torch.equal(encoded(model, TEXTS[::-1]).flip(0), together)
    kept = attnpress.deploy(copy.deepcopy(model), backend, padding="keep")
    assert torch.equal(encoded(kept), together)


@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "mean_sqrt_len_tokens", "max"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_sums_in_one_order_are_those_of_the_library(pooling: str, include_prompt: bool) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    module = Pooling(8, (pooling, "cls", pooling), include_prompt=include_prompt)
    mask = (torch.arange(9) < torch.tensor([[9], [5], [3]])).long()
    states = torch.randn(3, 9, 8)
    features = {"token_embeddings": states, "attention_mask": mask, "prompt_length": 2}
    expected = module(dict(features))["sentence_embedding"]
    found = ordered_pooling(module, None, {**features, "sentence_embedding": expected.clone()})["sentence_embedding"]
    torch.testing.assert_close(found, expected)
    exact = states.double() * mask.unsqueeze(-1)
    if pooling == "mean" and include_prompt:
        torch.testing.assert_close(found[:, :8].double(), exact.sum(1) / mask.sum(1, keepdim=True))


def test_a_norm_in_one_order_is_that_of_the_library() -> None:
    from sentence_transformers.base.modules import Normalize

    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    expected = Normalize()({"sentence_embedding": x})
    found = ordered_norm(Normalize(), None, {"sentence_embedding": expected["sentence_embedding"] * 3})
    torch.testing.assert_close(found["sentence_embedding"], expected["sentence_embedding"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("deployed_first", [True, False])
def test_what_was_saved_gives_the_same_bits(
    tiny_model: Path, tmp_path: Path, backend: str, deployed_first: bool, recwarn: pytest.WarningsRecorder
) -> None:
    model = compressed(make_embedder(tiny_model, prompts={"query": "good film "}))
    if deployed_first:
        attnpress.deploy(model, backend, linear="int8")
    model.save(str(tmp_path / "fast"))
    attnpress.deploy(model, backend, linear="int8")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "fast"), device="cpu")
    assert loaded.prompts["query"] == "good film "
    modules = json.loads((tmp_path / "fast" / "modules.json").read_text(encoding="utf-8"))
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    attnpress.deploy(loaded, backend, linear="int8")
    for options in ({}, {"prompt_name": "query"}, {"truncate_dim": 5}, {"normalize_embeddings": True}):
        assert torch.equal(encoded(loaded, **options), encoded(model, **options))
    assert not [str(said.message) for said in recwarn if "trust" in str(said.message)]


def test_activations_behind_the_encoder_keep_their_class(tiny_model: Path, tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Dense

    model = make_embedder(tiny_model)
    model[2] = Dense(32, 16, activation_function=nn.GELU())
    attnpress.deploy(compressed(model), "reference", linear="int8")
    model.save(str(tmp_path / "fast"))
    config = json.loads((tmp_path / "fast" / "2_Dense" / "config.json").read_text(encoding="utf-8"))
    assert config["activation_function"] == "torch.nn.modules.activation.GELU"


def test_copies_and_pickles_serve_as_the_model_does(tiny_model: Path) -> None:
    model = attnpress.deploy(compressed(make_embedder(tiny_model)), "reference", linear="int8")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(encoded(copied), encoded(model))


def test_deploying_twice_computes_each_sum_once(tiny_model: Path) -> None:
    model = attnpress.deploy(compressed(make_embedder(tiny_model)), "reference", linear="int8")
    attnpress.deploy(model, "reference")
    assert all(len(module._forward_hooks) <= 1 for module in list(model.children())[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [1, 3])
def test_a_cross_encoder_gives_a_pair_the_same_bits_in_any_batch(
    tiny_model: Path, tmp_path: Path, labels: int, backend: str
) -> None:
    model = sentence_transformers.CrossEncoder(str(tiny_model), num_labels=labels, device="cpu")
    attnpress.deploy(compressed(model, some_pairs(24)), backend, linear="int8")
    assert linear_layers(model).library == 0
    pairs = some_pairs(30)
    together = model.predict(pairs, activation_fn=nn.Identity())
    for size in (1, 7):
        assert (model.predict(pairs, activation_fn=nn.Identity(), batch_size=size) == together).all()
    model.save_pretrained(str(tmp_path / "fast"))
    loaded = attnpress.deploy(sentence_transformers.CrossEncoder(str(tmp_path / "fast"), device="cpu"), backend)
    assert (loaded.predict(pairs, activation_fn=nn.Identity()) == together).all()
    if labels == 1:
        query, passages = pairs[0][0], [passage for _, passage in pairs]
        assert loaded.rank(query, passages, top_k=5) == model.rank(query, passages, top_k=5)


def test_unbind_gives_the_library_back_its_own(tiny_model: Path) -> None:
    model = make_embedder(tiny_model)
    before = encoded(model)
    compressed(model)
    assert not torch.equal(encoded(model), before)
    attnpress.unbind(model)
    assert torch.equal(encoded(model), before)


def test_a_deployed_pipeline_leaves_others_as_they_were(tiny_model: Path) -> None:
    """The library's Dense layers share their default activation: a hook on it would reach every model."""
    other = make_embedder(tiny_model)
    first = make_embedder(tiny_model)
    assert first[2].activation_function is other[2].activation_function
    attnpress.deploy(compressed(first), "reference", linear="int8")
    assert not other[2].activation_function._forward_hooks
    assert first[2].activation_function is not other[2].activation_function
