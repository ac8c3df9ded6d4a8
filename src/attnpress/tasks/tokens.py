"""Tokenize texts into at least one token each, since a model cannot process a row of length zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnpress.tasks.lines import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = dict[str, list[list[int]]]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], max_length: int) -> Encoded:
    """Token ids of texts or pairs of texts, unpadded, with the other inputs of the model.

    A text without tokens (an empty one, if the tokenizer adds no [CLS] or similar) is replaced by `stand_in`, and is
    then trained on, evaluated and answered like any other.

    Args:
        texts: one or two columns of equal length.
        max_length: longer inputs are truncated.

    Raises:
        TaskError: a row has no tokens, and the tokenizer has no special token to replace it with.
    """
    found: Any = tokenizer(*([*column] for column in texts), truncation=True, max_length=max_length)
    encoded: Encoded = dict(found)
    empty = [row for row, ids in enumerate(encoded["input_ids"]) if not ids]
    if empty:
        values = {"input_ids": stand_in(tokenizer), "attention_mask": 1}
        for key, rows in encoded.items():
            for row in empty:
                rows[row] = [values.get(key, 0)]
    return encoded


def stand_in(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token for an input without tokens: the first that marks a beginning or an end, else the unknown token.

    A token that is not also the padding token is preferred, since models that look for the last real token skip
    padding.

    Raises:
        TaskError: the tokenizer has no such token.
    """
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    known: list[int] = [
        token for token in (*named, tokenizer.unk_token_id, tokenizer.pad_token_id) if token is not None
    ]
    if not known:
        raise TaskError("model: its tokenizer makes no token of an empty text, and has no special one; set bos_token")
    return next((token for token in known if token != tokenizer.pad_token_id), known[0])
