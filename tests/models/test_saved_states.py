"""Saving with weights other than the model's own, and parts of a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BartConfig,
    BartModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from attnpress.config import AttentionSpec, ScheduleSpec, TensorSpec
from attnpress.models.binding import attentions, bind
from attnpress.models.hub import ModelError
from attnpress.training.calibration import calibrate
from attnpress.training.driver import SparsityDriver
from tests.models.checkpoints import SPECS, load, logits, make_compressed
from tests.models.factories import VOCABULARY, make_batch, make_classifier, outputs

# Other weights than the model's own, and parts.


def test_weights_given_to_save_pretrained_are_the_ones_that_are_stored(tmp_path: Path) -> None:
    model = make_compressed()
    dense = {name: x for name, x in model.state_dict().items() if ".attnpress." not in name}
    averaged = {name: x * 0.5 if x.is_floating_point() else x for name, x in dense.items()}
    model.save_pretrained(tmp_path, state_dict=averaged)
    twin = make_compressed()
    twin.load_state_dict(averaged, strict=False)
    assert torch.equal(logits(load(tmp_path)), logits(twin))


def test_a_state_given_to_save_pretrained_brings_its_own_sparsity(tmp_path: Path) -> None:
    model = make_compressed()
    state, expected = copy.deepcopy(model.state_dict()), logits(model)
    SparsityDriver(model, ScheduleSpec(), 0.9, total=1).freeze()
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = load(tmp_path)
    assert {one.spec.sparsity for one in attentions(loaded).values()} == {0.7}
    assert torch.equal(logits(loaded), expected)


def test_a_state_of_another_spec_is_not_saved(tmp_path: Path) -> None:
    other = bind(make_classifier(num_labels=3), AttentionSpec(v=TensorSpec(bits=4)))
    calibrate(other, [make_batch(seed=3)])
    with pytest.raises(ModelError, match=r"state_dict given to save_pretrained: .*v\.bits is 4 in the state"):
        make_compressed().save_pretrained(tmp_path, state_dict=other.state_dict())


def test_a_whole_of_which_a_part_is_bound_is_not_saved_as_if_nothing_were(tmp_path: Path) -> None:
    model = make_classifier(num_labels=3)
    calibrate(bind(model.get_submodule("bert"), SPECS["relative"]), [make_batch(seed=3)])
    with pytest.raises(ValueError, match="BertForSequenceClassification was not bound itself"):
        model.save_pretrained(tmp_path / "whole")
    body: Any = model.get_submodule("bert")
    body.save_pretrained(tmp_path / "part")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "part"), make_batch()), outputs(body, make_batch()))
    assert model.state_dict().keys() > {f"bert.{name}" for name in body.state_dict()} - {"bert"}


def test_cross_attention_is_still_known_after_loading(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    model = bind(BartModel(BartConfig(**sizes)).eval(), SPECS["relative"])
    calibrate(model, [{"input_ids": torch.randint(3, 60, (2, 6))}])
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    flags = {name: state.is_cross for name, state in attentions(model).items()}
    assert {name: state.is_cross for name, state in attentions(loaded).items()} == flags
    assert sum(flags.values()) == 1


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight labelled rows."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(3, VOCABULARY, (7,)), "labels": torch.tensor(index % 3)}


def test_the_best_model_of_a_trainer_comes_back_with_its_sparsity(tmp_path: Path) -> None:
    model = make_compressed(SPECS["relative"])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=1, eval_steps=1, save_strategy="steps", eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="first", report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, learning_rate=1e-3, logging_strategy="no",
    )  # fmt: skip
    asked = iter([0.2, 0.9, 0.9, 0.9])

    class Raise(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            sparsity = next(asked)
            for state in attentions(model).values():
                state.set_sparsity(sparsity)

    class BestFirst(Trainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_first": 1.0 / self.state.global_step}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    trainer = BestFirst(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[Raise()])
    trainer.train()
    assert {state.spec.sparsity for state in attentions(model).values()} == {0.2}
    best = load(Path(str(trainer.state.best_model_checkpoint)))
    assert torch.equal(logits(best), logits(model.eval()))
