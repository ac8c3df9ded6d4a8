"""Frozen dataclasses for what a leaderboard compares, and the recipe of each of its cells."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from attnpress.config import Bits, ConfigError, RunConfig, Seed, Sparsity, merged
from attnpress.config.recipe import parse_spec, spec_to_dict

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class EntrySpec:
    """One rule, as published.

    Attributes:
        source: where it is described.
        attention, schedule: changes to the board's recipe.
        stage: "progressive" trains with the rule; "one_shot" is for rules meant for inference only.
        sparsities: its own, if it cannot reach those of the board.
        predictor_bits: bits of a product by which its design predicts the mask, so that Q K^T can be skipped too;
            for a rule whose `attention` decides on full scores.
    """

    source: str
    attention: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    stage: Literal["progressive", "one_shot"] = "progressive"
    sparsities: tuple[Sparsity, ...] | None = None
    predictor_bits: Bits = None


@dataclass(frozen=True, config=_STRICT)
class BoardSpec:
    """A whole leaderboard.

    Attributes:
        recipe: of every run, before the changes of tasks and rules.
        tasks: by a short name, changes to the recipe: data, and the training of the dense model.
        rules: by a short name.
        sparsities: at which rules are compared, in the order of execution.
        seeds: each rule has one run per seed, each task one dense model per seed.
    """

    recipe: RunConfig
    tasks: dict[str, dict[str, Any]]
    rules: dict[str, EntrySpec]
    sparsities: tuple[Sparsity, ...] = (0.9, 0.95, 0.8)
    seeds: tuple[Seed, ...] = (0,)

    @model_validator(mode="after")
    def _check(self) -> BoardSpec:
        for name in (*self.tasks, *self.rules):
            if not name.replace("-", "").isalnum():
                raise ValueError(
                    f"{name}: use letters, digits and hyphens for names of tasks and rules, which name folders"
                )
        if not plan(self):
            raise ValueError("nothing to compare; give tasks, rules, sparsities and seeds")
        return self


class Cell(NamedTuple):
    """One run of the board."""

    task: str
    rule: str
    asked: float
    seed: int
    recipe: RunConfig
    stage: str

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.task}-{self.rule}-{self.asked:g}-seed{self.seed}"


def plan(board: BoardSpec) -> list[Cell]:
    """All cells: every rule on every task at the first sparsity, then at the second, ...; then the other seeds."""
    own = {name: entry.sparsities or board.sparsities for name, entry in board.rules.items()}
    rounds = range(max(map(len, own.values()), default=0))
    return [
        Cell(task, name, own[name][turn], seed, _recipe(board, task, name, own[name][turn], seed), entry.stage)
        for seed in board.seeds
        for turn in rounds
        for task in board.tasks
        for name, entry in board.rules.items()
        if turn < len(own[name])
    ]


def teacher_recipe(board: BoardSpec, task: str, seed: int) -> RunConfig:
    """The recipe of a task's dense model.

    Raises:
        ConfigError: names the task and the invalid keys.
    """
    return _parsed(board, f"tasks.{task}", board.tasks[task], {"seed": seed})


def teacher_folder(output: Path, task: str, seed: int) -> Path:
    """The run folder of a dense model."""
    return output / "teachers" / f"{task}-seed{seed}"


def _recipe(board: BoardSpec, task: str, rule: str, sparsity: float, seed: int) -> RunConfig:
    entry = board.rules[rule]
    changes = {"attention": {**entry.attention, "sparsity": sparsity}, "schedule": entry.schedule, "seed": seed}
    return _parsed(board, f"tasks.{task}, rules.{rule}", board.tasks[task], changes)


def _parsed(board: BoardSpec, where: str, *changes: dict[str, Any]) -> RunConfig:
    plain = spec_to_dict(board.recipe)
    for change in changes:
        plain = merged(plain, change)
    try:
        return parse_spec(RunConfig, plain)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
