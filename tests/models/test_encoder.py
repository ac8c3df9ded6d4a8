"""Encoders without padding: what is packed, and when not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from attnpress.models.encoder import find_encoder, padding_alone, products
from tests.models.factories import HEADS, MODELS, SIZES, make_model

REAL = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
FAMILY = ("BERT", "RoBERTa", "ELECTRA")
MIN = torch.finfo(torch.float32).min


def as_mask(valid: Tensor) -> Tensor:
    return torch.zeros(valid.shape).masked_fill(~valid, MIN)


@pytest.mark.parametrize("name", MODELS)
def test_only_encoders_of_the_bert_family_are_found(name: str) -> None:
    encoder = find_encoder(make_model(name))
    assert (encoder is not None) == (name in FAMILY)
    if encoder is not None:
        names = {product: [layer.in_features for layer in layers] for product, layers in products(encoder)}
        width = SIZES["hidden_size"]
        expected = {"qkv": [width] * 3, "attention": [width], "up": [width], "down": [SIZES["intermediate_size"]]}
        assert names == {f"{layer}.{kind}": sizes for layer in range(2) for kind, sizes in expected.items()}


def test_decoders_of_the_family_are_left_alone() -> None:
    config = BertConfig(is_decoder=True, add_cross_attention=True, **SIZES | {"num_attention_heads": HEADS})
    assert find_encoder(BertModel(config)) is None


@pytest.mark.parametrize("valid", [REAL[:, None, :].expand(3, 4, 4), REAL[:, None, :] & REAL[:, :, None]])
def test_a_mask_of_padding_tells_the_real_tokens(valid: Tensor) -> None:
    for mask in (valid.unsqueeze(1), as_mask(valid.unsqueeze(1))):
        found = padding_alone(mask, 3, 4)
        assert found is not None
        assert torch.equal(found, REAL)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, 4, 4).tril().bool(),
        torch.ones(3, 1, 4, 4).bool(),
        torch.zeros(3, 1, 4, 4).bool(),
        torch.ones(3, 2, 4, 4).bool(),
        torch.ones(3, 1, 1, 4).bool(),
        as_mask(REAL[:, None, None, :].expand(3, 1, 4, 4)).clamp(min=-3.0),
        (torch.arange(4) - torch.arange(4).view(4, 1)).abs().le(1).view(1, 1, 4, 4),
    ],
    ids=["causal", "nothing to pack", "no token", "by head", "one row", "a bias", "window"],
)
def test_masks_that_say_more_than_padding_keep_it(mask: Tensor) -> None:
    assert padding_alone(mask, 3, 4) is None
