"""Compressed rows: only survivors of real tokens, and P V from them is the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnpress.export import ExportError
from attnpress.export.csr import FILE, packed_rows, write_csr
from attnpress.export.mapped import map_tensors
from tests.export.factories import LAYERS, header_of, made, record, sequences

scipy_sparse = pytest.importorskip("scipy.sparse")


def test_rows_are_those_of_a_drawing() -> None:
    one = made(["x..x", "..x.", "xxxx"])
    found = packed_rows([one])
    assert found["start"].tolist() == [0, 2, 3, 7]
    assert found["key"].tolist() == [0, 3, 2, 0, 1, 2, 3]
    assert found["lengths"].tolist() == [3]
    assert found["key_lengths"].tolist() == [4]
    twice = packed_rows([one, one])
    assert twice["start"].tolist() == [0, 2, 3, 7, 9, 10, 14]
    assert twice["v_codes"].shape == (8, 4)


def test_scipy_multiplies_what_was_written(tmp_path: Path) -> None:
    stated = write_csr(sequences(seeds=(5, 6)), tmp_path)
    header, tensors = header_of(tmp_path / FILE), map_tensors(tmp_path / FILE)[0]
    assert stated["bytes"] == (tmp_path / FILE).stat().st_size
    heads = json.loads(header["heads"])
    for name in LAYERS:
        t = {part: tensors[f"{name}.{part}"] for part in ("start", "key", "code", "v_codes", "weighted")}
        lengths = tensors[f"{name}.lengths"].tolist()
        shape = len(t["weighted"]), max(lengths)
        rows = scipy_sparse.csr_matrix((t["code"].astype("int64"), t["key"], t["start"]), shape)
        assert sum(lengths) == stated["tokens"]
        row = key = 0
        for length in lengths:
            for _ in range(heads[name][0]):
                p, v = rows[row : row + length, :length], t["v_codes"][key : key + length].astype("int64")
                assert (p @ v == t["weighted"][row : row + length]).all()
                row, key = row + length, key + length
        assert row == len(t["weighted"])
        assert key == len(t["v_codes"])


def test_padding_is_not_in_it(tmp_path: Path) -> None:
    write_csr(sequences(), tmp_path)
    tensors, batch = load_file(tmp_path / FILE), record()[0]
    for name in LAYERS:
        assert len(tensors[f"{name}.key"]) == int(batch.layers[name]["survivors"].sum())
        assert torch.equal(tensors[f"{name}.lengths"], batch.layers[name]["lengths"])


def test_sums_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    one = made(["x.", ".x"])
    one.weighted[0, 0, 0] += 1
    with pytest.raises(ExportError, match="layer: csr"):
        write_csr([one], tmp_path)
