"""Checkpoints that are damaged or not whole are refused in one sentence, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
)

from attnpress.models.binding import attentions
from attnpress.models.hub import ModelError
from attnpress.models.loading import WEIGHTS, load_compressed
from tests.models.checkpoints import load, logits
from tests.models.factories import make_classifier

NAMES = ("low", "middle", "high")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what config.json holds for attnpress."""
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(data["quantization_config"])
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")


def reweigh(folder: Path, part: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change the tensors whose names hold `part`, or drop those for which `change` gives None."""
    changed = {name: change(x) if part in name else x for name, x in load_file(folder / WEIGHTS).items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def add(folder: Path, name: str) -> None:
    save_file(load_file(folder / WEIGHTS) | {name: torch.ones(1)}, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def first_module(stored: dict[str, Any]) -> dict[str, Any]:
    module: dict[str, Any] = next(iter(stored["modules"].values()))
    return module


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


FIRST = "bert.encoder.layer.0.attention.self"


Damage = tuple[Callable[[Path], object], str]


NAN = torch.nan
DAMAGES: dict[str, Damage] = {
    "newer format": (lambda folder: rewrite(folder, lambda x: x.update(format=2)), "format 2.*update attnpress"),
    "no format": (lambda folder: rewrite(folder, lambda x: x.pop("format")), "format None"),
    "no spec": (lambda folder: rewrite(folder, lambda x: x.pop("attention")), "damaged: 'attention'"),
    "spec not an object": (lambda folder: rewrite(folder, lambda x: x.update(attention=8)), "damaged"),
    "unknown key": (lambda folder: rewrite(folder, lambda x: x["attention"].update(bitz=8)), "bitz"),
    "unknown key inside": (lambda folder: rewrite(folder, lambda x: x["attention"]["q"].update(bitz=8)), "bitz"),
    "impossible value": (lambda folder: rewrite(folder, lambda x: x["attention"].update(sparsity=1.5)), "sparsity"),
    "no modules": (lambda folder: rewrite(folder, lambda x: x.update(modules={})), "names no attention modules"),
    "modules not an object": (lambda folder: rewrite(folder, lambda x: x.update(modules=[1])), "damaged"),
    "strange module": (
        lambda folder: rewrite(folder, lambda x: x["modules"].update({"a.b": first_module(x)})),
        r"no attention module 'a\.b'",
    ),
    "huge module": (lambda folder: rewrite(folder, lambda x: first_module(x).update(heads=10**12)), "heads"),
    "other module": (lambda folder: rewrite(folder, lambda x: first_module(x).update(heads=2)), "q_scale has shape"),
    "huge heads": (lambda folder: rewrite(folder, lambda x: first_module(x).update(head_dim=513)), "head_dim"),
    "code for a number": (lambda folder: rewrite(folder, lambda x: first_module(x).update(heads="exit(1)")), "heads"),
    "weights cut short": (lambda folder: truncate(folder / WEIGHTS, 5000), WEIGHTS),
    "weights empty": (lambda folder: truncate(folder / WEIGHTS, 0), WEIGHTS),
    "weights in a pickle": (as_pickle, "pytorch_model.bin: compressed models are read from safetensors"),
    "a scale missing": (lambda folder: reweigh(folder, "q_scale", lambda x: None), "weights lack bert.*q_scale"),
    "thresholds missing": (lambda folder: reweigh(folder, "cutoff", lambda x: None), "weights lack bert.*cutoff"),
    "a scale of another shape": (lambda folder: reweigh(folder, "k_scale", lambda x: x[:, :1].clone()), "has shape"),
    "a scale that is no number": (lambda folder: reweigh(folder, "v_scale", lambda x: x * NAN), "v_scale holds"),
    "a threshold that is no number": (lambda folder: reweigh(folder, "cutoff", lambda x: x * NAN), "cutoff holds"),
    "a scale of zero": (lambda folder: reweigh(folder, "q_scale", lambda x: x * 0), r"safetensors: .*q_scale holds 0;"),
    "a negative scale": (lambda folder: reweigh(folder, "k_scale", lambda x: -x), "k_scale holds -"),
    "a tiny scale": (lambda folder: reweigh(folder, "v_scale", lambda x: x * 0 + 1e-45), "v_scale holds 1.4"),
    "a huge scale": (lambda folder: reweigh(folder, "v_scale", lambda x: x * 0 + 1e38), r"v_scale holds 1e\+38"),
    "a scale of another dtype": (lambda folder: reweigh(folder, "q_scale", lambda x: x.half()), "q_scale has dtype"),
    "a scale in whole numbers": (lambda folder: reweigh(folder, "q_scale", lambda x: x.int()), "q_scale has dtype"),
    "a negative threshold": (lambda folder: reweigh(folder, "cutoff", lambda x: x * 0 - 1), "cutoff holds -1; 0 to"),
    "a huge threshold": (lambda folder: reweigh(folder, "cutoff", lambda x: x * 0 + 1e38), r"cutoff holds 1e\+38"),
    "thresholds that prune nothing": (
        lambda folder: reweigh(folder, "cutoff", lambda x: x + torch.inf), "cutoff keeps every pair.* sparsity of 0.7",
    ),
    "negative counts": (lambda folder: reweigh(folder, "histogram", lambda x: x - 1), "histogram holds -1"),
    "an extra state of nothing": (lambda folder: reweigh(folder, "_extra_state", lambda x: x * 0), "it is not JSON"),
    "an extra tensor": (lambda folder: add(folder, f"{FIRST}.attnpress.bonus"), "bonus, which .* no place for"),
    "a tensor of no module": (
        lambda folder: add(folder, "bert.pooler.attnpress.q_scale"), "names no attention module 'bert.pooler'",
    ),
    "a layer left out of the configuration": (
        lambda folder: rewrite(folder, lambda x: x["modules"].pop(FIRST)), "leaves out the attention module '.*layer.0",
    ),
    "a layer left out of the weights": (
        lambda folder: reweigh(folder, f"{FIRST}.attnpress", lambda x: None), r"weights lack bert\.encoder\.layer\.0",
    ),
    "an empty spec": (lambda folder: rewrite(folder, lambda x: x.update(attention={})), r"attention\.q is missing"),
    "no bits": (lambda folder: rewrite(folder, lambda x: x["attention"]["v"].pop("bits")), r"v\.bits is missing"),
    "no sparsity": (lambda folder: rewrite(folder, lambda x: x["attention"].pop("sparsity")), "sparsity is missing"),
    "an empty spec of a layer": (
        lambda folder: rewrite(folder, lambda x: first_module(x).update(attention={})),
        r"modules\.bert.*attention\.q is missing",
    ),
    "other bits": (lambda folder: rewrite(folder, lambda x: x["attention"]["k"].update(bits=4)), "k.bits is 8 in the"),
    "another rule": (lambda folder: rewrite(folder, lambda x: x["attention"].update(rule="topk")), "rule is relative"),
    "another sparsity": (
        lambda folder: rewrite(folder, lambda x: x["attention"].update(sparsity=0.2)), "sparsity is 0.7, but 0.2",
    ),
    "other heads": (lambda folder: rewrite(folder, lambda x: first_module(x).update(head_dim=4)), "head_dim 4, but"),
    "text for a switch": (lambda folder: rewrite(folder, lambda x: x.update(int8="no")), "int8 is neither"),
    "an unknown part": (lambda folder: rewrite(folder, lambda x: x.update(bonus=1)), "unknown key 'bonus'"),
    "an ordinary weight missing": (
        lambda folder: reweigh(folder, "layer.1.output.dense.weight", lambda x: None), "lacks bert.*dense.weight",
    ),
}  # fmt: skip


# What is refused.


@pytest.mark.filterwarnings("ignore:You are using `torch.load`")
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_by_name(name: str, saved: Path) -> None:
    damage, named = DAMAGES[name]
    damage(saved)
    with pytest.raises(ModelError, match=named):
        load(saved)
    with pytest.raises(ModelError, match=named) as caught:
        load_compressed(saved, "classification", NAMES)
    assert str(saved) in str(caught.value)


WORSE: dict[str, Damage] = {
    "a weight missing": (lambda folder: reweigh(folder, "classifier.bias", lambda x: None), "lacks classifier.bias"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "configuration cut short": (lambda folder: truncate(folder / "config.json", 40), "config.json is missing or"),
    "of another method": (lambda folder: rewrite(folder, lambda x: x.update(quant_method="gptq")), "'gptq'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORSE)
def test_a_run_folder_is_read_more_strictly_than_transformers_reads(name: str, saved: Path) -> None:
    damage, named = WORSE[name]
    damage(saved)
    with pytest.raises(ModelError, match=named) as caught:
        load_compressed(saved, "classification", NAMES)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("place", ["nowhere", "dense"])
def test_a_folder_without_a_compressed_model_is_refused(place: str, tmp_path: Path) -> None:
    make_classifier().save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="not a compressed model"):
        load_compressed(tmp_path / place, "classification", NAMES)


def test_a_lost_histogram_only_has_to_be_gathered_anew(saved: Path) -> None:
    expected = logits(load(saved))
    reweigh(saved, "histogram", lambda x: None)
    model = load(saved)
    assert torch.equal(logits(model), expected)
    assert not any(bool(state.histogram.any()) for state in attentions(model).values())
    assert torch.equal(logits(load_compressed(saved, "classification", NAMES)), expected)


def change_model(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(data | changes), encoding="utf-8")


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "wide"}, {"num_attention_heads": None}, {"num_hidden_layers": -1}, {"vocab_size": []}]
)
def test_a_damaged_configuration_of_the_model_is_refused_in_one_sentence(changes: Any, saved: Path) -> None:
    change_model(saved, **changes)
    with pytest.raises(ModelError, match="could not be loaded") as caught:
        load_compressed(saved, "classification", NAMES)
    assert str(saved) in str(caught.value)


def test_a_checkpoint_from_before_the_extra_state_loads_as_ever(saved: Path) -> None:
    expected = logits(load(saved))
    reweigh(saved, "_extra_state", lambda x: None)
    model = load(saved)
    assert torch.equal(logits(model), expected)
    assert {state.spec.sparsity for state in attentions(model).values()} == {0.7}
    assert not [name for module in model.modules() for name in vars(module) if name == "_extra_state"]


@pytest.mark.parametrize("lost", ["histogram", "_extra_state"])
def test_nothing_is_reported_as_missing_from_a_model_that_is_whole(
    lost: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reweigh(saved, lost, lambda x: None)
    model, report = AutoModelForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert "MISSING" not in caplog.text
    assert type(model)._keys_to_ignore_on_load_missing == model._keys_to_ignore_on_load_missing
