"""An encoder beside its peers, from the JSON of `attnpress bench --encode`: the same rows for terminal and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from attnpress.report.render import markdown_table, text_table, threads_in_words

Timing = Mapping[str, Any]
"""One `posttraining.peers.EncodeTiming`; records from before it had `ratios`, `quality` and `judged` lack them."""


def encode_table(records: Sequence[Timing]) -> Table:
    """For a terminal."""
    header, *rows = encode_rows(records)
    return text_table(header, rows, "an encoder beside its peers", encode_caption(records))


def encode_markdown(records: Sequence[Timing]) -> str:
    """For a page."""
    header, *rows = encode_rows(records)
    return f"{markdown_table(header, rows, header[:1])}\n\n{encode_caption(records)}"


def encode_rows(records: Sequence[Timing]) -> list[tuple[str, ...]]:
    """Header, ours and each peer: speed for each number of threads, agreement, quality, memory, as text."""
    threads = _threads(records)
    first = [record for record in records if record["threads"] == threads[0]]
    sides = [("attnpress", first[0], "ours"), *((record["peer"], record, "peer") for record in first)]
    return [_header(first[0], threads), *(_row(name, side, record, records) for name, record, side in sides)]


def encode_caption(records: Sequence[Timing]) -> str:
    """What they rest on."""
    first = records[0]
    form = first["provenance"].get("form") or {}
    pruned = f", sparsity {form['sparsity']:g} with tail {form['tail']}" if form.get("sparsity") else ", nothing pruned"
    words = [
        f"{first['model']}: {first['texts']} texts, {first['seq_len']} tokens at the median, in batches of "
        f"{first['batch']}; medians, {threads_in_words(*_threads(records))}, target {first['target']}",
        f"attnpress: {form['bits']} bits{pruned}, linear layers in {form['linear']}" if form else "",
        _quality_in_words(first),
        "changed: texts with other bits "
        + ("alone or in batches of 7" if "ratios" in first else "in batches of another size"),
    ]
    return "; ".join(filter(None, words)) + "."


def _threads(records: Sequence[Timing]) -> list[int]:
    return sorted({record["threads"] for record in records})


def _header(first: Timing, threads: Sequence[int]) -> tuple[str, ...]:
    speeds = [
        f"{name}, {threads_in_words(number)}" if len(threads) > 1 else name
        for number in threads
        for name in ("texts a second", "ours is faster, times")
    ]
    agreement = next(iter(first["ours_agreement"])).replace("_", " ")
    quality = [f"{first['quality']['measure']}, share of float32's"] if first.get("quality") else []
    return ("", *speeds, agreement, *quality, "changed by the batch", "peak memory, MB", "folder, MB")


def _row(name: str, side: str, shown: Timing, records: Sequence[Timing]) -> tuple[str, ...]:
    """Of one side; its other figures are those of the fewest threads."""
    same = [record for record in records if record["peer"] == shown["peer"]]
    speeds = [
        cell
        for record in sorted(same, key=lambda record: int(record["threads"]))
        for cell in (f"{record['texts'] / record[f'{side}_ms'] * 1e3:.1f}", "" if side == "ours" else _times(record))
    ]
    headline = next(iter(shown[f"{side}_agreement"].values()))
    found = shown.get("quality")
    quality = [f"{found[side] / found['float32']:.2%}"] if found else []
    megabytes = [f"{shown[f'{side}_{kind}_mb']:.0f}" for kind in ("model", "file")]
    return (name, *speeds, f"{headline:.4f}", *quality, f"{shown[f'{side}_changed']:.0%}", *megabytes)


def _times(record: Timing) -> str:
    """The ratio, with the lowest and the highest of a round."""
    ratios = record.get("ratios")
    return f"{record['ratio']:.2f}" + (f" ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")


def _quality_in_words(first: Timing) -> str:
    found = first.get("quality")
    if found is None:
        return f"agreement on {first['judged']} texts" if "judged" in first else ""
    return f"{found['measure']} of float32 {found['float32']:.4f}, on {first['judged']} texts"
