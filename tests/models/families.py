"""What is promised of each model family, measured on tiny random models: `python -m tests.models.families`.

That writes docs/families.json, the source of a table in docs/ecosystem.md; test_families.py compares it with models.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from attnpress.config import DENSE, AttentionSpec
from attnpress.deployment.attention import deploy, undeploy
from attnpress.files import write_text
from attnpress.models.binding import bind
from attnpress.models.forward import UnsupportedModelError
from attnpress.training.calibration import calibrate
from tests.models.factories import ENDS, GPT, MODELS, SIZES, make_batch, make_model, outputs, real_tokens

FILE = Path(__file__).parents[2] / "docs" / "families.json"
EIGHT_BITS, PRUNED = AttentionSpec(), AttentionSpec(sparsity=0.5)
NEW_TOKENS = 12

SUPPORTED = ["BERT", "RoBERTa", "DistilBERT", "ELECTRA", "ALBERT", "ModernBERT", "ViT", "GPT-2", "Llama"]

WRITERS: dict[str, Callable[[], PreTrainedModel]] = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**GPT | ENDS)),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **ENDS | SIZES)),
}

T5: dict[str, Any] = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "T5": lambda: T5EncoderModel(T5Config(**T5)),
    "MPNet": lambda: MPNetModel(MPNetConfig(**SIZES)),
    "DeBERTa-v2": lambda: DebertaV2Model(DebertaV2Config(**SIZES)),
}


def measure(name: str) -> dict[str, Any]:
    """The row of one family."""
    if name in REFUSED:
        return {"refused": refusal(REFUSED[name]())}
    return {
        "eager": eager_equality(name),
        "error_8bit": float(f"{eight_bit_error(name):.1e}"),
        "deployed": deployed_equality(name),
        "round_trip": round_trip(name),
        "generate": generation(name) if name in WRITERS else None,
    }


def eager_equality(name: str) -> bool:
    """With nothing compressed: the framework's eager output, as exactly as that repeats itself."""
    model, batch = make_model(name), make_batch(name)
    model.set_attn_implementation("eager")
    eager = [outputs(model, batch) for _ in range(3)]
    spread = max(float((one - eager[0]).abs().max()) for one in eager)
    bind(model, DENSE)
    return float((outputs(model, batch) - eager[0]).abs().max()) <= 2 * spread


def eight_bit_error(name: str) -> float:
    """Error of the last hidden states over their norm, real tokens only."""
    model, batch = make_model(name), make_batch(name)
    dense = real_tokens(model, batch)
    calibrate(bind(model, EIGHT_BITS), [batch])
    return float((real_tokens(model, batch) - dense).norm() / dense.norm())


def compressed(name: str) -> PreTrainedModel:
    model = bind(make_model(name), PRUNED)
    calibrate(model, [make_batch(name, seed=5)])
    return model


def deployed_equality(name: str) -> bool:
    """Kernel, reference and training forward: the same bits, with padding, through all layers."""
    model, batch = compressed(name), make_batch(name)
    expected = outputs(model, batch)
    found = [outputs(deploy(model, backend), batch) for backend in ("cpu", "reference")]
    return all(torch.equal(one, expected) for one in found)


def round_trip(name: str) -> bool:
    """Saved and loaded: the same bits."""
    model, batch = compressed(name), make_batch(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return torch.equal(outputs(AutoModel.from_pretrained(folder), batch), outputs(model, batch))


def generation(name: str) -> bool:
    """`generate` with its cache writes what a loop without one writes, before and after deployment."""
    torch.manual_seed(0)
    model, batch = WRITERS[name]().eval(), make_batch(name, (9, 5))
    calibrate(bind(model, PRUNED), [batch])
    expected = written_without_cache(model, batch)
    found = [written(model, batch)]
    found += [written(deploy(undeploy(model), backend), batch) for backend in ("cpu", "reference")]
    return all(torch.equal(one, expected) for one in found)


def written(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """New tokens, chosen greedily."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 1}
    tokens: Tensor = model.generate(**batch, **options)  # type: ignore[operator]
    return tokens[:, batch["input_ids"].shape[1] :]


def written_without_cache(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The same by a plain loop that feeds the whole sequence at each step."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        logits[:, ENDS["eos_token_id"]] = -torch.inf  # as min_new_tokens has it
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, batch["input_ids"].shape[1] :]


def refusal(model: PreTrainedModel) -> str:
    """The message that refuses it."""
    try:
        bind(model, PRUNED)
    except UnsupportedModelError as error:
        return str(error)
    raise AssertionError(f"{type(model).__name__} was not refused")


if __name__ == "__main__":
    assert sorted(SUPPORTED) == sorted(MODELS)
    rows = {name: measure(name) for name in [*SUPPORTED, *REFUSED]}
    write_text(FILE, json.dumps(rows, indent=1) + "\n")
