"""evidence: the cells of a table, each a recipe with something changed, run for its seeds; once each.

The dense model of a seed is trained once, and every cell of that seed begins from it. Its control, trained on for as
many steps as a cell is compressed, is run once for each number of epochs.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from attnpress.config import ConfigError, RunConfig, Seed, merged
from attnpress.config.recipe import parse_spec, spec_to_dict
from attnpress.files import write_text
from attnpress.locks import alone, is_held
from attnpress.runs.compression import compress
from attnpress.studies.teacher import check_one_process

_STRICT = ConfigDict(extra="forbid")
DENSE_CELL = "dense"
FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]{0,99}", re.ASCII)
"""What names of rows and cells look like: records and folders are called by them."""

CELL_STAGES = {"progressive": ("dense", "quantized", "one_shot", "progressive"), "one_shot": ("one_shot",)}
"""What is run for a cell, by the last of it."""


@dataclass(frozen=True, config=_STRICT)
class CellSpec:
    """One cell of the table.

    Attributes:
        seeds: one run for each.
        change: what differs from the recipe, as plain data of a recipe.
        stage: the last to run; "one_shot" prunes without training.
    """

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    change: dict[str, Any] = Field(default_factory=dict)
    stage: Literal["progressive", "one_shot"] = "progressive"


@dataclass(frozen=True, config=_STRICT)
class EvidenceSpec:
    """A row of the table: one task.

    Attributes:
        name: of the row; records are called NAME-CELL-seedN.json.
        recipe: what all its cells share. With a `checkpoint`, that is the dense model of every seed.
        cells: by name; names that begin with "dense" are kept for the dense models.
    """

    name: str
    recipe: RunConfig
    cells: dict[str, CellSpec]

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r:.80} is part of file names: use letters, digits, '.', '_', '+' and '-'")
        return name

    @field_validator("cells")
    @classmethod
    def _free_names(cls, cells: dict[str, CellSpec]) -> dict[str, CellSpec]:
        for cell in cells:
            cls._plain_name(cell)
        if taken := [cell for cell in cells if cell.startswith(DENSE_CELL)]:
            raise ValueError(f"{taken[0]!r} begins as the names of dense models do; call the cell otherwise")
        return cells


@dataclasses.dataclass(frozen=True)
class Item:
    """One run that the table asks for: its recipe, its stages, where it runs and where its record goes."""

    cell: str
    seed: int
    config: RunConfig
    stages: tuple[str, ...]
    folder: Path
    record: Path

    @property
    def name(self) -> str:
        """Cell and seed."""
        return f"{self.cell}-seed{self.seed}"


def plan(spec: EvidenceSpec, output: Path, records: Path) -> list[Item]:
    """All runs, in the order of the cells.

    Before the first cell of a seed comes its dense model, and before the first that is trained for another number of
    epochs than the recipe says, a control of that many. A table that trains no cell has no control.

    Raises:
        ConfigError: a cell's change is not valid; the message names the cell.
    """
    return list(_items(spec, output, records))


def choose(items: Sequence[Item], names: Collection[str] | None) -> list[Item]:
    """Those of the named cells or runs, such as "dense" or "dense-seed1"; None is all.

    Raises:
        ConfigError: no such cell; the message names those that there are.
    """
    known = {item.cell for item in items} | {item.name for item in items}
    if unknown := sorted(set(names or ()) - known):
        raise ConfigError(f"--only {unknown[0]}: no such cell; there are {', '.join(item.name for item in items)}")
    return [item for item in items if names is None or {item.cell, item.name} & set(names)]


def missing(items: Sequence[Item]) -> list[Item]:
    """Those without a record."""
    return [item for item in items if _lacks_record(item)]


def run_missing(items: Sequence[Item], chosen: Sequence[Item], notify: Callable[[str], None] = print) -> None:
    """Run what has no record, and the dense models that it needs; an interrupted run is resumed.

    Any number of processes may do so at once: each takes what no other is at work on, and waits where nothing is left.
    A dense model that has a record but is not there is trained again, without its control; its record stays.

    Args:
        items: of `plan`.
        chosen: those of them to run.
        notify: is given one line when a run or one of its stages begins.

    Raises:
        ConfigError, TaskError, ModelError, DivergedError: as `compress` does; runs before it stay recorded.
    """
    check_one_process()
    dense = {item.seed: item for item in items if item.cell == DENSE_CELL}
    left = missing(chosen)
    total = len(left)
    while left:
        item = next((one for one in left if not _is_taken(one, dense)), left[0])
        left.remove(item)
        notify(f"run {total - len(left)} of {total}: {item.record.stem}")
        if _lacks_dense(item):
            _run(dense[item.seed], notify, functools.partial(_lacks_dense, item))
        _run(item, notify, functools.partial(_lacks_record, item))
        left = missing(left)


def _lacks_record(item: Item) -> bool:
    return not item.record.is_file()


def _lacks_dense(item: Item) -> bool:
    return item.config.checkpoint is not None and not item.config.checkpoint.is_dir()


def _is_taken(item: Item, dense: Mapping[int, Item]) -> bool:
    """Whether another process is at work on it, or on the dense model that it needs."""
    return is_held(item.folder) or (_lacks_dense(item) and is_held(dense[item.seed].folder))


def _run(item: Item, notify: Callable[[str], None], is_needed: Callable[[], bool]) -> None:
    with alone(item.folder, lambda: notify(f"waiting for the process that is at work on {item.name}")):
        if is_needed():  # another process may have made it meanwhile
            known = item.record.is_file()
            compress(item.config, item.folder, notify, stages=item.stages[:1] if known else item.stages)
            if not known:
                write_text(item.record, (item.folder / "record.json").read_text(encoding="utf-8"))


def _items(spec: EvidenceSpec, output: Path, records: Path) -> Iterator[Item]:
    begun: set[tuple[int, str]] = set()
    trained = any(found.stage == "progressive" for found in spec.cells.values())
    dense_stages = ("dense", "dense_control") if trained else ("dense",)
    for cell, found in spec.cells.items():
        for seed in found.seeds:
            checkpoint = spec.recipe.checkpoint or output / f"{DENSE_CELL}-seed{seed}" / "dense"
            change = {**found.change, "seed": seed, "dense_control": False, "checkpoint": str(checkpoint)}
            config = _changed(spec.recipe, change, cell)
            for name, control in _controls(spec.recipe, config):
                if (seed, name) not in begun:
                    begun.add((seed, name))
                    yield _item(spec, name, control, dense_stages, output, records)
            yield _item(spec, cell, config, CELL_STAGES[found.stage], output, records)


def _controls(recipe: RunConfig, config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """The dense model that a cell begins from, and what it is compared with if it is trained for longer or shorter."""
    control = dataclasses.replace(recipe, seed=config.seed, dense_control=True)
    yield DENSE_CELL, control
    if (epochs := config.compress.epochs) != recipe.compress.epochs:
        compress = dataclasses.replace(recipe.compress, epochs=epochs)
        control = dataclasses.replace(control, checkpoint=config.checkpoint, compress=compress)
        yield f"{DENSE_CELL}-{epochs:g}epochs", control


def _item(
    spec: EvidenceSpec, cell: str, config: RunConfig, stages: tuple[str, ...], output: Path, records: Path
) -> Item:
    stem = f"{cell}-seed{config.seed}"
    return Item(cell, config.seed, config, stages, output / stem, records / f"{spec.name}-{stem}.json")


def _changed(recipe: RunConfig, change: dict[str, Any], cell: str) -> RunConfig:
    try:
        return parse_spec(RunConfig, merged(spec_to_dict(recipe), change))
    except ConfigError as error:
        raise ConfigError(f"cells.{cell}.change:\n{error}") from None
