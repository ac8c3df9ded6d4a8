"""bind on models of many kinds: the inputs it makes up for them, what it finds, and what it asks for instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTModel,
    BartConfig,
    BartForSequenceClassification,
    BartModel,
    BeitConfig,
    BeitModel,
    BertConfig,
    BertForMultipleChoice,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DeepseekV3Config,
    DeepseekV3Model,
    EncoderDecoderModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperModel,
)

from attnpress.config import AttentionSpec
from attnpress.models.attention import NAME
from attnpress.models.binding import _warn_if_switched, attentions, bind
from attnpress.models.example import example_inputs
from attnpress.models.forward import UnsupportedModelError
from attnpress.models.watchers import Counting, watched
from attnpress.training.calibration import calibrate
from tests.models.factories import GPT

SPEC = AttentionSpec(sparsity=0.5)
ENDS: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
IMAGES: dict[str, Any] = SIZES | {"image_size": 16, "patch_size": 4}
TEXT: dict[str, Any] = SIZES | ENDS | {"vocab_size": 60, "max_position_embeddings": 20}
PAIR: dict[str, Any] = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
SOUND: dict[str, Any] = SIZES | {
    "vocab_size": 60, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

TAKEN: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "decoder without a padding token": (
        lambda: GPT2ForSequenceClassification(GPT2Config(**GPT | {"bos_token_id": 0, "eos_token_id": 2})), 2,
    ),
    "decoder with grouped keys": (lambda: LlamaForSequenceClassification(LlamaConfig(vocab_size=60, **SIZES)), 1),
    "image of two sizes": (lambda: ViTModel(ViTConfig(**IMAGES | {"image_size": (16, 8)})), 1),
    "image of one channel": (lambda: ViTModel(ViTConfig(num_channels=1, **IMAGES)), 1),
    "video": (lambda: VideoMAEModel(VideoMAEConfig(num_frames=4, tubelet_size=2, **IMAGES)), 1),
    "sound": (lambda: Wav2Vec2Model(Wav2Vec2Config(**SOUND)), 1),
    "spectrogram": (
        lambda: ASTModel(
            ASTConfig(max_length=32, num_mel_bins=16, patch_size=4, time_stride=4, frequency_stride=4, **SIZES)
        ), 1,
    ),
    "two towers": (
        lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=IMAGES, projection_dim=16)), 2,
    ),
    "choices": (lambda: BertForMultipleChoice(BertConfig(vocab_size=60, **SIZES)), 1),
    "encoder and decoder": (lambda: BartModel(BartConfig(**PAIR)), 3),
    "encoder and decoder with a classifier": (lambda: BartForSequenceClassification(BartConfig(**PAIR)), 3),
    "sound and text": (
        lambda: WhisperModel(
            WhisperConfig(num_mel_bins=8, max_source_positions=10, decoder_start_token_id=0, **PAIR | ENDS)
        ), 3,
    ),
    "models put together": (
        lambda: EncoderDecoderModel(
            encoder=BertModel(BertConfig(vocab_size=60, **SIZES)),
            decoder=BertLMHeadModel(BertConfig(vocab_size=60, is_decoder=True, add_cross_attention=True, **SIZES)),
        ), 3,
    ),
    "decoder with cross-attention": (
        lambda: BertLMHeadModel(BertConfig(vocab_size=60, is_decoder=True, add_cross_attention=True, **SIZES)), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_an_example_is_made_for_every_kind_of_input(name: str) -> None:
    make, modules = TAKEN[name]
    model = make()
    next(iter(model.parameters())).requires_grad_(False)
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    bind(model, SPEC)
    assert len(attentions(model)) == modules
    assert [parameter.requires_grad for name, parameter in model.named_parameters() if NAME not in name] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    listening = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert all(hook is _warn_if_switched for hook in listening), "nothing listens to the example any more"


@pytest.mark.parametrize("name", TAKEN)
def test_every_kind_comes_back_from_its_checkpoint_the_same(name: str, tmp_path: Path) -> None:
    model: Any = TAKEN[name][0]().eval()
    batch = first_example(model)
    calibrate(bind(model, SPEC), [batch])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in saved.items())
    with torch.no_grad():  # float32 products of the same weights at other addresses may differ in their last bits
        torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0], rtol=1e-5, atol=1e-7)
    flags = {key: state.is_cross for key, state in attentions(model).items()}
    assert {key: state.is_cross for key, state in attentions(loaded).items()} == flags


def first_example(model: PreTrainedModel) -> dict[str, Tensor]:
    """The first that bind makes which passes through a model."""
    for inputs in example_inputs(model):
        with contextlib.suppress(Exception), torch.no_grad():
            model(**inputs)
            return inputs
    raise AssertionError(type(model).__name__)


# Cross-attention.


def test_cross_attention_is_told_apart_whatever_the_lengths_are() -> None:
    for make in (BartModel, BartForSequenceClassification):
        model = bind(make(BartConfig(**PAIR)), SPEC)
        assert {name.rpartition(".")[2]: state.is_cross for name, state in attentions(model).items()} == {
            "self_attn": False, "encoder_attn": True,
        }  # fmt: skip


def test_rows_of_cross_attention_count_whether_or_not_source_and_target_are_equally_long() -> None:
    torch.manual_seed(0)
    model = bind(BartModel(BartConfig(**PAIR)).eval(), SPEC)
    (cross,) = [state for state in attentions(model).values() if state.is_cross]
    source, target = torch.randint(3, 60, (2, 6)), torch.randint(3, 60, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
    longer = batch | {
        "input_ids": torch.cat([source, torch.ones(2, 3, dtype=torch.int64)], 1),
        "attention_mask": torch.cat([mask, torch.zeros(2, 3, dtype=torch.int64)], 1),
    }
    calibrate(model, [batch])
    found = []
    for one in (batch, longer):
        counting = Counting(cross)
        with torch.no_grad(), watched([(cross, counting)]):
            model(**one)
        found.append((counting.counts.pairs.tolist(), counting.counts.rows.tolist()))
    assert found[0] == found[1] == ([6 * (6 + 3)] * 2, [12] * 2)


# What is refused.


def beit() -> PreTrainedModel:
    return BeitModel(BeitConfig(use_relative_position_bias=True, **IMAGES))


def swin() -> PreTrainedModel:
    return SwinModel(
        SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )


@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [beit, swin])
def test_a_bias_inside_the_mask_is_refused_even_while_it_is_zero(
    make: Callable[[], PreTrainedModel], frozen: bool, bias: float
) -> None:
    model = make().eval()
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.constant_(parameter, bias)
    model.requires_grad_(not frozen)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"Attention.* adds a bias to its scores by way of the .*mask"):
        bind(model, SPEC)
    assert snapshot(model) == before


def test_values_of_another_size_than_keys_are_refused() -> None:
    config = DeepseekV3Config(
        vocab_size=60, moe_intermediate_size=16, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        num_key_value_heads=2, **SIZES,
    )  # fmt: skip
    model = DeepseekV3Model(config)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="heads of 16 values in Q and K but 12 in V"):
        bind(model, SPEC)
    assert snapshot(model) == before


class Picky(GPT2ForSequenceClassification):
    """Takes an input that nobody could guess."""

    def forward(self, input_ids: Tensor | None = None, secret: Tensor | None = None, **kwargs: Any) -> Any:
        if secret is None:
            raise ValueError("the secret is missing")
        return super().forward(input_ids, **kwargs)


def test_where_no_example_can_be_made_one_is_asked_for() -> None:
    model = Picky(GPT2Config(**GPT | {"bos_token_id": 0, "eos_token_id": 2}))
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"Picky: no example .*the secret is missing.*example=\{\.\.\.\}"):
        bind(model, SPEC)
    assert snapshot(model) == before
    with pytest.raises(UnsupportedModelError, match="Picky: the example does not pass"):
        bind(model, SPEC, example={"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    tokens = torch.ones(1, 4, dtype=torch.int64)
    assert attentions(bind(model, SPEC, example={"input_ids": tokens, "secret": tokens}))


def snapshot(model: nn.Module) -> list[Any]:
    """What bind could change, as far as it can be compared."""
    known: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [(id(config), getattr(config, "_attn_implementation", None)) for config in known]
    children = [name for name, _ in model.named_modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    assert not any(name.endswith(NAME) for name in children)
    return [configs, children, attributes, grads, [module.training for module in model.modules()]]
