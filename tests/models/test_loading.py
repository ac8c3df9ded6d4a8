"""Finding and loading models; what is missing is refused by name. Compressed ones: see test_hub.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertForQuestionAnswering, PreTrainedModel

from attnpress.files import sha256_of
from attnpress.models import loading
from attnpress.models.hub import ModelError
from attnpress.models.loading import WEIGHTS, load_model, load_tokenizer, resolve_model, weights_hash
from tests.models.factories import make_batch, make_classifier, make_model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**make_batch()).logits
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a dense classifier."""
    make_classifier(num_labels=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


NAMES = ("low", "middle", "high")


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
