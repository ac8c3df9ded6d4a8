"""Encoders on the real tokens of a batch alone: the same outputs as with padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from attnpress.deployment.attention import deploy, undeploy
from attnpress.models.binding import attentions, bind, unbind
from attnpress.training.calibration import calibrate, watching
from tests.deployment.int8_models import BACKENDS, BATCH, BATCHES, FAMILY, PRUNED, compressed, hidden, ragged, real
from tests.models.factories import make_model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILY)
def test_without_padding_real_tokens_get_the_same(name: str, backend: str) -> None:
    model = compressed(name)
    expected = hidden(deploy(model, backend))
    found = hidden(deploy(model, backend, padding="skip"))
    assert torch.allclose(real(found), real(expected), rtol=1e-4, atol=1e-4)
    assert not found[~BATCH["attention_mask"].bool()].any()
    assert torch.equal(hidden(deploy(model, backend)), expected), "padding is back"


def test_only_real_tokens_reach_the_layers() -> None:
    model: Any = deploy(compressed(), "reference", padding="skip")
    seen: list[tuple[int, ...]] = []
    layer = model.encoder.layer[1]
    layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    hidden(model)
    hidden(model, ragged(6, 6))
    assert seen == [(1, 33), (2, 6)], "a batch without padding stays as it is"


def test_each_row_gets_what_it_gets_alone() -> None:
    model = deploy(compressed(), "reference", padding="skip")
    together = hidden(model)
    for row, length in enumerate(BATCH["attention_mask"].sum(1).tolist()):
        alone = hidden(model, {key: value[row : row + 1, :length] for key, value in BATCH.items()})
        assert torch.allclose(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_hidden_states_of_all_layers_are_those_of_the_padded_batch(how: str) -> None:
    model = compressed()
    if how == "configuration":
        model.config.output_hidden_states = True
    options = {"output_hidden_states": True} if how == "argument" else {}
    with torch.no_grad():
        expected = deploy(model, "reference")(**BATCH, **options).hidden_states
        found = deploy(model, "reference", padding="skip")(**BATCH, **options).hidden_states
    assert len(found) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_statistics_see_the_padded_batch() -> None:
    def pairs(model: PreTrainedModel) -> float:
        with watching(attentions(model).values(), slice(None)):
            hidden(model)
        return sum(float(state.take_seen(0.0)[1]) for state in attentions(model).values())

    model = compressed()
    expected = sum(length**2 for length in (3, 11, 7, 1, 11)) * 2 * 4
    assert pairs(deploy(model, "reference", padding="skip")) == pairs(undeploy(model)) == expected


def test_masks_of_pairs_keep_their_padding() -> None:
    model = compressed()
    batch = {**BATCH, "attention_mask": torch.ones(5, 1, 11, 11).tril().bool()}
    expected = hidden(deploy(model, "reference"), batch)
    assert torch.equal(hidden(deploy(model, "reference", padding="skip"), batch), expected)


def test_a_failed_call_leaves_nothing_behind() -> None:
    model = deploy(compressed(), "reference", padding="skip")
    expected = hidden(model)
    handle = model.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden(model)
    handle.remove()
    full = ragged(6, 6)
    assert torch.equal(hidden(model, full), hidden(deploy(compressed(), "reference"), full))
    assert torch.equal(hidden(model), expected)


@pytest.mark.parametrize("name", ["BERT", "ModernBERT"])
def test_unbinding_brings_padding_back(name: str) -> None:
    model = deploy(compressed(name), "reference", padding="skip")
    assert torch.equal(real(hidden(unbind(model))), real(hidden(make_model(name))))


def test_binding_anew_brings_padding_back() -> None:
    model = deploy(compressed(), "reference", padding="skip")
    calibrate(bind(model, PRUNED), BATCHES)
    assert torch.equal(hidden(model), hidden(compressed()))


@pytest.mark.filterwarnings("ignore:.*set_attn_implementation")
def test_another_attention_gets_the_padded_batch() -> None:
    model = deploy(compressed(), "reference", padding="skip")
    model.set_attn_implementation("sdpa")
    assert torch.allclose(real(hidden(model)), real(hidden(make_model())), atol=1e-5)
