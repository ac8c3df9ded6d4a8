"""Tables of records for the terminal and for Markdown, from the same rows."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from attnpress.records.run import Record, StageRecord
from attnpress.records.sweep import SweepRecord

TITLES = {
    "dense": "dense",
    "dense_control": "dense, trained equally long",
    "quantized": "quantized, no training",
    "one_shot": "one-shot pruning, no training",
    "progressive": "progressive pruning",
}

COLUMNS = (
    "stage",
    "{metric}",
    "sparsity",
    "pruned",
    "padded",
    "tiles",
    "keys per query",
    "bits Q/K/V/P",
    "MACs left",
)


def stage_rows(record: Record) -> list[tuple[str, ...]]:
    """Header and one row per stage, as text."""
    header = tuple(column.format(metric=record.headline) for column in COLUMNS)
    return [header, *(_row(stage, record.headline) for stage in record.stages)]


def stages_table(record: Record) -> Table:
    """The summary table for a terminal."""
    header, *rows = stage_rows(record)
    return text_table(header, rows, _title(record), caption(record))


def timings_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Records of `benchmark.attention.Timing` for a terminal: medians in milliseconds, ratio = peer over ours."""
    shared = f"one attention call{_tail(records[0])}, {_conditions(records)}"
    measured = any(record["product_share"] is not None for record in records)
    table = Table(title=shared + "; Q K^T: share of the bare integer product in ours" * measured)
    layers = any(record["layer"] for record in records)
    _columns(table, *(["layer"] if layers else []), "tokens", "batch", "sparsity", "peer", *TIMES, "Q K^T")
    for record in records:
        layer = [record["layer"]] if layers else []
        table.add_row(*layer, *_case(record), *_times(record), _known(record["product_share"], ".0%"))
    return table


def models_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Records of `benchmark.whole_model.ModelTiming` for a terminal, with the share of attention on both sides."""
    linear = " and ".join(dict.fromkeys(map(_linear, records)))
    table = Table(
        title=f"one forward pass, {linear} linear layers, {_conditions(records)}; ceiling: attention in no time; "
        "off: norm of the difference to the float32 model's output, nothing pruned"
    )
    _columns(
        table,
        "model",
        "tokens",
        "batch",
        "sparsity",
        "peer",
        *TIMES,
        "attention ours",
        "peer's",
        "ceiling",
        "MB ours",
        "peer's",
        "off ours",
        "peer's",
    )
    for record in records:
        shares = [_known(record[name], ".1%") for name in ("ours_attention", "peer_attention")]
        memory = [_known(record.get(name), ".0f") for name in ("ours_model_mb", "peer_model_mb")]
        off = [_known(record.get(name), ".2%") for name in ("ours_unpruned_difference", "peer_difference")]
        name = " ".join(filter(None, (record["model"], record.get("ragged"))))
        table.add_row(name, *_case(record), *_times(record), *shares, _known(record["ceiling"], ".2f"), *memory, *off)
    return table


def _tail(record: Mapping[str, Any]) -> str:
    """The tail of a record; old records do not name one."""
    kind, rank = record.get("tail", "none"), record.get("tail_rank")
    return "" if kind == "none" else f" with tail {kind}{f' of rank {rank}' if rank else ''}"


def _linear(record: Mapping[str, Any]) -> str:
    """The linear layers of our side, such as "int8 (7-bit inputs)", with the number of those in float."""
    kind, bits, layers = record.get("linear", "float"), record.get("activation_bits"), record.get("linear_layers")
    if not bits or not layers:
        return str(kind)
    floats = sum(layers.values()) - layers["int8"]
    return f"{kind} ({'- and '.join(map(str, bits))}-bit inputs{f', {floats} in float' if floats else ''})"


def _known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


TIMES = ("ours ms", "spread", "peer ms", "spread", "ratio")


def _conditions(records: Sequence[Mapping[str, Any]]) -> str:
    return f"medians, {threads_in_words(records[0]['threads'])}, target {records[0]['target']}"


def threads_in_words(*counts: int) -> str:
    """How many there are on each side: "1 thread", "1 and 2 threads"."""
    return f"{' and '.join(map(str, counts))} thread{'s' * (counts[-1] != 1)}"


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="left" if name in ("layer", "model", "peer") else "right")


def _case(record: Mapping[str, Any]) -> list[str]:
    executed = record["provenance"]["peer"].get("executed") if record["peer"] == "openvino" else None
    fused = executed is None or any(node.endswith("_i8") for node in executed)
    return [
        *(str(record[name]) for name in ("seq_len", "batch", "sparsity")),
        record["peer"] + ", not fused" * (not fused),
    ]


def _times(record: Mapping[str, Any]) -> list[str]:
    ours, theirs = (f"{record[name]:.3f}" for name in ("ours_ms", "peer_ms"))
    return [ours, f"{record['spread']:.1%}", theirs, f"{record['peer_spread']:.1%}", f"{record['ratio']:.2f}"]


HEADS_COLUMNS = {
    "layer": ("layer", "{}"),
    "head": ("head", "{}"),
    "zeros at 8 bits": ("zeros", "{:.3f}"),
    "keys for 99 %": ("keys_99", "{:.1f}"),
    "max |q|": ("q_max", "{:.2f}"),
    "max |k|": ("k_max", "{:.2f}"),
    "max |v|": ("v_max", "{:.2f}"),
    "change at 4 bits": ("change_4bit", "{:.4f}"),
    "change pruned 0.9": ("change_pruned", "{:.4f}"),
}


HEADS_CAPTION = (
    "zeros: pairs whose P has the code 0 before any pruning; keys for 99 %: how many hold 99 % of a row's P, on "
    "average; max: largest magnitude; change: of the model's last hidden states, relative to their norm, when this "
    "head alone is quantized to 4 bits, or to 8 bits with nine in ten of its pairs pruned"
)
TRIALS_CAPTION = "change: of the last hidden states, relative to their norm; training wins back much of it"


def heads_table(heads: Iterable[Mapping[str, object]]) -> Table:
    """`inspection.HeadView` as a table with one row per head; layers by number, from 0."""
    table = Table(title="heads, before compression", caption=HEADS_CAPTION, caption_justify="left")
    for column in HEADS_COLUMNS:
        table.add_column(column, justify="right")
    layers: dict[object, int] = {}
    for head in heads:
        shown = {**head, "layer": layers.setdefault(head["layer"], len(layers))}
        table.add_row(*(form.format(shown[name]) for name, form in HEADS_COLUMNS.values()))
    return table


def trials_table(trials: Iterable[tuple[int, float, float, float]]) -> Table:
    """Specs tried on a whole model: bits, sparsity, change of the hidden states, and remaining bit operations."""
    table = Table(title="the whole model, compressed without training", caption=TRIALS_CAPTION, caption_justify="left")
    for column in ("bits", "sparsity", "change", "bit operations left"):
        table.add_column(column, justify="right")
    for bits, sparsity, change, work in trials:
        table.add_row(str(bits), f"{sparsity:g}", f"{change:.3f}", f"{work:.2%}")
    return table


FRONT_COLUMNS = ("chosen", "{metric}", "bit operations left", "sparsity", "trial")


def front_rows(record: SweepRecord) -> list[tuple[str, ...]]:
    """Header and one row for each trial of the front, least work first, as text."""
    header = tuple(column.format(metric=record.headline) for column in FRONT_COLUMNS)
    rows = [
        (trial.chosen, f"{trial.metric:.2f}", f"{trial.work:.2%}", f"{trial.sparsity:.3f}", str(trial.number))
        for trial in record.on_front()
    ]
    return [header, *rows]


def front_caption(record: SweepRecord) -> str:
    """Summary of a sweep's trials."""
    states = [trial.state for trial in record.trials]
    majority = (
        "" if record.majority is None else f"; Always predicting the most frequent class gives {record.majority:.2f}"
    )
    return (
        f"{record.headline} in points, of the dense model {record.dense:.2f}{majority}. {len(states)} trials: "
        + ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed"))
        + f"; {len(record.front)} that no other beats."
    )


def front_table(record: SweepRecord) -> Table:
    """The front of a sweep for a terminal."""
    header, *rows = front_rows(record)
    return text_table(header, rows, f"{record.task}: the least work for each score", front_caption(record))


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str, caption: str) -> Table:
    """Rows of text for a terminal; all columns except the first hold numbers."""
    table = Table(title=title, caption=caption)
    for place, column in enumerate(header):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def stages_markdown(record: Record) -> str:
    """The summary table as Markdown."""
    header, *rows = stage_rows(record)
    return f"{markdown_table(header, rows, header[:1])}\n\n{caption(record)}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str]) -> str:
    """A table as Markdown; all columns except those in `words` hold numbers."""
    rule = ["---" if column in words else "---:" for column in header]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


SEEDS_COLUMNS = ("stage", "{metric}", "against dense", "sparsity", "keys per query", "seeds")


def seeds_rows(records: Sequence[Record], every: Sequence[Record]) -> list[tuple[str, ...]]:
    """A row of SEEDS_COLUMNS for each stage of records that differ in their seed.

    Args:
        records: what to average.
        every: records that may contain the dense models trained equally long.

    Raises:
        ValueError: a record has no dense stage.
    """
    controls = control_scores(every)
    return [_seeds_row(stage.name, records, controls) for stage in records[0].stages]


def _seeds_row(name: str, records: Sequence[Record], controls: Mapping[Start, float]) -> tuple[str, ...]:
    found = [(record, stage) for record in records if (stage := record.stage(name))]
    stages = [stage for _, stage in found]
    scores = [stage.metrics[record.headline] for record, stage in found]
    losses = [score - reference_score(record, controls) for score, (record, _) in zip(scores, found, strict=True)]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    sparsity = statistics.mean(stage.sparsity for stage in stages)
    keys = statistics.mean(stage.keys_per_row for stage in stages)
    return (
        TITLES[name],
        f"{statistics.mean(scores):.2f} ± {spread:.2f}",
        f"{statistics.mean(losses):+.2f}",
        f"{sparsity:.3f}",
        f"{keys:.2f}",
        str(len(scores)),
    )


Start = tuple[str, float]
"""Start and length of training: the hash of the initial dense weights, and epochs of compression."""


def control_scores(records: Iterable[Record], stage: str = "dense_control") -> dict[Start, float]:
    """Scores of the dense models trained equally long, by their initial weights and number of epochs.

    Args:
        records: those without the stage are skipped.
        stage: "dense" without training compares with the dense model as it was.
    """
    found = control_stages(records, stage)
    return {start: known.metrics[record.headline] for start, (record, known) in found.items()}


def control_stages(records: Iterable[Record], stage: str = "dense_control") -> dict[Start, tuple[Record, StageRecord]]:
    """The stages that `control_scores` takes the scores of, each with its record."""
    found = [(record, record.stage(stage)) for record in records]
    return {start_of(record): (record, known) for record, known in found if known}


def reference_score(record: Record, controls: Mapping[Start, float]) -> float:
    """The score a record is compared with: its dense model trained equally long if `controls` has it, else as it was.

    Raises:
        ValueError: the record has no dense stage.
    """
    if (control := controls.get(start_of(record))) is not None:
        return control
    dense = record.stage("dense")
    if dense is None:
        raise ValueError("the record has no dense stage to compare with")
    return dense.metrics[record.headline]


def start_of(record: Record) -> Start:
    """Initial weights of a record's training, and its number of epochs."""
    return record.provenance["weights"]["dense"], record.recipe["compress"]["epochs"]


def _row(stage: StageRecord, headline: str) -> tuple[str, ...]:
    bits = "/".join("fp" if value is None else f"{value:.3g}" for value in stage.bits.values())
    return (
        TITLES[stage.name],
        f"{stage.metrics[headline]:.2f}",
        f"{stage.sparsity:.3f}",
        f"{stage.pruned:.3f}",
        f"{stage.padded_sparsity:.3f}",
        f"{stage.tile_sparsity:.3f}",
        f"{stage.keys_per_row:.2f}",
        bits,
        f"{stage.macs_remaining / stage.macs_dense:.1%}",
    )


def _title(record: Record) -> str:
    return f"{record.recipe['data']['task']} with {record.recipe['model']}"


def caption(record: Record) -> str:
    """Explanation of the columns of `stage_rows`."""
    length = record.stages[0].padded_length if record.stages else "?"
    majority = (
        "" if record.majority is None else f" Always predicting the most frequent class gives {record.majority:.2f}."
    )
    return (
        f"{record.headline} in points on {record.provenance['rows']['eval']} rows; sparsity over valid pairs (the"
        f" headline figure), pruned by the rule alone, padded to {length} tokens, and of 16 x 64 tiles; MACs of"
        f" attention over valid pairs.{majority}"
    )
