"""Progressive pruning in Lightning: the same `SparsityDriver` as a callback of three hooks.

pip install pytorch-lightning
python examples/lightning_loop.py
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from plain_loop import STEPS, TARGET, make_batch, pruned_share
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import attnpress


class Sparsity(pl.Callback):
    """Drives the sparsity of `module.model`, bound and calibrated, by the trainer's own count of steps.

    With gradient accumulation a step spans several batches; the driver is told of steps, not of batches.
    """

    def __init__(self, schedule: attnpress.ScheduleSpec, target: float) -> None:
        self.schedule, self.target = schedule, target

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Once the number of steps is known."""
        total = int(trainer.estimated_stepping_batches)
        self.driver = attnpress.SparsityDriver(pl_module.model, self.schedule, self.target, total)
        self.begun = -1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the first batch of a step."""
        if trainer.global_step != self.begun:
            self.begun = trainer.global_step
            pl_module.log("sparsity_asked", self.driver.begin(self.begun))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last batch of a step."""
        if trainer.global_step != self.begun:  # the optimizer has stepped
            self.driver.end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leave the model at its target."""
        self.driver.freeze()


class Classifier(pl.LightningModule):
    """Any Transformers model with a loss."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own loss."""
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main(accumulate: int = 1) -> tuple[float, float, PreTrainedModel]:
    """Train; returns the last loss, the share of pairs pruned on fresh data, and the model."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = attnpress.bind(BertForSequenceClassification(config), attnpress.AttentionSpec())
    attnpress.calibrate(model, [make_batch(generator) for _ in range(4)])

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Sparsity(attnpress.ScheduleSpec("cubic", end=0.7), TARGET)],
    )  # fmt: skip
    batches: Any = [make_batch(generator) for _ in range(STEPS * accumulate)]
    trainer.fit(Classifier(model.train()), DataLoader(batches, batch_size=None))
    return float(trainer.callback_metrics["loss"]), pruned_share(model, make_batch(generator)), model


if __name__ == "__main__":
    loss, pruned, _ = main()
    print(f"loss {loss:.3f}, {pruned:.1%} of the valid pairs pruned")
