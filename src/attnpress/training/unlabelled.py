"""Training without labels: the compressed model learns the dense one's answers while it is pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback

from attnpress.config import DistillationSpec, ScheduleSpec, TrainSpec
from attnpress.core.distillation import attention_loss, check_gradients, logits_loss, states_loss
from attnpress.models.binding import captured_outputs
from attnpress.tasks.sampler import LengthSampler
from attnpress.training.callbacks import CheckpointCallback, SparsityCallback
from attnpress.training.trainer import CompressionTrainer, last_checkpoint, training_arguments

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


class UnlabelledTrainer(CompressionTrainer):
    """Trainer whose loss is only the distance to the teacher: of logits, or of hidden states without logits.

    Args:
        lengths: of the training rows, for batches of similar length.
    """

    def __init__(self, *args: Any, lengths: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lengths = lengths

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        batch = self.args.train_batch_size * self.args.world_size
        return LengthSampler(self.lengths, batch, self.args.seed, epoch=lambda: int(self.state.epoch or 0))

    def _distilled(
        self, teacher: PreTrainedModel, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Any]:
        with captured_outputs(self.accelerator.unwrap_model(model)) as seen:
            outputs = model(**inputs)
        check_gradients(seen, self.distillation)
        with torch.no_grad(), captured_outputs(teacher) as wanted:
            answers = teacher(**inputs)
        spec, tokens = self.distillation, inputs["attention_mask"]
        if hasattr(outputs, "logits"):
            loss = logits_loss(outputs, answers, spec.temperature, tokens)
        else:
            loss = states_loss(outputs[0], answers[0], tokens)
        return spec.logits * loss + spec.attention * attention_loss(seen, wanted, tokens), outputs


def train_unlabelled(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Sequence[Any],
    collate: Collate,
    spec: TrainSpec,
    folder: Path | None,
    *,
    sparsity: float,
    lengths: Sequence[int],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Train a bound, calibrated model in place, while its sparsity rises to the requested one.

    Args:
        teacher: bound with `DENSE`.
        rows, collate: texts, and a function that makes a batch of model inputs, with an attention mask, from some of
            them.
        folder: for checkpoints, from which interrupted training resumes; None keeps none.
        sparsity: target of the default schedule of recipes.
        lengths: of the rows.

    Returns:
        The log history, with the loss and the requested and achieved sparsity.

    Raises:
        DivergedError: NaN or infinity.
    """
    arguments = training_arguments(spec, len(rows), folder or Path(), seed)
    arguments.remove_unused_columns = False
    if folder is None:
        arguments.save_strategy = "no"
    trainer = UnlabelledTrainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=collate,
        lengths=lengths,
        teacher=teacher,
        distillation=DistillationSpec(),
        callbacks=[CheckpointCallback(), SparsityCallback(model, ScheduleSpec(), sparsity)],
    )
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    trainer.train(resume_from_checkpoint=None if folder is None else last_checkpoint(folder))
    model.eval()
    return list(trainer.state.log_history)
