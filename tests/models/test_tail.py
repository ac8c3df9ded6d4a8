"""The tail in a model: fitted in calibration and with thresholds, stored in checkpoints, run where it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from attnpress.config import AttentionSpec, RuleName, ScheduleSpec, TailName
from attnpress.deployment.attention import deploy
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import attentions, bind
from attnpress.models.encoder import find_encoder
from attnpress.models.hub import ModelError
from attnpress.models.loading import WEIGHTS
from attnpress.models.watchers import Counting, start
from attnpress.training.calibration import calibrate, fit_thresholds
from attnpress.training.driver import SparsityDriver
from tests.kernels.factories import needs_kernel
from tests.models.factories import ENDS, MODELS, SIZES, as_dtype, make_batch, make_model, outputs

FITTED = ("lift", "query_directions", "key_directions", "key_offset", "direction_step")
SPECS = {
    "mean": AttentionSpec(sparsity=0.8, tail="mean"),
    "linear": AttentionSpec(sparsity=0.8, tail="linear", tail_rank=2),
    "whole": AttentionSpec(sparsity=0.8, tail="linear", tail_rank=8),
}


def make_tailed(name: str, family: str = "BERT") -> PreTrainedModel:
    model = bind(make_model(family), SPECS[name])
    calibrate(model, [make_batch(family, seed=3), make_batch(family, (8, 8), seed=4)])
    return model


def states(model: PreTrainedModel) -> list[CompressedAttention]:
    return list(attentions(model).values())


def fitted(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: x for name, x in model.state_dict().items() if name.rsplit(".", 1)[-1] in FITTED}


@pytest.mark.parametrize("name", SPECS)
def test_calibration_fits_what_the_tail_needs(name: str) -> None:
    model = make_tailed(name)
    for state in states(model):
        assert bool((state.lift > 0).any())
        assert torch.equal(state.lift, state.lift.round())
        assert bool((state.masses[:, 0] > 0).all())
        assert not state.watchers
        assert state.has_directions == (name == "linear")
        if name == "linear":
            assert bool((state.query_directions != 0).any())
            assert bool((state.direction_step > 0).all())
    assert bool(outputs(model, make_batch()).isfinite().all())


@pytest.mark.parametrize("rule", ["relative", "threshold", "topk", "mass", "nm"])
def test_every_rule_has_a_lift(rule: RuleName) -> None:
    model = bind(make_model(), AttentionSpec(rule=rule, sparsity=0.75, tail="mean"))
    calibrate(model, [make_batch(seed=3)])
    assert all(bool((state.lift > 0).any()) for state in states(model))


def test_a_user_threshold_has_a_lift() -> None:
    model = bind(make_model(), AttentionSpec(threshold=0.5, tail="mean"))
    calibrate(model, [make_batch(seed=3)])
    assert all(bool((state.lift > 0).any()) for state in states(model))


def test_nothing_pruned_is_nothing_changed() -> None:
    bare, tailed = (bind(make_model(), AttentionSpec(tail=tail, tail_rank=2)) for tail in ("none", "linear"))
    for model in (bare, tailed):
        calibrate(model, [make_batch(seed=3)])
    assert torch.equal(outputs(bare, make_batch()), outputs(tailed, make_batch()))
    assert not any(bool(state.lift.any()) for state in states(tailed))


@pytest.mark.parametrize("name", SPECS)
def test_padding_changes_nothing_that_is_fitted(name: str) -> None:
    batch = make_batch(seed=3)
    wide = {
        key: torch.nn.functional.pad(x, (0, 5), value=0 if key == "attention_mask" else 7) for key, x in batch.items()
    }
    found = []
    for shown in (batch, wide):
        model = bind(make_model().double(), SPECS[name])
        calibrate(model, [shown])
        found.append(fitted(model))
    assert found[0]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_the_lift_follows_the_sparsity_while_training() -> None:
    model = bind(make_model(), AttentionSpec(sparsity=0.5, tail="mean"))
    calibrate(model, [make_batch(seed=3)])
    driver = SparsityDriver(model, ScheduleSpec(kind="linear", start=0.0, end=1.0), target=0.9, total=6)
    model.train()
    seen = []
    for step in range(6):
        driver.begin(step)
        model(**make_batch(lengths=(16, 16, 9), seed=step)).last_hidden_state.sum().backward()
        driver.end()
        seen.append(states(model)[0].lift.clone())
    driver.freeze()
    assert not torch.equal(seen[1], seen[4])
    assert bool((states(model)[0].masses > 0).all())
    fit_thresholds(model, [make_batch(seed=3)])
    assert bool((states(model)[0].lift > 0).any())


@pytest.mark.parametrize("name", SPECS)
def test_a_checkpoint_brings_it_back(name: str, tmp_path: Path) -> None:
    model = make_tailed(name)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, make_batch()), outputs(model, make_batch()))
    for ours, theirs in zip(states(again), states(model), strict=True):
        assert ours.spec == theirs.spec
        assert torch.equal(ours.masses, theirs.masses)
        assert not bool(ours.seen_masses.any())


def test_a_checkpoint_from_before_has_none(tmp_path: Path) -> None:
    model = bind(make_model(), AttentionSpec(sparsity=0.8))
    calibrate(model, [make_batch(seed=3)])
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for key in ("tail", "tail_rank"):
        del config["quantization_config"]["attention"][key]
    file.write_text(json.dumps(config))
    again = AutoModel.from_pretrained(tmp_path)
    assert states(again)[0].spec.tail == "none"
    assert torch.equal(outputs(again, make_batch()), outputs(model, make_batch()))


@pytest.mark.parametrize(("tail", "differs"), [("none", False), ("mean", False), ("linear", True)])
def test_a_state_with_another_rank_fits_where_the_rank_has_no_effect(tail: TailName, differs: bool) -> None:
    other = bind(make_model(), AttentionSpec(sparsity=0.8, tail=tail, tail_rank=2))
    own = bind(make_model(), AttentionSpec(sparsity=0.8, tail=tail))
    if differs:
        with pytest.raises(RuntimeError, match="tail_rank is 2 in the state and 512 in the model"):
            own.load_state_dict(other.state_dict())
    else:
        own.load_state_dict(other.state_dict())


def test_linear_sees_the_whole_score_by_default() -> None:
    assert not any(module.has_directions for module in states(bind(make_model(), AttentionSpec(tail="linear"))))


@pytest.mark.parametrize(
    ("part", "value"),
    [("lift", 0.5), ("lift", -3.0), ("lift", 1e6), ("key_directions", 40000.0), ("query_directions", 1.5),
     ("key_offset", 2.0**22), ("direction_step", torch.nan), ("masses", torch.inf)],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(part: str, value: float, tmp_path: Path) -> None:
    make_tailed("linear").save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    name = next(key for key in weights if key.endswith(f".attnpress.{part}"))
    weights[name] = torch.full_like(weights[name], value)
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match=part):
        AutoModel.from_pretrained(tmp_path)


def test_one_layer_may_have_its_own() -> None:
    bare = AttentionSpec(sparsity=0.8)
    model = bind(make_model(), bare, {"1": SPECS["linear"]})
    calibrate(model, [make_batch(seed=3)])
    first, second = states(model)
    assert not hasattr(first, "lift")
    assert second.has_directions
    assert first.scales().tail is None


@pytest.mark.parametrize("family", [name for name in MODELS if name != "ViT"])
@pytest.mark.parametrize("name", SPECS)
def test_every_family_runs_it(name: str, family: str) -> None:
    model = make_tailed(name, family)
    found = outputs(model, make_batch(family))
    assert bool(found.isfinite().all())
    deploy(model, "reference")
    assert torch.equal(outputs(model, make_batch(family)), found)


@pytest.mark.parametrize("tail", ["mean", "linear"])
def test_generation_with_a_cache_is_that_without_one(tail: TailName) -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **ENDS | SIZES)).eval()
    bind(model, AttentionSpec(sparsity=0.7, tail=tail, tail_rank=2))
    batch = make_batch("Llama", (7, 7), seed=1)
    calibrate(model, [make_batch("Llama", (12, 12), seed=2)])
    with torch.no_grad():
        tokens = [
            model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)
        ]
    assert torch.equal(*tokens)


@needs_kernel
@pytest.mark.parametrize("family", [name for name in MODELS if name != "ViT"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("padding", ["keep", "skip"])
def test_the_kernel_gives_what_was_trained(name: str, family: str, padding: Any) -> None:
    model = make_tailed(name, family)
    batch = make_batch(family)
    real = batch.get("attention_mask", torch.ones(1, 1)).bool().unsqueeze(-1)
    trained = expected = outputs(model, batch) * real
    if padding == "skip" and find_encoder(model):
        # Float layers around attention are a library's, which may round otherwise where there are fewer rows.
        expected = outputs(deploy(model, "reference", padding=padding), batch) * real
        assert torch.allclose(expected, trained, rtol=1e-4, atol=1e-4)
    deploy(model, "auto", padding=padding if find_encoder(model) else "keep")
    assert torch.equal(outputs(model, batch) * real, expected)


def test_sparsity_stays_the_share_without_a_code() -> None:
    counts = []
    for tail in ("none", "mean"):
        model = bind(make_model(), AttentionSpec(sparsity=0.8, tail=tail))
        calibrate(model, [make_batch(seed=3)])
        first = states(model)[0]
        counting = start(first, Counting(first))
        outputs(model, make_batch())
        counts.append(counting.counts)
    assert torch.equal(counts[0].zeros, counts[1].zeros)


def test_half_precision_leaves_what_is_fitted_alone() -> None:
    model = make_tailed("linear")
    before = fitted(model)
    as_dtype(model, torch.bfloat16)
    after = fitted(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
