"""Compressed models as Transformers checkpoints: there and back bit for bit; what is damaged is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from attnpress.config import DENSE, AttentionSpec, ConfigError, ProbsSpec, ScheduleSpec, TensorSpec
from attnpress.models.binding import attentions, bind, unbind
from attnpress.models.forward import UnsupportedModelError
from attnpress.models.hub import AttnPressConfig, ModelError
from attnpress.models.loading import WEIGHTS, load_compressed
from attnpress.training.calibration import calibrate
from attnpress.training.driver import SparsityDriver
from tests.conftest import TokenizerFactory
from tests.models.factories import MODELS, VOCABULARY, as_dtype, make_batch, make_classifier, make_model, outputs

NAMES = ("low", "middle", "high")

SPECS = {
    "relative": AttentionSpec(sparsity=0.7),
    "topk": AttentionSpec(rule="topk", sparsity=0.7),
    "two of four": AttentionSpec(rule="nm", sparsity=0.5),
    "trained thresholds": AttentionSpec(sparsity=0.6, threshold_penalty=2.0),
    "fixed threshold": AttentionSpec(rule="threshold", threshold=0.05),
    "learned": AttentionSpec(q=TensorSpec(learned=True), v=TensorSpec(bits=4, granularity="channel"), sparsity=0.5),
    "dynamic": AttentionSpec(q=TensorSpec(granularity="token"), p=ProbsSpec(mode="unit"), smooth_key=True),
    "dense": DENSE,
}

LOAD = """
import sys, torch, attnpress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**make_batch()).logits
    return found


def make_compressed(spec: AttentionSpec = SPECS["relative"]) -> PreTrainedModel:
    model = bind(make_classifier(num_labels=3), spec)
    calibrate(model, [make_batch(seed=3)])
    return model


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder, **arguments)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a compressed classifier."""
    make_compressed().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


# There and back.


@pytest.mark.parametrize("name", SPECS)
def test_a_saved_model_comes_back_the_same(name: str, tmp_path: Path) -> None:
    model = make_compressed(SPECS[name])
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert {module.training for module in loaded.modules()} == {False}
    ours, theirs = attentions(loaded), attentions(model)
    assert list(ours) == list(theirs)
    for key, state in ours.items():
        assert state.spec == SPECS[name]
        for part in ("cutoff", "histogram", *(f"{matrix}_scale" for matrix in state.quantized())):
            assert torch.equal(getattr(state, part), getattr(theirs[key], part))
            assert type(getattr(state, part)) is type(getattr(theirs[key], part))
        assert not state.seen.any()


@pytest.mark.parametrize("name", MODELS)
def test_every_family_comes_back_the_same(name: str, tmp_path: Path) -> None:
    model = bind(make_model(name), SPECS["relative"])
    calibrate(model, [make_batch(name, seed=3)])
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path), make_batch(name)), outputs(model, make_batch(name)))


def test_another_process_restores_it_after_import_attnpress_alone(saved: Path, tmp_path: Path) -> None:
    save_file(make_batch(), tmp_path / "batch.safetensors")
    done = run(LOAD, saved, tmp_path / "batch.safetensors", tmp_path / "logits.safetensors")
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(load(saved)))


@pytest.mark.parametrize("imports", ["attnpress, transformers", "transformers.quantizers.auto, attnpress"])
def test_registration_needs_no_order_of_imports(imports: str) -> None:
    listed = "print('attnpress' in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING)"
    code = f"import {imports}\nimport transformers.modeling_utils\n{listed}"
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_importing_attnpress_imports_nothing_heavy() -> None:
    done = run("import sys, attnpress; print(*{'torch', 'transformers'} & sys.modules.keys())")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_without_attnpress_loading_fails_with_a_message_that_names_it(saved: Path) -> None:
    without = "import sys; sys.modules['attnpress'] = None\n"
    code = "from transformers import AutoModelForSequenceClassification as A; A.from_pretrained(sys.argv[1])"
    done = run(without + code, saved)
    assert done.returncode == 1
    assert "Unknown quantization type, got attnpress" in done.stderr
    assert 'ValueError: Specified `attn_implementation="attnpress"` is not supported' in done.stderr


def test_without_attnpress_the_weights_load_dense_only_when_that_is_asked_for(saved: Path) -> None:
    without = "import sys; sys.modules['attnpress'] = None\n"
    code = "from transformers import AutoModelForSequenceClassification as A\n"
    load_eager = "print(A.from_pretrained(sys.argv[1], attn_implementation='eager').config._attn_implementation)"
    done = run(without + code + load_eager, saved)
    assert (done.returncode, done.stdout.strip()) == (0, "eager"), done.stderr


def test_what_is_pushed_to_the_hub_is_what_is_saved(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = tmp_path / "pushed"
    pushed.mkdir()

    def create_commit(_: HfApi, repo_id: str, operations: list[CommitOperationAdd], **arguments: Any) -> str:
        for operation in operations:
            shutil.copyfile(str(operation.path_or_fileobj), pushed / operation.path_in_repo)
        return repo_id

    def no_card(repo_id: str, **_: Any) -> ModelCard:
        raise EntryNotFoundError(repo_id)

    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **arguments: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", no_card)
    model: Any = make_compressed()
    assert model.push_to_hub("me/compressed") == "me/compressed"
    assert {path.name for path in pushed.iterdir()} == {path.name for path in saved.iterdir()} | {"README.md"}
    for path in saved.iterdir():
        assert (pushed / path.name).read_bytes() == path.read_bytes(), path.name
    assert torch.equal(logits(load(pushed)), logits(model))


def test_a_pipeline_runs_a_saved_model(tmp_path: Path, make_tokenizer: TokenizerFactory) -> None:
    model = make_compressed()
    model.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(4, VOCABULARY))]
    tokenizer = make_tokenizer(words)
    tokenizer.save_pretrained(tmp_path)
    text = "w9 w20 w31 w4 w57"
    (answer,) = pipeline("text-classification", str(tmp_path), device="cpu")(text)
    with torch.no_grad():
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
    assert answer == {
        "label": f"LABEL_{int(probabilities.argmax())}",
        "score": pytest.approx(float(probabilities.max())),
    }


def test_a_model_is_bound_on_loading(tmp_path: Path) -> None:
    make_classifier(num_labels=3).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=AttnPressConfig(bits=8, sparsity=0.7))
    calibrate(model, [make_batch(seed=3)])
    assert torch.equal(logits(model), logits(make_compressed()))
    assert unbind(model).config._attn_implementation == "sdpa"


def test_a_whole_spec_can_be_asked_for_on_loading(tmp_path: Path) -> None:
    make_classifier().save_pretrained(tmp_path)
    spec = SPECS["learned"]
    model = load(tmp_path, quantization_config=AttnPressConfig(attention=spec))
    assert {state.spec for state in attentions(model).values()} == {spec}
    with pytest.raises(ConfigError, match="either attention, or bits and sparsity"):
        AttnPressConfig(8, attention=spec)


def test_a_model_that_cannot_be_bound_is_refused_on_loading(tmp_path: Path) -> None:
    from transformers import MPNetConfig, MPNetModel

    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    MPNetModel(MPNetConfig(intermediate_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="MPNetModel"):
        AutoModel.from_pretrained(tmp_path, quantization_config=AttnPressConfig())


# What is stored.


def test_a_saved_model_is_readable_by_anyone(saved: Path) -> None:
    state = load_file(saved / WEIGHTS)
    assert {name.rsplit(".", 1)[1] for name in state if ".attnpress." in name} == {
        "q_scale", "k_scale", "v_scale", "cutoff", "histogram", "_extra_state",
    }  # fmt: skip
    stored = json.loads((saved / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (stored["quant_method"], stored["format"], stored["attention"]["sparsity"]) == ("attnpress", 1, 0.7)
    assert list(stored["modules"]) == list(attentions(load(saved)))
    assert not [path for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pkl")], "nothing to unpickle"


def test_what_is_stored_is_the_state_at_the_time_of_saving(tmp_path: Path) -> None:
    model = make_compressed()
    twin = copy.deepcopy(model)
    SparsityDriver(twin, ScheduleSpec(), 0.9, total=1).freeze()
    for name, one in {"model": model, "twin": twin}.items():
        one.save_pretrained(tmp_path / name)
        loaded = load(tmp_path / name)
        assert torch.equal(logits(loaded), logits(one))
        assert {state.spec.sparsity for state in attentions(loaded).values()} == {0.7 if one is model else 0.9}


def test_layers_keep_specs_of_their_own(tmp_path: Path) -> None:
    model = make_compressed()
    first, second = attentions(model).values()
    second.set_sparsity(0.3)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert [state.spec for state in attentions(loaded).values()] == [first.spec, second.spec]
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_saved_in_half_precision_keeps_float32_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    model = as_dtype(make_compressed(), dtype)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.dtype == dtype
    assert {state.q_scale.dtype for state in attentions(loaded).values()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(model))


def test_a_loaded_model_is_as_free_as_one_that_was_bound(saved: Path) -> None:
    model = load(saved)
    assert model.half().dtype == torch.float16, "its weights are not quantized"
    assert torch.equal(logits(model.float()), logits(make_compressed().half().float()))
    SparsityDriver(model, ScheduleSpec(), 0.9, total=1).freeze()  # its histogram came along


def test_a_large_model_in_several_files(tmp_path: Path) -> None:
    model = make_compressed()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_an_unbound_model_saves_as_if_it_had_never_been_bound(tmp_path: Path, saved: Path) -> None:
    make_classifier(num_labels=3).save_pretrained(tmp_path / "never")
    for name, model in {"once": unbind(make_compressed()), "loaded": unbind(load(saved))}.items():
        model.save_pretrained(tmp_path / name)
        for file in ("config.json", WEIGHTS):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "never" / file).read_bytes()


def test_heads_may_be_taken_off_or_put_on(saved: Path, tmp_path: Path) -> None:
    body = AutoModel.from_pretrained(saved)
    expected = outputs(load(saved).get_submodule("bert"), make_batch())
    assert torch.equal(outputs(body, make_batch()), expected)
    body.save_pretrained(tmp_path / "body")
    assert torch.equal(outputs(load(tmp_path / "body").get_submodule("bert"), make_batch()), expected)


def test_weights_quantized_by_another_method_cannot_be_stored_with_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_classifier(num_labels=3).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")
    theirs = model.hf_quantizer
    with pytest.warns(UserWarning, match="quantized by bitsandbytes.*will not store it"):
        bind(model, SPECS["relative"])
    assert model.hf_quantizer is theirs
    assert unbind(model).hf_quantizer is theirs


# What is refused.


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


# Other weights than the model's own, and parts.


def test_weights_given_to_save_pretrained_are_the_ones_that_are_stored(tmp_path: Path) -> None:
    model = make_compressed()
    dense = {name: x for name, x in model.state_dict().items() if ".attnpress." not in name}
    averaged = {name: x * 0.5 if x.is_floating_point() else x for name, x in dense.items()}
    model.save_pretrained(tmp_path, state_dict=averaged)
    twin = make_compressed()
    twin.load_state_dict(averaged, strict=False)
    assert torch.equal(logits(load(tmp_path)), logits(twin))


def test_a_state_given_to_save_pretrained_brings_its_own_sparsity(tmp_path: Path) -> None:
    model = make_compressed()
    state, expected = copy.deepcopy(model.state_dict()), logits(model)
    SparsityDriver(model, ScheduleSpec(), 0.9, total=1).freeze()
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = load(tmp_path)
    assert {one.spec.sparsity for one in attentions(loaded).values()} == {0.7}
    assert torch.equal(logits(loaded), expected)


def test_a_state_of_another_spec_is_not_saved(tmp_path: Path) -> None:
    other = bind(make_classifier(num_labels=3), AttentionSpec(v=TensorSpec(bits=4)))
    calibrate(other, [make_batch(seed=3)])
    with pytest.raises(ModelError, match=r"state_dict given to save_pretrained: .*v\.bits is 4 in the state"):
        make_compressed().save_pretrained(tmp_path, state_dict=other.state_dict())


def test_a_whole_of_which_a_part_is_bound_is_not_saved_as_if_nothing_were(tmp_path: Path) -> None:
    model = make_classifier(num_labels=3)
    calibrate(bind(model.get_submodule("bert"), SPECS["relative"]), [make_batch(seed=3)])
    with pytest.raises(ValueError, match="only a part of this BertForSequenceClassification is bound"):
        model.save_pretrained(tmp_path / "whole")
    body: Any = model.get_submodule("bert")
    body.save_pretrained(tmp_path / "part")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "part"), make_batch()), outputs(body, make_batch()))
    assert model.state_dict().keys() > {f"bert.{name}" for name in body.state_dict()} - {"bert"}


def test_cross_attention_is_still_known_after_loading(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    model = bind(BartModel(BartConfig(**sizes)).eval(), SPECS["relative"])
    calibrate(model, [{"input_ids": torch.randint(3, 60, (2, 6))}])
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    flags = {name: state.is_cross for name, state in attentions(model).items()}
    assert {name: state.is_cross for name, state in attentions(loaded).items()} == flags
    assert sum(flags.values()) == 1


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight labelled rows."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(3, VOCABULARY, (7,)), "labels": torch.tensor(index % 3)}


def test_the_best_model_of_a_trainer_comes_back_with_its_sparsity(tmp_path: Path) -> None:
    model = make_compressed(SPECS["relative"])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=1, eval_steps=1, save_strategy="steps", eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="first", report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, learning_rate=1e-3, logging_strategy="no",
    )  # fmt: skip
    asked = iter([0.2, 0.9, 0.9, 0.9])

    class Raise(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            sparsity = next(asked)
            for state in attentions(model).values():
                state.set_sparsity(sparsity)

    class BestFirst(Trainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_first": 1.0 / self.state.global_step}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    trainer = BestFirst(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[Raise()])
    trainer.train()
    assert {state.spec.sparsity for state in attentions(model).values()} == {0.2}
    best = load(Path(str(trainer.state.best_model_checkpoint)))
    assert torch.equal(logits(best), logits(model.eval()))
