"""Compressed checkpoints by mutation: tensor values, dtypes, shapes and names, config.json, and bytes. Allowed: an
error of ours that names the folder or what is wrong in it; or a model that holds what the files hold, and computes
numbers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from attnpress import AttentionSpec, attentions, bind, calibrate
from attnpress.config import ConfigError
from attnpress.models.hub import ModelError
from attnpress.models.loading import load_compressed
from tests.fuzz.mutations import as_json, damage_bytes, damage_plain, damage_text, odd, to_bytes

WEIGHTS, CONFIG = "model.safetensors", "config.json"
REGRESSIONS: list[int] = [*range(40), 53, 104]
"""Seeds that are replayed as tests: some of every kind, and each that failed once."""

NUMBERS = (0.0, -0.0, -1.0, 1e-45, 1e-38, 1e-10, 1e10, 1e38, float("inf"), float("-inf"), float("nan"), -1e-3, 2.0)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.uint8)
LARGE = 1e9
"""Ordinary weights may be any number; beyond this, or not finite, no finite answer is asked for."""

Tensors = dict[str, Tensor]


def replay(seed: int) -> str:
    """One checkpoint; returns how it ended.

    Raises:
        AssertionError: not as it may; names the seed.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        shutil.copytree(_whole(), folder)
        what = _damage(rng, folder)
        try:
            return _load(folder)
        except Exception as error:
            raise AssertionError(f"seed {seed} ({what}): {error!r:.2000}") from error


def _load(folder: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load_compressed(folder, "classification", ("no", "yes"))
    except (ModelError, ConfigError) as error:
        said = str(error)
    else:
        _check(folder, model)
        return "loaded"
    assert 0 < len(said) < 20_000, f"a message of {len(said)} characters"
    return "refused"


def _check(folder: Path, model: Any) -> None:
    state = model.state_dict()
    for name, tensor in _read(folder).items():
        assert name in state, f"{name} was left out without a word"
        assert state[name].shape == tensor.shape, f"{name} has another shape"
        same = torch.equal(state[name].double().nan_to_num(7.0), tensor.double().nan_to_num(7.0))
        assert same, f"{name} has other values"
    for name, module in attentions(model).items():
        for key in module.quantized():
            scale = getattr(module, f"{key}_scale")
            assert bool((scale > 0).all() & scale.isfinite().all()), f"{name}.{key}_scale is {scale}"
        assert bool((module.cutoff >= 0).all()), f"{name}.cutoff is {module.cutoff}"
    sound = all(bool((weight.abs() < LARGE).all()) for weight in model.parameters())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are no numbers
        logits = model(**_batch()).logits
    assert bool(logits.isfinite().all()) or not sound, "the model computes no numbers"


def _damage(rng: random.Random, folder: Path) -> str:
    kind = rng.choice(("tensor", "tensor", "tensor", "config", "config", "config", "text", "bytes", "files"))
    if kind == "tensor":
        tensors = _read(folder)
        what = _damage_tensor(rng, tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        return what
    config = folder / CONFIG
    if kind == "config":
        plain = json.loads(config.read_text(encoding="utf-8"))
        ours = plain["quantization_config"]
        key = rng.choice(sorted(ours))
        inside: Any = ours if rng.random() < 0.3 else {key: ours[key]}
        plain["quantization_config"] = ours | damage_plain(rng, inside) if inside is not ours else _damaged(rng, ours)
        config.write_bytes(to_bytes(as_json(plain)))
    elif kind == "text":
        config.write_bytes(to_bytes(damage_text(rng, config.read_text(encoding="utf-8"))))
    elif kind == "bytes":
        (folder / WEIGHTS).write_bytes(damage_bytes(rng, (folder / WEIGHTS).read_bytes()))
    else:
        file = rng.choice((config, folder / WEIGHTS))
        file.unlink()
        if rng.random() < 0.5:
            file.mkdir()
    return kind


def _damaged(rng: random.Random, plain: Any) -> Any:
    return damage_plain(rng, plain) if rng.random() < 0.9 else odd(rng)


def _damage_tensor(rng: random.Random, tensors: Tensors) -> str:
    ours = [name for name in sorted(tensors) if ".attnpress." in name]
    name = rng.choice(ours if rng.random() < 0.8 else sorted(tensors))
    kind = rng.choice(("value", "value", "value", "dtype", "shape", "rename", "remove", "extra"))
    tensor = tensors[name]
    if kind == "value" and tensor.is_floating_point() and tensor.numel():
        changed = tensor.clone()
        changed.view(-1)[rng.randrange(tensor.numel())] = rng.choice(NUMBERS)
        tensors[name] = changed
    elif kind == "dtype":
        tensors[name] = tensor.to(rng.choice(DTYPES))
    elif kind == "shape":
        tensors[name] = rng.choice(
            (tensor.flatten(), tensor[None], torch.cat([tensor, tensor]) if tensor.dim() else tensor)
        )
    elif kind == "rename":
        tensors[rng.choice((name + "s", name.replace("0", "7"), "x"))] = tensors.pop(name)
    elif kind == "extra":
        tensors[rng.choice(("extra", name + ".extra", name.rpartition(".")[0] + ".bias_scale"))] = tensor.clone()
    else:
        del tensors[name]
    return f"{kind} of {name}"


def _read(folder: Path) -> Tensors:
    with contextlib.suppress(SafetensorError, OSError), safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    return {}


@functools.cache
def _whole() -> Path:
    """A sound checkpoint: two layers, one with a spec of its own."""
    folder = Path(_place().name) / "whole"
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=32, **size)).eval()
    bind(model, AttentionSpec(sparsity=0.5), {"0": AttentionSpec(sparsity=0.8, rule="relative")})
    calibrate(model, [_batch()])
    model.save_pretrained(folder)
    assert _load(folder) == "loaded"
    return folder


@functools.cache
def _place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="attnpress-fuzz-")


@functools.cache
def _batch() -> Tensors:
    ids = torch.randint(1, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}
