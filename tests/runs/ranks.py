"""A program for one rank or several: calibrates, prunes and evaluates on shared rows; rank 0 writes what came out.

Usage: [torchrun ...] ranks.py RECIPE.yaml FOLDER: figures go to FOLDER/figures.json; several ranks also run the recipe
itself, into FOLDER/run.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnpress.cli
from attnpress.config import DENSE, AttentionSpec, ScheduleSpec, TensorSpec, TrainSpec
from attnpress.config.recipe import load_config
from attnpress.distributed import reduce_over_ranks, this_process
from attnpress.models.binding import attentions, bind
from attnpress.models.loading import load_model, load_tokenizer
from attnpress.models.outputs import outputs
from attnpress.runs.evaluation import evaluate
from attnpress.tasks import TaskData, load_task
from attnpress.tasks.predictions import predicted_logits
from attnpress.training.calibration import calibrate
from attnpress.training.driver import SparsityDriver
from attnpress.training.trainer import train

SPEC = AttentionSpec(
    q=TensorSpec(observer="ema"),
    k=TensorSpec(observer="mse", bits=4),
    v=TensorSpec(observer="percentile"),
    sparsity=0.6,
)


def shares(data: TaskData, batches: int, rows: int) -> list[dict[str, Any]]:
    """This rank's rows of each batch; padded before they are shared, so that all ranks together see what one would."""
    state = this_process()
    whole = [
        data.collate([data.train[n] for n in range(first, first + rows)]) for first in range(0, batches * rows, rows)
    ]
    return [{k: v[state.process_index :: state.num_processes] for k, v in batch.items()} for batch in whole]


def buffers(model: nn.Module) -> dict[str, list[float]]:
    """Scales, thresholds and histograms, exactly."""
    names = ("q_scale", "k_scale", "v_scale", "cutoff", "histogram")
    return {
        f"{layer}.{name}": getattr(module, name).flatten().tolist()
        for layer, module in attentions(model).items()
        for name in names
    }


def measure(recipe: Path) -> dict[str, Any]:
    config = load_config(recipe)
    data = load_task(config.data, load_tokenizer(config.model), config.seed)
    assert config.checkpoint is not None
    # In float64 the order of a sum, which depends on how many rows a rank has, does not reach the float32 statistics.
    model = bind(load_model(str(config.checkpoint), "classification", data.label_names).double(), SPEC)
    calibrate(model, shares(data, 3, 15))
    found: dict[str, Any] = {"calibrated": buffers(model)}
    driver = SparsityDriver(model, ScheduleSpec("linear", end=0.5, start=0.2), 0.7, total=4)
    for step, batch in enumerate(shares(data, 4, 16)):
        driver.begin(step)
        list(outputs(model, [batch]))
        driver.end()
    driver.freeze()
    found["driven"] = buffers(model)
    stage = dataclasses.asdict(evaluate(model, data, "progressive", config.data.max_length, batch_size=10))
    found["stage"] = {name: value for name, value in stage.items() if name != "layers"}
    found["layers"] = stage["layers"]
    found["logits"] = predicted_logits(bind(model, DENSE), data, batch_size=10).tolist()
    return found


def resumes_exactly(recipe: Path, folder: Path) -> bool:
    """Train, lose the last checkpoint, go on in mid-epoch: does this rank end with the same weights?"""
    config, state = load_config(recipe), this_process()
    data = load_task(config.data, load_tokenizer(config.model), config.seed)
    spec = TrainSpec(epochs=2, learning_rate=1e-3, batch_size=8, checkpoints=3)
    whole, resumed = (load_model(str(config.checkpoint), "classification", data.label_names) for _ in range(2))
    train(whole, data, spec, folder, config.seed, config.distillation)
    if state.is_main_process:
        shutil.rmtree(folder / "checkpoint-10")
    state.wait_for_everyone()
    train(resumed, data, spec, folder, config.seed, config.distillation)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    return all(torch.equal(before, after) for before, after in pairs)


def main(recipe: Path, folder: Path) -> None:
    state = this_process()
    found = measure(recipe)
    different = torch.tensor(float(not resumes_exactly(recipe, folder / "resumed")))
    found["ranks_that_resumed_differently"] = float(reduce_over_ranks(different, "sum"))
    if state.is_main_process:
        (folder / "figures.json").write_text(json.dumps(found), encoding="utf-8")
    status = attnpress.cli.main(["compress", str(recipe), "--output", str(folder / "run")])
    state.wait_for_everyone()
    state.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
