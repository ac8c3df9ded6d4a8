"""Frozen dataclasses for what a sweep searches, and the recipe of a trial."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from attnpress.config import (
    AttentionSpec,
    Bits,
    Fraction,
    Number,
    RuleName,
    RunConfig,
    Sparsity,
    Text,
    Times,
)
from attnpress.config.recipe import spec_to_dict
from attnpress.config.rules import RULES
from attnpress.core.cost import Work, attention_work, total_work

_STRICT = ConfigDict(extra="forbid")

Layered = Literal["bits", "probs_bits", "sparsity"]


@dataclass(frozen=True, config=_STRICT)
class SearchSpec:
    """The search space. What is left out stays as in the recipe.

    Attributes:
        bits: choices for Q, K and V together, and for P unless `probs_bits` has some; null is floating point.
        probs_bits: choices for P.
        sparsity: lowest and highest.
        rule: choices, for the whole model.
        per_layer: which of bits, probs_bits and sparsity are chosen separately for each attention module.
    """

    bits: tuple[Bits, ...] = ()
    probs_bits: tuple[Bits, ...] = ()
    sparsity: tuple[Sparsity, Sparsity] | None = None
    rule: tuple[RuleName, ...] = ()
    per_layer: tuple[Layered, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> SearchSpec:
        if self.sparsity is not None and self.sparsity[0] >= self.sparsity[1]:
            raise ValueError(f"sparsity: the lowest first, then the highest (found {list(self.sparsity)})")
        for name in self.per_layer:
            if not getattr(self, name):
                raise ValueError(f"per_layer: {name} is not searched; give {name} its choices, or leave it out here")
        return self

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to choose."""
        return not (self.bits or self.probs_bits or self.sparsity or self.rule)


@dataclass(frozen=True, config=_STRICT)
class PruneSpec:
    """When a trial is stopped early (see `sweep.study.hopeless`).

    Attributes:
        percentile: a trial continues while its metric is within this best percentage of comparable trials; 100 stops
            only trials worse than all of them.
        startup: number of finished trials with no more work before any trial is stopped.
        after: fraction of training before which no trial is stopped, while thresholds and scales settle.
    """

    percentile: Annotated[float, Number, Field(gt=0, le=100)] = 50.0
    startup: Times = 5
    after: Fraction = 0.4


@dataclass(frozen=True, config=_STRICT)
class SweepSpec:
    """A whole sweep.

    Attributes:
        recipe: of every trial, before the choices of the search.
        search: see `SearchSpec`.
        prune: see `PruneSpec`.
        name: of the study in its storage.
        trials: number of trials to finish or stop, over all workers and sessions.
        storage: database of the study, as an SQLAlchemy URL; None is a file in the sweep's folder, for one machine.
        heartbeat: seconds between heartbeats; a worker that is silent for four times as long counts as dead, and its
            trial is repeated.
    """

    recipe: RunConfig = RunConfig()
    search: SearchSpec = SearchSpec()
    prune: PruneSpec = PruneSpec()
    name: Text = "sweep"
    trials: Times = 40
    storage: Text | None = None
    heartbeat: Annotated[int, Number, Field(ge=1, le=86_400)] = 15

    @model_validator(mode="after")
    def _check(self) -> SweepSpec:
        if self.search.is_empty:
            raise ValueError("search: nothing to search; give choices of bits, probs_bits or rule, or sparsity")
        if self.search.sparsity and self.recipe.attention.threshold is not None:
            raise ValueError("recipe.attention.threshold fixes what is pruned; remove it, or do not search sparsity")
        if self.recipe.layers:
            raise ValueError("recipe.layers: a sweep chooses for layers itself; see search.per_layer")
        for rule in self.search.rule:
            if RULES[rule].shares is not None and self.search.sparsity:
                raise ValueError(
                    f"search.rule: {rule!r} reaches few sparsities only: leave it out, or do not search sparsity"
                )
            dataclasses.replace(self.recipe.attention, rule=rule)  # some rules cannot have a threshold
        return self


class Chooser(Protocol):
    """Interface for sampling: an Optuna trial, or anything with its two methods."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """A number within the bounds."""


def choose(trial: Chooser, search: SearchSpec, recipe: RunConfig, layers: int) -> RunConfig:
    """The recipe of one trial.

    Args:
        trial: samples each value by name, such as "sparsity" or "layers.3.bits".
        layers: number of attention modules.
    """
    attention = recipe.attention
    if search.rule:
        attention = dataclasses.replace(attention, rule=trial.suggest_categorical("rule", search.rule))
    attention = _choose_spec(trial, search, _SEARCHED - set(search.per_layer), attention, "")
    if not search.per_layer:
        return dataclasses.replace(recipe, attention=attention)
    chosen = {
        str(index): _choose_spec(trial, search, set(search.per_layer), attention, f"layers.{index}.")
        for index in range(layers)
    }
    return dataclasses.replace(recipe, attention=attention, layers=chosen)


_SEARCHED = set(get_args(Layered))


def _choose_spec(
    trial: Chooser, search: SearchSpec, names: set[str], spec: AttentionSpec, prefix: str
) -> AttentionSpec:
    if "bits" in names and search.bits:
        bits = trial.suggest_categorical(f"{prefix}bits", search.bits)
        q, k, v = (dataclasses.replace(tensor, bits=bits) for tensor in (spec.q, spec.k, spec.v))
        p = spec.p if search.probs_bits else dataclasses.replace(spec.p, bits=bits)
        spec = dataclasses.replace(spec, q=q, k=k, v=v, p=p)
    if "probs_bits" in names and search.probs_bits:
        bits = trial.suggest_categorical(f"{prefix}probs_bits", search.probs_bits)
        spec = dataclasses.replace(spec, p=dataclasses.replace(spec.p, bits=bits))
    if "sparsity" in names and search.sparsity:
        spec = dataclasses.replace(spec, sparsity=round(trial.suggest_float(f"{prefix}sparsity", *search.sparsity), 4))
    return spec


PAIRS = 10**6


def asked_work(recipe: RunConfig, layers: int) -> float:
    """Share of the dense bit operations that the recipe asks for; known before training."""
    specs = [recipe.layers.get(str(index), recipe.attention) for index in range(layers)]
    work = total_work(_asked(spec) for spec in specs)
    return work.bit_operations_remaining / work.bit_operations_dense


def _asked(spec: AttentionSpec) -> Work:
    survivors = round(PAIRS * (1 - spec.sparsity))
    if spec.predictor_bits is None or spec.sparsity == 0:
        return attention_work(PAIRS, survivors, 1, spec.bits)
    return attention_work(PAIRS, survivors, 1, spec.bits, survivors, spec.predictor_bits)


def describe(recipe: RunConfig) -> str:
    """The choices of a trial in a few words."""
    specs = list(recipe.layers.values()) or [recipe.attention]
    bits = "/".join(_range([spec.bits[name] for spec in specs]) for name in "qkvp")
    low, high = min(spec.sparsity for spec in specs), max(spec.sparsity for spec in specs)
    return f"{bits} bits, {recipe.attention.rule}, sparsity {low:g}{f' to {high:g}' if high > low else ''}"


def _range(values: Sequence[int | None]) -> str:
    found = sorted({32 if value is None else value for value in values})
    low, high = ("fp" if value == 32 else str(value) for value in (found[0], found[-1]))
    return low if low == high else f"{low}-{high}"


def trial_folder(output: Path, recipe: RunConfig) -> Path:
    """The run folder of a recipe, named by its content, so that no recipe is trained twice."""
    text = json.dumps(spec_to_dict(recipe), sort_keys=True)
    return output / "trials" / hashlib.sha256(text.encode()).hexdigest()[:12]
