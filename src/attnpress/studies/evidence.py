"""evidence: the cells of a table, each a recipe with something changed, run for its seeds; once each.

The dense model of a seed is trained once, and every cell of that seed begins from it. Its control, trained on for as
many steps as a cell is compressed, is run once for each number of epochs. Brief records of all runs are one file, the
table's; the long ones stay in the run folders.
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
        name: of the row; its records are in NAME.json.
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
    """One run that the table asks for: its recipe, its stages, where it runs, and the file that its record is in."""

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
    """Those without a record.

    Raises:
        RecordError: the file of the table, or a record beside it, cannot be read.
    """
    known = {table: recorded(table).keys() for table in {item.table for item in items}}
    return [item for item in items if item.name not in known[item.table]]


def run_missing(items: Sequence[Item], chosen: Sequence[Item], notify: Notify = print) -> None:
    """Run what has no record, and the dense models that it needs; a run that was interrupted goes on.

    Any number of processes may do so at once: each takes what no other is at work on, and waits where nothing is left.
    A dense model that has a record but is not there is trained again, without its control; its record stays.

    Args:
        items: of `plan`.
        chosen: those of them to run.
        notify: is given one line when a run or one of its stages begins.

    Raises:
        ConfigError, TaskError, ModelError, DivergedError: as `compress` does; runs before it stay recorded.
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
    """Take the records that lie apart in a folder, as `NAME-CELL-seedN.json`, into its tables; their files stay.

    Returns:
        The files that are no longer needed there.

    Raises:
        RecordError: a file cannot be read, or a run has another record in the table.
    """
    taken: list[Path] = []
    for table in table_files(folder):
        if files := records_apart(table):
            _add(table, {name: read_record(file) for name, file in files.items()})
            taken += files.values()
    return taken


def _add(table: Path, records: Mapping[str, Record]) -> None:
    """Write records into their table, whatever other processes write there meanwhile."""
    new = {name: brief(record) for name, record in records.items()}
    with alone(table):
        known = read_table(table) if table.is_file() else {}
        if other := sorted(name for name in known.keys() & new.keys() if known[name] != new[name]):
            raise RecordError(f"{table}: {other[0]} is there with other figures; remove one of the two")
        write_text(table, table_text(known | new))


def _lacks_record(item: Item) -> bool:
    return bool(missing([item]))


def _lacks_dense(item: Item) -> bool:
    return item.config.checkpoint is not None and not item.config.checkpoint.is_dir()


def _run(item: Item, notify: Notify, is_needed: Callable[[], bool]) -> None:
    with alone(item.folder, lambda: notify(f"waiting for the process that is at work on {item.name}")):
        if is_needed():  # another process may have made it meanwhile
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
    return Item(cell, config.seed, config, stages, output / stem, records / f"{spec.name}.json")


def _changed(recipe: RunConfig, change: dict[str, Any], cell: str) -> RunConfig:
    try:
        return parse_spec(RunConfig, merged(spec_to_dict(recipe), change))
    except ConfigError as error:
        raise ConfigError(f"cells.{cell}.change:\n{error}") from None
