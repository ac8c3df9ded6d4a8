"""Binding tiny random models: nothing compressed is the framework's own output, and its traps stay shut."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    Gemma2Config,
    Gemma2Model,
    GptOssConfig,
    GptOssModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.bert.modeling_bert import BertSelfAttention

from attnpress.config import DENSE, AttentionSpec, ProbsSpec, TensorSpec
from attnpress.core.call import AttentionCall
from attnpress.core.probe import probe
from attnpress.deployment.attention import deploy
from attnpress.models.attention import NAME
from attnpress.models.binding import attentions, bind, captured_outputs, probed, unbind
from attnpress.models.forward import UnsupportedModelError, attention_forward, eager_function, real_rows, valid_pairs
from attnpress.models.watchers import Counting, Fitting, Observing, start, watched
from attnpress.training.calibration import calibrate
from tests.models.factories import (
    DECODERS,
    ENCODERS,
    ENDS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    MODELS,
    SIZES,
    as_dtype,
    make_batch,
    make_classifier,
    make_model,
    outputs,
    real_tokens,
)

PRUNED = AttentionSpec(sparsity=0.5)
QUANTIZED = AttentionSpec()
WITH_PADDING = [*ENCODERS, *DECODERS]


def compressed(name: str = "BERT", spec: AttentionSpec = PRUNED) -> PreTrainedModel:
    model = bind(make_model(name), spec)
    calibrate(model, [make_batch(name, seed=5), make_batch(name, lengths=(7, 7), seed=6)])
    return model


def layers_of(name: str) -> int:
    return 1 if name == "ALBERT" else LAYERS


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


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_module_gets_one_state_of_its_own(name: str) -> None:
    model = compressed(name)
    states = attentions(model)
    assert len(states) == len({id(state) for state in states.values()}) == layers_of(name)
    for key, state in states.items():
        assert model.get_submodule(f"{key}.{NAME}") is state
        assert (state.heads, state.head_dim) == (HEADS, HEAD_DIM)
    scales = {float(state.q_scale.flatten()[0]) for state in states.values()}
    assert len(scales) == layers_of(name), "calibrated apart, though layer_idx is None in some models"


def test_layers_of_a_shared_module_all_pass_through_its_one_state() -> None:
    model, batch = compressed("ALBERT"), make_batch("ALBERT")
    (state,) = attentions(model).values()
    counting = start(state, Counting(state))
    outputs(model, batch)
    pairs = sum(length**2 for length in (9, 5, 1))
    assert counting.counts.pairs.tolist() == [LAYERS * pairs] * HEADS


def test_grouped_keys_and_values_have_scales_of_their_own() -> None:
    model = compressed("Llama")
    for state in attentions(model).values():
        assert (state.heads, state.kv_heads) == (HEADS, 2)
        assert (state.q_scale.shape[1], state.k_scale.shape[1], state.v_scale.shape[1]) == (HEADS, 2, 2)


def test_models_that_share_a_configuration_do_not_share_the_binding() -> None:
    one = make_model()
    torch.manual_seed(1)
    other = type(one)(one.config)
    other.eval()
    assert other.config is one.config
    before = other.config._attn_implementation
    expected = outputs(other, make_batch())
    bind(one, PRUNED)
    assert (one.config._attn_implementation, other.config._attn_implementation) == (NAME, before)
    assert torch.equal(outputs(other, make_batch()), expected)
    assert not attentions(other)


def test_a_model_made_from_the_configuration_of_a_bound_one_says_so() -> None:
    bound = bind(make_model(), PRUNED)
    stranger = type(bound)(bound.config)
    with pytest.raises(RuntimeError, match="never bound: call bind"):
        outputs(stranger, make_batch())
    assert attentions(bind(stranger, DENSE)), "and binding it is the mend"


GROUPED = SIZES | ENDS | {"num_key_value_heads": 2, "head_dim": HEAD_DIM}
BIASED: dict[str, Any] = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}

REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "MPNetModel": lambda: MPNetModel(MPNetConfig(**SIZES)),
    "DebertaV2Model": lambda: DebertaV2Model(DebertaV2Config(**SIZES)),
    "T5Attention": lambda: T5EncoderModel(T5Config(**BIASED)),
    "Gemma2Attention": lambda: Gemma2Model(Gemma2Config(**GROUPED)),
    "GptOssAttention": lambda: GptOssModel(GptOssConfig(**GROUPED | EXPERTS)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("spec", [DENSE, PRUNED], ids=["dense", "compressed"])
def test_a_model_that_cannot_be_compressed_is_refused_by_name_and_left_as_it_was(
    name: str, spec: AttentionSpec
) -> None:
    torch.manual_seed(0)
    model = REFUSED[name]()
    model.eval()
    batch = {"input_ids": torch.arange(10).view(2, 5) + 3}
    implementation, expected = model.config._attn_implementation, outputs(model, batch)
    with pytest.raises(UnsupportedModelError, match=name):
        bind(model, spec)
    assert model.config._attn_implementation == implementation
    assert not attentions(model)
    assert torch.equal(outputs(model, batch), expected)


@pytest.mark.parametrize("spec", [DENSE, PRUNED], ids=["dense", "compressed"])
def test_heads_whose_scores_float32_cannot_hold_are_refused(spec: AttentionSpec) -> None:
    def wide(size: int) -> PreTrainedModel:
        return BertModel(BertConfig(**SIZES | {"hidden_size": size, "num_attention_heads": 1, "num_hidden_layers": 1}))

    assert attentions(bind(wide(512), spec))
    model = wide(516)
    with pytest.raises(UnsupportedModelError, match=r"encoder\.layer\.0\.attention\.self: head size 516; .* up to 512"):
        bind(model, spec)
    assert model.config._attn_implementation != "attnpress"
    assert not attentions(model)


# Binding and unbinding.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_unbinding_restores_the_model(name: str, implementation: str) -> None:
    model, batch = make_model(name), make_batch(name)
    model.set_attn_implementation(implementation)
    expected, names = outputs(model, batch), set(model.state_dict())
    bind(model, PRUNED)
    calibrate(model, [batch])
    assert unbind(model) is model
    assert model.config._attn_implementation == implementation
    assert set(model.state_dict()) == names
    torch.testing.assert_close(outputs(model, batch), expected, rtol=1e-6, atol=1e-6)


def test_unbinding_an_unbound_model_changes_nothing() -> None:
    model = make_model()
    config = model.config
    assert unbind(model).config is config


def test_binding_anew_replaces_the_state_and_still_remembers_the_first_implementation() -> None:
    model = make_model()
    implementation = model.config._attn_implementation
    bind(bind(model, PRUNED), QUANTIZED)
    assert [state.spec for state in attentions(model).values()] == [QUANTIZED] * LAYERS
    assert unbind(model).config._attn_implementation == implementation


def test_binding_keeps_the_mode_of_the_model() -> None:
    for training in (True, False):
        model = bind(make_model().train(training), PRUNED)
        assert {module.training for module in model.modules()} == {training}


def test_binding_leaves_the_random_state_alone() -> None:
    model = make_model().train()
    before = torch.get_rng_state()
    bind(model, PRUNED)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_copy_of_a_bound_model_is_independent() -> None:
    model = compressed()
    twin = copy.deepcopy(model)
    expected = outputs(model, make_batch())
    assert torch.equal(outputs(twin, make_batch()), expected)
    unbind(twin)
    assert torch.equal(outputs(model, make_batch()), expected)


def test_a_bound_model_saves_scales_and_thresholds_with_its_weights() -> None:
    learned = TensorSpec(learned=True)
    model = bind(make_model(), AttentionSpec(k=learned, sparsity=0.5))
    names = {name for name in model.state_dict() if f".{NAME}." in name}
    module = "encoder.layer.0.attention.self.attnpress."
    expected = {module + name for name in ("q_scale", "k_scale", "v_scale", "cutoff", "histogram", "_extra_state")}
    assert {name for name in names if ".0." in name} == expected
    parameters = {name for name, _ in model.named_parameters() if NAME in name}
    assert parameters == {name for name in names if name.endswith("k_scale")}


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


# Attention outputs for a teacher.


@pytest.mark.parametrize("spec", [DENSE, PRUNED], ids=["dense", "compressed"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_outputs_are_captured_in_the_order_of_the_layers(name: str, spec: AttentionSpec) -> None:
    model, batch = compressed(name, spec), make_batch(name)
    seen: list[Tensor] = []
    hooks = [
        model.get_submodule(key).register_forward_pre_hook(lambda module, *_: seen.append(torch.tensor(id(module))))
        for key in attentions(model)
    ]
    with captured_outputs(model) as captured:
        found = outputs(model, batch)
    for hook in hooks:
        hook.remove()
    assert len(captured) == len(seen) == LAYERS
    shape = (*found.shape[:2], HEADS, HEAD_DIM)
    assert all(output.shape == shape for output in captured)
    outputs(model, batch)
    assert len(captured) == LAYERS, "nothing is captured after the block"


def test_captured_outputs_carry_gradients() -> None:
    model = compressed()
    with captured_outputs(model) as captured:
        model(**make_batch())
    captured[0].square().sum().backward()
    weight = model.get_parameter("encoder.layer.0.attention.self.query.weight")
    assert weight.grad is not None
    assert bool(weight.grad.any())


def test_capturing_stops_when_the_block_fails() -> None:
    model = compressed()
    with pytest.raises(ZeroDivisionError), captured_outputs(model):
        raise ZeroDivisionError
    assert all(not state.watchers for state in attentions(model).values())


# Masks.

LOWEST = torch.finfo(torch.float32).min


class Causal(nn.Module):
    is_causal = True


def heads(rows: int, batch: int = 1) -> Tensor:
    return torch.zeros(batch, 2, rows, 4)


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


# All or nothing, and whole wrappers.


class Wrapper(nn.Module):
    """As a SentenceTransformer, an adapted model or a module of Lightning: a Transformers model inside another."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.steps = nn.Sequential(nn.Identity(), nn.ModuleDict({"auto_model": model}))

    def forward(self, **batch: Tensor) -> Tensor:
        model: Any = self.get_submodule("steps.1.auto_model")
        hidden: Tensor = model(**batch).last_hidden_state
        return hidden[:, 0]


def test_a_module_that_holds_a_transformers_model_may_be_given_whole() -> None:
    model, twin, batch = Wrapper(make_model()), compressed("BERT", QUANTIZED), make_batch()
    assert bind(model, QUANTIZED) is model
    assert next(iter(attentions(model))) == "steps.1.auto_model.encoder.layer.0.attention.self"
    calibrate(model, [make_batch("BERT", seed=5), make_batch("BERT", lengths=(7, 7), seed=6)])
    with torch.no_grad():
        assert torch.equal(model(**batch), outputs(twin, batch)[:, 0])
    assert not attentions(unbind(model))


def test_layers_of_several_models_are_counted_through() -> None:
    model = nn.ModuleList([make_model(), make_model("ViT")])
    bind(model, QUANTIZED, {str(LAYERS): PRUNED})
    assert [state.spec for state in attentions(model).values()] == [*[QUANTIZED] * LAYERS, PRUNED, QUANTIZED]


def test_what_holds_no_transformers_model_is_refused_with_what_to_pass() -> None:
    class Pipeline:
        model = nn.Linear(2, 2)

    with pytest.raises(UnsupportedModelError, match=r"Linear is not a Transformers model and holds none"):
        bind(nn.Linear(2, 2), QUANTIZED)
    with pytest.raises(UnsupportedModelError, match=r"Pipeline .*for example its \.model"):
        bind(Pipeline(), QUANTIZED)  # type: ignore[type-var]


@pytest.mark.parametrize("wrong", ["layers", "second model"])
def test_a_failed_bind_leaves_a_bound_model_bound_as_it_was(wrong: str) -> None:
    whole = nn.ModuleList([compressed(), REFUSED["MPNetModel"]()]) if wrong == "second model" else compressed()
    model: Any = whole[0] if isinstance(whole, nn.ModuleList) else whole
    states, config, quantizer = attentions(model), model.config, model.hf_quantizer
    expected = outputs(model, make_batch())
    with pytest.raises(ValueError, match=r"no such attention module|MPNetModel"):
        bind(whole, QUANTIZED, {"99": PRUNED})
    assert attentions(model) == states
    assert (model.config, model.hf_quantizer) == (config, quantizer)
    assert torch.equal(outputs(model, make_batch()), expected)


def test_binding_the_whole_unbinds_its_part_first() -> None:
    model = make_classifier()
    implementation = model.config._attn_implementation
    bind(model.get_submodule("bert"), PRUNED)
    bind(model, QUANTIZED)
    assert [state.spec for state in attentions(model).values()] == [QUANTIZED] * LAYERS
    assert unbind(model).config._attn_implementation == implementation
    body: Any = model.get_submodule("bert")
    assert body.config._attn_implementation == implementation


def test_frozen_parts_keep_their_mode() -> None:
    model = make_model().train()
    model.get_submodule("embeddings").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    bind(model, PRUNED)
    assert {name: module.training for name, module in model.named_modules() if NAME not in name} == modes


# Eager functions, and weights.


class OwnAttention(BertSelfAttention):
    """As a user derives one in a file of their own, which has no eager function."""


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
