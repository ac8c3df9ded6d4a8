"""State dicts of bound models: what they carry beside tensors, what is refused, and models that nobody calibrated."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from attnpress.config import DENSE, AttentionSpec, ProbsSpec, ScheduleSpec, TensorSpec
from attnpress.deployment.attention import deploy
from attnpress.export.onnx import write_onnx
from attnpress.export.trace import write_trace
from attnpress.models.attention import NAME, CompressedAttention
from attnpress.models.binding import attentions, bind
from attnpress.models.state import NotCalibratedError, StateError, pack_extra, unpack_extra
from attnpress.training.calibration import calibrate, fit_thresholds
from attnpress.training.driver import SparsityDriver
from tests.models.checkpoints import logits
from tests.models.factories import make_batch, make_classifier

FOUR, EIGHT_BITS = TensorSpec(bits=4), AttentionSpec()


def made(spec: AttentionSpec = EIGHT_BITS) -> PreTrainedModel:
    return bind(make_classifier(num_labels=2), spec)


def calibrated(spec: AttentionSpec = EIGHT_BITS) -> PreTrainedModel:
    model = made(spec)
    calibrate(model, [make_batch(seed=3)])
    return model


def pruned(sparsity: float = 0.9) -> PreTrainedModel:
    """Bound without sparsity, and raised to it as in training."""
    model = calibrated()
    SparsityDriver(model, ScheduleSpec("constant"), sparsity, total=1).freeze()
    return model


def through_torch(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    torch.save(state, folder / "state.pt")
    found: dict[str, Tensor] = torch.load(folder / "state.pt", weights_only=True)
    return found


def through_safetensors(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    save_file(state, folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


def without_extra(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if not name.endswith("_extra_state")}


# What a state dict carries.


@pytest.mark.parametrize("stored", [through_torch, through_safetensors])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_brings_the_sparsity_in_force_with_it(
    stored: Callable[..., dict[str, Tensor]], strict: bool, assign: bool, tmp_path: Path
) -> None:
    model, twin = pruned(0.9), made()
    twin.load_state_dict(stored(model.state_dict(), tmp_path), strict=strict, assign=assign)
    assert {state.spec.sparsity for state in attentions(twin).values()} == {0.9}
    assert torch.equal(logits(twin), logits(model))


def test_a_state_dict_goes_back_into_its_own_model_after_more_training() -> None:
    model = pruned(0.5)
    best, expected = copy.deepcopy(model.state_dict()), logits(model)
    SparsityDriver(model, ScheduleSpec("constant"), 0.9, total=1).freeze()
    assert not torch.equal(logits(model), expected)
    model.load_state_dict(best, strict=False)
    assert torch.equal(logits(model), expected)
    assert {state.spec.sparsity for state in attentions(model).values()} == {0.5}


OTHER_SPECS: dict[str, tuple[AttentionSpec, str]] = {
    "bits of V": (AttentionSpec(v=FOUR), r"v\.bits is 8 in the state and 4 in the model"),
    "bits of P": (AttentionSpec(p=ProbsSpec(bits=4)), r"p\.bits is 8 in the state and 4 in the model"),
    "mode": (AttentionSpec(p=ProbsSpec(mode="unit")), r"p\.mode is row in the state and unit in the model"),
    "rule": (AttentionSpec(rule="topk"), "rule is relative in the state and topk in the model"),
    "smoothing": (AttentionSpec(smooth_key=True), "smooth_key is False in the state and True in the model"),
    "threshold": (AttentionSpec(threshold=0.1), "threshold is None in the state and 0.1 in the model"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", OTHER_SPECS)
def test_a_state_of_another_spec_is_refused_with_the_module_and_the_field(name: str, strict: bool) -> None:
    spec, named = OTHER_SPECS[name]
    model = calibrated(spec)
    before = {key: x.clone() for key, x in model.state_dict().items() if NAME in key}
    state = {key: x for key, x in calibrated().state_dict().items() if NAME in key}
    with pytest.raises(RuntimeError, match=rf"bert\.encoder\.layer\.0\.attention\.self\.attnpress\.{named}"):
        model.load_state_dict(state | without_extra_of(model), strict=strict)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items() if NAME in key)


def without_extra_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The ordinary weights."""
    return {key: x for key, x in model.state_dict().items() if NAME not in key}


def test_what_only_training_reads_of_a_spec_may_differ() -> None:
    spec = AttentionSpec(q=TensorSpec(observer="absmax"))
    twin = made(spec)
    twin.load_state_dict(calibrated().state_dict())
    assert {state.spec for state in attentions(twin).values()} == {spec}


def test_a_state_from_before_the_extra_state_loads_and_says_what_it_takes_for_granted() -> None:
    model, twin = calibrated(AttentionSpec(sparsity=0.6)), made(AttentionSpec(sparsity=0.6))
    with pytest.warns(UserWarning, match="older version.*stay those that the model was bound with"):
        found = twin.load_state_dict(without_extra(model.state_dict()))
    assert not found.missing_keys
    assert torch.equal(logits(twin), logits(model))


def test_dense_weights_leave_the_state_of_a_bound_model_alone() -> None:
    model = pruned(0.5)
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.load_state_dict(without_extra_of(model), strict=False)
    assert all(NAME in name for name in found.missing_keys)
    assert torch.equal(logits(model), expected)


VALUES: dict[str, tuple[str, float]] = {
    "no scale": ("q_scale", 0.0),
    "a negative scale": ("k_scale", -0.1),
    "a tiny scale": ("v_scale", 1e-45),
    "a huge scale": ("q_scale", 1e38),
    "a scale that is no number": ("k_scale", torch.nan),
    "a negative cutoff": ("cutoff", -1.0),
    "a cutoff that is no number": ("cutoff", torch.nan),
    "a huge cutoff": ("cutoff", 1e38),
    "negative counts": ("histogram", -1.0),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_state_with_values_that_none_can_have_is_refused_by_name(name: str) -> None:
    part, value = VALUES[name]
    model = pruned(0.5)
    state = {key: torch.full_like(x, value) if key.endswith(part) else x for key, x in model.state_dict().items()}
    expected = logits(model)
    with pytest.raises(RuntimeError, match=rf"layer\.0\.attention\.self\.attnpress\.{part} holds .* is allowed"):
        model.load_state_dict(state)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x.float(), "damaged"),
        (lambda x: x * 0, "it is not JSON"),
        (lambda x: x[:20], "it is not JSON"),
        (lambda x: as_text(b"[]"), "version None"),
        (lambda x: as_text(b'{"version": 99}'), "version 99.*update attnpress"),
        (lambda x: as_text(b'{"version": 1, "unset": [], "attention": {}}'), r"attention\.q is missing"),
        (lambda x: as_text(b'{"version": 1, "unset": ["nothing"]}'), "unset is"),
    ],
)
def test_a_damaged_extra_state_is_refused(change: Callable[[Tensor], Tensor], named: str) -> None:
    model = calibrated()
    state = {key: change(x) if key.endswith("_extra_state") else x for key, x in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=named):
        model.load_state_dict(state)


def as_text(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def test_extra_states_are_tensors_of_one_size() -> None:
    wide = AttentionSpec(q=TensorSpec(bits=None), k=TensorSpec(bits=None), rule="threshold", sparsity=1 / 3)
    packed = [pack_extra(spec, unset) for spec in (AttentionSpec(), wide, DENSE) for unset in ([], ["q_scale"])]
    assert len({x.shape for x in packed}) == 1
    assert unpack_extra(packed[3]) == dataclasses.replace(unpack_extra(packed[2]), unset=frozenset({"q_scale"}))
    assert unpack_extra(packed[2]).spec == wide


def test_copies_and_pickles_keep_the_sparsity_in_force() -> None:
    model = pruned(0.7)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_file(model)):
        assert {state.spec.sparsity for state in attentions(twin).values()} == {0.7}
        assert torch.equal(logits(twin), logits(model))


def through_file(model: PreTrainedModel) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Models that nobody calibrated.


UNCALIBRATED: dict[str, Callable[[PreTrainedModel], object]] = {
    "evaluation": logits,
    "training": lambda model: model.train()(**make_batch(), labels=torch.tensor([0, 1, 0])),
    "deploy": lambda model: deploy(model, "reference"),
    "save_pretrained": lambda model: model.save_pretrained("nowhere"),
    "fit_thresholds": lambda model: fit_thresholds(model, [make_batch()]),
}
SPECS = {
    "static scales": AttentionSpec(),
    "a scale of V only": AttentionSpec(q=TensorSpec(granularity="token"), k=TensorSpec(learned=True)),
    "pruned": AttentionSpec(sparsity=0.5),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("use", UNCALIBRATED)
def test_a_model_that_was_not_calibrated_says_so(
    use: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = made(SPECS[name])
    with pytest.raises(NotCalibratedError, match=r"not calibrated .*call calibrate\(model, batches\) first"):
        UNCALIBRATED[use](model)
    assert not list(tmp_path.rglob("*.safetensors"))
    calibrate(model, [make_batch()])
    UNCALIBRATED[use](model)


@pytest.mark.parametrize("rule", ["relative", "threshold", "mass"])
def test_thresholds_alone_have_to_be_fitted_too(rule: Any) -> None:
    free = TensorSpec(bits=None)
    spec = AttentionSpec(q=free, k=free, v=free, rule=rule, sparsity=0.5)
    with pytest.raises(NotCalibratedError, match="cutoff not set"):
        logits(made(spec))
    assert logits(calibrated(spec)).isfinite().all()


@pytest.mark.parametrize(
    "spec",
    [
        DENSE,
        AttentionSpec(q=TensorSpec(bits=None), k=TensorSpec(bits=None), v=TensorSpec(bits=None)),
        AttentionSpec(q=TensorSpec(bits=None), k=TensorSpec(bits=None), v=TensorSpec(bits=None), threshold=0.05),
        AttentionSpec(q=TensorSpec(bits=None), k=TensorSpec(bits=None), v=TensorSpec(bits=None), rule="topk"),
    ],
)
def test_what_has_nothing_to_calibrate_runs_at_once(spec: AttentionSpec) -> None:
    assert logits(made(spec)).isfinite().all()


def test_a_state_of_a_model_that_was_not_calibrated_does_not_make_another_one_so() -> None:
    model = calibrated()
    model.load_state_dict(made().state_dict())
    with pytest.raises(NotCalibratedError):
        logits(model)


def test_scales_may_be_set_by_hand() -> None:
    model, twin = calibrated(), made()
    for ours, theirs in zip(attentions(twin).values(), attentions(model).values(), strict=True):
        ours.set_scales({name: getattr(theirs, f"{name}_scale") for name in "qkv"})
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize(
    ("scales", "named"),
    [
        ({"q": torch.zeros(1, 1, 1, 1)}, "q_scale holds 0"),
        ({"q": torch.ones(1, 1, 1, 1, dtype=torch.float16)}, r"q_scale has dtype torch\.float16"),
        ({"p": torch.ones(1, 1, 1, 1)}, "p_scale does not exist"),
    ],
)
def test_a_scale_that_none_can_have_is_not_taken(scales: dict[str, Tensor], named: str) -> None:
    state = CompressedAttention(AttentionSpec(), 4, 4, 8)
    with pytest.raises(ValueError, match=named):
        state.set_scales({"v": torch.full((1, 1, 1, 1), 0.5)} | scales)
    assert state.unset == {"q_scale", "k_scale", "v_scale"}
    assert bool((state.v_scale == 1).all())


def test_trained_thresholds_are_not_those_that_are_fitted() -> None:
    spec = AttentionSpec(sparsity=0.5)
    trained = calibrated(dataclasses.replace(spec, threshold_penalty=2.0))
    state = {name: x for name, x in trained.state_dict().items() if not name.endswith("trained_cutoff")}
    twin = made(spec)
    twin.load_state_dict(state)
    with pytest.raises(NotCalibratedError, match="cutoff not set"):
        logits(twin)


def test_a_state_error_is_raised_to_whoever_sets_an_extra_state() -> None:
    state = CompressedAttention(AttentionSpec(), 4, 4, 8)
    with pytest.raises(StateError, match=r"v\.bits is 4 in the state and 8 in the model"):
        state.set_extra_state(pack_extra(AttentionSpec(v=FOUR), []))


def test_a_sparsity_that_cannot_be_fitted_is_not_computed_without() -> None:
    model = made()
    for state in attentions(model).values():
        state.set_scales({name: torch.full((1, 1, 1, 1), 0.05) for name in "qkv"})
    assert logits(model).isfinite().all()
    for state in attentions(model).values():
        with pytest.raises(ValueError, match="calibrate on real batches first"):
            state.set_sparsity(0.5)
    with pytest.raises(NotCalibratedError, match="cutoff not set"):
        logits(model)


@pytest.mark.parametrize("write", [write_onnx, write_trace])
def test_what_was_not_calibrated_is_not_exported(write: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(NotCalibratedError, match="call calibrate"):
        write(made().eval(), make_batch(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_predictor_is_stored_and_a_state_without_one_says_nothing_of_it() -> None:
    spec = AttentionSpec(sparsity=0.5, rule="threshold", predictor_bits=4)
    assert unpack_extra(pack_extra(spec, ())).spec == spec
    assert b"predictor_bits" not in bytes(pack_extra(AttentionSpec(sparsity=0.5), ()).tolist())


def test_thresholds_that_a_state_lacks_have_to_be_fitted() -> None:
    state = {name: x for name, x in pruned(0.7).state_dict().items() if not name.endswith(".cutoff")}
    model = made(AttentionSpec(sparsity=0.5))
    model.load_state_dict(state, strict=False)
    with pytest.raises(NotCalibratedError, match="cutoff not set"):
        logits(model)


def test_a_model_is_copied_after_a_training_step_with_trained_thresholds() -> None:
    model = calibrated(AttentionSpec(sparsity=0.5, threshold_penalty=1.0)).train()
    model(**make_batch())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin.eval()), logits(model.eval()))
