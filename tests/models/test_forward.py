"""The attention of a bound model: exact where nothing is compressed, with the masks and weights of the framework."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from attnpress.config import DENSE, AttentionSpec
from attnpress.core.call import AttentionCall
from attnpress.core.probe import probe
from attnpress.deployment.attention import deploy
from attnpress.models.binding import bind, probed
from attnpress.models.forward import eager_function, real_rows, valid_pairs
from attnpress.training.calibration import calibrate
from tests.models.bound_models import PRUNED, QUANTIZED, WITH_PADDING, compressed
from tests.models.factories import (
    DECODERS,
    ENCODERS,
    LAYERS,
    MODELS,
    make_batch,
    make_model,
    outputs,
    real_tokens,
)

# Nothing compressed.


@pytest.mark.parametrize("lengths", [(9, 5, 1), (6, 6)], ids=["padded", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_compressed_is_the_framework_s_own_eager_output(name: str, lengths: tuple[int, ...]) -> None:
    model, batch = make_model(name), make_batch(name, lengths)
    model.set_attn_implementation("eager")
    eager = [outputs(model, batch) for _ in range(3)]
    # Where eager itself repeats bit for bit, so must we; else within what it differs by from run to run.
    spread = max(float((one - eager[0]).abs().max()) for one in eager)
    bind(model, DENSE)
    assert float((outputs(model, batch) - eager[0]).abs().max()) <= 2 * spread


@pytest.mark.parametrize("name", MODELS)
def test_nothing_compressed_trains_as_the_framework_does(name: str) -> None:
    model, batch = make_model(name), make_batch(name)
    model.set_attn_implementation("eager")
    gradients = []
    for bound in (False, True):
        model = bind(model, DENSE) if bound else model
        model.zero_grad()
        model(**batch).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_stay_close_to_the_dense_output(name: str) -> None:
    model, batch = make_model(name), make_batch(name)
    dense = real_tokens(model, batch)
    bind(model, QUANTIZED)
    calibrate(model, [batch])
    found = real_tokens(model, batch)
    assert float(torch.cosine_similarity(found.flatten(), dense.flatten(), 0)) > 0.995
    assert not torch.equal(found, dense), "something was quantized"


# Traps of the framework.


@pytest.mark.parametrize("spec", [DENSE, PRUNED], ids=["dense", "compressed"])
@pytest.mark.parametrize("name", WITH_PADDING)
def test_padding_is_not_attended_to(name: str, spec: AttentionSpec) -> None:
    model = compressed(name, spec)
    batch = make_batch(name)
    filled = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    unmasked = filled | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    real = batch["attention_mask"].bool()
    assert torch.equal(outputs(model, filled)[real], outputs(model, batch)[real]), "whatever the padding holds"
    assert not torch.equal(outputs(model, unmasked)[real], outputs(model, batch)[real]), "or the test would be blind"


@pytest.mark.parametrize("name", ENCODERS)
def test_the_amount_of_padding_does_not_matter(name: str) -> None:
    model = compressed(name)
    batch, longer = make_batch(name, (6, 4)), make_batch(name, (6, 4, 15))
    for key, value in batch.items():
        longer[key][:2, :6] = value
    # Linear layers round differently in other shapes, which may tip a code; a leak would show in every token.
    errors = (outputs(model, longer)[:2, :6] - outputs(model, batch)).abs()[batch["attention_mask"].bool()].amax(-1)
    assert float(errors.median()) < 1e-4


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("spec", [DENSE, PRUNED], ids=["dense", "compressed"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_causal_models_stay_causal(name: str, spec: AttentionSpec, masked: bool) -> None:
    model, batch = compressed(name, spec), make_batch(name, (8, 8))
    if not masked:
        del batch["attention_mask"]
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 5:] = 9
    before, after = outputs(model, batch), outputs(model, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_look_both_ways_with_and_without_a_mask(name: str) -> None:
    model, batch = compressed(name), make_batch(name, (8, 8))
    bare = {"input_ids": batch["input_ids"]}
    assert torch.equal(outputs(model, bare), outputs(model, batch))
    changed = {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, -1] = 9
    assert not torch.equal(outputs(model, changed)[:, 0], outputs(model, bare)[:, 0])


@pytest.mark.parametrize("name", DECODERS)
def test_a_cached_continuation_is_the_whole_sequence(name: str) -> None:
    model = bind(make_model(name), QUANTIZED)
    calibrate(model, [make_batch(name, (8, 8))])
    tokens = make_batch(name, (8, 8))["input_ids"]
    with torch.no_grad():
        first = model(input_ids=tokens[:, :5], use_cache=True)
        steps = [model(input_ids=tokens[:, 5:6], past_key_values=first.past_key_values, use_cache=True)]
        steps.append(model(input_ids=tokens[:, 6:], past_key_values=steps[0].past_key_values, use_cache=True))
    found = torch.cat([step.last_hidden_state for step in steps], 1)
    errors = (found - outputs(model, {"input_ids": tokens})[:, 5:]).abs().amax(-1)
    assert float(errors.median()) < 1e-4


LOWEST = torch.finfo(torch.float32).min


class Causal(nn.Module):
    is_causal = True


def heads(rows: int, batch: int = 1) -> Tensor:
    return torch.zeros(batch, 2, rows, 4)


# Masks.


@pytest.mark.parametrize("blocked", [LOWEST, -math.inf, 2 * LOWEST])
def test_additive_masks_become_boolean(blocked: float) -> None:
    mask = torch.tensor([[[[0.0, blocked, 0.0, blocked]]]])
    found = valid_pairs(nn.Module(), heads(3), heads(3), mask)
    assert found is not None
    assert found.tolist() == [[[[True, False, True]]]], "and lose the columns of keys that are not there yet"


def test_boolean_masks_are_taken_as_they_are() -> None:
    mask = torch.tensor([[[[True, False, True]]]])
    found = valid_pairs(nn.Module(), heads(3), heads(3), mask)
    assert found is not None
    assert torch.equal(found, mask)


@pytest.mark.parametrize("bias", [-1.0, 0.5, -1e30])
def test_a_bias_in_the_mask_is_refused(bias: float) -> None:
    with pytest.raises(ValueError, match="adds a bias to the scores"):
        valid_pairs(nn.Module(), heads(2), heads(2), torch.tensor([[[[0.0, bias]]]]))


def test_without_a_mask_all_pairs_are_valid_unless_the_module_is_causal() -> None:
    assert valid_pairs(nn.Module(), heads(3), heads(3), None) is None
    assert valid_pairs(Causal(), heads(1), heads(3), None) is None, "the newest token sees all"
    found = valid_pairs(Causal(), heads(2), heads(3), None)
    assert found is not None
    assert found.tolist() == [[[[True, True, False], [True, True, True]]]]


def test_a_row_is_real_if_its_own_token_is() -> None:
    valid = torch.tensor([[True, True, False], [True, True, True]]).view(2, 1, 1, 3)
    found = real_rows(nn.Module(), heads(3, 2), heads(3, 2), valid)
    assert found is not None
    assert found.squeeze().tolist() == [[True, True, False], [True, True, True]]
    assert real_rows(nn.Module(), heads(3), heads(3), None) is None
    assert real_rows(nn.Module(), heads(2), heads(3), valid) is None, "queries of other tokens than the keys"
    newest = real_rows(Causal(), heads(1, 2), heads(3, 2), valid)
    assert newest is not None
    assert newest.flatten().tolist() == [False, True]


class OwnAttention(BertSelfAttention):
    """As a user derives one in a file of their own, which has no eager function."""


# Eager functions, and weights.


def test_a_class_derived_elsewhere_is_run_as_the_class_it_derives_from() -> None:
    model, batch = make_model(), make_batch()
    model.set_attn_implementation("eager")
    expected = outputs(model, batch)
    for module in model.modules():
        if isinstance(module, BertSelfAttention):
            module.__class__ = OwnAttention
    assert torch.equal(outputs(bind(model, DENSE), batch), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_a_class_derived_from_none_gets_the_usual_formula(kv_heads: int, masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 8)
    valid = torch.rand(2, 1, 5, 7) > 0.4 if masked else None
    mask = None if valid is None else torch.where(valid, 0.0, torch.finfo(torch.float32).min)
    function = eager_function(nn.Identity())
    output, weights = function(nn.Identity(), query, key, value, mask, scaling=0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, wanted.transpose(1, 2))
    assert weights is not None
    assert weights.shape == (2, 4, 5, 7)


@pytest.mark.parametrize("name", MODELS)
def test_attention_weights_are_given_where_they_are_asked_for(name: str) -> None:
    model, batch = compressed(name), make_batch(name)
    plain = outputs(model, batch)
    calls: list[AttentionCall] = []
    with torch.no_grad(), probed(model, lambda _, state, call: calls.append(call)):
        found = model(**batch, output_attentions=True)
    assert torch.equal(found.last_hidden_state, plain)
    assert len(found.attentions) == LAYERS
    for weights, call in zip(found.attentions, calls, strict=True):
        wanted = probe(call).after
        torch.testing.assert_close(weights, wanted)
        assert bool((weights == 0).any()), "pruned ones among them"


def test_attention_weights_of_a_deployed_model_are_those_of_the_trained_one() -> None:
    model, batch = compressed(), make_batch()
    with torch.no_grad():
        wanted = model(**batch, output_attentions=True).attentions
        found = deploy(model, "reference", padding="skip")(**batch, output_attentions=True).attentions
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_outputs_may_be_tuples() -> None:
    model, batch = make_model(), make_batch()
    model.config.return_dict = False
    calibrate(bind(model, PRUNED), [batch])
    with torch.no_grad():
        found = model(**batch)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], outputs_of_twin(batch))


def outputs_of_twin(batch: dict[str, Tensor]) -> Tensor:
    model = bind(make_model(), PRUNED)
    calibrate(model, [batch])
    return outputs(model, batch)
