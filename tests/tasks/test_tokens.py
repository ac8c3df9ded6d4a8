"""Texts into tokens: at least one for each text, whatever the tokenizer adds."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnpress.tasks import TaskError
from attnpress.tasks.tokens import encode, stand_in

WORDS = ["[PAD]", "[UNK]", "[END]", "good", "film"]


def bare(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer that adds no token of its own, as GPT-2's."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def test_a_text_without_tokens_becomes_one_token() -> None:
    tokenizer = bare(pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")
    found = encode(tokenizer, [["good film", "", "  \t", "film"]], 8)
    assert found["input_ids"] == [[3, 4], [2], [2], [4]]
    assert found["attention_mask"] == [[1, 1], [1], [1], [1]]
    assert encode(tokenizer, [["", "good"], ["", ""]], 8)["input_ids"] == [[2], [3]]
    assert encode(tokenizer, [[""]], 8)["input_ids"] == [[2]]


def test_a_token_that_does_not_pad_is_preferred() -> None:
    assert stand_in(bare(pad_token="[END]", eos_token="[END]", unk_token="[UNK]")) == 1
    assert stand_in(bare(pad_token="[PAD]")) == 0
    with pytest.raises(TaskError, match="makes no token of an empty text"):
        stand_in(bare())
