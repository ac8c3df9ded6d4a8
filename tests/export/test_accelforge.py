"""A workload for AccelForge: its text by the schema; run by AccelForge where it is installed (Python 3.12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from attnpress.config import AttentionSpec, TensorSpec
from attnpress.export import ExportError
from attnpress.export.accelforge import FILE, write_accelforge
from tests.export.factories import LAYERS, SPEC, made, sequences

SPECS = dict.fromkeys(LAYERS, SPEC)


def rendered(file: Path, **variables: int) -> dict[str, Any]:
    jinja2 = pytest.importorskip("jinja2")
    text = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(file.read_text("utf-8")).render(**variables)
    found: dict[str, Any] = yaml.safe_load(text)["workload"]
    return found


def test_ranks_hold_the_survivors_of_each_layer(tmp_path: Path) -> None:
    said = write_accelforge(sequences(), SPECS, tmp_path)
    kept = said["kept"]
    assert isinstance(kept, list)
    for number, layer in enumerate(LAYERS):
        own = [one for one in sequences() if one.layer == layer]
        mean = sum(int(one.survivors.sum()) for one in own) / sum(one.survivors.numel() for one in own)
        assert mean <= kept[number] < mean + 1
        sizes = rendered(tmp_path / FILE, LAYER=number)["rank_sizes"]
        assert sizes == {"B": 1, "H": 2, "M": said["tokens"], "P": said["tokens"], "R": kept[number], "E": 16, "F": 16}
    assert rendered(tmp_path / FILE, KEPT=9)["rank_sizes"]["R"] == 9


def test_every_rank_and_tensor_of_an_einsum_has_a_size(tmp_path: Path) -> None:
    write_accelforge(sequences(), SPECS, tmp_path)
    workload = rendered(tmp_path / FILE)
    assert [one["einsum"] for one in workload["einsums"]] == [
        "S[b, h, m, p] = Q[b, h, m, e] * K[b, h, p, e]", "O[b, h, m, f] = A[b, h, m, r] * V[b, h, r, f]",
    ]  # fmt: skip
    assert set("bhmpref".upper()) == workload["rank_sizes"].keys()
    assert workload["bits_per_value"] == {"Q": 8, "K": 8, "V": 8, "A": 8, "S": 32, "O": 8}


def test_layers_that_differ_are_refused(tmp_path: Path) -> None:
    other = AttentionSpec(sparsity=0.7, v=TensorSpec(bits=4))
    with pytest.raises(ExportError, match="layers differ in heads or bits"):
        write_accelforge([made(["x."], layer="a"), made(["x."], layer="b")], {"a": SPEC, "b": other}, tmp_path)


def test_accelforge_maps_it(tmp_path: Path) -> None:
    accelforge = pytest.importorskip("accelforge")
    main = pytest.importorskip("accelforge.mapper.FFM.main")
    metrics = pytest.importorskip("accelforge.frontend.mapper.metrics")
    tokens = write_accelforge(sequences(), SPECS, tmp_path)["tokens"]
    assert isinstance(tokens, int)
    for kept in (2, 8):  # one multiplier, so that cycles are the multiplications
        spec = accelforge.Spec.from_yaml(
            accelforge.examples.arches.simple, tmp_path / FILE, jinja_parse_data={"KEPT": kept}
        )
        spec.mapper.metrics = metrics.Metrics.LATENCY
        found = main.map_workload_to_arch(spec, eval_in_detail=False, print_progress=False).data
        assert float(found["Total<SEP>latency"].iloc[0]) == 2 * tokens * 16 * (tokens + kept)
