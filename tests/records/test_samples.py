"""Samples of attention: read back as written, the same bytes each time, and none where there are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from attnpress.records.samples import Samples, read_samples, samples_bytes, samples_file

MAP = np.linspace(0, 1, 18, dtype=np.float16).reshape(2, 3, 3)
SAMPLES = Samples(
    "relative", [["[CLS]", "ça", "$"], ["a", "b", "c"]], {"layer.0": [MAP, MAP[::-1]], "layer.1": [MAP, MAP]},
    {"layer.0": np.arange(8).reshape(2, 4), "layer.1": np.ones((2, 4), dtype=np.int64)},
)  # fmt: skip


def test_samples_survive_their_file(tmp_path: Path) -> None:
    file = samples_file(tmp_path, "dense")
    file.parent.mkdir()
    file.write_bytes(samples_bytes(SAMPLES))
    found = read_samples(tmp_path, "dense")
    assert found is not None
    assert (found.rule, found.tokens, list(found.maps)) == (SAMPLES.rule, SAMPLES.tokens, list(SAMPLES.maps))
    for name, maps in SAMPLES.maps.items():
        assert all(np.array_equal(a, b) for a, b in zip(found.maps[name], maps, strict=True))
        assert np.array_equal(found.histograms[name], SAMPLES.histograms[name])


def test_the_same_samples_are_the_same_bytes_in_every_process() -> None:
    code = (
        "import hashlib; from tests.records.test_samples import *; "
        "print(hashlib.sha256(samples_bytes(SAMPLES)).hexdigest())"
    )
    root = Path(__file__).parents[2]
    seen = {
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout for _ in "ab"
    }
    assert len(seen) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"no safetensors", samples_bytes(SAMPLES)[:200], save({"x": MAP}), save({"x": MAP}, {"attnpress": "{}"}),
     save({"x": MAP}, {"attnpress": '{"format": 2}'})],
    ids=["empty", "other", "cut short", "without header", "header without keys", "newer format"],
)  # fmt: skip
def test_what_cannot_be_read_is_as_if_it_were_not_there(content: bytes, tmp_path: Path) -> None:
    assert read_samples(tmp_path, "dense") is None
    samples_file(tmp_path, "dense").parent.mkdir()
    samples_file(tmp_path, "dense").write_bytes(content)
    assert read_samples(tmp_path, "dense") is None
