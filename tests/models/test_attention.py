"""The state of one attention module: its buffers, thresholds, histogram and counts."""

from __future__ import annotations

import math

import pytest
import torch

from attnpress.config import DENSE, AttentionSpec, Granularity, RuleName, TensorSpec
from attnpress.config.rules import RULES as FACTS
from attnpress.core.attention import dense_attention, integer_attention
from attnpress.models.attention import CompressedAttention
from attnpress.models.watchers import Counting, Fitting, start, stop
from tests.models.states import (
    DIM,
    HEADS,
    KV_HEADS,
    RULES,
    Inputs,
    calibrated,
    call,
    counts_of,
    make_inputs,
    make_state,
)


@pytest.mark.parametrize(("granularity", "groups"), [("tensor", (1, 1, 1)), ("head", (HEADS, KV_HEADS, KV_HEADS))])
def test_scales_have_one_value_a_group(granularity: Granularity, groups: tuple[int, int, int]) -> None:
    spec = TensorSpec(granularity=granularity)
    state = calibrated(AttentionSpec(q=spec, k=spec, v=spec), make_inputs())
    for scale, count in zip((state.q_scale, state.k_scale, state.v_scale), groups, strict=True):
        assert scale.shape == (1, count, 1, 1)
        assert bool((scale != 1).all())


def test_dynamic_and_floating_matrices_have_no_scale() -> None:
    state = make_state(AttentionSpec(q=TensorSpec(granularity="token"), v=TensorSpec(bits=None)))
    assert list(state.quantized()) == ["k"]
    assert {name for name, _ in state.named_buffers()} == {"k_scale", "budget", "cutoff", "histogram", "seen"}
    assert make_state(DENSE).quantized() == {}


def test_channel_scales_have_one_value_a_channel() -> None:
    state = calibrated(AttentionSpec(v=TensorSpec(granularity="channel")), make_inputs())
    assert state.v_scale.shape == (1, KV_HEADS, 1, DIM)


def test_what_is_saved_is_all_that_a_resumed_training_needs() -> None:
    state = calibrated(AttentionSpec(k=TensorSpec(learned=True), sparsity=0.5), make_inputs())
    assert set(state.state_dict()) == {"q_scale", "k_scale", "v_scale", "cutoff", "histogram", "_extra_state"}
    assert [name for name, _ in state.named_parameters()] == ["k_scale"]
    twin = make_state(state.spec)
    twin.load_state_dict(state.state_dict())
    inputs = make_inputs(1)
    assert torch.equal(call(twin, inputs), call(state, inputs))
    twin.set_sparsity(0.7)
    state.set_sparsity(0.7)
    assert torch.equal(twin.cutoff, state.cutoff)


@pytest.mark.parametrize("rule", RULES)
def test_output_is_that_of_the_reference(rule: RuleName) -> None:
    inputs = make_inputs()
    state = calibrated(AttentionSpec(rule=rule, sparsity=0.6), inputs)
    query, key, value, valid, _ = inputs
    found = integer_attention(state.call(query, key, value, valid, None, DIM**-0.5))
    assert torch.equal(call(state, inputs), found.output)


def test_attend_can_be_replaced() -> None:
    state = make_state()
    state.attend = lambda call: call.query + 1
    inputs = make_inputs()
    assert torch.equal(call(state, inputs), inputs[0] + 1)


# Thresholds.


def test_nothing_is_pruned_before_a_sparsity_is_asked() -> None:
    state = make_state(AttentionSpec())
    assert state.active_cutoff() is None
    assert state.cutoff.tolist() == [math.inf] * HEADS


@pytest.mark.parametrize("rule", ["relative", "threshold", "mass"])
def test_a_sparsity_fits_the_thresholds_and_zero_lifts_them(rule: RuleName) -> None:
    inputs = make_inputs()
    state = calibrated(AttentionSpec(rule=rule, sparsity=0.8), inputs)
    assert bool(state.cutoff.isfinite().all())
    assert pruned_fraction(state, inputs) == pytest.approx(0.8, abs=0.03)
    state.set_sparsity(0.4)
    assert pruned_fraction(state, inputs) == pytest.approx(0.4, abs=0.03)
    state.set_sparsity(0.0)
    assert state.active_cutoff() is None
    assert pruned_fraction(state, inputs) == 0


def pruned_fraction(state: CompressedAttention, inputs: Inputs) -> float:
    return float(counts_of(state, inputs).total().pruned_fraction())


def test_thresholds_are_told_in_the_unit_of_the_rule() -> None:
    inputs = make_inputs()
    for rule in RULES:
        spec = AttentionSpec(rule=rule, sparsity=0.8)
        state = calibrated(spec, inputs)
        if FACTS[rule].counts:
            assert not state.threshold().any()
            continue
        assert bool(((state.threshold() > 0) & (state.threshold() < 1)).all())
        state.set_sparsity(0.0)
        assert not state.threshold().any()
        fixed = make_state(AttentionSpec(rule=rule, threshold=0.25))
        assert fixed.threshold().tolist() == pytest.approx([0.25] * HEADS)
        assert fixed.active_cutoff() is not None


def test_a_threshold_of_ones_own_is_never_refitted() -> None:
    spec = AttentionSpec(threshold=0.1, sparsity=0.5)
    state = calibrated(spec, make_inputs())
    state.set_sparsity(0.9)
    assert state.threshold().tolist() == pytest.approx([0.1] * HEADS)


def test_thresholds_cannot_be_fitted_to_nothing() -> None:
    with pytest.raises(ValueError, match="calibrate on real batches first"):
        make_state().set_sparsity(0.5)


# Precision and learning.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_only_the_device_of_the_state_may_change(dtype: torch.dtype) -> None:
    state = calibrated(AttentionSpec(v=TensorSpec(learned=True), sparsity=0.5), make_inputs())
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    state.to(dtype)
    for name, tensor in state.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert isinstance(state.v_scale, torch.nn.Parameter)


def test_a_learned_scale_counts_by_its_magnitude() -> None:
    inputs = make_inputs()
    state = calibrated(AttentionSpec(v=TensorSpec(learned=True)), inputs)
    expected = call(state, inputs)
    with torch.no_grad():
        state.v_scale.neg_()
    assert torch.equal(call(state, inputs), expected)
    assert state.v_scale.requires_grad
    (gradient,) = torch.autograd.grad(call(state, inputs).square().sum(), [state.v_scale])
    assert bool(gradient.any()), "and can come back"
    state.requires_grad_(False)
    assert torch.equal(call(state, inputs), expected), "frozen ones too"


def test_learned_scales_improve() -> None:
    inputs = make_inputs()
    coarse = TensorSpec(bits=3, observer="absmax", learned=True)
    state = calibrated(AttentionSpec(q=coarse, k=coarse, v=coarse), inputs)
    query, key, value, valid, _ = inputs
    wanted = dense_attention(query, key, value, valid, DIM**-0.5)
    optimizer = torch.optim.Adam(state.parameters(), 0.02)
    losses = []
    for _ in range(40):
        loss = (call(state, inputs) - wanted)[:, :, :6].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses) < 0.9 * losses[0]


TRAINED = AttentionSpec(sparsity=0.5, threshold_penalty=2.0)


def test_a_trained_threshold_is_one_for_the_module_and_begins_at_the_sparsity_of_calibration() -> None:
    inputs = make_inputs()
    state = calibrated(TRAINED, inputs)
    state.fit()
    cutoff = state.active_cutoff()
    assert cutoff is not None
    assert len(set(cutoff.tolist())) == 1
    assert pruned_fraction(state.eval(), inputs) == pytest.approx(0.5, abs=0.03)
    state.set_sparsity(0.9)
    assert torch.equal(torch.exp(-cutoff), state.threshold()), "asking for more moves nothing: training does"


def test_only_training_passes_the_soft_gate() -> None:
    inputs = make_inputs()
    state = calibrated(TRAINED, inputs)
    state.fit()
    cutoff = state.active_cutoff()
    hard = make_state(AttentionSpec(sparsity=0.5))
    hard.load_state_dict({k: v for k, v in state.state_dict().items() if k != "trained_cutoff"})
    assert cutoff is not None
    hard.cutoff.copy_(cutoff)
    state.density = None
    assert torch.equal(call(state.eval(), inputs), call(hard, inputs))
    assert state.density is None
    soft = call(state.train(), inputs)
    assert not torch.equal(soft, call(hard, inputs))
    assert state.density is not None
    (gradient,) = torch.autograd.grad(state.density, state.trained_cutoff)
    assert float(gradient) > 0


def test_a_threshold_trained_below_the_row_maximum_keeps_the_maximum() -> None:
    inputs = make_inputs()
    state = calibrated(TRAINED, inputs)
    with torch.no_grad():
        state.trained_cutoff.fill_(-1.0)
    counts = counts_of(state.eval(), inputs)
    assert float((counts.pairs - counts.pruned).min()) >= float(counts.rows.max())


def test_a_threshold_that_prunes_nothing_stays_a_number() -> None:
    state = calibrated(AttentionSpec(threshold_penalty=2.0), make_inputs())
    state.fit()
    assert bool(state.trained_cutoff.isfinite().all())


# Devices.


@pytest.mark.parametrize(("rule", "penalty"), [*((rule, None) for rule in RULES), ("relative", 20.0)])
def test_no_tensor_is_made_on_another_device(
    rule: RuleName, penalty: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data stand for those of an accelerator: they mix with none of the processor's."""
    monkeypatch.setattr(torch, "bincount", lambda x, minlength: x.new_zeros(minlength))  # its size depends on data
    state = make_state(AttentionSpec(rule=rule, sparsity=0.5, smooth_key=True, threshold_penalty=penalty))
    state.to("meta").train()
    query, key, value, valid, real = (one.to("meta") for one in make_inputs())
    leaves = [one.requires_grad_() for one in (query, key, value)]
    counting = start(state, Counting(state))
    start(state, Fitting(slice(0, None, 2)))
    output = state(state.call(query, key, value, valid, real, DIM**-0.5, dropout=0.1))
    output.sum().backward()
    stop(state, Fitting)
    found = [output, state.take_seen(0.9), *counting.counts.tensors(), *(leaf.grad for leaf in leaves)]
    assert {one.device.type for one in found} == {"meta"}
