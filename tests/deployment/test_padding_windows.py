"""ModernBERT and DistilBERT without padding: windows and rotations stay, a text gets the same bits in any company."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForSequenceClassification, PreTrainedModel

from attnpress.config import AttentionSpec, ProbsSpec, TensorSpec
from attnpress.deployment.attention import deploy
from attnpress.deployment.linear import LinearLayers, calibrate_linear, linear_layers
from attnpress.models.binding import bind
from attnpress.models.encoder import plan_of, set_plan
from attnpress.training.calibration import calibrate
from tests.deployment.int8_models import BACKENDS, PRUNED
from tests.models.factories import ENDS, LOCAL, SIZES, make_batch, make_model, outputs

BATCH = make_batch(lengths=(3, 33, 7, 1, 21), seed=3)
"""All but two texts are longer than the window of a layer, which reaches over two tokens to either side."""

FEW = TensorSpec(bits=4)
SPECS = {
    "8 bits": PRUNED,
    "4 bits, smooth keys": AttentionSpec(FEW, FEW, FEW, ProbsSpec(bits=4), sparsity=0.3, tail="mean", smooth_key=True),
}


def calibrated(model: PreTrainedModel, spec: AttentionSpec = PRUNED) -> Any:
    bind(model.eval(), spec)
    calibrate(model, [BATCH, make_batch(lengths=(20, 9), seed=4)])
    return model


def real(states: Tensor) -> Tensor:
    return states[BATCH["attention_mask"].bool()]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ModernBERT", "DistilBERT"])
def test_padding_changes_no_bit_of_int8_layers(name: str, backend: str, spec: str) -> None:
    model = calibrated(make_model(name), SPECS[spec])
    expected = outputs(deploy(copy.deepcopy(model), backend, linear="int8", padding="keep"), BATCH)
    found = outputs(deploy(model, backend, linear="int8"), BATCH)
    assert torch.equal(real(found), real(expected))
    assert not found[~BATCH["attention_mask"].bool()].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ModernBERT", "DistilBERT"])
def test_a_text_gets_the_same_bits_alone(name: str, backend: str) -> None:
    model = deploy(calibrated(make_model(name)), backend, linear="int8")
    together = outputs(model, BATCH)
    for row, length in enumerate(BATCH["attention_mask"].sum(1).tolist()):
        alone = outputs(model, {key: value[row : row + 1, :length] for key, value in BATCH.items()})
        assert torch.equal(together[row, :length], alone[0])


def test_products_that_stay_in_float_stay_torch_s() -> None:
    model = calibrated(make_model("ModernBERT"))
    calibrate_linear(model, [BATCH])
    plan = plan_of(model) or {}
    set_plan(model, plan | {"1.up": dataclasses.replace(plan["1.up"], quantized=False)})
    deployed = deploy(model, "reference", linear="int8")
    assert linear_layers(deployed) == LinearLayers(int8=7, ordered=0, library=1)
    assert type(deployed.layers[1].mlp_norm).__name__ == "OrderedLayerNorm"


@pytest.mark.parametrize("name", ["ModernBERT", "DistilBERT"])
def test_float_layers_run_without_padding_too(name: str) -> None:
    model = calibrated(make_model(name))
    expected = outputs(deploy(model, "reference"), BATCH)
    found = outputs(deploy(model, "reference", padding="skip"), BATCH)
    torch.testing.assert_close(real(found), real(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(deploy(model, "reference"), BATCH), expected), "padding is back"


def test_only_real_tokens_reach_the_layers_of_modernbert() -> None:
    model = deploy(calibrated(make_model("ModernBERT")), "reference", padding="skip")
    seen: list[tuple[int, ...]] = []
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    outputs(model, BATCH)
    outputs(model, make_batch(lengths=(6, 6)))
    assert seen == [(1, 65), (2, 6)], "a batch without padding stays as it is"


def test_positions_embeddings_and_tuples_of_modernbert_come_through() -> None:
    model = deploy(calibrated(make_model("ModernBERT")), "reference", linear="int8")
    expected = outputs(model, BATCH)
    embedded = {"inputs_embeds": model.embeddings.tok_embeddings(BATCH["input_ids"])}
    mask = {"attention_mask": BATCH["attention_mask"]}
    assert torch.equal(outputs(model, embedded | mask), expected)
    length = BATCH["input_ids"].shape[1]
    positions = torch.arange(length).flip(0).expand(5, length)
    padded = outputs(deploy(model, "reference", padding="keep"), BATCH | {"position_ids": positions})
    model = deploy(model, "reference", padding="skip")
    turned = outputs(model, BATCH | {"position_ids": positions})
    assert torch.equal(real(turned), real(padded))
    assert not torch.equal(real(turned), real(expected))
    with torch.no_grad():
        assert torch.equal(model(**BATCH, return_dict=False)[0], expected)


def test_who_asks_for_every_layer_gets_the_padded_batch() -> None:
    model = calibrated(make_model("ModernBERT"))
    with torch.no_grad():
        expected = deploy(model, "reference")(**BATCH, output_hidden_states=True).hidden_states
        found = deploy(model, "reference", padding="skip")(**BATCH, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_logits_of_a_classifier_do_not_change_with_the_batch() -> None:
    torch.manual_seed(0)
    config = ModernBertConfig(**LOCAL | ENDS | SIZES | {"num_labels": 3, "classifier_pooling": "cls"})
    model = deploy(calibrated(ModernBertForSequenceClassification(config)), "auto", linear="int8")
    with torch.no_grad():
        together = model(**BATCH).logits
        for row, length in enumerate(BATCH["attention_mask"].sum(1).tolist()):
            alone = model(**{key: value[row : row + 1, :length] for key, value in BATCH.items()}).logits
            assert torch.equal(together[row], alone[0])
