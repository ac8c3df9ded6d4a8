"""Compressed models as Transformers checkpoints: there and back bit for bit; what is damaged is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BitsAndBytesConfig,
    pipeline,
)

from attnpress.config import AttentionSpec, ConfigError, ScheduleSpec
from attnpress.models.binding import attentions, bind, unbind
from attnpress.models.forward import UnsupportedModelError
from attnpress.models.hub import AttnPressConfig, ModelError
from attnpress.models.loading import WEIGHTS
from attnpress.training.calibration import calibrate
from attnpress.training.driver import SparsityDriver
from tests.conftest import TokenizerFactory
from tests.models.checkpoints import SPECS, load, logits, make_compressed
from tests.models.factories import MODELS, VOCABULARY, as_dtype, make_batch, make_classifier, make_model, outputs

LOAD = """
import sys, torch, attnpress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


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


def test_a_head_of_another_size_is_made_anew_where_that_is_asked_for(tmp_path: Path) -> None:
    model = make_classifier(num_labels=2)
    calibrate(bind(model, AttentionSpec(sparsity=0.5)), [make_batch()])
    model.save_pretrained(tmp_path)
    options: Any = {"num_labels": 5, "ignore_mismatched_sizes": True}
    loaded: Any = type(model).from_pretrained(tmp_path, **options)
    assert (loaded.num_labels, len(attentions(loaded))) == (5, len(attentions(model)))


def test_a_configuration_that_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = make_classifier()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    calibrate(bind(model, AttentionSpec(sparsity=0.5)), [make_batch()])
    with pytest.raises(ModelError, match=r"config\.output_attentions is True"):
        model.save_pretrained(tmp_path)
