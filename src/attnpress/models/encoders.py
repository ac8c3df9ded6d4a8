"""A common interface to encoders of any class: embedders, classifiers and rerankers of texts.

A model is loaded by its own class: SentenceTransformer or CrossEncoder if the folder says so, else a class of
Transformers. Unsupported models are refused before any weight is read.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from attnpress.models.attention import NAME
from attnpress.models.checkpoint import ModelError
from attnpress.models.inputs import Batch
from attnpress.models.loading import load_tokenizer, longest_input, resolve_model, take_padding
from attnpress.models.pipeline import LIBRARY, is_pipeline

Kind = Literal["embedder", "classifier", "reranker"]

PACKAGE = "sentence-transformers"
CLASSIFIES = "ForSequenceClassification"
UNBOUNDED = 2**20
"""Tokenizers without a limit report a number beyond this."""

LONGEST = 512
"""Maximum input length for models without a limit or with a far larger one, since calibration texts are short."""

Rows = Sequence[Sequence[str]]
"""Texts, or pairs of texts."""


@dataclass
class Encoder:
    """A model together with its tokenizer.

    Attributes:
        model: a Transformers model, or a pipeline of sentence-transformers.
        tokenizer: of a Transformers model; a pipeline has its own.
        kind: "embedder" outputs a vector, "classifier" class logits, "reranker" one score.
        longest: maximum input length in tokens; longer inputs are truncated.
    """

    model: Any
    tokenizer: Any
    kind: Kind
    longest: int

    def lengths(self, rows: Rows) -> list[int]:
        """Number of tokens of each text, without truncation."""
        tokenizer = self.model.tokenizer if is_pipeline(self.model) else self.tokenizer
        columns = [list(column) for column in zip(*rows, strict=True)]
        found = tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
        return [len(ids) for ids in found]

    def batches(self, rows: Rows, size: int) -> Iterator[Batch]:
        """Inputs of the model in batches of this many texts, in order."""
        for begin in range(0, len(rows), size):
            yield self.inputs(rows[begin : begin + size])

    def answer(self, rows: Rows, batch_size: int = 32) -> Tensor:
        """Outputs of the model for texts: float32 [rows, dimensions or classes or 1], on the CPU.

        Batches contain texts of similar length. Scores and classes are logits, before any sigmoid or softmax.
        """
        if is_pipeline(self.model):
            return self._ask_pipeline(rows, batch_size).float().cpu().reshape(len(rows), -1)
        order = sorted(range(len(rows)), key=lambda row: -sum(map(len, rows[row])))
        said: list[Tensor] = [torch.empty(0)] * len(rows)
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            inputs = self.inputs([rows[row] for row in part])
            with torch.inference_mode():
                found = self.model(**{name: x.to(self.model.device) for name, x in inputs.items()})
            answers = _mean(found[0], inputs["attention_mask"]) if self.kind == "embedder" else found.logits
            for row, answer in zip(part, answers.float().cpu(), strict=True):
                said[row] = answer
        return torch.stack(said)

    def save(self, folder: Path) -> None:
        """Save the model with its tokenizer into a folder."""
        if is_pipeline(self.model):
            self.model.save(str(folder), create_model_card=False)
        else:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def _ask_pipeline(self, rows: Rows, batch_size: int) -> Tensor:
        shared: dict[str, Any] = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
        if self.kind == "embedder":
            found: Tensor = self.model.encode([row[0] for row in rows], **shared)
        else:
            found = self.model.predict([tuple(row) for row in rows], activation_fn=nn.Identity(), **shared)
        return found

    def inputs(self, rows: Rows) -> dict[str, Any]:
        """Inputs of the model for texts, padded to the longest."""
        if is_pipeline(self.model):
            prompt = self.model.prompts.get(self.model.default_prompt_name)
            texts = [row[0] if len(row) == 1 else tuple(row) for row in rows]
            features = self.model.preprocess(texts, prompt=prompt)
            return {name: x for name, x in features.items() if isinstance(x, Tensor)}
        columns = [list(column) for column in zip(*rows, strict=True)]
        encoded = self.tokenizer(*columns, truncation=True, max_length=self.longest, padding=True, return_tensors="pt")
        return dict(encoded)


def load_encoder(name: str) -> Encoder:
    """Load a dense model by Hub name, folder or "package:NAME", in float32, with the class that it was saved with.

    Raises:
        ModelError: there is no such model, it is not supported, or a library is missing.
    """
    resolved = resolve_model(name)
    plain = _plain_config(resolved)
    _check(name, plain)
    pipeline = _pipeline_class(resolved, plain)
    if pipeline is not None:
        return encoder_of(_make(pipeline, resolved))
    classifies = any(CLASSIFIES in architecture for architecture in plain.get("architectures") or ())
    family: Any = AutoModelForSequenceClassification if classifies else AutoModel
    try:
        model = family.from_pretrained(resolved, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: {name} could not be loaded: {' '.join(str(error).split())[:300]}") from None
    return encoder_of(model, load_tokenizer(resolved))


def saved_encoder(folder: Path) -> Encoder:
    """Load a model that `Encoder.save` wrote, compressed or not.

    Raises:
        ModelError: a library is missing.
    """
    plain = _plain_config(str(folder))
    pipeline = _pipeline_class(str(folder), plain)
    if pipeline is not None:
        return encoder_of(_make(pipeline, str(folder)))
    classifies = any(CLASSIFIES in architecture for architecture in plain.get("architectures") or ())
    family: Any = AutoModelForSequenceClassification if classifies else AutoModel
    return encoder_of(family.from_pretrained(folder), load_tokenizer(str(folder)))


def check_compressible(model: Any) -> None:
    """Check a model in memory as `load_encoder` checks one by its configuration.

    Raises:
        ModelError: see `load_encoder`.
    """
    inner = getattr(model, "transformers_model", None) if is_pipeline(model) else model
    if isinstance(inner, PreTrainedModel):
        _check(type(model).__name__, inner.config.to_dict() | {"architectures": [type(inner).__name__]})


def encoder_of(model: Any, tokenizer: Any = None) -> Encoder:
    """Wrap a model in memory, and put it into evaluation mode.

    Args:
        tokenizer: of a Transformers model.

    Raises:
        ModelError: not a Transformers model with its tokenizer nor a pipeline with one, or an unsupported kind of
            model.
    """
    if is_pipeline(model):
        kind: Kind = "embedder" if hasattr(model, "encode") else _kind(getattr(model, "num_labels", 1))
        if model.transformers_model is None:
            raise ModelError(f"{type(model).__name__}: holds no Transformers model, so there is no attention in it")
        model.eval()
        return Encoder(model, None, kind, int(model.max_seq_length or LONGEST))
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__}: give a Transformers model, a SentenceTransformer, a CrossEncoder, or a name"
        )
    if tokenizer is None:
        raise ModelError(
            f"{type(model).__name__}: a Transformers model needs its tokenizer: quantize(..., tokenizer=...)"
        )
    take_padding(model, tokenizer)
    model.eval()
    kind = _kind(model.config.num_labels or 1) if CLASSIFIES in type(model).__name__ else "embedder"
    limits = [longest_input(model) or LONGEST, tokenizer.model_max_length, LONGEST]
    return Encoder(model, tokenizer, kind, int(min(limits)))


def _kind(labels: int) -> Kind:
    return "reranker" if labels == 1 else "classifier"


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens, [B, S, K] -> [B, K]: the default pooling of sentence-transformers."""
    real = mask.unsqueeze(-1).to(states)
    return (states * real).sum(1) / real.sum(1).clamp(min=1e-9)


def _plain_config(resolved: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = PreTrainedConfig.get_config_dict(resolved)[0]
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {resolved} could not be loaded: {' '.join(str(error).split())[:300]}") from None
    if not found:
        raise ModelError(
            f"model: {resolved} has no config.json; give a Hub name, or a folder that save_pretrained wrote"
        )
    return found


def _check(name: str, plain: dict[str, Any]) -> None:
    """Refuse unsupported models by their configuration."""
    family, made = plain.get("model_type", ""), plain.get("quantization_config")
    if isinstance(made, dict) and made.get("quant_method") == NAME:
        raise ModelError(f"model: {name} is already compressed by attnpress; pass the original model")
    if made:
        method = made.get("quant_method", "another tool") if isinstance(made, dict) else "another tool"
        raise ModelError(
            f"model: the weights of {name} are quantized by {method} for other kernels; pass the float model that they "
            "were made from"
        )
    if plain.get("auto_map") and family not in CONFIG_MAPPING:
        raise ModelError(
            f"model: {name} needs code of its own, which is not run here; load it with trust_remote_code=True and "
            "pass the model to attnpress.quantize"
        )
    if plain.get("is_encoder_decoder"):
        raise ModelError(
            f"model: {name} is an encoder-decoder ({family}), which generates text; quantize takes encoders: "
            "embedders, classifiers and rerankers"
        )
    heads = [each for each in plain.get("architectures") or () if each.endswith(("LMHeadModel", "ForCausalLM"))]
    if heads:
        raise ModelError(
            f"model: {name} ({heads[0]}) generates text; quantize takes encoders: embedders, classifiers and rerankers"
        )


def _pipeline_class(resolved: str, plain: dict[str, Any]) -> str | None:
    """The class of sentence-transformers that saved a model; None if Transformers did."""
    if _read(resolved, "modules.json") is not None:
        about = _read(resolved, "config_sentence_transformers.json") or {}
        kind = str(about.get("model_type") or "SentenceTransformer")
        if kind not in ("SentenceTransformer", "CrossEncoder"):
            raise ModelError(f"model: a {kind} of {PACKAGE}; quantize takes its SentenceTransformer and CrossEncoder")
        return kind
    return "CrossEncoder" if "sentence_transformers" in plain and _has_library() else None


def _read(resolved: str, file: str) -> dict[str, Any] | None:
    """A JSON file from a folder or the Hub; None if there is none."""
    found = cached_file(
        resolved, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if found is None:
        return None
    try:
        content: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model: {file} of {resolved} is not JSON ({error})") from None
    return content


def _has_library() -> bool:
    return importlib.util.find_spec(LIBRARY) is not None


def _make(kind: str, resolved: str) -> Any:
    if not _has_library():
        raise ModelError(f"model: {resolved} is a {kind}; pip install 'attnpress[{PACKAGE}]'")
    try:
        return getattr(importlib.import_module(LIBRARY), kind)(resolved, device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: {resolved} could not be loaded: {' '.join(str(error).split())[:300]}") from None
