"""Recipes by mutation: files of every kind of spec, and `--set`. Allowed: a spec that survives its own file, or one
ConfigError of a few lines, soon.
"""

from __future__ import annotations

import functools
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from attnpress.config import ConfigError, RunConfig
from attnpress.config.recipe import dump_config, load_spec, parse_spec, spec_to_dict
from attnpress.studies.evidence import EvidenceSpec
from attnpress.studies.leaderboard.spec import BoardSpec
from attnpress.studies.sweep.spec import SweepSpec
from tests.fuzz.mutations import PIECES, damage_bytes, damage_plain, damage_text, odd, to_bytes

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0
"""Processor seconds for one recipe; those of anchors that expand without end once took for ever."""

LONGEST_MESSAGE = 20_000

REGRESSIONS: list[int] = [*range(40), 55, 104, 607, 332550738]
"""Seeds that are replayed as tests: some of every kind, and each that failed once."""


def replay(seed: int) -> str:
    """One recipe; returns how it ended.

    Raises:
        AssertionError: not as it may; names the seed.
    """
    rng = random.Random(seed)
    begin = time.process_time()
    try:
        kind, content = _draw(rng)
        return read_back(kind, content, [_set(rng) for _ in range(rng.choice((0, 0, 1, 2)))])
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error!r:.2000}") from error
    finally:
        took = time.process_time() - begin
        assert took < PATIENCE, f"seed {seed}: took {took:.0f} s"


def read_back(kind: type[Any], content: bytes, overrides: list[str]) -> str:
    """Read a recipe, and what it writes of itself; returns how that ended.

    Raises:
        AssertionError: not as it may.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(content)
        try:
            spec = load_spec(kind, file, overrides)
        except ConfigError as error:
            said = str(error)
            spec = None
    if spec is None:
        assert 0 < len(said) < LONGEST_MESSAGE, f"a message of {len(said)} characters"
        return "refused"
    again = parse_spec(kind, yaml.safe_load(dump_config(spec)))
    assert again == spec, "another spec comes out of its own file"
    assert spec_to_dict(again) == spec_to_dict(spec)
    return "read"


def _draw(rng: random.Random) -> tuple[type[Any], bytes]:
    kind, text = rng.choice(_samples())
    plain = yaml.safe_load(text)
    how = rng.choice(("plain", "plain", "text", "text", "bytes", "bomb", "whole"))
    if how == "plain":
        for _ in range(rng.choice((1, 1, 2))):
            plain = damage_plain(rng, plain)
        return kind, to_bytes(_as_yaml(plain))
    if how == "text":
        return kind, to_bytes(damage_text(rng, text))
    if how == "bytes":
        return kind, damage_bytes(rng, text.encode())
    if how == "bomb":
        return kind, to_bytes(_bomb(rng))
    return kind, text.encode()


def _as_yaml(plain: Any) -> str:
    try:
        return str(yaml.safe_dump(plain, allow_unicode=True))
    except (RecursionError, UnicodeEncodeError):
        return "a: " + "[" * 3000 + "]" * 3000


def _bomb(rng: random.Random) -> str:
    """What is small and grows when it is read."""
    kind = rng.choice(("anchors", "keys", "depth", "merge", "long", "circle", "twice"))
    if kind == "anchors":
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, rng.choice((3, 9)))]
        return "\n".join(lines)
    if kind == "keys":
        return "\n".join(f"k{n}: {n}" for n in range(rng.choice((10, 20_000))))
    if kind == "depth":
        depth = rng.choice((10, 200, 5000))
        return rng.choice(("a: " + "[" * depth, "{a: " * depth, "- " * depth))
    if kind == "merge":
        return "base: &b {seed: 1}\nattention:\n  <<: *b\n" + "  <<: *b\n" * rng.choice((1, 100))
    if kind == "long":
        return f"model: {'x' * rng.choice((10, 5000, 150_000))}\nseed: {'9' * rng.choice((3, 30, 6000))}"
    if kind == "circle":
        return "layers: &l\n  '0': *l\n"
    return "seed: 1\nseed: 2\nattention: {sparsity: 0.5, sparsity: 0.9}\n"


def _set(rng: random.Random) -> str:
    key = rng.choice(
        ("seed", "attention.sparsity", "data.task", "data.text", "layers.0.sparsity", "compress.epochs", "model", "x.y")
    )
    kind = rng.choice(("odd", "pieces", "legal", "none"))
    if kind == "none":
        return rng.choice(("", "=", "a", "=1", ".=1", "a..b=1", "seed.x=1", " = "))
    value: dict[str, Callable[[], str]] = {
        "odd": lambda: str(odd(rng)),
        "pieces": lambda: "".join(rng.choices(PIECES, k=3)),
        "legal": lambda: "0.5",
    }
    return f"{key}={value[kind]()}"


@functools.cache
def _samples() -> list[tuple[type[Any], str]]:
    """Every recipe of the project, with the kind of spec that it is."""
    found = []
    kinds = (RunConfig, SweepSpec, EvidenceSpec, BoardSpec)
    for file in sorted((ROOT / "recipes").rglob("*.yaml")):
        for kind in kinds:
            try:
                load_spec(kind, file)
            except ConfigError:
                continue
            found.append((kind, file.read_text(encoding="utf-8")))
            break
    assert {kind for kind, _ in found} == set(kinds), "there is a recipe of every kind"
    return found
