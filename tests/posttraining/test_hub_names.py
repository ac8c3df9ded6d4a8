"""quantize takes a name of the Hub: whatever class saved the model, out of the cache and without a network."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from transformers import PreTrainedTokenizerFast

import attnpress
from attnpress.cli.parser import main
from attnpress.models.encoders import load_encoder
from attnpress.posttraining import run as module
from attnpress.posttraining.measure import Cost
from tests.kernels.factories import needs_kernel
from tests.posttraining.factories import make_embedder, save_classifier, some_pairs, some_texts
from tests.posttraining.hub_cache import add_to_cache


def transformers_embedder(tiny: Path, _: Path) -> Path:
    return tiny


def classifier(tiny: Path, folder: Path) -> Path:
    return save_classifier(folder, PreTrainedTokenizerFast.from_pretrained(tiny))


def sentence_transformer(tiny: Path, folder: Path) -> Path:
    make_embedder(tiny).save(str(folder))
    return folder


def cross_encoder(tiny: Path, folder: Path) -> Path:
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(tiny), num_labels=1, device="cpu").save_pretrained(str(folder))
    return folder


MODELS: dict[str, tuple[Callable[[Path, Path], Path], str, str]] = {
    "someone/tiny-bert": (transformers_embedder, "embedder", "BertModel"),
    "someone/tiny-classifier": (classifier, "classifier", "BertForSequenceClassification"),
    "sentence-transformers/tiny-embedder": (sentence_transformer, "embedder", "SentenceTransformer"),
    "cross-encoder/tiny-reranker": (cross_encoder, "reranker", "CrossEncoder"),
    "tiny-without-owner": (transformers_embedder, "embedder", "BertModel"),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, which no network can fill."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(module, "costs", lambda *_: (Cost(10.0, 100.0, 90.0), Cost(30.0, 60.0, 40.0), "avx2"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@needs_kernel
@pytest.mark.parametrize("name", MODELS)
def test_a_name_is_what_its_folder_is(name: str, cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    make, kind, family = MODELS[name]
    add_to_cache(cache, name, make(tiny_model, tmp_path / "source"))
    folder = tiny_model if make is transformers_embedder else tmp_path / "source"
    rows = some_pairs(120) if kind == "reranker" else [(text,) for text in some_texts(120)]
    columns = ["query", "passage"][: len(rows[0])] if kind == "reranker" else ["text"]
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert main(["quantize", name, "--texts", "mine.jsonl", "--output", "fast"]) == 0
    made = attnpress.quantize(folder, tmp_path / "mine.jsonl", output=tmp_path / "again")
    weights = sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.safetensors"))
    assert weights
    assert [(tmp_path / "fast" / path).read_bytes() for path in weights] == [
        (tmp_path / "again" / path).read_bytes() for path in weights
    ]
    record = json.loads((tmp_path / "fast" / "quantize.json").read_text("utf-8"))
    assert (record["model"], record["kind"], type(made.model).__name__) == (name, kind, family)
    assert name in (tmp_path / "fast" / "README.md").read_text("utf-8")


def test_a_name_that_is_not_there_is_one_line(
    cache: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("\n".join(some_texts(120)), encoding="utf-8")
    for name in ("someone/absent", "absent", "someone/absent/really"):
        assert main(["quantize", name, "--texts", "mine.txt", "--output", "fast"]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert f"model: {name} could not be loaded: " in said[0] or f"no folder {name}; give a Hub name" in said[0]
    assert not (tmp_path / "fast").exists()
    add_to_cache(cache, "someone/without-weights", tiny_model)
    for file in (cache / "models--someone--without-weights").rglob("model.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="someone/without-weights could not be loaded"):
        load_encoder("someone/without-weights")
