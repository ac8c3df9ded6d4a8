"""Finding, saving and loading models; what is missing, damaged or newer is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertForQuestionAnswering, PreTrainedModel

from attnpress.calibration import calibrate
from attnpress.config import AttentionSpec, ProbsSpec, TensorSpec
from attnpress.files import sha256_of
from attnpress.models import loading
from attnpress.models.binding import attentions, bind
from attnpress.models.loading import (
    SPEC_FILE,
    WEIGHTS,
    ModelError,
    load_compressed,
    load_model,
    load_tokenizer,
    resolve_model,
    save_compressed,
    weights_hash,
)
from tests.models.factories import as_dtype, make_batch, make_classifier, make_model

SPECS = {
    "relative": AttentionSpec(sparsity=0.7),
    "topk": AttentionSpec(rule="topk", sparsity=0.7),
    "fixed threshold": AttentionSpec(rule="threshold", threshold=0.05),
    "learned": AttentionSpec(q=TensorSpec(learned=True), v=TensorSpec(bits=4, granularity="channel"), sparsity=0.5),
    "dynamic": AttentionSpec(q=TensorSpec(granularity="token"), p=ProbsSpec(mode="unit"), smooth_key=True),
}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**make_batch()).logits
    return found


def make_compressed(spec: AttentionSpec = SPECS["relative"]) -> PreTrainedModel:
    model = bind(make_classifier(num_labels=3), spec)
    calibrate(model, [make_batch(seed=3)])
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a compressed model."""
    save_compressed(make_compressed(), SPECS["relative"], tmp_path / "model")
    return tmp_path / "model"


NAMES = ("low", "middle", "high")


# Compressed models.


@pytest.mark.parametrize("name", SPECS)
def test_a_saved_model_comes_back_the_same(name: str, tmp_path: Path) -> None:
    model, spec = make_compressed(SPECS[name]), SPECS[name]
    save_compressed(model, spec, tmp_path)
    loaded = load_compressed(tmp_path, "classification", NAMES)
    assert torch.equal(logits(loaded), logits(model))
    ours, theirs = attentions(loaded), attentions(model)
    assert list(ours) == list(theirs)
    for key, state in ours.items():
        assert state.spec == spec
        for part in ("cutoff", *(f"{matrix}_scale" for matrix in state.quantized())):
            assert torch.equal(getattr(state, part), getattr(theirs[key], part))
            assert type(getattr(state, part)) is type(getattr(theirs[key], part))


def test_a_saved_model_is_readable_by_anyone(saved: Path) -> None:
    state = load_file(saved / WEIGHTS)
    assert not any(name.endswith("histogram") for name in state), "statistics of training stay behind"
    assert {name.rsplit(".", 1)[1] for name in state if ".attnpress." in name} == {
        "q_scale", "k_scale", "v_scale", "cutoff",
    }  # fmt: skip
    data = json.loads((saved / SPEC_FILE).read_text(encoding="utf-8"))
    assert data["attention"]["sparsity"] == 0.7
    assert not [path for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pkl")], "nothing to unpickle"


def test_a_model_saved_in_half_precision_keeps_float32_scales(tmp_path: Path) -> None:
    model = as_dtype(make_compressed(), torch.bfloat16)
    save_compressed(model, SPECS["relative"], tmp_path)
    loaded = load_compressed(tmp_path, "classification", NAMES)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_weights_of_a_saved_model_also_load_without_compression(saved: Path) -> None:
    model = load_model(str(saved), "classification", NAMES)
    assert not attentions(model)
    assert bool(logits(model).isfinite().all())


def rewrite_spec(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    data = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    (folder / SPEC_FILE).write_text(json.dumps(change(data)), encoding="utf-8")


def without_weight(folder: Path, name: str) -> None:
    save_weights(folder, {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if name not in key})


def narrow(folder: Path, name: str) -> None:
    state = load_file(folder / WEIGHTS)
    save_weights(folder, {key: tensor[:, :1].clone() if name in key else tensor for key, tensor in state.items()})


def save_weights(folder: Path, state: dict[str, Tensor]) -> None:
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no spec": (lambda folder: (folder / SPEC_FILE).unlink(), SPEC_FILE),
    "spec cut short": (lambda folder: truncate(folder / SPEC_FILE, 40), SPEC_FILE),
    "spec not an object": (lambda folder: rewrite_spec(folder, lambda data: [data]), SPEC_FILE),
    "spec without attention": (lambda folder: rewrite_spec(folder, lambda data: {"format": 1}), SPEC_FILE),
    "attention not an object": (lambda folder: rewrite_spec(folder, lambda data: data | {"attention": 8}), SPEC_FILE),
    "unknown key": (lambda folder: rewrite_spec(folder, lambda data: data | {"attention": {"bitz": 8}}), "bitz"),
    "newer format": (lambda folder: rewrite_spec(folder, lambda data: data | {"format": 2}), "update attnpress"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "weights cut short": (lambda folder: truncate(folder / WEIGHTS, 5000), WEIGHTS),
    "weights empty": (lambda folder: truncate(folder / WEIGHTS, 0), WEIGHTS),
    "a scale missing": (lambda folder: without_weight(folder, "q_scale"), "q_scale"),
    "a scale of another shape": (lambda folder: narrow(folder, "k_scale"), "k_scale"),
    "a weight missing": (lambda folder: without_weight(folder, "classifier.bias"), "classifier.bias"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "could not be loaded"),
    "configuration cut short": (lambda folder: truncate(folder / "config.json", 40), "could not be loaded"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_by_name(name: str, saved: Path) -> None:
    damage, named = DAMAGES[name]
    damage(saved)
    with pytest.raises(ModelError, match=named) as caught:
        load_compressed(saved, "classification", NAMES)
    assert str(saved) in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a compressed model"):
        load_compressed(tmp_path / "nowhere", "classification", NAMES)


# Names.


def test_a_local_folder_stands_for_itself(saved: Path) -> None:
    assert resolve_model(str(saved)) == str(saved)


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/electra-small-discriminator"])
def test_a_hub_name_is_left_to_transformers(name: str) -> None:
    assert resolve_model(name) == name
    assert weights_hash(name) is None


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder-at-all", "a/b/c"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(ModelError, match="no folder"):
        resolve_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes an importable package of that name; gives its folder."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('must not be run to be found')")
        return tmp_path / name

    return make


@pytest.mark.parametrize("place", ["", "model"])
def test_a_package_may_carry_a_model(package: Callable[[str], Path], place: str) -> None:
    folder = package("carrier") / place
    make_classifier().save_pretrained(folder)
    assert resolve_model("package:carrier") == str(folder)
    assert "carrier" not in sys.modules


def test_a_package_that_is_missing_or_empty_is_refused_by_name(package: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"'no_such_carrier' is not installed; pip install no-such-carrier"):
        resolve_model("package:no_such_carrier")
    package("hollow")
    with pytest.raises(ModelError, match=r"'hollow' holds no config\.json"):
        resolve_model("package:hollow")
    for name in ("", "json.decoder", "no_such.carrier", "../hollow"):
        with pytest.raises(ModelError, match="is not installed"):
            resolve_model(f"package:{name}")


def test_a_pinned_model_must_be_the_known_one(package: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package("pinned")
    make_classifier().save_pretrained(folder)
    known = sha256_of(folder / WEIGHTS)
    monkeypatch.setitem(loading.PINNED_WEIGHTS, "package:pinned", known)
    assert resolve_model("package:pinned") == str(folder)
    assert weights_hash(str(folder)) == known
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match=rf"has sha256 \w+, expected {known}: reinstall"):
        resolve_model("package:pinned")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="expected"):
        resolve_model("package:pinned")


# Models with the head of a task.


def test_a_classifier_knows_its_labels(saved: Path) -> None:
    model = load_model(str(saved), "classification", NAMES)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {label: index for index, label in enumerate(NAMES)}
    assert model.config.problem_type == "single_label_classification"
    assert model.config._attn_implementation == "eager"


def test_a_regression_has_one_output(tmp_path: Path) -> None:
    make_classifier(num_labels=1).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "regression")
    assert model.config.problem_type == "regression"
    assert logits(model).shape[-1] == 1


def test_question_answering_has_positions(tmp_path: Path) -> None:
    make_classifier().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "qa")
    assert isinstance(model, BertForQuestionAnswering)


def test_a_new_head_follows_the_global_seed(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load_model(str(tmp_path), "classification", NAMES).get_parameter("classifier.weight"))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_model(str(tmp_path), "classification", NAMES)


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "GPT-2", "Llama"])
def test_a_missing_tokenizer_is_refused_and_not_made_up(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded|holds no vocabulary") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_is_the_one_saved_with_the_model(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("Good film")["input_ids"] == [2, 5, 6, 3]


def test_a_head_with_other_labels_is_refused_by_name(tmp_path: Path) -> None:
    make_classifier(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(tmp_path), "classification", ("no", "yes"))
