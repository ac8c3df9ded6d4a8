"""Modules keep the mode that they had: what a user has frozen stays frozen through every look at the model."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from attnpress.config import AttentionSpec
from attnpress.deployment.linear import calibrate_linear
from attnpress.models.binding import bind
from attnpress.models.inputs import BatchError
from attnpress.models.modes import evaluation_mode
from attnpress.models.outputs import outputs
from attnpress.runs.inspection import inspect_model
from attnpress.training.calibration import calibrate, fit_thresholds
from tests.models.factories import make_batch, make_classifier


def half_frozen() -> Any:
    """A model in training whose dropout is not."""
    model = make_classifier().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules() if not name.endswith("attnpress")}


def test_each_module_is_put_back_into_its_own_mode_also_after_an_error() -> None:
    model = half_frozen()
    before = modes(model)
    assert set(before.values()) == {True, False}
    with evaluation_mode(model):
        assert not any(modes(model).values())
    assert modes(model) == before
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        raise ZeroDivisionError
    assert modes(model) == before


def test_no_look_at_a_model_undoes_what_is_frozen() -> None:
    model, batch = half_frozen(), make_batch()
    before = modes(model)
    bind(model, AttentionSpec(sparsity=0.5))
    assert modes(model) == before
    calibrate(model, [batch])
    assert modes(model) == before
    fit_thresholds(model, [batch])
    calibrate_linear(model, [batch])
    assert modes(model) == before
    inspect_model(model, batch)
    assert modes(model) == before


def test_the_mode_is_back_when_a_pass_is_given_up_or_fails() -> None:
    model = half_frozen()
    before = modes(model)
    passes = outputs(model, [make_batch(), make_batch()])
    next(passes)
    passes.close()  # type: ignore[attr-defined]
    assert modes(model) == before
    with pytest.raises(BatchError):
        list(outputs(model, [make_batch(), {}]))
    assert modes(model) == before
