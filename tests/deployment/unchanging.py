"""What a deployed int8 encoder gives, as hashes: for tests here, and by `python -m` in a process held to a target.

Weights and scales are made from integers, so that they are the same bits on every machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from attnpress.config import AttentionSpec
from attnpress.core.linear import Bits, ProductPlan
from attnpress.deployment.attention import deploy
from attnpress.kernels import cpu
from attnpress.kernels.linear import multiplication
from attnpress.models.binding import attentions, bind
from attnpress.models.encoder import entries, find_encoder, set_plan

HASHES: dict[str, str] = {
    "BERT, 7 bits": "d3fb7b418de3c175e521d80505f73013e3ebbe3474fa647b75ddea546b1fccb5",
    "RoBERTa, 7 bits": "0f72a1323a628ddc051d2a7a4f8b6c36917924f6bcf8dbf98a8a2542aaf82925",
    "ELECTRA, 7 bits": "7c02d97f00cf542cc72f055e35419fccc977a18e3a6ee72743d03cc083a76885",
    "BERT, 8 bits": "6e0a44147be22d1ea6f91d2aafb69cd739c42fae301da465d2109e943b771f78",
}
"""Of every machine; docs/never_changes.md has the same."""

VOCABULARY, PAD, TEXTS, LONGEST, LABELS = 120, 1, 64, 40, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 168, "max_position_embeddings": 520, "type_vocab_size": 2, "pad_token_id": PAD,
    "bos_token_id": 0, "eos_token_id": 2, "num_labels": LABELS,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "BERT": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "RoBERTa": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
    "ELECTRA": lambda: ElectraForSequenceClassification(ElectraConfig(embedding_size=40, **SIZES)),
}


def integers(count: int, seed: int) -> Tensor:
    """The same numbers from -128 to 127 on every machine: a multiplicative hash of their places."""
    places = torch.arange(count, dtype=torch.int64) + seed * 1_000_003
    mixed = (places * 2_654_435_761 % 2**32) ^ (places * 40_503 % 2**16)
    return (mixed * 2_246_822_519 % 2**32 >> 16) % 256 - 128


def unchanging_model(family: str, bits: Bits = 7, padding: Literal["skip", "keep"] = "skip") -> Any:
    """A small classifier, deployed with int8 layers."""
    model = bind(FAMILIES[family]().eval(), AttentionSpec(sparsity=0.5))
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
            values = integers(parameter.numel(), seed).view(parameter.shape).float()
            parameter.copy_(values / 512 + 1 if name.endswith("LayerNorm.weight") else values / 400)
        for seed, state in enumerate(attentions(model).values()):
            for scale in (state.q_scale, state.k_scale, state.v_scale):
                scale.copy_((integers(scale.numel(), seed).view(scale.shape).float() + 400) / 2**13)
            state.cutoff.copy_(integers(state.heads, seed).float() / 64 + 4)
    encoder = find_encoder(model)
    assert encoder is not None
    set_plan(model, {name: ProductPlan(bits=bits) for name in entries(model, encoder)})
    return deploy(model, "cpu", linear="int8", padding=padding)


def texts() -> list[Tensor]:
    """Token numbers of each text, of 1 to LONGEST tokens."""
    lengths = (integers(TEXTS, 1000) + 128) * LONGEST // 256 + 1
    return [3 + (integers(int(length), 2000 + at) + 128) % (VOCABULARY - 3) for at, length in enumerate(lengths)]


def together(rows: list[Tensor], length: int | None) -> dict[str, Tensor]:
    """A batch of texts, padded to the longest or to a length; the second half of each is of the other type."""
    size = length or max(len(row) for row in rows)
    batch = {name: torch.zeros(len(rows), size, dtype=torch.int64) for name in ("attention_mask", "token_type_ids")}
    ids = torch.full((len(rows), size), PAD)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
        batch["attention_mask"][at, : len(row)] = 1
        batch["token_type_ids"][at, len(row) // 2 : len(row)] = 1
    return {"input_ids": ids, **batch}


def outputs(model: Any, batch_size: int, length: int | None, order: list[int] | None = None) -> list[Tensor]:
    """What the model gives of each text: its logits, and hidden states of its tokens, as one row of numbers."""
    everything, seen = texts(), {}
    order = order or list(range(TEXTS))
    for first in range(0, TEXTS, batch_size):
        chosen = order[first : first + batch_size]
        batch = together([everything[at] for at in chosen], length)
        found: list[Tensor] = []
        hook = model.base_model.register_forward_hook(lambda *call, kept=found: kept.append(call[-1][0]))
        with torch.no_grad():
            logits, (states,) = model(**batch).logits, found
        hook.remove()
        for row, at in enumerate(chosen):
            seen[at] = torch.cat([logits[row], states[row, : len(everything[at])].flatten()])
    return [seen[at] for at in range(TEXTS)]


def digest(rows: list[Tensor]) -> str:
    """Sha256 of float32 numbers, little-endian."""
    return hashlib.sha256(b"".join(row.contiguous().numpy().astype("<f4").tobytes() for row in rows)).hexdigest()


Around = tuple[int, int | None, int]
"""Batch size, length that batches are padded to, threads."""

FULL: list[Around] = list(itertools.product((1, 7, 64), (None, 128, 512), (1, 2, 3)))


def hashes(name: str, padding: Literal["skip", "keep"], around: Sequence[Around]) -> dict[Around, str]:
    """The hashes of a model of HASHES in all these surroundings."""
    family, bits = name.removesuffix(" bits").split(", ")
    model, found = unchanging_model(family, 7 if bits == "7" else 8, padding), {}
    for batch_size, length, threads in around:
        torch.set_num_threads(threads)
        found[batch_size, length, threads] = digest(outputs(model, batch_size, length))
    return found


def sums_are_exact() -> bool:
    """Does the multiplication in force give the integers, where 16 bits would pass over soonest and anywhere else?"""
    exact = True
    for bits, inputs in itertools.product((7, 8), (3, 768, 3072)):
        codes = (integers(5 * inputs, 3).view(5, inputs) % 2**bits).to(torch.uint8)
        weight = integers(70 * inputs, 4).view(70, inputs).clamp(min=-127).to(torch.int8)
        codes[0], weight[0], weight[1] = 2**bits - 1, 127, -127
        exact &= torch.equal(multiplication(weight, bits)(codes), (codes.long() @ weight.long().mT).float())
    return exact


if __name__ == "__main__":
    full = sys.argv[1:] == ["--full"]
    surroundings = FULL if full else [(7, None, 2)]
    paddings: list[Literal["skip", "keep"]] = ["skip", "keep"] if full else ["skip"]
    print(
        json.dumps(
            {
                "target": cpu.active_target(),
                "torch": torch.backends.cpu.get_cpu_capability(),
                "exact": sums_are_exact(),
                "hashes": {
                    name: sorted({one for padding in paddings for one in hashes(name, padding, surroundings).values()})
                    for name in HASHES
                },
            }
        )
    )
