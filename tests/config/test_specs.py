"""Specs: what they refuse, in whose name, and what follows from them."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnpress.config import (
    DENSE,
    AttentionSpec,
    ConfigError,
    ProbsSpec,
    RuleName,
    RunConfig,
    ScheduleSpec,
    TensorSpec,
)
from attnpress.config.recipe import parse_spec


@given(st.integers(2, 8))
def test_largest_codes_are_symmetric_for_tensors_and_unsigned_for_probabilities(bits: int) -> None:
    assert TensorSpec(bits).qmax == 2 ** (bits - 1) - 1
    assert ProbsSpec(bits).qmax == 2**bits - 1
    assert ProbsSpec(bits, signed=True).qmax == TensorSpec(bits).qmax


def test_no_bits_have_no_largest_code() -> None:
    with pytest.raises(ConfigError, match="bits=None"):
        _ = TensorSpec(None).qmax
    with pytest.raises(ConfigError, match="bits=None"):
        _ = ProbsSpec(None).qmax


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_are_calibrated_by_least_squares(bits: int) -> None:
    assert TensorSpec(bits).observer_name == "mse"
    assert TensorSpec(bits, observer="absmax").observer_name == "absmax"
    assert TensorSpec(8).observer_name == "ema"


def test_dense_means_that_nothing_is_taken() -> None:
    assert DENSE.is_dense
    assert not AttentionSpec().is_dense
    for change in ({"sparsity": 0.1}, {"threshold": 0.5}, {"p": ProbsSpec(8)}, {"v": TensorSpec(8)}):
        assert not dataclasses.replace(DENSE, **change).is_dense
    assert AttentionSpec(v=TensorSpec(4)).bits == {"q": 8, "k": 8, "v": 4, "p": 8}


def test_specs_are_frozen_and_compare_by_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]
    assert AttentionSpec(sparsity=0.5) == dataclasses.replace(AttentionSpec(), sparsity=0.5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attention": {"q": {"bits": 9}}}, r"attention\.q\.bits: .*less than or equal to 8 \(found 9\)"),
    ({"attention": {"p": {"bits": 1}}}, r"attention\.p\.bits: .*greater than or equal to 2 \(found 1\)"),
    ({"attention": {"q": {"bits": 4.5}}}, r"attention\.q\.bits: .*valid integer.*\(found 4\.5\)"),
    ({"attention": {"sparsity": 1}}, r"attention\.sparsity: .*less than 1 \(found 1\)"),
    ({"attention": {"sparsity": -0.1}}, r"attention\.sparsity: .*greater than or equal to 0 \(found -0\.1\)"),
    ({"attention": {"sparsity": float("nan")}}, r"attention\.sparsity: .*\(found nan\)"),
    ({"attention": {"rule": "top-k"}}, r"attention\.rule: .*'mass' or 'nm' \(found 'top-k'\)"),
    ({"attention": {"threshold": 0}}, r"attention\.threshold: .*greater than 0"),
    ({"attention": {"rule": "topk", "threshold": 0.5}}, "threshold: rule 'topk' keeps a count.*set sparsity instead"),
    ({"attention": {"predictor_bits": 8}}, "predictor_bits: 8 has no effect: .*fewer than the bits of q and k, 8"),
    (
        {"attention": {"predictor_bits": 4, "q": {"bits": None}, "k": {"bits": None}}},
        "predictor_bits: 4 has no effect.*None and None",
    ),
    ({"attention": {"predictor_bits": 4, "p": {"mode": "unit"}}}, "predictor_bits: p.mode 'unit' needs the score"),
    ({"attention": {"predictor_bits": 4, "tail": "mean"}}, "predictor_bits: a tail counts from the largest exact"),
    ({"attention": {"predictor_bits": 4, "threshold_penalty": 1.0}}, "predictor_bits: threshold_penalty trains on"),
    ({"attention": {"rule": "nm", "threshold": 0.5}}, "threshold: rule 'nm' keeps a count.*set sparsity instead"),
    ({"attention": {"rule": "nm", "sparsity": 0.9}}, "sparsity: rule 'nm' prunes 0.25, 0.5 or 0.75 .* not 0.9"),
    ({"attention": {"rule": "topk", "threshold_penalty": 1.0}}, "threshold_penalty: .* need rule relative"),
    ({"attention": {"p": {"mode": "unit"}, "threshold_penalty": 1.0}}, "threshold_penalty: .* p.mode row"),
    ({"attention": {"rule": "topk", "budget": "sensitivity"}}, "budget: it needs thresholds that are fitted"),
    ({"attention": {"threshold": 0.1, "budget": "sensitivity"}}, "budget: it needs thresholds that are fitted"),
    ({"attention": {"sparsity": 0.9, "threshold_penalty": 1.0}}, "schedule.start: give the sparsity at which trained"),
    ({"attention": {"q": {"granularity": "channel"}}}, r"q\.granularity: 'channel' would vary inside .*tensor, head"),
    ({"attention": {"k": {"granularity": "token"}}}, r"k\.granularity: 'token' would vary within .*use tensor or head"),
    ({"attention": {"v": {"granularity": "token"}}}, r"v\.granularity: 'token' would .*use tensor, head or channel"),
    ({"attention": {"q": {"bits": None}}}, r"q\.bits, k\.bits: quantize both of Q and K, or neither"),
    ({"attention": {"v": {"learned": True, "power_of_two": True}}}, "learned steps need .*: drop power_of_two"),
    ({"attention": {"q": {"observer": "max"}}}, r"attention\.q\.observer: .*'absmax', 'ema', 'percentile' or 'mse'"),
    ({"attention": {"sparsety": 0.5}}, r"attention\.sparsety: unknown key; did you mean 'sparsity'\?"),
    ({"attention": {"q": {"bitz": 8}}}, r"attention\.q\.bitz: unknown key; did you mean 'bits'\?"),
    ({"zzz": 1}, r"zzz: unknown key; known keys: model, checkpoint, data"),
    ({"schedule": {"kind": "cosine"}}, r"schedule\.kind: .*'cubic', 'step' or 'fixed' \(found 'cosine'\)"),
    ({"schedule": {"begin": 0.8, "end": 0.5}}, r"begin: must not exceed end \(0\.8 > 0\.5\)"),
    ({"dense": {"learning_rate": float("inf")}}, r"dense\.learning_rate: .*finite"),
    ({"compress": {"batch_size": 0}}, r"compress\.batch_size: .*greater than or equal to 1"),
    ({"data": {"max_length": 4}}, r"data\.max_length: .*greater than or equal to 8"),
    ({"seed": "one"}, r"seed: .*valid integer.*\(found 'one'\)"),
    ({"data": None}, r"data: "),
    ({"seed": -1}, r"seed: .*greater than or equal to 0 \(found -1\)"),
    ({"seed": 2**32}, r"seed: .*less than 4294967296"),
    ({"seed": True}, "seed: should be a number, not true or false"),
    ({"seed": 10**400}, "seed: .*less than 4294967296"),
    ({"dense": {"epochs": 1e300}}, r"dense\.epochs: .*less than or equal to 10000"),
    ({"dense": {"epochs": 10**400}}, r"dense\.epochs: .*valid number"),
    ({"dense": {"epochs": float("nan")}}, r"dense\.epochs: .*found nan"),
    ({"dense": {"batch_size": 10**9}}, r"dense\.batch_size: .*less than or equal to 65536"),
    ({"dense": {"checkpoints": 10**9}}, r"dense\.checkpoints: .*less than or equal to"),
    ({"dense": {"weight_decay": 1e300}}, r"dense\.weight_decay: .*less than or equal to"),
    ({"calibration": {"batches": 10**9}}, r"calibration\.batches: .*less than or equal to"),
    ({"distillation": {"temperature": 1e-300}}, r"distillation\.temperature: .*greater than or equal to 0\.01"),
    ({"schedule": {"steps": 10**9}}, r"schedule\.steps: .*less than or equal to"),
    ({"data": {"max_length": 10**9}}, r"data\.max_length: .*less than or equal to"),
    ({"data": {"train_file": "a\0b"}}, r"data\.train_file: holds a NUL character"),
    ({"data": {"text": "\ud83d"}}, r"data\.text: holds .*an unpaired surrogate"),
    ({"data": {"data_dir": "x" * 5000}}, r"data\.data_dir: is longer than 4096 characters"),
    ({"layers": {0: {"sparsity": 0.5}, "0": {}}}, "layers: two keys are the same as text"),
    ({"attention": {"q": {"bits": True}}}, r"attention\.q\.bits: should be a number"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "message"), REFUSED)
def test_what_cannot_work_is_refused_by_key_with_the_mend(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(RunConfig, recipe)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        parse_spec(RunConfig, {"seed": "one", "zzz": 1, "attention": {"q": {"bits": 9}}})
    assert len(str(told.value).splitlines()) == 3


@pytest.mark.parametrize("bits", [1, 9])
def test_a_spec_made_in_python_is_checked_too(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        TensorSpec(bits=bits)
    with pytest.raises(ValueError, match="sparsity"):
        AttentionSpec(sparsity=1.0)
    with pytest.raises(ValueError, match="begin"):
        ScheduleSpec(begin=0.9, end=0.1)


def test_choices_are_those_of_the_type() -> None:
    assert get_args(RuleName) == ("relative", "threshold", "topk", "mass", "nm")
