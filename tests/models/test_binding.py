"""Binding tiny random models: nothing compressed is the framework's own output, and its traps stay shut."""

from __future__ import annotations

import copy
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

from attnpress.config import DENSE, AttentionSpec, ConfigError, TensorSpec
from attnpress.deployment.attention import deploy
from attnpress.models.attention import NAME
from attnpress.models.binding import attentions, bind, captured_outputs, unbind
from attnpress.models.forward import UnsupportedModelError
from attnpress.models.watchers import Counting, start
from attnpress.training.calibration import calibrate
from tests.models.bound_models import PRUNED, QUANTIZED, compressed
from tests.models.factories import (
    ENDS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    MODELS,
    SIZES,
    make_batch,
    make_classifier,
    make_model,
    outputs,
)


def layers_of(name: str) -> int:
    return 1 if name == "ALBERT" else LAYERS


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


class Wrapper(nn.Module):
    """As a SentenceTransformer, an adapted model or a module of Lightning: a Transformers model inside another."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.steps = nn.Sequential(nn.Identity(), nn.ModuleDict({"auto_model": model}))

    def forward(self, **batch: Tensor) -> Tensor:
        model: Any = self.get_submodule("steps.1.auto_model")
        hidden: Tensor = model(**batch).last_hidden_state
        return hidden[:, 0]


# All or nothing, and whole wrappers.


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


def test_a_model_switched_to_another_attention_warns_and_is_neither_calibrated_nor_deployed() -> None:
    model = compressed()
    expected = outputs(model, make_batch())
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match="BertModel was switched to 'sdpa' attention after bind, so nothing is"):
        outputs(model, make_batch())
    for call in (lambda: calibrate(model, [make_batch()]), lambda: deploy(model, "reference")):
        with pytest.raises(ConfigError, match=r"switched to 'sdpa' attention after bind: call its set_attn_impl"):
            call()
    model.set_attn_implementation(NAME)
    assert torch.equal(outputs(model, make_batch()), expected)


def test_an_unbound_model_may_use_any_attention(recwarn: pytest.WarningsRecorder) -> None:
    model = unbind(compressed())
    model.set_attn_implementation("eager")
    outputs(model, make_batch())
    assert not [warning for warning in recwarn if "attention after bind" in str(warning.message)]
    assert not model._forward_pre_hooks
