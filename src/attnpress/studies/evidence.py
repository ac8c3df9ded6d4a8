"""evidence: run the cells of a table once for each seed; a cell is a recipe with some changes.

The dense model of a seed is trained once, and every cell of that seed starts from it. Its control, trained further for
as many steps as a cell, is run once for each number of epochs. Brief records of all runs are in one file, the table;
full records stay in the run folders.
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
from attnpress.locks import alone
from attnpress.records.reading import RecordError
from attnpress.records.run import Record, read_record
from attnpress.records.table import brief, read_table, recorded, records_apart, table_files, table_text
from attnpress.runs.compression import compress
from attnpress.studies.cells import Notify, check_one_process, in_turn

_STRICT = ConfigDict(extra="forbid")
DENSE_CELL = "dense"
FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]{0,99}", re.ASCII)
"""Pattern of names of rows and cells, which appear in the names of records and folders."""

CELL_STAGES = {"progressive": ("dense", "quantized", "one_shot", "progressive"), "one_shot": ("one_shot",)}
"""The stages to run for a cell, by its last stage."""


@dataclass(frozen=True, config=_STRICT)
class CellSpec:
    """One cell of the table.

    Attributes:
        seeds: one run each.
        change: differences from the recipe, as plain data of a recipe.
        stage: the last stage to run; "one_shot" prunes without training.
    """

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    change: dict[str, Any] = Field(default_factory=dict)
    stage: Literal["progressive", "one_shot"] = "progressive"


@dataclass(frozen=True, config=_STRICT)
class EvidenceSpec:
    """A row of the table: one task.

    Attributes:
        name: of the row; its records are in NAME.json.
        recipe: shared by all cells. With a `checkpoint`, that is the dense model of every seed.
        cells: by name; names starting with "dense" are reserved for the dense models.
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
            raise ValueError(f"{taken[0]!r} starts like the names of dense models; rename the cell")
        return cells


@dataclasses.dataclass(frozen=True)
class Item:
    """One run of the table: its recipe, stages, folder, and the file of its record."""

    cell: str
    seed: int
    config: RunConfig
    stages: tuple[str, ...]
    folder: Path
    table: Path

    @property
    def name(self) -> str:
        """Cell and seed."""
        return f"{self.cell}-seed{self.seed}"


def plan(spec: EvidenceSpec, output: Path, records: Path) -> list[Item]:
    """All runs, in the order of the cells.

    The dense model of a seed precedes its first cell. A control precedes the first cell that is trained for another
    number of epochs than the recipe. A table without trained cells has no control.

    Raises:
        ConfigError: a cell's change is not valid. The message names the cell.
    """
    return list(_items(spec, output, records))


def choose(items: Sequence[Item], names: Collection[str] | None) -> list[Item]:
    """The named cells or runs, such as "dense" or "dense-seed1"; None selects all.

    Raises:
        ConfigError: no such cell. The message lists the existing ones.
    """
    known = {item.cell for item in items} | {item.name for item in items}
    if unknown := sorted(set(names or ()) - known):
        raise ConfigError(f"--only {unknown[0]}: no such cell; there are {', '.join(item.name for item in items)}")
    return [item for item in items if names is None or {item.cell, item.name} & set(names)]


def missing(items: Sequence[Item]) -> list[Item]:
    """The runs without a record.

    Raises:
        RecordError: the file of the table, or a record beside it, cannot be read.
    """
    known = {table: recorded(table).keys() for table in {item.table for item in items}}
    return [item for item in items if item.name not in known[item.table]]


def run_missing(items: Sequence[Item], chosen: Sequence[Item], notify: Notify = print) -> None:
    """Run everything without a record, and the dense models that it needs. Interrupted runs are resumed.

    Any number of processes may do this at once: each takes runs that no other is working on, and waits when none is
    left. A dense model that has a record but no weights here is trained again, without its control; its record is kept.

    Args:
        items: of `plan`.
        chosen: the items to run.
        notify: receives one line when a run or one of its stages begins.

    Raises:
        ConfigError, TaskError, ModelError, DivergedError: as `compress` does; earlier runs stay recorded.
        RecordError: as `missing` does.
    """
    check_one_process()
    dense = {item.seed: item for item in items if item.cell == DENSE_CELL}

    def works_in(item: Item) -> list[Path]:
        return [item.folder, *([dense[item.seed].folder] if _lacks_dense(item) else [])]

    left = missing(chosen)
    for item, after in in_turn(left, missing, works_in):
        notify(f"run {len(left) - after} of {len(left)}: {item.table.stem}-{item.name}")
        if _lacks_dense(item):
            _run(dense[item.seed], notify, functools.partial(_lacks_dense, item))
        _run(item, notify, functools.partial(_lacks_record, item))


def fold(folder: Path) -> list[Path]:
    """Add separate records of a folder, `NAME-CELL-seedN.json`, to its tables. The files are not deleted.

    Returns:
        The files that are no longer needed.

    Raises:
        RecordError: a file cannot be read, or the table has a different record of the run.
    """
    taken: list[Path] = []
    for table in table_files(folder):
        if files := records_apart(table):
            _add(table, {name: read_record(file) for name, file in files.items()})
            taken += files.values()
    return taken


def _add(table: Path, records: Mapping[str, Record]) -> None:
    """Add records to their table, safely with concurrent processes."""
    new = {name: brief(record) for name, record in records.items()}
    with alone(table):
        known = read_table(table) if table.is_file() else {}
        if other := sorted(name for name in known.keys() & new.keys() if known[name] != new[name]):
            raise RecordError(f"{table}: {other[0]} already has a different record; remove one of the two")
        write_text(table, table_text(known | new))


def _lacks_record(item: Item) -> bool:
    return bool(missing([item]))


def _lacks_dense(item: Item) -> bool:
    return item.config.checkpoint is not None and not item.config.checkpoint.is_dir()


def _run(item: Item, notify: Notify, is_needed: Callable[[], bool]) -> None:
    with alone(item.folder, lambda: notify(f"waiting for the process that is at work on {item.name}")):
        if is_needed():  # another process may have created it in the meantime
            is_new = _lacks_record(item)
            record = compress(item.config, item.folder, notify, stages=item.stages if is_new else item.stages[:1])
            if is_new:
                _add(item.table, {item.name: record})


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
    """The initial dense model of a cell, and its control if the cell is trained for another number of epochs."""
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
    return Item(cell, config.seed, config, stages, output / stem, records / f"{spec.name}.json")


def _changed(recipe: RunConfig, change: dict[str, Any], cell: str) -> RunConfig:
    try:
        return parse_spec(RunConfig, merged(spec_to_dict(recipe), change))
    except ConfigError as error:
        raise ConfigError(f"cells.{cell}.change:\n{error}") from None
