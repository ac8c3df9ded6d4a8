"""Tiny models with random weights, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

VOCABULARY, PAD, HEADS, HEAD_DIM, LAYERS = 60, 1, 4, 8, 2

# Wide random weights: with the usual ones a tiny model hardly looks at its attention.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HEADS * HEAD_DIM, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": 32, "max_position_embeddings": 64,
    "initializer_range": 0.25, "pad_token_id": PAD,
}  # fmt: skip
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2}
LOCAL: dict[str, Any] = {
    "local_attention": 4, "layer_types": ["full_attention", "sliding_attention"], "cls_token_id": 0, "sep_token_id": 2,
}  # fmt: skip
DISTIL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "dim": HEADS * HEAD_DIM, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 32,
    "max_position_embeddings": 64, "initializer_range": 0.25, "pad_token_id": PAD,
}  # fmt: skip
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": HEADS * HEAD_DIM, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
    "initializer_range": 0.25,
}  # fmt: skip

ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "BERT": lambda: BertModel(BertConfig(**SIZES)),
    "RoBERTa": lambda: RobertaModel(RobertaConfig(**ENDS | SIZES)),
    "DistilBERT": lambda: DistilBertModel(DistilBertConfig(**DISTIL)),
    "ELECTRA": lambda: ElectraModel(ElectraConfig(embedding_size=16, **SIZES)),
    "ALBERT": lambda: AlbertModel(AlbertConfig(embedding_size=16, **ENDS | SIZES)),
    "ModernBERT": lambda: ModernBertModel(ModernBertConfig(**LOCAL | ENDS | SIZES)),
}
DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "GPT-2": lambda: GPT2Model(GPT2Config(**GPT | ENDS)),
    "Llama": lambda: LlamaModel(LlamaConfig(num_key_value_heads=2, **ENDS | SIZES)),
}
IMAGE_SIZES = {name: SIZES[name] for name in SIZES if name.startswith(("hidden", "num", "inter", "init"))}
MODELS = ENCODERS | DECODERS | {"ViT": lambda: ViTModel(ViTConfig(image_size=8, patch_size=2, **IMAGE_SIZES))}


def make_model(name: str = "BERT", seed: int = 0) -> PreTrainedModel:
    """A tiny model in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    model.eval()
    return model


def make_classifier(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A tiny BERT with a classification head."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**SIZES, **config))
    model.eval()
    return model


def as_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself, converted; `PreTrainedModel.to` is published without usable types."""
    nn.Module.to(model, dtype)
    return model


def make_batch(name: str = "BERT", lengths: Sequence[int] = (9, 5, 1), seed: int = 0) -> dict[str, Tensor]:
    """Random inputs, padded at the end (decoders: at the beginning, where a causal mask does not hide it already)."""
    generator = torch.Generator().manual_seed(seed)
    if name == "ViT":
        return {"pixel_values": torch.randn(len(lengths), 3, 8, 8, generator=generator)}
    real = torch.arange(max(lengths)) < torch.tensor(lengths).view(-1, 1)
    if name in DECODERS:
        real = real.flip(1)
    tokens = torch.randint(3, VOCABULARY, real.shape, generator=generator)
    return {"input_ids": torch.where(real, tokens, PAD), "attention_mask": real.long()}


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states [B, S, D] of the last layer."""
    with torch.no_grad():
        hidden: Tensor = model(**batch).last_hidden_state
    return hidden


def real_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states of real tokens only [tokens, D]."""
    hidden = outputs(model, batch)
    return hidden[batch["attention_mask"].bool()] if "attention_mask" in batch else hidden.flatten(0, 1)
