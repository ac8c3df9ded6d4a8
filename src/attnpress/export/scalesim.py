"""`--to scalesim`: the matrix products of attention as SCALE-Sim topologies, dense and pruned.

The array is weight stationary, the only dataflow in which SCALE-Sim 3 supports sparsity; the stationary operand is
sparse. In Q K^T, K^T is stationary and rows of Q stream. P V is transposed to V^T P^T, so that P^T is stationary and
sparse; its ratio N:M means that a row keeps N of its M keys.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnpress.export.errors import ExportError, require
from attnpress.export.sequences import AttendedSequence, by_layer
from attnpress.files import write_text

KINDS = ("dense", "remaining")
LAYOUT, COUNTS = "layout.csv", "gemms.json"
ARRAY = 32
"""Rows and columns of the systolic array in the configurations written."""

NOTES = (
    "Each GEMM stands once in a topology; gemms.json says how often each layer runs it, and its cycles.",
    "remaining.csv: a row of P keeps N of M keys, N the mean of the head on that sequence, rounded up: SCALE-Sim takes "
    "one ratio for all rows. Scores are needed before a pair can be pruned, so Q K^T is dense in both.",
)

HEADER = "Layer, M, N, K, Sparsity,\n"

CONFIG = """[general]
run_name = {kind}

[architecture_presets]
ArrayHeight = {array}
ArrayWidth = {array}
IfmapSramSzkB = 64
FilterSramSzkB = 64
OfmapSramSzkB = 64
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Dataflow = ws
Bandwidth = 10
ReadRequestBuffer = 64
WriteRequestBuffer = 64

[layout]
IfmapCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterCustomLayout = False
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2

[sparsity]
SparsitySupport = {sparse}
SparseRep = ellpack_block
OptimizedMapping = False
BlockSize = 4
RandomNumberGeneratorSeed = 0

[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""


@dataclass(frozen=True)
class Gemm:
    """One product [m, k] [k, n]; each column of the second matrix has `kept` of k nonzero numbers."""

    product: str
    m: int
    n: int
    k: int
    kept: int

    @property
    def name(self) -> str:
        """Such as "PV.32x55x55.3"; the number of kept keys is included if some are pruned."""
        return f"{self.product}.{self.m}x{self.n}x{self.k}" + (f".{self.kept}" if self.kept < self.k else "")

    @property
    def line(self) -> str:
        """Line of a topology file."""
        return f"{self.name}, {self.m}, {self.n}, {self.k}, {self.kept}:{self.k},\n"


def gemms(sequence: AttendedSequence) -> Mapping[str, Counter[Gemm]]:
    """The products of one layer on one sequence, by kind, with the number of heads that run each."""
    heads, rows, keys = sequence.codes.shape
    dim = sequence.v_codes.shape[-1]
    if not rows or not keys:
        return {kind: Counter() for kind in KINDS}
    scores = Gemm("QK", rows, keys, dim, dim)
    kept = [max(1, -(-int(total) // rows)) for total in sequence.survivors.sum(-1)]
    return {
        "dense": Counter({scores: heads, Gemm("PV", dim, rows, keys, keys): heads}),
        "remaining": Counter({scores: heads}) + Counter(Gemm("PV", dim, rows, keys, one) for one in kept),
    }


def write_scalesim(sequences: Iterable[AttendedSequence], folder: Path, array: int = ARRAY) -> dict[str, int]:
    """Write a topology and a configuration of each kind, a layout and the counts; run both.

    Returns:
        Cycles of all heads, sequences and layers, by kind.

    Raises:
        ExportError: scalesim is not installed, or did not finish a file.
    """
    layers: dict[str, dict[str, dict[str, int]]] = {}
    seen: dict[str, dict[str, Gemm]] = {kind: {} for kind in KINDS}
    for name, found in by_layer(sequences).items():
        counted = [gemms(one) for one in found]
        totals = {kind: sum((one[kind] for one in counted), Counter[Gemm]()) for kind in KINDS}
        layers[name] = {kind: {gemm.name: count for gemm, count in total.items()} for kind, total in totals.items()}
        for kind, total in totals.items():
            seen[kind] |= {gemm.name: gemm for gemm in total}
    write_text(folder / LAYOUT, "Layer name,\n")  # the file must exist, but is not read without a custom layout
    for kind in KINDS:
        write_text(folder / f"{kind}.csv", "".join([HEADER, *(gemm.line for gemm in seen[kind].values())]))
        write_text(folder / f"{kind}.cfg", CONFIG.format(kind=kind, array=array, sparse=kind == "remaining"))
    cycles = {kind: {name: int(row["Total Cycles"]) for name, row in simulate(folder, kind).items()} for kind in KINDS}
    write_text(folder / COUNTS, json.dumps({"array": array, "layers": layers, "cycles": cycles}, indent=1) + "\n")
    return {kind: total_cycles(layers, cycles, kind) for kind in KINDS}


def total_cycles(
    layers: Mapping[str, Mapping[str, Mapping[str, int]]], cycles: Mapping[str, Mapping[str, int]], kind: str
) -> int:
    """Cycles of all products in sequence, from the content of `gemms.json`."""
    return sum(cycles[kind][name] * count for layer in layers.values() for name, count in layer[kind].items())


def simulate(folder: Path, kind: str) -> dict[str, dict[str, float]]:
    """Run one topology of an export.

    Args:
        folder: written by `write_scalesim`.
        kind: one of KINDS.

    Returns:
        By name of the GEMM, the columns of SCALE-Sim's COMPUTE_REPORT.csv.

    Raises:
        ExportError: scalesim is not installed, or did not finish the file.
    """
    require("scalesim", "scalesim")
    from scalesim.scale_sim import scalesim

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()) as said:
        with warnings.catch_warnings(), _arrays_of_one():
            warnings.simplefilter("ignore")  # scalesim leaves files open
            simulator = scalesim(
                save_disk_space=True,
                verbose=False,
                config=str(folder / f"{kind}.cfg"),
                topology=str(folder / f"{kind}.csv"),
                layout=str(folder / LAYOUT),
                input_type_gemm=True,
            )
            simulator.run_scale(top_path=scratch)
        report = Path(scratch) / kind / "COMPUTE_REPORT.csv"
        if not report.is_file():
            raise ExportError(f"scalesim did not run {folder / kind}.csv to its end: {said.getvalue()[-300:]}")
        rows = [*csv.DictReader(report.read_text(encoding="utf-8").splitlines(), skipinitialspace=True)]
    names = [line.split(",")[0] for line in (folder / f"{kind}.csv").read_text(encoding="utf-8").splitlines()[1:]]
    return {name: _numbers(row) for name, row in zip(names, rows, strict=True)}


@contextlib.contextmanager
def _arrays_of_one() -> Iterator[None]:
    """Work around SCALE-Sim 3.0.0: it converts arrays of one number to int, which NumPy refuses since 2.4."""
    from scalesim.memory import double_buffered_scratchpad_mem as memory

    memory.max = lambda *values: np.asarray(max(*values)).item()  # shadows the built-in function
    try:
        yield
    finally:
        del memory.max


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if key and value}
