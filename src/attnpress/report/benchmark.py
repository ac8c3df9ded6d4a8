"""Tables of `attnpress bench` results, from its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnpress.report.render import markdown_table

Comparison = Mapping[str, Any]
"""One entry of the JSON: a shape, ours and a peer's median time, and the ratio of turns taken side by side."""

PEERS = {
    "sdpa": "SDPA float32",
    "sdpa-bf16": "SDPA bfloat16",
    "eager": "eager float32",
    "openvino": "OpenVINO int8",
    "onnxruntime-int8": "ONNX Runtime int8",
    "openvino-int8": "OpenVINO int8",
}
INT8_PEERS = ("onnxruntime-int8", "openvino-int8")
OURS_OFF = "ours_unpruned_difference"


def attention_markdown(found: Sequence[Comparison]) -> str:
    """Speed-up of attention: a row for each length and batch, a column for each peer and thread count."""
    columns = list(dict.fromkeys((each["peer"], each["threads"]) for each in found))
    shapes = sorted({(each["seq_len"], each["batch"]) for each in found})
    ratios = {(each["seq_len"], each["batch"], each["peer"], each["threads"]): each["ratio"] for each in found}
    header = ["tokens (batch)", *(f"{PEERS[peer]}, {_threads(threads)}" for peer, threads in columns)]
    return _markdown(
        header,
        (
            [f"{length} ({batch})", *(_times(ratios.get((length, batch, *column))) for column in columns)]
            for length, batch in shapes
        ),
    )


def settings_markdown(settings: Mapping[str, Sequence[Comparison]]) -> str:
    """Speed-up over one peer under named settings, a column for each."""
    ratios = [{(each["seq_len"], each["batch"]): each["ratio"] for each in found} for found in settings.values()]
    shapes = sorted({shape for found in ratios for shape in found})
    rows = (
        [f"{length} ({batch})", *(_times(found.get((length, batch))) for found in ratios)] for length, batch in shapes
    )
    return _markdown(["tokens (batch)", *settings], rows)


def layers_markdown(found: Sequence[Comparison]) -> str:
    """Speed-up for each layer of a trained model."""
    peers = list(dict.fromkeys(each["peer"] for each in found))
    layers: dict[str, dict[str, Comparison]] = {}
    for each in found:
        layers.setdefault(each["layer"], {})[each["peer"]] = each
    rows = []
    for layer, by_peer in layers.items():
        shown = next(iter(by_peer.values()))
        shape = [f"{shown['seq_len']} ({shown['batch']})", f"{shown['sparsity']:.3f}"]
        rows.append([f"`{layer}`", *shape, *(_times(by_peer[peer]["ratio"]) for peer in peers)])
    return _markdown(["layer", "tokens (batch)", "sparsity", *(PEERS[peer] for peer in peers)], rows)


def models_markdown(found: Sequence[Comparison]) -> str:
    """Whole models: our time in ms, speed-up, attention's share on both sides, memory and file sizes against float32.

    If int8 sides recorded their distance from unpruned float32, the last columns show it.
    """
    peers = [peer for peer in PEERS if any(each["peer"] == peer for each in found)]
    cases: dict[tuple[Any, ...], dict[str, Comparison]] = {}
    for each in found:
        case = tuple(each[key] for key in ("model", "linear", "seq_len", "ragged", "batch", "threads"))
        cases.setdefault(case, {})[each["peer"]] = each
    header = ["model, linear layers", "tokens (batch)", "threads", "ours, ms", *(PEERS[peer] for peer in peers)]
    header += ["attention, ours", "attention, SDPA's", "memory", "file"]
    judged = [peer for peer in peers if peer in INT8_PEERS] if any(each.get(OURS_OFF) for each in found) else []
    header += [f"error, {name}" for name in ("ours", *(PEERS[peer] for peer in judged))] if judged else []
    rows = []
    for (model, linear, length, ragged, batch, threads), by_peer in cases.items():
        shape = f"{ragged.upper()}'s, to {length} ({batch})" if ragged else f"{length} ({batch})"
        ours = next(iter(by_peer.values()))
        times = [_times(by_peer[peer]["ratio"] if peer in by_peer else None) for peer in peers]
        off = [ours.get(OURS_OFF), *(by_peer.get(peer, {}).get("peer_difference") for peer in judged)] if judged else []
        told = [*times, *_shares(by_peer.get("sdpa")), *("" if each is None else f"{each:.1%}" for each in off)]
        rows.append([f"{model}, {linear}", shape, str(threads), f"{ours['ours_ms']:.1f}", *told])
    return _markdown(header, rows)


def processors_markdown(processors: Mapping[str, Sequence[Comparison]], model: str) -> str:
    """Speed-up of a whole int8 model over each peer, by processor.

    Args:
        processors: records by the name of the processor; other models and batches of one row are left out.
        model: the model to show.
    """
    chosen = {
        name: [each for each in found if (each["model"], each["linear"]) == (model, "int8") and each["batch"] > 1]
        for name, found in processors.items()
    }
    peers = [peer for peer in PEERS if any(each["peer"] == peer for found in chosen.values() for each in found)]
    rows = []
    for name, found in chosen.items():
        for length, ragged in dict.fromkeys((each["seq_len"], each["ragged"]) for each in found):
            ratios = {
                each["peer"]: each["ratio"] for each in found if (each["seq_len"], each["ragged"]) == (length, ragged)
            }
            batch = f"{ragged.upper()} lengths, up to {length}" if ragged else f"{length} tokens"
            rows.append([name, batch, *(_times(ratios.get(peer)) for peer in peers)])
    return markdown_table(
        ["processor", "input", *(f"vs {PEERS[peer]}" for peer in peers)], rows, ["processor", "input"]
    )


def _shares(dense: Comparison | None) -> list[str]:
    """Columns that require a comparison with the framework in float32."""
    if dense is None:
        return [""] * 4
    memory, file = (dense[f"ours_{kind}_mb"] / dense[f"peer_{kind}_mb"] for kind in ("model", "file"))
    return [f"{dense['ours_attention']:.0%}", f"{dense['peer_attention']:.0%}", f"{memory:.2f}", f"{file:.2f}"]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown_table(header, rows, header[:1])
