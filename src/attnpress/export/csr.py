"""`--to csr`: survivors of each layer as compressed sparse rows, with their V codes and the weighted sums."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnpress.core.sparse_rows import csr_of
from attnpress.export.errors import ExportError
from attnpress.export.sequences import AttendedSequence, by_layer

Tensors = dict[str, Tensor]
FILE, FORMAT = "csr.safetensors", "1"

NOTES = (
    "Rows are those of real tokens: nothing of padding is in the file.",
    "weighted is the sum of P code times V code of each row; the file was read back and multiplied out before it was "
    "left here.",
)


def write_csr(sequences: Iterable[AttendedSequence], folder: Path) -> dict[str, float]:
    """Write `csr.safetensors`, and verify it.

    Returns:
        tokens (of all sequences, once), bytes, and bytes_a_token.

    Raises:
        ExportError: the file does not reproduce the sums of the reference.
    """
    layers = by_layer(sequences)
    tensors = {f"{name}.{part}": x for name, found in layers.items() for part, x in packed_rows(found).items()}
    heads = {name: [found[0].codes.shape[0], *found[0].v_codes.shape[::2]] for name, found in layers.items()}
    header = {"format": FORMAT, "layers": json.dumps(list(layers)), "heads": json.dumps(heads)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, header)
    _check(folder / FILE, heads)
    tokens = sum(one.codes.shape[1] for one in next(iter(layers.values())))
    size = (folder / FILE).stat().st_size
    return {"tokens": tokens, "bytes": size, "bytes_a_token": round(size / max(tokens, 1), 1)}


def _check(file: Path, heads: dict[str, list[int]]) -> None:
    tensors = load_file(file)
    for layer, (query_heads, key_heads, _) in heads.items():
        t = {part: tensors[f"{layer}.{part}"] for part in ("start", "key", "code", "v_codes", "weighted")}
        rows = torch.repeat_interleave(torch.arange(len(t["start"]) - 1), t["start"].diff())
        base = _first_keys(tensors, layer, query_heads, key_heads)
        picked = t["v_codes"].long()[base[rows] + t["key"]] * t["code"].long().unsqueeze(-1)
        expected = t["weighted"].long()
        if not torch.equal(torch.zeros_like(expected).index_add_(0, rows, picked), expected):
            raise ExportError(f"{layer}: {FILE} does not give the sums of the reference; please report it")


def _first_keys(tensors: Tensors, layer: str, query_heads: int, key_heads: int) -> Tensor:
    """Row of v_codes that holds each row's first key; int64 [rows]."""
    found, before = [], 0
    for rows, keys in zip(tensors[f"{layer}.lengths"].tolist(), tensors[f"{layer}.key_lengths"].tolist(), strict=True):
        head = torch.arange(query_heads) * key_heads // query_heads
        found.append((before + head * keys).repeat_interleave(rows))
        before += key_heads * keys
    return torch.cat(found)


def packed_rows(sequences: Sequence[AttendedSequence]) -> Tensors:
    """Survivors of one layer over many sequences, without padding.

    Args:
        sequences: of one layer, in order.

    Returns:
        lengths, key_lengths int32 [sequences]; start int64 [rows + 1], key int32 and code uint8 [survivors]; v_codes
        int8 [keys, D] and weighted int32 [rows, D], which holds sums of up to 66,311 keys. Rows are ordered by
        sequence, query head, query; keys by sequence, key head, key. `key` counts from the first key of its sequence.
    """
    parts = [csr_of(one.codes.unsqueeze(0)) for one in sequences]
    counts = torch.cat([part["csr_start"].diff() for part in parts])
    return {
        "lengths": torch.tensor([one.codes.shape[1] for one in sequences], dtype=torch.int32),
        "key_lengths": torch.tensor([one.codes.shape[2] for one in sequences], dtype=torch.int32),
        "start": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        "key": torch.cat([part["csr_key"] for part in parts]),
        "code": torch.cat([part["csr_code"] for part in parts]),
        "v_codes": torch.cat([one.v_codes.flatten(0, 1) for one in sequences]),
        "weighted": torch.cat([one.weighted.flatten(0, 1) for one in sequences]).int(),
    }
