"""Traces: one sparsity whoever counts, integers that follow from codes, shards with an index, and older formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnpress.cli import main
from attnpress.config import AttentionSpec, ProbsSpec, RuleName, TensorSpec
from attnpress.core.attention import repeat_heads
from attnpress.export import ExportError
from attnpress.export.mapped import map_tensors
from attnpress.export.recording import record_batch
from attnpress.export.trace import INDEX, check_trace, trace_files, write_shards, write_trace
from attnpress.models.binding import bind
from attnpress.training.calibration import calibrate
from tests.deployment.test_attention import make_batch, tiny_bert
from tests.export.factories import LAYERS, SPEC, header_of, record
from tests.models.factories import DECODERS
from tests.models.factories import make_batch as make_family_batch


def layer(spec: AttentionSpec = SPEC) -> dict[str, Tensor]:
    return record(spec)[0].layers[LAYERS[1]]


def test_three_readers_count_one_sparsity() -> None:
    t, batch = layer(), make_batch(5)
    lengths = batch["attention_mask"].sum(-1)
    assert torch.equal(t["lengths"].long(), lengths)
    assert torch.equal(t["key_lengths"].long(), lengths)
    by_mask = int(t["valid"].expand_as(t["p_codes"]).sum())
    by_lengths = int((lengths**2).sum()) * 2
    kept = int((t["p_codes"] > 0).sum())
    assert by_mask == by_lengths
    assert kept == int(t["survivors"].sum()) == len(t["csr_key"])
    assert torch.equal(t["keep"], t["keep"] & t["valid"])
    real = batch["attention_mask"].bool()
    for name in ("p_codes", "keep", "code_sum", "weighted", "output", "survivors", "row_max"):
        assert not t[name].permute(0, 2, 1, 3)[~real].any(), f"{name}: padding is not empty"


def test_rows_of_real_tokens_are_those_of_the_model() -> None:
    model, batch = tiny_bert(SPEC), make_batch(5)
    padded = record_batch(model, batch).layers[LAYERS[1]]
    for place, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        alone = record_batch(model, {name: x[place : place + 1, :length] for name, x in batch.items()})
        for name in ("row_max", "p_codes", "code_sum", "weighted", "survivors"):
            ours = padded[name][place, :, :length]
            found = alone.layers[LAYERS[1]][name][0]
            assert torch.equal(ours[..., : found.shape[-1]], found), name


@pytest.mark.parametrize("rule", ["relative", "threshold", "topk", "mass", "nm"])
@pytest.mark.parametrize("mode", ["row", "unit"])
def test_the_cut_is_what_the_rule_comes_down_to(rule: RuleName, mode: str) -> None:
    t = layer(AttentionSpec(sparsity=0.6, rule=rule, p=ProbsSpec(mode=mode)))  # type: ignore[arg-type]
    valid, cut = t["valid"].expand_as(t["keep"]), t["cut"]
    distance = (t["row_max"] - t["acc"]).masked_fill(~valid, 2**30)
    nearer = (distance.unsqueeze(-2) < distance.unsqueeze(-1)) | (
        (distance.unsqueeze(-2) == distance.unsqueeze(-1)) & torch.ones(*distance.shape[-1:] * 2).tril(-1).bool()
    )
    if rule == "relative":
        assert torch.equal(t["keep"], valid & (distance <= cut))
    elif rule == "topk":
        assert torch.equal(t["keep"], valid & (nearer.sum(-1) < cut))
    elif rule == "nm":
        assert int(cut) == 2
        assert int(t["keep"].unflatten(-1, (-1, 4)).sum(-1).max()) == 2
    else:
        from attnpress.core.exponential import exponent, exponent_rate, power

        p = power(exponent(distance, exponent_rate(t["alpha"]))).long() * valid
        before = (nearer & valid.unsqueeze(-2)).long() @ p.unsqueeze(-1) if rule == "mass" else p.unsqueeze(-1)
        kept = before.squeeze(-1) < cut if rule == "mass" else (p >= cut) | (distance == 0)
        assert torch.equal(t["keep"], kept & valid)


def test_a_foretold_mask_is_traced_with_the_scores_that_it_comes_from(tmp_path: Path) -> None:
    spec = AttentionSpec(sparsity=0.6, predictor_bits=4)
    t = layer(spec)
    foretold = t["foretold"].masked_fill(~t["valid"], -(2**30))
    assert torch.equal(t["keep"], t["valid"] & (foretold.amax(-1, keepdim=True) - foretold <= t["cut"]))
    short = [((t[name].float() + 8) / 16).floor().clamp(-7, 7) for name in ("q_codes", "k_codes")]
    assert torch.equal(t["foretold"], (short[0] @ short[1].mT).int())
    kept = t["acc"].masked_fill(~t["keep"], -(2**30)).amax(-1, keepdim=True)
    assert torch.equal(t["row_max"], kept.masked_fill(~t["keep"].any(-1, keepdim=True), 0))
    write_trace(tiny_bert(spec), make_batch(5), tmp_path)
    file = tmp_path / "trace.safetensors"
    check_trace(file)
    tensors, header = load_file(file), header_of(file)
    tensors[f"{LAYERS[1]}.foretold"].view(-1)[0] += 1
    save_file(tensors, file, header)
    with pytest.raises(ExportError, match="foretold"):
        check_trace(file)


def test_nothing_pruned_has_no_cut() -> None:
    assert "cut" not in layer(AttentionSpec(sparsity=0.0))


def test_compressed_rows_are_the_codes() -> None:
    t = layer()
    rows = t["p_codes"].flatten(0, 2)
    rebuilt = torch.zeros_like(rows)
    for row, (begin, end) in enumerate(zip(t["csr_start"][:-1].tolist(), t["csr_start"][1:].tolist(), strict=True)):
        rebuilt[row, t["csr_key"][begin:end].long()] = t["csr_code"][begin:end]
    assert torch.equal(rebuilt, rows)


@pytest.mark.parametrize("name", ["survivors", "cut", "lengths", "key_lengths", "csr_key", "csr_code", "row_max"])
def test_a_changed_integer_is_found(name: str, tmp_path: Path) -> None:
    write_trace(tiny_bert(SPEC), make_batch(5), tmp_path)
    file = tmp_path / "trace.safetensors"
    tensors, header = load_file(file), header_of(file)
    tensors[f"{LAYERS[1]}.{name}"].view(-1)[0] += 1
    save_file(tensors, file, header)
    with pytest.raises(ExportError, match=name):
        check_trace(file)


@pytest.mark.parametrize("name", ["survivors", "q_codes", "valid"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    write_trace(tiny_bert(SPEC), make_batch(5), tmp_path)
    file = tmp_path / "trace.safetensors"
    tensors, header = load_file(file), header_of(file)
    del tensors[f"{LAYERS[1]}.{name}"]
    save_file(tensors, file, header)
    with pytest.raises(ExportError, match=rf"{name}.*missing"):
        check_trace(file)


def test_a_trace_of_format_2_is_still_checked(tmp_path: Path) -> None:
    write_trace(tiny_bert(SPEC), make_batch(5), tmp_path)
    file = tmp_path / "trace.safetensors"
    newer = ("survivors", "cut", "lengths", "key_lengths", "csr_start", "csr_key", "csr_code")
    tensors = {name: x for name, x in load_file(file).items() if name.rsplit(".", 1)[1] not in newer}
    header = header_of(file) | {"format": "2"}
    save_file(tensors, file, header)
    check_trace(file)
    tensors[f"{LAYERS[0]}.p_codes"].view(-1)[0] += 1
    save_file(tensors, file, header)
    with pytest.raises(ExportError, match=rf"{LAYERS[0]}\.p_codes"):
        check_trace(file)


def test_batches_are_shards_with_an_index(tmp_path: Path) -> None:
    model, batches = tiny_bert(SPEC), [make_batch(seed, rows=2) for seed in range(3)]
    written = write_shards(model, batches, tmp_path)
    index = json.loads((tmp_path / INDEX).read_text("utf-8"))
    files = [tmp_path / f"trace-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert trace_files(tmp_path) == files
    assert index["layers"] == list(LAYERS)
    assert index["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches) == written["tokens"]
    assert index["bytes"] == sum(file.stat().st_size for file in files)
    assert index["bytes_a_token"] == round(index["bytes"] / index["tokens"], 1)
    check_trace(tmp_path)
    for file, batch in zip(files, batches, strict=True):
        assert torch.equal(load_file(file)["input.input_ids"], batch["input_ids"])
    files[1].unlink()
    with pytest.raises(ExportError, match=r"trace-00002-of-00003\.safetensors, not found"):
        check_trace(tmp_path)
    (tmp_path / INDEX).write_text("[]", encoding="utf-8")
    with pytest.raises(ExportError, match="not an index of a trace"):
        check_trace(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ExportError, match="no trace here"):
        check_trace(tmp_path)


def test_the_command_writes_shards(finished: Path, tmp_path: Path) -> None:
    place = tmp_path / "trace"
    assert main(["export", str(finished), "--to", "trace", "--rows", "5", "--batch", "2", "--output", str(place)]) == 0
    record = json.loads((place / "export.json").read_text("utf-8"))
    assert sorted(record["files"]) == [*(f"trace-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), INDEX]
    assert record["bytes_a_token"] > 0
    check_trace(place)


def test_a_mapped_file_holds_what_a_loaded_one_does(tmp_path: Path) -> None:
    write_trace(tiny_bert(SPEC), make_batch(5), tmp_path)
    file = tmp_path / "trace.safetensors"
    mapped, header = map_tensors(file)
    loaded = load_file(file)
    assert header == header_of(file)
    assert mapped.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert np.array_equal(mapped[name], tensor.numpy()), name
    base = mapped[f"{LAYERS[0]}.acc"]
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("content", [b"", b"\x05\x00\x00\x00\x00\x00\x00\x00hello", b"\xff" * 20])
def test_what_cannot_be_mapped_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ExportError, match=r"x\.safetensors: not a safetensors file"):
        map_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_causal_models_are_traced(family: str) -> None:
    torch.manual_seed(0)
    batch = make_family_batch(family)
    model = bind(DECODERS[family]().eval(), AttentionSpec(sparsity=0.5, smooth_key=True))
    calibrate(model, [batch])
    recorded = record_batch(model, batch)
    lengths = batch["attention_mask"].sum(-1)
    for t in recorded.layers.values():
        assert torch.equal(t["lengths"].long(), lengths)
        pairs = int((lengths * (lengths + 1) // 2).sum())
        assert int(t["valid"].expand(-1, 1, -1, -1).sum()) == pairs
        v = repeat_heads(t["v_codes"], t["q_codes"].shape[1]).long()
        assert torch.equal(t["p_codes"].long() @ v, t["weighted"])


def test_bits_of_each_matrix_show_in_the_codes() -> None:
    t = layer(AttentionSpec(sparsity=0.5, q=TensorSpec(bits=3), v=TensorSpec(bits=4), p=ProbsSpec(bits=5)))
    assert [int(t[f"{name}_codes"].long().abs().max()) for name in "qvp"] == [3, 7, 31]
