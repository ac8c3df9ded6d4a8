"""Topologies for SCALE-Sim: what they say, what SCALE-Sim makes of them, and the analytic model beside it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attnpress.config import AttentionSpec
from attnpress.core.accelerator import Accelerator, Shape, estimate, systolic_cycles
from attnpress.export.scalesim import ARRAY, KINDS, Gemm, gemms, simulate, total_cycles, write_scalesim
from attnpress.export.sequences import AttendedSequence
from tests.export.factories import LAYERS, made, sequences

pytest.importorskip("scalesim")


def test_products_say_what_is_kept() -> None:
    found = gemms(made(["x...", "xx..", "xxx."]))
    assert found["dense"] == {Gemm("QK", 3, 4, 4, 4): 1, Gemm("PV", 4, 3, 4, 4): 1}
    assert found["remaining"] == {Gemm("QK", 3, 4, 4, 4): 1, Gemm("PV", 4, 3, 4, 2): 1}
    assert Gemm("PV", 4, 3, 4, 2).line == "PV.4x3x4.2, 4, 3, 4, 2:4,\n"


def test_scalesim_runs_what_was_written(tmp_path: Path) -> None:
    cycles = write_scalesim(sequences(), tmp_path)
    counts = json.loads((tmp_path / "gemms.json").read_text("utf-8"))
    assert list(counts["layers"]) == list(LAYERS)
    for layer in counts["layers"].values():
        assert [sum(layer[kind].values()) for kind in KINDS] == [4 * 2 * 2] * 2  # sequences, heads, products
    assert cycles == {kind: total_cycles(counts["layers"], counts["cycles"], kind) for kind in KINDS}
    assert [*counts["cycles"]["dense"]] == [*simulate(tmp_path, "dense")]
    assert 0 < cycles["remaining"] <= cycles["dense"]


@pytest.mark.skipif(
    tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4), reason="SCALE-Sim 3.0.0 alone needs NumPy below 2.4"
)
def test_the_tool_itself_reads_the_files(tmp_path: Path) -> None:
    write_scalesim([made(["x...", "xx..", "xxx."])], tmp_path)
    files = [word for option, name in (("-t", "dense.csv"), ("-l", "layout.csv"), ("-c", "dense.cfg"))
             for word in (option, str(tmp_path / name))]  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "scalesim.scale", *files, "-p", str(tmp_path / "out"), "-i", "gemm", "-s", "N"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    report = (tmp_path / "out" / "dense" / "COMPUTE_REPORT.csv").read_text("utf-8").splitlines()
    rows = [*csv.DictReader(report, skipinitialspace=True)]
    ours = simulate(tmp_path, "dense")
    assert [float(row["Total Cycles"]) for row in rows] == [one["Total Cycles"] for one in ours.values()]


def long_sequence(length: int, dim: int, kept: int) -> AttendedSequence:
    codes = torch.zeros(1, length, length, dtype=torch.uint8)
    codes[..., :kept] = 1
    v_codes = torch.ones(1, length, dim, dtype=torch.int8)
    return AttendedSequence(
        "layer", 0, codes, torch.ones_like(codes, dtype=torch.bool), v_codes, codes.long() @ v_codes.long()
    )


@pytest.mark.parametrize(("length", "dim"), [(20, 32), (55, 32), (128, 64)])
def test_the_analytic_model_is_within_5_percent_of_scalesim_where_all_is_dense(
    length: int, dim: int, tmp_path: Path
) -> None:
    found = write_scalesim([long_sequence(length, dim, length // 8 + 1)], tmp_path)["dense"]
    machine = Accelerator(rows=ARRAY, columns=ARRAY)
    modelled = estimate(machine, Shape(length, dim, length**2), AttentionSpec()).cycles
    assert abs(modelled - found) <= 0.05 * found


def test_sparse_rows_take_as_many_cycles_as_their_survivors(tmp_path: Path) -> None:
    write_scalesim([long_sequence(128, 32, 40)], tmp_path)
    ran = {name.partition(".")[0]: row["Total Cycles"] for name, row in simulate(tmp_path, "remaining").items()}
    expected = systolic_cycles(Accelerator(rows=ARRAY, columns=ARRAY), 32, 128, 40)
    assert abs(ran["PV"] - expected) <= 0.05 * expected
