"""Validation of the files of a compressed model before they are used: names, shapes, dtypes and values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from attnpress.config import AttentionSpec
from attnpress.models.attention import EXTRA, NAME, CompressedAttention
from attnpress.models.state import StateError, differences, fault, unpack_extra

HEAD_SIZES = ("head_dim", "attention_head_size", "dim_per_head")
"""Attributes of Transformers' attention modules that hold the head size."""


class ModelError(ValueError):
    """A model cannot be found or loaded. The message says which, and what to do."""


def check_readable(files: Iterable[str]) -> None:
    """Check that weights are complete safetensors files.

    Raises:
        ModelError: names the file.
    """
    for file in files:
        if not file.endswith(".safetensors"):
            raise ModelError(f"{file}: compressed models are read from safetensors files only; save it as one")
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is missing or damaged: {error}") from None


def check_tensors(files: Iterable[str], states: Mapping[str, CompressedAttention]) -> None:
    """Compare the tensors of compressed attention in the files with the description in config.json.

    Args:
        states: empty states as config.json describes them, by the name of the attention module.

    Raises:
        ModelError: a tensor is missing or unexpected, or has an invalid shape, dtype or value. The message names the
            file.
    """
    found = {name: file for file in files for name in names_in(file) if f".{NAME}." in name}
    held = {name.rpartition(f".{NAME}.")[0] for name in found}
    if held and held.isdisjoint(states) and len(held) == len(states):
        return  # some families rename tensors in files; these are checked after loading
    for name, file in found.items():
        module, _, part = name.rpartition(f".{NAME}.")
        if module not in states:
            raise ModelError(f"{file}: damaged: it holds {name}, but config.json names no attention module {module!r}")
        if part not in shapes_of(states[module]):
            raise ModelError(f"{file}: damaged: it holds {name}, which the spec in config.json has no place for")
    for module, state in states.items():
        for part in shapes_of(state):
            if f"{module}.{NAME}.{part}" not in found and part not in ("histogram", EXTRA):
                raise ModelError(f"{_all(files)}: damaged: the weights lack {module}.{NAME}.{part}")
        with torch.device("cpu"):  # models have no data while they are loaded
            _check_state(module, state, found)


def check_geometry(model: Any, states: Mapping[nn.Module, CompressedAttention]) -> None:
    """Check that head sizes match the model's, and that no layer is left out.

    Args:
        states: by the name of the attention module.

    Raises:
        ModelError: names the module.
    """
    names = {module: name for name, module in model.named_modules()}
    for module, state in states.items():
        size = next((own for key in HEAD_SIZES if isinstance(own := getattr(module, key, None), int)), state.head_dim)
        if size != state.head_dim:
            raise ModelError(
                f"quantization_config of attnpress: {names[module]} has head_dim {state.head_dim}, but the model's "
                f"heads have {size}"
            )
    rows = {re.sub(r"\d+", "*", names[module]) for module in states}
    for module, name in names.items():
        if re.sub(r"\d+", "*", name) in rows and module not in states:
            raise ModelError(
                f"quantization_config of attnpress is damaged: it leaves out the attention module {name!r}"
            )


def shapes_of(state: CompressedAttention) -> dict[str, Tensor]:
    """The tensors of such a state, without data."""
    with torch.device("meta"):
        empty = CompressedAttention(state.spec, state.heads, state.kv_heads, state.head_dim)
        return dict(empty.state_dict(keep_vars=True))


def wrong_with(part: str, tensor: Tensor, expected: Tensor, spec: AttentionSpec) -> str | None:
    """The reason why a tensor of a state is invalid (shape, dtype or values); None if it is valid."""
    if part != EXTRA and tensor.shape != expected.shape:
        return f"has shape {list(tensor.shape)} where {list(expected.shape)} fits its spec"
    return fault_of(part, tensor, spec)


def fault_of(part: str, tensor: Tensor, spec: AttentionSpec) -> str | None:
    """The reason why the values of a tensor of a state are invalid, including the extra state."""
    if part != EXTRA:
        return fault(part, tensor, spec)
    try:
        wrong = differences(unpack_extra(tensor).spec, spec)
    except StateError as error:
        return f"is {error}"
    return f"is of another spec: {wrong[0]}" if wrong else None


def _check_state(module: str, state: CompressedAttention, found: Mapping[str, str]) -> None:
    held = {}
    for part, expected in shapes_of(state).items():
        name = f"{module}.{NAME}.{part}"
        if name not in found:
            continue
        with safe_open(found[name], "pt") as file:
            held[part] = file.get_tensor(name)
        wrong = wrong_with(part, held[part], expected, state.spec)
        if wrong is not None:
            raise ModelError(f"{found[name]}: damaged: {name} {wrong}")
    where = f"{found[f'{module}.{NAME}.cutoff']}: damaged: {module}.{NAME}"
    asked, extra = state.spec.sparsity, unpack_extra(held[EXTRA]) if EXTRA in held else None
    if extra is not None and extra.spec.sparsity != asked:
        raise ModelError(f"{where}: its sparsity is {extra.spec.sparsity:g}, but {asked:g} in config.json")
    if not state.fits_thresholds() or state.spec.threshold_penalty is not None or state.spec.is_dense:
        return
    pruned = held.get("budget", torch.ones(state.heads)) * asked > 0
    if bool((held["cutoff"].isinf() == pruned).any()):
        kept = "keeps every pair of a head" if asked > 0 else "prunes"
        raise ModelError(f"{where}.cutoff {kept}, but config.json asks for a sparsity of {asked:g}")


def names_in(file: str) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _all(files: Iterable[str]) -> str:
    return ", ".join(files)
