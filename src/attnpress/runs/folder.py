"""The run folder: its recipe, its disk space, and the provenance of its record."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnpress.config import ConfigError, RunConfig
from attnpress.config.recipe import comparable, dump_config, load_config
from attnpress.distributed import this_process
from attnpress.files import MARKER, mark, read_marker, write_text
from attnpress.locks import locked
from attnpress.models.loading import weights_hash
from attnpress.records.provenance import machine, versions
from attnpress.records.reading import RecordError
from attnpress.records.run import read_record
from attnpress.tasks import TaskData

MARK, RECIPE = "run", "recipe.yaml"
"""Kind of a run folder in its marker, and the file with its recipe."""

COPIES = 8
"""Disk space of a run in copies of the weights: two checkpoints with optimizer state, and two final models."""


def claim_folder(config: RunConfig, output: Path) -> None:
    """Claim the run folder for this recipe: a new or empty one, or one with a run of the same recipe.

    Raises:
        ConfigError: it contains a run of another recipe or foreign files, or cannot be written.
    """
    state = this_process()
    try:
        taken = _holds_a_run(output)
        if not taken:
            _check_free(output)
        state.wait_for_everyone()  # all ranks check before one writes
        if taken:
            _check_owner(output, config)
        elif state.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            mark(output, MARK)
            write_text(output / RECIPE, dump_config(config))
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    state.wait_for_everyone()


@contextmanager
def hold_folder(output: Path) -> Iterator[None]:
    """Keep other runs out of the folder. The lock ends with its process.

    Raises:
        ConfigError: another run is using the folder.
    """
    if not this_process().is_main_process:
        yield
        return

    def refuse() -> None:
        raise ConfigError(f"{output}: another run is at work there; wait for its end, or choose another --output")

    with locked(output / "run.lock", refuse):
        yield


def check_space(model: nn.Module, output: Path) -> None:
    """Check that there is enough disk space.

    Raises:
        ConfigError: there is too little.
    """
    needed = COPIES * sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(output).free
    if free < needed:
        raise ConfigError(f"{output}: the run needs about {needed >> 20} MiB of disk, {free >> 20} MiB are free")


def provenance(seed: int, base: str, data: TaskData) -> dict[str, Any]:
    """Provenance of a run: versions, hashes of data and base weights, row counts, machine."""
    packages = ("attnpress", "torch", "transformers", "accelerate", "datasets", "numpy")
    return {
        "versions": versions(packages),
        "seed": seed,
        "data": data.fingerprint,
        "rows": {"train": len(data.train), "eval": len(data.eval)},
        "weights": {"base": weights_hash(base)},
        "machine": machine(
            cpu=torch.backends.cpu.get_cpu_capability(),
            threads=torch.get_num_threads(),
            accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            processes=this_process().num_processes,
        ),
    }


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{prefix}{key}.")]
    return [] if before == now else [prefix.removesuffix(".")]


def _holds_a_run(output: Path) -> bool:
    """True if attnpress has started a run there; unmarked folders of older versions are recognized by their record."""
    if not (output / RECIPE).is_file():
        return False
    found = read_marker(output)
    if found is not None:
        return found.what == MARK
    try:
        return bool(read_record(output).recipe)
    except RecordError:
        return False


def _check_free(output: Path) -> None:
    held = [path.name for path in output.iterdir()] if output.exists() else []
    # A run killed while claiming the folder leaves its marker, or an unfinished recipe.
    foreign = sorted(name for name in held if name != MARKER and not name.startswith(f".{RECIPE}."))
    if foreign:
        raise ConfigError(
            f"{output}: holds {foreign[0]} and no run of attnpress, and nothing of it may be replaced; choose another "
            "--output, or an empty folder"
        )


def _check_owner(output: Path, config: RunConfig) -> None:
    different = differences(comparable(load_config(output / RECIPE)), comparable(config))
    if different:
        raise ConfigError(
            f"{output}: holds a run of another recipe (differs in {', '.join(different)}); "
            "choose another --output, or delete the folder"
        )
