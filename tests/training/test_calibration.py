"""Calibration: scales and thresholds from real batches, whatever their padding, and the target they are fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from attnpress.config import DENSE, AttentionSpec, RuleName, TensorSpec
from attnpress.core.cost import PairCounts
from attnpress.core.rules import rule_of
from attnpress.models.binding import attentions, bind
from attnpress.models.inputs import Batch, BatchError
from attnpress.models.outputs import outputs
from attnpress.models.watchers import Counting, Fitting, watched
from attnpress.training.calibration import REFITS, calibrate, fit_thresholds, watching


def make_model(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config).double()  # the order of sums does not reach float32 statistics


def make_batches(count: int = 3, extra: int = 0, filler: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of 4 rows of 3 to 12 tokens; `extra` more columns of padding, which holds `filler`."""
    draw, batches = torch.Generator().manual_seed(1), []
    for _ in range(count):
        lengths = torch.randint(3, 13, (4, 1), generator=draw)
        mask = (torch.arange(12 + extra) < lengths).long()
        ids = torch.randint(1, 50, (4, 12), generator=draw)
        ids = torch.nn.functional.pad(ids, (0, extra)).masked_fill(mask == 0, filler)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(4, dtype=torch.long)})
    return batches


def calibrated(spec: AttentionSpec, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    model = bind(make_model(), spec)
    calibrate(model, batches)
    return {name: tensor for name, tensor in model.state_dict().items() if ".attnpress." in name}


def seen_pairs(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> list[PairCounts]:
    """Pairs of each module, by head."""
    counting = {module: Counting(module) for module in attentions(model).values()}
    with watched(counting.items()):
        for _ in outputs(model, batches):
            pass
    return [watcher.counts for watcher in counting.values()]


def measured(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """Fraction of valid pairs that the rule removes."""
    counts = seen_pairs(model, batches)
    return float(sum(one.pruned.sum() for one in counts) / sum(one.pairs.sum() for one in counts))


@pytest.mark.parametrize(
    ("rule", "sparsity", "passes"), [("relative", 0.0, 1), ("relative", 0.5, 1 + REFITS), ("topk", 0.5, 1)]
)
def test_batches_are_shown_again_only_where_thresholds_moved(rule: RuleName, sparsity: float, passes: int) -> None:
    model, batches, seen = bind(make_model(), AttentionSpec(rule=rule, sparsity=sparsity)), make_batches(), 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1

    model.register_forward_hook(count)
    calibrate(model, batches)
    assert seen == len(batches) * (1 + passes), "scales take one pass more"


@pytest.mark.parametrize("observer", ["absmax", "ema", "percentile", "mse"])
def test_padding_changes_neither_scales_nor_thresholds(observer: Any) -> None:
    tensor = TensorSpec(observer=observer)
    spec = AttentionSpec(tensor, tensor, tensor, sparsity=0.5)
    short = calibrated(spec, make_batches())
    long = calibrated(spec, make_batches(extra=9, filler=7))
    assert len(short) == 2 * 6, "three scales, cutoff, histogram, and the spec in force"
    for name, tensor_found in short.items():
        assert torch.equal(tensor_found, long[name]), name


def test_static_scales_are_the_largest_magnitudes_seen_over_the_largest_code() -> None:
    absmax = TensorSpec(observer="absmax")
    spec = AttentionSpec(absmax, absmax, absmax)
    model = make_model()
    plain = bind(make_model(), DENSE)
    seen: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": []}
    layer: Any = plain.get_submodule("bert.encoder.layer.0.attention.self")
    for name, found in seen.items():
        getattr(layer, name).register_forward_hook(lambda _, __, output, found=found: found.append(output))
    batches = make_batches()
    for _ in outputs(plain, batches):
        pass
    calibrate(bind(model, spec), batches)
    module = next(iter(attentions(model).values()))
    for name, found in seen.items():
        largest = torch.zeros(2)
        for output, batch in zip(found, batches, strict=True):
            heads = output.float().view(4, -1, 2, 16).masked_fill(batch["attention_mask"].view(4, -1, 1, 1) == 0, 0)
            largest = torch.maximum(largest, heads.abs().amax((0, 1, 3)))
        assert torch.equal(getattr(module, f"{name[0]}_scale").flatten(), largest / 127)


@pytest.mark.parametrize("rule", ["relative", "threshold", "mass", "topk"])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_thresholds_reach_the_target_on_the_data_they_were_fitted_to(rule: RuleName, sparsity: float) -> None:
    model, batches = make_model(), make_batches(8)
    calibrate(bind(model, AttentionSpec(rule=rule, sparsity=sparsity)), batches)
    assert measured(model, batches) == pytest.approx(sparsity, abs=0.06 if rule in ("mass", "topk") else 0.02)


def test_a_threshold_of_ones_own_stays() -> None:
    model = bind(make_model(), AttentionSpec(rule="relative", threshold=0.3))
    calibrate(model, make_batches())
    for module in attentions(model).values():
        assert module.threshold().tolist() == pytest.approx([0.3, 0.3])


def test_thresholds_can_be_fitted_again_without_touching_the_scales() -> None:
    model, batches = make_model(), make_batches(6)
    calibrate(bind(model, AttentionSpec(sparsity=0.2)), batches)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in attentions(model).values():
        module.spec = dataclasses.replace(module.spec, sparsity=0.6)
    fit_thresholds(model, iter(batches))
    changed = {name.rpartition(".")[2] for name, tensor in model.state_dict().items() if not before[name].equal(tensor)}
    assert changed == {"cutoff", "histogram", "_extra_state"}, "and the sparsity in force, which was set by hand"
    assert measured(model, batches) == pytest.approx(0.6, abs=0.03)


def test_the_model_comes_back_in_its_mode_without_gradients_and_batches_are_read_once() -> None:
    def once() -> Iterator[Batch]:
        yield from make_batches()

    model = bind(make_model(), AttentionSpec(sparsity=0.5)).train()
    calibrate(model, once())
    assert model.training
    assert all(module.training for module in attentions(model).values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module.watchers for module in attentions(model).values())


def test_dropout_does_not_reach_the_statistics() -> None:
    spec, batches = AttentionSpec(sparsity=0.5), make_batches()
    first, second = (bind(make_model(), spec).train() for _ in range(2))
    calibrate(first, batches)
    torch.manual_seed(99)
    calibrate(second, batches)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_outputs_are_those_of_the_model_without_labels() -> None:
    model, batches = make_model(), make_batches(2)
    for found, batch in zip(outputs(model.train(), batches), batches, strict=True):
        assert found.loss is None
        assert not found.logits.requires_grad
        assert model.training is False
        kept = {name: value for name, value in batch.items() if name != "labels"}
        assert torch.equal(found.logits, model(**kept).logits)
    assert model.training


def test_watching_ends_also_when_a_call_fails() -> None:
    module = next(iter(attentions(bind(make_model(), AttentionSpec())).values()))
    watch = watching([module], slice(2))
    watch.__enter__()
    (watcher,) = module.watchers
    assert isinstance(watcher, Fitting)
    assert watcher.rows == slice(2)
    watch.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not module.watchers


def test_what_cannot_be_calibrated_is_explained() -> None:
    with pytest.raises(ValueError, match=r"BertForSequenceClassification is not bound: call bind\(model, spec\) first"):
        calibrate(make_model(), make_batches())
    with pytest.raises(ValueError, match="at least one batch of real data"):
        calibrate(bind(make_model(), AttentionSpec()), [])


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(), AttentionSpec(sparsity=0.5), AttentionSpec(rule="topk", sparsity=0.5),
        AttentionSpec(threshold=0.1), AttentionSpec(rule="mass", threshold=0.9),
    ],
    ids=["unpruned", "fitted", "topk", "fixed", "fixed mass"],
)  # fmt: skip
def test_padding_alone_is_refused_whatever_the_rule(spec: AttentionSpec) -> None:
    padding = [{name: torch.zeros_like(value) for name, value in make_batches(1)[0].items()}]
    with pytest.raises(ValueError, match="no valid pair of tokens, only padding"):
        calibrate(bind(make_model(), spec), padding)


def test_a_failed_calibration_leaves_no_observer_behind() -> None:
    model = bind(make_model(), AttentionSpec())
    with pytest.raises(BatchError, match="cannot be called with it"):
        calibrate(model, [{"input_ids": torch.full((2, 5), 10**6)}])
    assert all(not module.watchers for module in attentions(model).values())


@pytest.mark.parametrize("rule", ["relative", "threshold", "mass"])
def test_a_head_that_pruning_harms_keeps_more_of_the_same_total(rule: RuleName) -> None:
    """The second head's values are made a hundred times those of the others, so that only its pairs matter."""
    model: Any = make_model()
    batches = make_batches()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.value.weight[16:] *= 100.0
        model.bert.encoder.layer[1].attention.self.value.weight *= 0.01
    spec = AttentionSpec(rule=rule, sparsity=0.8, budget="sensitivity")
    calibrate(bind(model, spec), batches)
    budgets = torch.cat([module.budget for module in attentions(model).values()])
    assert budgets.argmin() == 1
    assert torch.isclose(budgets.mean(), torch.ones((), dtype=torch.float64))
    assert abs(measured(model, batches) - spec.sparsity) < 0.08
    removed = [counts.pruned / counts.pairs for counts in seen_pairs(model, batches)]
    assert removed[0][1] < removed[0][0]


def test_budgets_are_in_force_at_each_sparsity_of_a_schedule() -> None:
    model, batches = make_model(), make_batches()
    calibrate(bind(model, AttentionSpec(sparsity=0.8, budget="sensitivity")), batches)
    module = next(iter(attentions(model).values()))
    module.budget.copy_(torch.tensor([0.5, 1.5]))
    module.set_sparsity(0.4)
    with watching([module], slice(None)):
        for _ in outputs(model, batches):
            pass
    removed = rule_of(module.spec).pruned(module.spec, module.seen, module.active_cutoff()) / module.seen.sum(-1)
    assert torch.allclose(removed, torch.tensor([0.2, 0.6], dtype=torch.float64), atol=0.05)
    module.set_sparsity(0.0)
    assert module.active_cutoff() is None


def test_without_a_budget_a_checkpoint_holds_none() -> None:
    assert not any("budget" in name for name in calibrated(AttentionSpec(sparsity=0.5), make_batches()))
    assert any(
        "budget" in name for name in calibrated(AttentionSpec(sparsity=0.5, budget="sensitivity"), make_batches())
    )
