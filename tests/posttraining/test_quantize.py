"""quantize: from a model and texts to a compressed model with a proof; and newcomers' mistakes, each in one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import attnpress
from attnpress.cli.parser import main
from attnpress.config import ConfigError
from attnpress.deployment.linear import linear_layers
from attnpress.files import OutputError
from attnpress.kernels import cpu
from attnpress.kernels.cpu import BackendUnavailableError
from attnpress.models.checkpoint import ModelError
from attnpress.models.encoders import saved_encoder
from attnpress.models.forward import UnsupportedModelError
from attnpress.posttraining import run as module
from attnpress.posttraining.forms import make
from attnpress.posttraining.measure import Cost, costs
from attnpress.posttraining.run import QuantizeSpec
from attnpress.records.quantized import read_quantized
from attnpress.tasks.texts import texts_of
from tests.conftest import VOCABULARY, TokenizerFactory
from tests.kernels.factories import needs_kernel
from tests.posttraining.factories import make_embedder, save_classifier, some_pairs, some_texts

pytestmark = needs_kernel

TEXTS = some_texts(120)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that load libraries take longer than all else."""
    monkeypatch.setattr(module, "costs", lambda *_: (Cost(10.0, 100.0, 90.0), Cost(30.0, 60.0, 40.0), "avx2"))


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: TokenizerFactory) -> Any:
    return make_tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_classifier(tmp_path_factory.mktemp("models") / "classifier", tokenizer)


@pytest.mark.usefixtures("untimed")
def test_an_encoder_is_compressed_judged_and_saved(tiny_model: Path, tmp_path: Path) -> None:
    made = attnpress.quantize(tiny_model, TEXTS, output=tmp_path / "fast")
    record = read_quantized(tmp_path / "fast" / "quantize.json")
    assert record == made.record
    assert (record.kind, record.linear, record.speedup) == ("embedder", "int8", 3.0)
    assert record.texts.calibration + record.texts.judged == len(TEXTS)
    assert 0.95 < record.agreement["cosine"] < 1
    assert record.linear_layers == {"int8": 8, "ordered": 1, "library": 0}
    again = attnpress.deploy(AutoModel.from_pretrained(tmp_path / "fast"), "cpu")
    batch = {
        "input_ids": torch.tensor([[2, 7, 9, 3], [2, 5, 3, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
    }
    with torch.no_grad():
        assert torch.equal(again(**batch).last_hidden_state, made.model(**batch).last_hidden_state)
    card = (tmp_path / "fast" / "README.md").read_text(encoding="utf-8")
    assert "30.0 (3.00 times)" in card
    assert "AutoModel.from_pretrained(folder)" in card


@pytest.mark.usefixtures("untimed")
def test_what_is_judged_is_the_model_that_is_saved(classifier: Path, tmp_path: Path) -> None:
    record = attnpress.quantize(classifier, TEXTS, output=tmp_path / "fast", bits=4, sparsity=0.8).record
    dense, ours = saved_encoder(classifier), saved_encoder(tmp_path / "fast")
    attnpress.deploy(ours.model, "cpu")
    rows = texts_of(TEXTS).rows[record.texts.calibration :]
    assert len(rows) == record.texts.judged
    same = dense.answer(rows).argmax(-1) == ours.answer(rows, batch_size=5).argmax(-1)
    assert record.agreement["same_decisions"] == pytest.approx(float(same.double().mean()))
    assert 0 < record.agreement["logit_change"] < 2
    assert record.sparsity == pytest.approx(0.8, abs=0.05)
    assert record.keys_per_query == pytest.approx(record.dense_keys * (1 - record.sparsity), rel=1e-6)
    assert [record.attention[name]["bits"] for name in "qkvp"] == [4] * 4


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    "form", [{"linear": "float"}, {"tail": "mean", "sparsity": 0.5}, {"tail": "linear", "sparsity": 0.7}]
)
def test_what_is_asked_for_by_name_is_made(tiny_model: Path, form: dict[str, Any]) -> None:
    made = attnpress.quantize(tiny_model, TEXTS, **form)
    assert {name: made.record.attention.get(name) for name in form if name != "linear"} == {
        name: value for name, value in form.items() if name != "linear"
    }
    assert made.record.linear == form.get("linear", "int8")
    assert (linear_layers(made.model).int8 == 0) == (form.get("linear") == "float")


@pytest.mark.usefixtures("untimed")
def test_a_model_that_python_holds_stays_as_it_is(tiny_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModel.from_pretrained(tiny_model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = attnpress.quantize(model, TEXTS, tokenizer=tokenizer)
    assert made.model is not model
    assert not attnpress.attentions(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.usefixtures("untimed")
def test_sentence_transformers_keep_their_class(tiny_model: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    made = attnpress.quantize(make_embedder(tiny_model), TEXTS, output=tmp_path / "embedder")
    loaded = attnpress.deploy(SentenceTransformer(str(tmp_path / "embedder"), device="cpu"), "cpu")
    assert torch.equal(
        loaded.encode(TEXTS[:9], convert_to_tensor=True), made.model.encode(TEXTS[:9], convert_to_tensor=True)
    )
    assert "SentenceTransformer(folder)" in (tmp_path / "embedder" / "README.md").read_text(encoding="utf-8")
    assert made.record.model == "SentenceTransformer"

    reranker = CrossEncoder(str(tiny_model), num_labels=1, device="cpu")
    made = attnpress.quantize(reranker, some_pairs(120), output=tmp_path / "reranker")
    assert made.record.kind == "reranker"
    assert 0.8 < made.record.agreement["same_order"] <= 1
    loaded = attnpress.deploy(CrossEncoder(str(tmp_path / "reranker"), device="cpu"), "cpu")
    pairs = some_pairs(12)
    assert (loaded.predict(pairs) == made.model.predict(pairs)).all()


@pytest.mark.usefixtures("untimed")
def test_a_search_holds_what_it_is_asked_to_hold(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPARSITIES", (0.0, 0.6))
    monkeypatch.setattr(module, "BITS", (8,))
    said: list[str] = []
    loose = attnpress.quantize(tiny_model, TEXTS, output=tmp_path / "fast", max_loss=0.5, notify=said.append).record
    assert loose.attention["sparsity"] == 0.6
    assert [trial.sparsity for trial in loose.trials] == [0.6]
    assert any(line.startswith("tried 8 bits, sparsity 0.6") for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fast"]
    with pytest.raises(ValueError, match="--max-loss 1e-09: no form meets it"):
        attnpress.quantize(tiny_model, TEXTS, max_loss=1e-9)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("kind", ["embedder", "classifier"])
def test_distillation_wins_back_what_pruning_costs(
    tiny_model: Path, classifier: Path, tmp_path: Path, kind: str
) -> None:
    source, figure = (tiny_model, "lowest_cosine") if kind == "embedder" else (classifier, "logit_change")
    torch.manual_seed(0)
    form: dict[str, Any] = {"sparsity": 0.9, "tail": "none", "linear": "float"}
    texts = some_texts(240)
    untaught = attnpress.quantize(source, texts, **form).record
    taught = attnpress.quantize(source, texts, **form, distill=12, output=tmp_path / "taught").record
    assert taught.texts.calibration < taught.texts.training == len(texts) - taught.texts.judged
    assert taught.sparsity == pytest.approx(0.9, abs=0.05)
    better = untaught.agreement[figure] < taught.agreement[figure]
    assert better == (kind == "embedder")  # a cosine grows, a change shrinks
    loaded = saved_encoder(tmp_path / "taught").model
    assert {state.spec.sparsity for state in attnpress.attentions(loaded).values()} == {0.9}
    with pytest.raises(ConfigError, match="--distill trains one form"):
        attnpress.quantize(source, texts, distill=1, max_loss=0.1)


@pytest.mark.usefixtures("untimed")
def test_few_texts_and_texts_of_one_length_are_told_of(tiny_model: Path) -> None:
    with pytest.warns(UserWarning, match="only 20 texts"):
        attnpress.quantize(tiny_model, TEXTS[:20], linear="float")
    alike = [" ".join(text.split()[:2]) for text in some_texts(400)]  # each counts once
    with pytest.warns(UserWarning, match="all texts have 4 tokens"):
        attnpress.quantize(tiny_model, alike, linear="float")


@pytest.mark.usefixtures("untimed")
def test_texts_beyond_the_models_length_are_told_of(tiny_model: Path) -> None:
    texts = [*TEXTS, " ".join(["film"] * 200)]
    with pytest.warns(UserWarning, match="1 of 121 texts are longer than the 128 tokens that the model takes"):
        attnpress.quantize(tiny_model, texts, linear="float")


@pytest.mark.usefixtures("untimed")
def test_a_slower_model_is_told_of(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "costs", lambda *_: (Cost(10.0, 1.0, 1.0), Cost(5.0, 1.0, 1.0), "avx2"))
    with pytest.warns(UserWarning, match=r"slower than the dense one on this machine \(0.50 times\)"):
        attnpress.quantize(tiny_model, TEXTS, linear="float")


def test_costs_are_those_of_the_saved_models(tiny_model: Path, tmp_path: Path) -> None:
    made = make(saved_encoder(tiny_model), module.USUAL, [(text,) for text in TEXTS[:16]])
    made.encoder.save(tmp_path / "fast")
    dense, ours, target = costs(tiny_model, tmp_path / "fast", [(text,) for text in TEXTS[:8]], threads=1, seconds=0.1)
    assert dense.texts_per_second > 0
    assert ours.texts_per_second > 0
    files = [file.stat().st_size for file in (tmp_path / "fast").iterdir()]
    assert ours.file_mb == pytest.approx(sum(files) / 1e6)
    assert target in ("scalar", "avx2", "avx512vnni", "amx")


def save_config(folder: Path, **plain: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    return folder


def test_models_that_are_not_compressed_are_refused_before_anything_is_loaded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    mistakes = {
        "is an encoder-decoder": save_config(tmp_path / "t5", model_type="t5", is_encoder_decoder=True),
        "needs code of its own": save_config(tmp_path / "own", model_type="mine", auto_map={"AutoModel": "m.Mine"}),
        "generates text": save_config(tmp_path / "gpt", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "quantized by gptq for other kernels": save_config(
            tmp_path / "gpu", model_type="bert", quantization_config={"quant_method": "gptq", "bits": 4}
        ),
        "is already compressed by attnpress": save_config(
            tmp_path / "again", model_type="bert", quantization_config={"quant_method": "attnpress"}
        ),
    }
    for said, folder in mistakes.items():
        with pytest.raises(ModelError, match=said) as refused:
            attnpress.quantize(folder, TEXTS)
        assert "\n" not in str(refused.value)
    small: dict[str, Any] = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 30}
    for model, said in (
        (T5ForConditionalGeneration(T5Config(**small)), "is an encoder-decoder"),
        (GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=30)), "generates text"),
    ):
        with pytest.raises(ModelError, match=said):
            attnpress.quantize(model, TEXTS, tokenizer=tokenizer)
    with pytest.raises(ModelError, match="needs its tokenizer"):
        attnpress.quantize(ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1)), TEXTS)
    with pytest.raises(ModelError, match="give a Transformers model, a SentenceTransformer"):
        attnpress.quantize(torch.nn.Linear(2, 2), TEXTS)


def test_pairs_go_to_models_of_pairs_alone(tiny_model: Path) -> None:
    from sentence_transformers import CrossEncoder

    with pytest.raises(ConfigError, match="an embedder takes single texts; name one column"):
        attnpress.quantize(tiny_model, some_pairs(20))
    with pytest.raises(ConfigError, match="a reranker scores pairs; name two columns"):
        attnpress.quantize(CrossEncoder(str(tiny_model), num_labels=1, device="cpu"), TEXTS)
    with pytest.raises(ConfigError, match="only one; at least two are needed"):
        attnpress.quantize(tiny_model, TEXTS[:1])


def test_an_output_in_use_is_refused_before_the_work(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"holds mine.txt"):
        attnpress.quantize(tiny_model, TEXTS, output=tmp_path)


def test_without_the_kernel_it_says_how_to_build_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_built", lambda: False)
    with pytest.raises(BackendUnavailableError, match="run `make kernel`"):
        attnpress.quantize(tiny_model, TEXTS)


@pytest.mark.usefixtures("untimed")
def test_int8_layers_asked_for_by_name_where_there_are_none_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AlbertConfig(vocab_size=len(VOCABULARY), embedding_size=32, intermediate_size=64, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ConfigError, match="--linear int8: all linear layers of AlbertModel stay in float"):
            attnpress.quantize(AlbertModel(config), TEXTS, tokenizer=tokenizer, linear="int8")
        record = attnpress.quantize(AlbertModel(config), TEXTS, tokenizer=tokenizer).record
    assert record.linear == "float"


def test_attention_that_cannot_be_reached_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import MPNetConfig, MPNetModel

    config = MPNetConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(UnsupportedModelError, match="MPNet"):
        attnpress.quantize(MPNetModel(config), TEXTS, tokenizer=tokenizer)


def test_values_are_checked() -> None:
    for wrong in ({"bits": 9}, {"sparsity": 1.0}, {"tail": "long"}, {"max_loss": -0.1}, {"speed": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            QuantizeSpec(**wrong)


@pytest.mark.usefixtures("untimed")
def test_the_command_prints_its_table_and_how_it_went(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("text,other\n" + "\n".join(f"{text},x" for text in TEXTS[:60]), encoding="utf-8")
    words = ["quantize", str(classifier), "--texts", str(file), "--output", str(tmp_path / "fast")]
    assert main([*words, "--sparsity", "0.5", "--bits", "4"]) == 0
    out, err = capsys.readouterr()
    assert "same decisions" in out
    assert "only 60 texts" in err
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert next(iter(attnpress.attentions(loaded).values())).spec.bits == dict.fromkeys("qkvp", 4)
    assert main([*words, "--column", "txt"]) == 1
    assert "it has text, other" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "fast"), *words[2:4], "--output", str(tmp_path / "faster")]) == 1
    assert "already compressed by attnpress" in capsys.readouterr().err
