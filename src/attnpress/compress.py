"""compress: the main journey, from a dense model to a compressed one and a record of what each step cost.

Stages, each recorded as soon as it is done, so that the same command goes on where a killed one stopped:
dense (fine-tuned here, or a checkpoint), dense_control (optional), quantized, one_shot, progressive.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from attnpress.calibrate import calibrate, fit_thresholds
from attnpress.config import DENSE, AttentionSpec, ConfigError, RunConfig
from attnpress.evaluate import evaluate
from attnpress.files import sha256_of, whole_folder, write_text
from attnpress.finetune import SparsityCallback, history_lines, train
from attnpress.models.binding import bind
from attnpress.models.loading import (
    WEIGHTS,
    load_compressed,
    load_model,
    load_tokenizer,
    resolve_model,
    save_compressed,
)
from attnpress.recipe import spec_to_dict
from attnpress.results import STAGES, Record, StageRecord, read_record, to_json
from attnpress.run_folder import check_space, claim_folder, provenance
from attnpress.tasks import TaskData, check_data, load_task


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage needs to know."""

    config: RunConfig
    output: Path
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    base: str
    notify: Callable[[str], None]

    @property
    def dense(self) -> str:
        """Where the fine-tuned dense model is."""
        return str(self.config.checkpoint or self.output / "dense")

    def load(self, source: str) -> PreTrainedModel:
        """A model with the task's head, the same head for the same seed."""
        set_seed(self.config.seed)
        return load_model(source, self.data.task.kind, self.data.label_names)

    def calibration_batches(self) -> list[dict[str, Any]]:
        """This rank's share of the calibration batches: random training rows, fixed by the seed."""
        spec, state = self.config.calibration, PartialState()
        generator = torch.Generator().manual_seed(self.config.seed)
        rows, collate = self.data.train, self.data.collate
        loader = DataLoader(rows, spec.batch_size, shuffle=True, generator=generator, collate_fn=collate)
        batches = list(islice(loader, spec.batches))
        shares = [{k: v[state.process_index :: state.num_processes] for k, v in batch.items()} for batch in batches]
        return [share for share in shares if len(next(iter(share.values())))]


def compress(config: RunConfig, output: Path, notify: Callable[[str], None] = print) -> Record:
    """Run a recipe, or go on with one that was interrupted.

    Args:
        config: the recipe.
        output: run folder; `record.json`, weights, recipe and logs go there.
        notify: is given one line when a stage begins or is already done.

    Returns:
        The record, also written to `output/record.json`.

    Raises:
        ConfigError, TaskError, ModelError: found before any training starts.
        DivergedError: training left the finite numbers; the last good checkpoint is kept.
    """
    check_data(config.data)
    base = resolve_model(config.model)
    if config.checkpoint is not None:
        resolve_model(str(config.checkpoint))
    claim_folder(config, output)
    tokenizer = load_tokenizer(base)
    run = Run(config, output, load_task(config.data, tokenizer, config.seed), tokenizer, base, notify)
    record = _open_record(run)
    for name in STAGES:
        if name == "dense_control" and not config.dense_control:
            continue
        if record.stage(name) is not None:
            notify(f"{name}: already done")
            continue
        notify(f"{name}: {_DOES[name]}")
        record = _run_stage(run, record, name)
    return record


def _run_stage(run: Run, record: Record, name: str) -> Record:
    begin, state = time.monotonic(), PartialState()
    model, history = _STAGES[name](run)
    stage = evaluate(model, run.data, name, run.config.data.max_length)
    stage = dataclasses.replace(stage, seconds=round(time.monotonic() - begin, 1))
    record = record.with_stage(stage)
    if history:
        record = dataclasses.replace(record, training={**record.training, name: history})
    record.provenance["weights"].update(_hashes(run))
    if state.is_main_process:
        if history:
            write_text(run.output / "logs" / f"{name}.jsonl", history_lines(history))
        write_text(run.output / "record.json", to_json(record))
        shutil.rmtree(run.output / "checkpoints" / name, ignore_errors=True)
    state.wait_for_everyone()
    return record


def _dense(run: Run) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    folder, history = Path(run.dense), []
    if not folder.is_dir():
        model = run.load(run.base)
        check_space(model, run.output)
        history = _train(run, model, "dense", run.config.dense)
        _save(folder, lambda scratch: _save_dense(run, model, scratch))
    return bind(run.load(run.dense), DENSE), history


def _dense_control(run: Run) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    model = run.load(run.dense)
    history = _train(run, model, "dense_control", run.config.compress)
    return bind(model, DENSE), history


def _quantized(run: Run) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    return _compressed(run, dataclasses.replace(run.config.attention, sparsity=0.0, threshold=None)), []


def _one_shot(run: Run) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    return _compressed(run, run.config.attention), []


def _progressive(run: Run) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    spec, folder = run.config.attention, run.output / "progressive"
    kind, names = run.data.task.kind, run.data.label_names
    if folder.is_dir():
        return load_compressed(folder, kind, names), []
    model = _compressed(run, dataclasses.replace(spec, sparsity=min(run.config.schedule.start, spec.sparsity)))
    check_space(model, run.output)
    callback = SparsityCallback(model, run.config.schedule, spec.sparsity)
    teacher = bind(run.load(run.dense), DENSE)
    history = _train(run, model, "progressive", run.config.compress, teacher, [callback])
    fit_thresholds(model, run.calibration_batches())
    _save(folder, lambda scratch: _save_progressive(run, model, spec, scratch))
    return model, history


_STAGES: dict[str, Callable[[Run], tuple[PreTrainedModel, list[dict[str, Any]]]]] = {
    "dense": _dense,
    "dense_control": _dense_control,
    "quantized": _quantized,
    "one_shot": _one_shot,
    "progressive": _progressive,
}

_DOES = {
    "dense": "fine-tune without compression",
    "dense_control": "train the dense model further, as long as the compressed one",
    "quantized": "quantize Q, K, V and P without training",
    "one_shot": "quantize and prune P at once, without training",
    "progressive": "quantize, and prune P progressively while training",
}


def _compressed(run: Run, spec: AttentionSpec) -> PreTrainedModel:
    model = bind(run.load(run.dense), spec)
    calibrate(model, run.calibration_batches())
    return model


def _train(
    run: Run, model: PreTrainedModel, name: str, spec: Any, teacher: PreTrainedModel | None = None, callbacks: Any = ()
) -> list[dict[str, Any]]:
    folder = run.output / "checkpoints" / name
    history = train(
        model, run.data, spec, folder, run.config.seed, run.config.distillation, teacher, callbacks
    )  # fmt: skip
    return [entry for entry in history if "loss" in entry]


def _save(folder: Path, write: Callable[[Path], None]) -> None:
    if PartialState().is_main_process:
        with whole_folder(folder) as scratch:
            write(scratch)
    PartialState().wait_for_everyone()


def _save_dense(run: Run, model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def _save_progressive(run: Run, model: PreTrainedModel, spec: AttentionSpec, folder: Path) -> None:
    save_compressed(model, spec, folder)
    run.tokenizer.save_pretrained(folder)


def _open_record(run: Run) -> Record:
    if (run.output / "record.json").is_file():
        record = read_record(run.output)
        before, now = record.provenance["data"], run.data.fingerprint
        if before != now:
            raise ConfigError(f"{run.output}: the data have changed since this run began (sha256 {before}, now {now})")
        return record
    return Record(
        spec_to_dict(run.config),
        run.data.task.headline,
        run.data.majority,
        provenance(run.config.seed, run.base, run.data),
    )


def _hashes(run: Run) -> dict[str, str]:
    files = {"dense": Path(run.dense) / WEIGHTS, "progressive": run.output / "progressive" / WEIGHTS}
    return {name: sha256_of(file) for name, file in files.items() if file.is_file()}


def reevaluate(run_folder: Path, config: RunConfig) -> StageRecord:
    """Evaluate the compressed model of a finished run, on its own data or another `config.data`.

    Raises:
        ConfigError: the run has no compressed model yet.
    """
    folder = run_folder / "progressive"
    if not folder.is_dir():
        raise ConfigError(
            f"{run_folder}: holds no finished compressed model; run `attnpress compress` to its end first"
        )
    data = load_task(config.data, load_tokenizer(str(folder)), config.seed)
    model = load_compressed(folder, data.task.kind, data.label_names)
    return evaluate(model, data, "progressive", config.data.max_length)
