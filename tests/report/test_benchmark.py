"""Tables of benchmarks: what stands where, and what was not measured stays empty."""

from __future__ import annotations

from typing import Any

from attnpress.report.benchmark import attention_markdown, layers_markdown, models_markdown, settings_markdown


def timing(peer: str, ratio: float, length: int = 128, **more: Any) -> dict[str, Any]:
    return {"seq_len": length, "batch": 8, "threads": 1, "peer": peer, "ratio": ratio, "ours_ms": 12.34, **more}


def whole(peer: str, ratio: float, ragged: str | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = {"model": "bert-base", "linear": "int8", "ragged": ragged, "ours_attention": 0.07}
    sizes: dict[str, Any] = {"ours_model_mb": 50.0, "peer_model_mb": 100.0, "ours_file_mb": 43.0, "peer_file_mb": 100.0}
    return timing(peer, ratio, **facts, peer_attention=0.041 if peer == "sdpa" else None, **sizes)


def test_attention_has_a_column_for_each_peer_and_thread_count() -> None:
    found = [timing("sdpa", 3.444), timing("openvino", 1.5), timing("sdpa", 4.2, threads=2), timing("sdpa", 6.0, 384)]
    assert attention_markdown(found).splitlines() == [
        "| tokens (batch) | SDPA float32, 1 thread | OpenVINO int8, 1 thread | SDPA float32, 2 threads |",
        "| --- | ---: | ---: | ---: |",
        "| 128 (8) | 3.44 | 1.50 | 4.20 |",
        "| 384 (8) | 6.00 |  |  |",
    ]


def test_settings_and_layers() -> None:
    lines = settings_markdown({"dense": [timing("sdpa", 2.0)], "AVX2": [timing("sdpa", 1.5, 384)]}).splitlines()
    assert lines[0] == "| tokens (batch) | dense | AVX2 |"
    assert lines[2:] == ["| 128 (8) | 2.00 |  |", "| 384 (8) |  | 1.50 |"]
    layer = [
        timing(peer, ratio, layer="layer.0", sparsity=0.9512) for peer, ratio in (("sdpa", 2.0), ("openvino", 1.4))
    ]
    assert layers_markdown(layer).splitlines()[2] == "| `layer.0` | 128 (8) | 0.951 | 2.00 | 1.40 |"


def test_whole_models_show_what_only_the_framework_tells() -> None:
    found = [whole("openvino-int8", 1.05), whole("sdpa", 3.2), whole("openvino-int8", 1.2, ragged="mrpc")]
    lines = models_markdown(found).splitlines()
    assert lines[0].startswith("| model, linear layers | tokens (batch) | threads | ours, ms | SDPA float32 | OpenVINO")
    assert lines[2:] == [
        "| bert-base, int8 | 128 (8) | 1 | 12.3 | 3.20 | 1.05 | 7% | 4% | 0.50 | 0.43 |",
        "| bert-base, int8 | MRPC's, to 128 (8) | 1 | 12.3 |  | 1.20 |  |  |  |  |",
    ]


def test_int8_sides_show_how_far_they_are_off() -> None:
    found = [
        whole("onnxruntime-int8", 1.2) | {"ours_unpruned_difference": 0.0123, "peer_difference": 0.2081},
        whole("sdpa", 2.0) | {"ours_unpruned_difference": 0.0123, "peer_difference": 0.0},
    ]
    header, _, row = models_markdown(found).splitlines()
    assert header.endswith("| file | error, ours | error, ONNX Runtime int8 |")
    assert row.endswith("| 0.43 | 1.2% | 20.8% |")
