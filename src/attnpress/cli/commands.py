"""Implementation of each command. Heavy modules are imported only by the command that needs them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from attnpress.config import ConfigError, RunConfig
from attnpress.config.recipe import dump_config, load_config, load_spec, override, parse_spec
from attnpress.files import check_file, check_folder, is_stdout, is_stream, whole_folder, write_json, write_text

GENERATOR = b'<meta name="generator" content="attnpress">'
"""Mark of every page of `report`; only such a file is replaced by a new page."""


def compress(options: argparse.Namespace) -> int:
    """Run a recipe or resume it, and print its table."""
    config = load_config(options.recipe, options.set)
    _quiet_libraries()
    from attnpress.distributed import this_process
    from attnpress.report.render import stages_table
    from attnpress.runs import compression

    record = compression.compress(config, options.output, notify=_stage_line)
    if this_process().is_main_process:
        _print_table(stages_table(record), options.talk)
        print(f"record: {options.output / 'record.json'}")
    return 0


def quantize(options: argparse.Namespace) -> int:
    """Compress an encoder with texts alone, and print the result."""
    _quiet_libraries()
    import dataclasses
    import warnings

    from attnpress.posttraining import QuantizeSpec
    from attnpress.posttraining import quantize as make
    from attnpress.posttraining.card import quantized_caption, quantized_rows
    from attnpress.report.render import text_table

    plain = {field.name: getattr(options, field.name) for field in dataclasses.fields(QuantizeSpec)}
    spec = parse_spec(QuantizeSpec, {name: value for name, value in plain.items() if value is not None})
    with warnings.catch_warnings():
        warnings.showwarning = _say_warning
        warnings.simplefilter("always", UserWarning)
        record = make(
            options.model,
            str(options.texts),
            output=options.output,
            columns=options.column,
            spec=spec,
            notify=_stage_line,
        ).record
    header, *rows = quantized_rows(record)
    _print_table(text_table(header, rows, f"{record.model}: {record.kind}", quantized_caption(record)), options.talk)
    print(f"model: {options.output}\nrecord: {options.output / 'quantize.json'}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate a finished run, or compare a backend with it row by row; returns 1 if a row differs."""
    _check_json(options.json, {"same_predictions", "identical_logits"}, {"padded_sparsity", "macs_dense"})
    overrides = [*options.set, *([f"data.task={options.task}"] if options.task else [])]
    config = _model_config(options.run_dir, overrides)
    if options.linear == "int8" and not options.backend:
        raise ConfigError("--linear int8 compares a deployed model with the trained one: add --backend cpu")
    _quiet_libraries()
    import dataclasses

    from attnpress.benchmark.machine import provenance
    from attnpress.distributed import this_process
    from attnpress.runs.agreement import compare_backends
    from attnpress.runs.evaluation import reevaluate

    if options.backend:
        agreement = compare_backends(options.run_dir, config, options.backend, options.linear)
        found, complete = dataclasses.asdict(agreement), agreement.complete or options.linear == "int8"
        found["provenance"] = {**provenance("transformers"), "command": _command_line(options)}
        if not complete:
            print(f"attnpress: {agreement.rows - agreement.same_predictions} rows differ", file=sys.stderr)
    else:
        stage = dataclasses.asdict(reevaluate(options.run_dir, config))
        found, complete = {key: stage[key] for key in stage if key not in ("layers", "seconds")}, True
    if this_process().is_main_process:
        _write_json(found, options.json)
        if options.json is None or not is_stdout(options.json):
            print(json.dumps(found, indent=1))
    return 0 if complete else 1


def run(options: argparse.Namespace) -> int:
    """Predict each row of one file or many with a compressed model, or resume an interrupted prediction."""
    from attnpress.runs.finished import is_saved_model

    _check_engine(options)
    config = None if is_saved_model(options.run_dir) else _run_config(options.run_dir)
    _quiet_libraries()
    from attnpress.runs.prediction import Deployment, run_file, run_files
    from attnpress.runs.ray_engine import spread
    from attnpress.runs.row_folders import are_many

    def warn(text: str) -> None:
        print(f"attnpress: {text}", file=sys.stderr)

    shared = {"backend": options.backend, "linear": options.linear, "batch_size": options.batch}
    if are_many(options.input):
        deployment = Deployment(options.run_dir, config, named=tuple(options.text), **shared)
        engine = spread(deployment, options.workers) if options.engine == "ray" else None
        done = run_files(deployment, options.input, options.output, warn=warn, notify=_stage_line, engine=engine)
    elif options.engine == "ray":
        raise ConfigError("--engine ray spreads files over a cluster: give --input a folder, or several files")
    else:
        done = run_file(
            options.run_dir, config, options.input[0], options.output, columns=options.text, warn=warn, **shared
        )
    print(f"predicted: {done.written} lines, skipped: {done.skipped}\noutput: {options.output}", file=options.talk)
    return 0


def export(options: argparse.Namespace) -> int:
    """Export the model of a finished run."""
    config = _model_config(options.run_dir, options.set)
    _quiet_libraries()
    from attnpress.export import export_run

    record = export_run(options.run_dir, config, options.to, options.output, options.rows, options.batch)
    print(json.dumps({key: value for key, value in record.items() if key not in ("attention", "versions")}, indent=1))
    return 0


def report(options: argparse.Namespace) -> int:
    """Draw runs as one page."""
    folder = options.output.with_name(f"{options.output.stem}-figures")
    alone = is_stream(options.output)  # the page also contains the figures
    check_file(options.output, lambda content: GENERATOR in content[:1000])
    if not alone:
        check_folder(folder, "figures")
    from attnpress.report.page import make_report

    made = make_report(options.runs, options.bench)
    if not alone:
        with whole_folder(folder, "figures") as scratch:
            for name, svg in made.figures.items():
                write_text(scratch / name, svg)
    write_text(options.output, made.html)
    print(f"report: {options.output}" + ("" if alone else f"\nfigures: {folder}"), file=options.talk)
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Show each head of a model."""
    _check_json(options.json, {"heads", "trials", "suggestion"})
    _quiet_libraries()
    import dataclasses

    import yaml

    from attnpress.models.loading import load_backbone, load_tokenizer, resolve_model
    from attnpress.report.render import heads_table, trials_table
    from attnpress.runs.inspection import TOLERANCE, encode, inspect_model, recipe_lines

    resolved = resolve_model(options.model)
    found = inspect_model(load_backbone(resolved), encode(load_tokenizer(resolved), options.text))
    _write_json(dataclasses.asdict(found), options.json)
    _print_table(heads_table(dataclasses.asdict(head) for head in found.heads), options.talk)
    trials = [(trial.spec.p.bits or 0, trial.spec.sparsity, trial.change, trial.work) for trial in found.trials]
    _print_table(trials_table(trials), options.talk)
    if found.suggestion is None:
        text = "# No trial left the hidden states near enough: begin with 8 bits and sparsity 0, and train.\n"
    else:
        text = f"# The cheapest with a change of up to {TOLERANCE}, to begin training with; put into a recipe:\n"
        text += yaml.safe_dump(recipe_lines(found.suggestion), sort_keys=False)
    print(text, end="", file=options.talk)
    return 0


def sweep(options: argparse.Namespace) -> int:
    """Start or resume a search."""
    from attnpress.studies.sweep.spec import SweepSpec

    spec = load_spec(SweepSpec, options.sweep, options.set)
    _quiet_libraries()
    from attnpress.report.render import front_table
    from attnpress.studies import sweep as search

    record = search.sweep(spec, options.output, notify=_stage_line)
    _print_table(front_table(record), options.talk)
    print(f"recipes: {options.output / 'front'}\nrecord: {options.output / 'sweep.json'}")
    return 0


def evidence(options: argparse.Namespace) -> int:
    """Run the missing cells of a table, or list them."""
    from attnpress.studies.evidence import EvidenceSpec, choose, missing, plan, run_missing

    items = plan(load_spec(EvidenceSpec, options.table, options.set), options.output, options.records)
    chosen = choose(items, options.only)
    if options.list:
        absent = missing(chosen)
        for item in chosen:
            print(f"{'missing' if item in absent else 'done':8}{item.name}")
        return 0
    _quiet_libraries()
    run_missing(items, chosen, _stage_line)
    return 0


def leaderboard(options: argparse.Namespace) -> int:
    """Run the missing cells of a leaderboard, and print it."""
    from attnpress.studies.leaderboard.spec import BoardSpec

    spec = load_spec(BoardSpec, options.board, options.set)
    _quiet_libraries()
    from attnpress.report.leaderboard import board_table
    from attnpress.studies.leaderboard.run import run_board

    record = run_board(spec, options.output, notify=_stage_line)
    _print_table(board_table(record), options.talk)
    print(f"record: {options.output / 'board.json'}")
    return 0


def validate(options: argparse.Namespace) -> int:
    """Validate a recipe, and print it in full."""
    config = load_config(options.recipe, options.set)
    _quiet_libraries()
    from attnpress.models.loading import resolve_model
    from attnpress.tasks import check_data
    from attnpress.training.progress import check_trackers

    check_data(config.data)
    check_trackers(config.report_to)
    resolve_model(config.model)
    print(dump_config(config), end="")
    return 0


def ls(options: argparse.Namespace) -> int:
    """List the names that recipes accept, or the backends."""
    from attnpress.cli.listing import rows_of

    rows = rows_of(options.what)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")
    return 0


def bench(options: argparse.Namespace) -> int:
    """Time the kernel against its peers."""
    _check_json(options.json, {"peer", "ours_ms", "peer_ms", "ratio"})
    from dataclasses import asdict

    from attnpress.report.encode import encode_table
    from attnpress.report.render import models_table, timings_table

    table = encode_table if options.encode else models_table if options.whole_model else timings_table
    records = [asdict(timing) for timing in _timings(options)]
    for record in records:
        record["provenance"]["command"] = _command_line(options)
    _write_json(records, options.json)
    _print_table(table(records), options.talk, width=160)
    return 0


def _check_engine(options: argparse.Namespace) -> None:
    if options.workers is not None and options.engine != "ray":
        raise ConfigError("--workers is the number of workers of --engine ray: add that, or drop --workers")


def _model_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The recipe of a run; for a model that `save_pretrained` wrote, which has no data, that of the overrides."""
    if (folder / "recipe.yaml").is_file() or not (folder / "config.json").is_file():
        return _run_config(folder, overrides)
    if not any(item.startswith("data.") for item in overrides):
        raise ConfigError(
            f"{folder}: a model that save_pretrained wrote, which names no data; add --set data.task=NAME, or "
            "data.task=custom with the other keys of data"
        )
    plain: dict[str, Any] = {}
    for item in overrides:
        override(RunConfig, plain, item)
    return parse_spec(RunConfig, plain)


def _run_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe of a run."""
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(
            f"{folder}: no run folder (it has no recipe.yaml); give the one that `attnpress compress --output` made"
        )
    return load_config(folder / "recipe.yaml", overrides)


def _command_line(options: argparse.Namespace) -> str:
    """The command as it can be typed again, with the variables that force a target or restrict the processor."""
    forced = os.environ.get("ATTNPRESS_CPU_TARGET")
    to = [] if os.environ.get("HOLD_TO", "avx2") == "avx2" else [f"HOLD_TO={os.environ['HOLD_TO']}"]
    held = [*to, "csrc/hold_avx2.sh"] if "hold_avx2.so" in os.environ.get("LD_PRELOAD", "") else []
    return (f"ATTNPRESS_CPU_TARGET={forced} " if forced else "") + shlex.join([*held, "attnpress", *options.words])


def _timings(options: argparse.Namespace) -> Sequence[Any]:
    from attnpress.benchmark.attention import BenchmarkError, bench, bench_run

    if options.encode:
        return _encode_timings(options)
    if options.texts is not None or any(getattr(options, name) for name in ENCODE_ALONE):
        raise BenchmarkError(
            "--texts and --column are those of --encode MODEL, and so are --scores, --count, --judged and --seconds"
        )
    if len(options.threads) > 1:
        raise BenchmarkError("--threads: several numbers are for --encode MODEL; give one")
    shared = {"threads": options.threads[0], **({"peers": options.peers} if options.peers else {})}
    if options.run_dir:
        if options.seq_len or options.sparsity is not None or options.tail or options.tail_rank:
            raise BenchmarkError(
                "--from takes the run's own lengths, sparsity and tail: drop --seq-len, --sparsity, --tail, --tail-rank"
            )
        config = _run_config(options.run_dir)
        _quiet_libraries()
        return bench_run(options.run_dir, config, layers=options.layer, rows=options.batch or 8, **shared)
    if options.layer:
        raise BenchmarkError("--layer chooses among the layers of --from RUN_DIR")
    sparsity, lengths = 0.95 if options.sparsity is None else options.sparsity, options.seq_len or [128, 512, 2048]
    if options.tail_rank and options.tail != "linear":
        raise BenchmarkError("--tail-rank is the number of directions of --tail linear")
    if options.whole_model and options.tail:
        raise BenchmarkError("--tail times one call of attention: drop it, or --whole-model")
    if options.whole_model:
        _quiet_libraries()
        from attnpress.benchmark.whole_model import bench_models

        return bench_models(
            options.whole_model,
            lengths,
            sparsity=sparsity,
            batch=options.batch or 1,
            linear=options.linear,
            ragged=options.ragged,
            **shared,
        )
    if options.linear == "int8" or options.ragged:
        raise BenchmarkError("--linear and --ragged are about whole models: add --whole-model NAME")
    tail = {"tail": options.tail or "none", **({"tail_rank": options.tail_rank} if options.tail_rank else {})}
    return bench(lengths, sparsity=sparsity, batch=options.batch, **tail, **shared)


ENCODE_ALONE = ("column", "scores", "count", "judged", "seconds")
"""Options of `bench` that only --encode takes, beside --texts."""


def _encode_timings(options: argparse.Namespace) -> Sequence[Any]:
    from dataclasses import replace

    from attnpress.benchmark.attention import BenchmarkError

    if options.texts is None:
        raise BenchmarkError("--encode needs texts: --texts FILE, as `attnpress quantize` takes them")
    wrong = [name for name in ("seq_len", "tail_rank", "ragged", "layer") if getattr(options, name)]
    if wrong:
        raise BenchmarkError(f"--encode takes no --{wrong[0].replace('_', '-')}: the texts have their own lengths")
    _quiet_libraries()
    from attnpress.posttraining.peers import bench_encode
    from attnpress.posttraining.run import USUAL

    given = {name: getattr(options, name) for name in ("sparsity", "tail") if getattr(options, name) is not None}
    asked = {name: getattr(options, name) for name in ("peers", "batch", "count", "judged", "seconds")}
    return bench_encode(
        options.encode,
        str(options.texts),
        options.column,
        scores=options.scores,
        form=replace(USUAL, **given),
        threads=options.threads,
        **{name: value for name, value in asked.items() if value is not None},
    )


def _print_table(table: object, talk: TextIO | None, width: int = 140) -> None:
    """Print a table at the width of the terminal; without one, at the given width."""
    from rich.console import Console

    if talk is not None:
        Console(file=talk, width=None if talk.isatty() else width).print(table)


def _check_json(file: Path | None, *keys: set[str]) -> None:
    """Check, before the work, that a JSON output can be written and would not replace a foreign file."""

    def is_own(content: bytes) -> bool:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return False
        rows = found if isinstance(found, list) else [found]
        return all(isinstance(row, dict) and any(row.keys() >= known for known in keys) for row in rows)

    if file is not None:
        check_file(file, is_own)


def _write_json(found: object, file: Path | None) -> None:
    if file is not None:
        write_json(file, found)


def _stage_line(text: str) -> None:
    print(f"== {text}", flush=True)


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"attnpress: {message}", file=sys.stderr, flush=True)


def _quiet_libraries() -> None:
    from attnpress.models.loading import quiet

    quiet()
