"""Recorded attention of a tiny model, for the tests of what designers of hardware read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from attnpress.config import AttentionSpec
from attnpress.export.recording import Recorded, record_batch
from attnpress.export.sequences import AttendedSequence, sequences_of
from tests.deployment.test_attention import make_batch, tiny_bert

LAYERS = tuple(f"bert.encoder.layer.{number}.attention.self" for number in range(2))
SPEC = AttentionSpec(sparsity=0.7)


def record(spec: AttentionSpec = SPEC, seeds: tuple[int, ...] = (5,)) -> list[Recorded]:
    """A batch of four sequences for each seed, through a BERT of two layers with two heads."""
    model = tiny_bert(spec)
    return [record_batch(model, make_batch(seed)) for seed in seeds]


def sequences(spec: AttentionSpec = SPEC, seeds: tuple[int, ...] = (5,)) -> list[AttendedSequence]:
    return list(sequences_of(record(spec, seeds)))


def made(mask: list[str], valid: list[str] | None = None, layer: str = "layer") -> AttendedSequence:
    """One head whose survivors are the crosses of a drawing; pairs that are not valid are the dots of `valid`."""
    drawn = torch.tensor([[letter == "x" for letter in row] for row in mask])
    allowed = None if valid is None else torch.tensor([[letter != "." for letter in row] for row in valid])
    codes = (drawn.to(torch.uint8) * 200).unsqueeze(0)
    keys = drawn.shape[1]
    v_codes = torch.arange(keys * 4, dtype=torch.int8).view(1, keys, 4)
    return AttendedSequence(
        layer, 0, codes, torch.ones_like(codes, dtype=torch.bool) if allowed is None else allowed.unsqueeze(0),
        v_codes, codes.long() @ v_codes.long(),
    )  # fmt: skip


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found
