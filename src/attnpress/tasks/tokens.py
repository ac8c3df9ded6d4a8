"""From texts to tokens, with at least one for each: a model cannot be asked about a row of length zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnpress.tasks.lines import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = dict[str, list[list[int]]]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], max_length: int) -> Encoded:
    """Token ids of texts or pairs of texts, unpadded, with what else the model's input has.

    A text without tokens (an empty one, where the tokenizer adds no [CLS] or such) becomes `stand_in`, so that it is
    trained on, evaluated and answered as any other.

    Args:
        texts: one or two columns of equal length.
        max_length: longer inputs are cut.

    Raises:
        TaskError: a row has no tokens, and the tokenizer has no special token to stand in for it.
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
    """The token that an input without tokens becomes: the first that marks a beginning or an end; else the unknown.

    A token of its own is preferred to one that also pads: models that look for the last real token pass over those.

    Raises:
        TaskError: the tokenizer has none.
    """
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    known: list[int] = [
        token for token in (*named, tokenizer.unk_token_id, tokenizer.pad_token_id) if token is not None
    ]
    if not known:
        raise TaskError("model: its tokenizer makes no token of an empty text, and has no special one; set bos_token")
    return next((token for token in known if token != tokenizer.pad_token_id), known[0])
