"""The exact integers of real data, layer by layer, for accelerator designers. The layout is in docs/trace.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnpress.config import AttentionSpec
from attnpress.config.recipe import parse_spec, spec_to_dict
from attnpress.export.errors import ExportError
from attnpress.export.recording import Recorded, check_layer, record_batch
from attnpress.files import write_text
from attnpress.models.binding import attentions
from attnpress.records.strict_json import parse_json

FILE = "trace.safetensors"
INDEX = "trace.safetensors.index.json"
SHARD = "trace-{number:05d}-of-{count:05d}.safetensors"
FORMAT = "3"
"""Since format 3, a pair is valid only if its query is a real token."""

COMPARED = {
    "2": {"acc", "keep", "p_codes", "weighted", "code_sum", "output"},
    "3": None,
}
"""Readable formats, and the tensors that each has besides its codes; None is all of `recording.derived`."""

NOTES = ("Every integer is that of the reference, core/attention.py; the layout is described in docs/trace.md.",)


def write_trace(model: nn.Module, batch: Mapping[str, Tensor], folder: Path) -> str:
    """Run one batch through the reference and write `trace.safetensors`; see `write_shards`.

    Returns:
        What the integers were compared with, in words.
    """
    return str(write_shards(model, [batch], folder)["compared"])


def write_shards(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], folder: Path) -> dict[str, Any]:
    """Run batches through the reference; write a file for each, and an index if there are several.

    Args:
        model: bound and calibrated, on the CPU.
        batches: keyword arguments of its forward; at least one.

    Returns:
        What the integers were compared with, `compared`, and the index: format, layers, tokens, bytes, bytes_a_token
        and shards.

    Raises:
        ExportError: see `recording.record_batch`; or the written file differs from the reference.
    """
    compared, shards = "", []
    for number, batch in enumerate(batches, start=1):
        recorded = record_batch(model, batch)
        name = FILE if len(batches) == 1 else SHARD.format(number=number, count=len(batches))
        _write_shard(model, batch, recorded, folder / name)
        check_trace(folder / name)
        shards.append(_described(folder / name, recorded))
        compared = recorded.compared
    index = _index(list(attentions(model)), shards)
    if len(batches) > 1:
        write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return {"compared": compared, **index}


def check_trace(place: Path) -> None:
    """Recompute a trace from its own Q, K and V codes with the reference.

    Args:
        place: a file, or the folder of an export, of which all files in its index are checked.

    Raises:
        ExportError: unsupported format, a missing file or tensor, or a tensor that differs from the reference. The
            message names the layer and the tensor.
    """
    for file in trace_files(place):
        with safe_open(file, "pt") as trace:
            header = trace.metadata() or {}
            written = header.get("format")
            if written not in COMPARED:
                raise ExportError(
                    f"{file}: format {written!r}; this version reads formats {', '.join(COMPARED)}: export the trace "
                    "again with attnpress export RUN_DIR --to trace"
                )
            for layer, plain in json.loads(header["attention"]).items():
                spec = parse_spec(AttentionSpec, plain)
                names = [name for name in trace.keys() if name.startswith(f"{layer}.")]  # noqa: SIM118, not a mapping
                found = {name.removeprefix(f"{layer}."): trace.get_tensor(name) for name in names}
                check_layer(layer, found, spec, COMPARED[written])


def trace_files(place: Path) -> list[Path]:
    """The files of a trace, in order: those in the index of a folder, or the given file.

    Raises:
        ExportError: a folder without a trace, a damaged index, or a missing file of the index.
    """
    if not place.is_dir():
        return [place]
    if (place / FILE).is_file():
        return [place / FILE]
    if not (place / INDEX).is_file():
        raise ExportError(f"{place}: no trace here; give a folder that attnpress export --to trace made")
    try:
        files = [place / str(shard["file"]) for shard in parse_json((place / INDEX).read_text("utf-8"))["shards"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{place / INDEX}: not an index of a trace ({error}): export the trace again") from error
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise ExportError(f"{place}: the index names {', '.join(lost)}, not found: export the trace again")
    return files


def _write_shard(model: nn.Module, batch: Mapping[str, Tensor], recorded: Recorded, file: Path) -> None:
    tensors = {f"{name}.{part}": x for name, layer in recorded.layers.items() for part, x in layer.items()}
    tensors |= {f"input.{name}": tensor for name, tensor in batch.items()}
    tensors |= {f"model.{name}": tensor for name, tensor in recorded.answers.items()}
    specs = {name: spec_to_dict(module.spec) for name, module in attentions(model).items()}
    header = {"format": FORMAT, "attention": json.dumps(specs), "layers": json.dumps(list(recorded.layers))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, header)


def _described(file: Path, recorded: Recorded) -> dict[str, Any]:
    """A shard's entry in the index: its size, and the shape of its content."""
    first = next(iter(recorded.layers.values()))
    lengths = first["lengths"].tolist()
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sequences": len(lengths),
        "padded": first["acc"].shape[2],
        "lengths": lengths,
    }


def _index(layers: list[str], shards: list[dict[str, Any]]) -> dict[str, Any]:
    tokens, size = sum(sum(one["lengths"]) for one in shards), sum(one["bytes"] for one in shards)
    return {
        "format": FORMAT,
        "layers": layers,
        "tokens": tokens,
        "bytes": size,
        "bytes_a_token": round(size / max(tokens, 1), 1),
        "shards": shards,
    }
