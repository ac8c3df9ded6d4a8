"""Inputs at the edge of what a bound model is given: lone tokens, padding alone, NaN, other precisions."""

from __future__ import annotations

import math

import pytest
import torch

from attnpress.config import DENSE, AttentionSpec, ProbsSpec, TensorSpec
from attnpress.models.attention import NAME
from attnpress.models.binding import attentions, bind, captured_outputs
from attnpress.models.forward import attention_forward
from attnpress.models.watchers import Counting, Fitting, Observing, start, watched
from attnpress.training.calibration import calibrate
from tests.models.bound_models import PRUNED, QUANTIZED, WITH_PADDING, compressed
from tests.models.factories import (
    ENCODERS,
    HEAD_DIM,
    HEADS,
    MODELS,
    as_dtype,
    make_batch,
    make_classifier,
    make_model,
    outputs,
    real_tokens,
)

# Inputs at the edge.


@pytest.mark.parametrize("spec", [DENSE, PRUNED], ids=["dense", "compressed"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_single_token_attends_to_itself(name: str, spec: AttentionSpec) -> None:
    model = compressed(name, spec)
    (state, *_) = attentions(model).values()
    counting = start(state, Counting(state))
    found = outputs(model, make_batch(name, (1,)))
    assert bool(found.isfinite().all())
    assert counting.counts.sparsity().tolist() == [0] * HEADS


@pytest.mark.parametrize("name", WITH_PADDING)
def test_a_sequence_of_padding_alone_outputs_zeros_and_does_not_disturb_the_others(name: str) -> None:
    model, batch = compressed(name), make_batch(name, (6, 6))
    expected = outputs(model, batch)
    emptied = batch | {"attention_mask": batch["attention_mask"] * torch.tensor([[1], [0]])}
    with captured_outputs(model) as captured:
        found = outputs(model, emptied)
    assert torch.equal(found[0], expected[0])
    assert bool(found.isfinite().all())
    assert not any(bool(output[1].any()) for output in captured)


@pytest.mark.parametrize(
    "spec", [DENSE, PRUNED, AttentionSpec(rule="topk", sparsity=0.5)], ids=["dense", "relative", "topk"]
)
def test_an_empty_batch_gives_an_empty_output(spec: AttentionSpec) -> None:
    # Called directly: the models of Transformers cannot reshape an empty batch on the way to their attention.
    model = compressed("BERT", spec)
    module = model.get_submodule(next(iter(attentions(model))))
    state = attentions(model)["encoder.layer.0.attention.self"]
    counting = start(state, Counting(state))
    start(state, Fitting(slice(3, None, 8)))
    empty = torch.zeros(0, HEADS, 6, HEAD_DIM)
    for watchers in ([Observing(state)], []):
        with watched((state, watcher) for watcher in watchers):
            output, _ = attention_forward(module, empty, empty, empty, torch.zeros(0, 1, 6, 6), scaling=0.3)
        assert output.shape == (0, 6, HEADS, HEAD_DIM)
    assert not state.seen.any()
    assert not counting.counts.pairs.any()


@pytest.mark.filterwarnings("ignore:attention met NaN:attnpress.core.attention.NanWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_spoils_no_other_sequence(bad: float) -> None:
    model = compressed()
    embeddings = torch.randn(3, 6, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 6, dtype=torch.long)
    spoilt = embeddings.clone()
    spoilt[1, 2] = bad
    expected = outputs(model, {"inputs_embeds": embeddings, "attention_mask": mask})
    with captured_outputs(model) as captured:
        found = outputs(model, {"inputs_embeds": spoilt, "attention_mask": mask})
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert all(bool(output.isfinite().all()) for output in captured), "codes are finite, whatever they are made from"


def test_strided_inputs_are_those_of_contiguous_ones() -> None:
    model = compressed()
    embeddings = torch.randn(6, 3, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    assert not embeddings.is_contiguous()
    assert torch.equal(
        outputs(model, {"inputs_embeds": embeddings}), outputs(model, {"inputs_embeds": embeddings.contiguous()})
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_keeps_float32_scales_and_works(name: str, dtype: torch.dtype) -> None:
    model, batch = compressed(name), make_batch(name)
    expected = real_tokens(model, batch)
    before = {key: value.clone() for key, value in model.state_dict().items() if NAME in key}
    as_dtype(model, dtype)
    for key, value in before.items():
        assert model.state_dict()[key].dtype == value.dtype
        assert torch.equal(model.state_dict()[key], value), "not rounded on the way"
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    found = real_tokens(model, batch)
    assert found.dtype == dtype
    assert float(torch.cosine_similarity(found.float().flatten(), expected.flatten(), 0)) > 0.97


def test_a_model_in_half_precision_can_be_bound_and_calibrated() -> None:
    model, batch = as_dtype(make_model(), torch.bfloat16), make_batch()
    dense = real_tokens(model, batch).float()
    bind(model, QUANTIZED)
    calibrate(model, [batch])
    assert all(state.q_scale.dtype == torch.float32 for state in attentions(model).values())
    assert float(torch.cosine_similarity(real_tokens(model, batch).float().flatten(), dense.flatten(), 0)) > 0.99


def test_autocast_does_not_touch_the_integers() -> None:
    model, batch = compressed(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model, batch)
    assert float(torch.cosine_similarity(found.float().flatten(), outputs(model, batch).flatten(), 0)) > 0.97


def test_compressed_models_train() -> None:
    spec = AttentionSpec(q=TensorSpec(learned=True), p=ProbsSpec(mode="unit"), sparsity=0.3)
    model = bind(make_classifier(num_labels=2), spec)
    batch = make_batch()
    calibrate(model, [batch])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch, labels=torch.tensor([0, 1, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
