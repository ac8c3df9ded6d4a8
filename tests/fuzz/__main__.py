"""Fuzzing for some minutes: `make fuzz MINUTES=10`, or `python -m tests.fuzz --minutes 10 --only kernel recipes`.

Every target gets the same share of the time. A failure is printed with its seed, kept under .fuzz/, and passed by; the
exit status is then 1. To see it again: `python -m tests.fuzz --only TARGET --replay SEED`.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, cast

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".fuzz"
TARGETS = ("kernel", "operators", "checkpoints", "recipes", "records", "input_lines", "paths", "guided")
MOST_FAILURES = 20
"""Of one target: after so many there is enough to mend."""


def main(words: Sequence[str] | None = None) -> int:
    """Fuzz, and say what came out; 1 if anything failed."""
    options = _parser().parse_args(words)
    if options.replay is not None:
        for name in options.only:
            print(f"{name}: {importlib.import_module(f'tests.fuzz.{name}').replay(options.replay)}")
        return 0
    print(f"seed {options.seed}", flush=True)
    counts: dict[str, dict[str, int]] = {}
    for name in options.only:
        counts[name] = fuzz(name, options.minutes * 60 / len(options.only), options.seed)
        print(f"{name}: {', '.join(f'{count} {what}' for what, count in sorted(counts[name].items()))}", flush=True)
    failures = sum(found.get("failures", 0) for found in counts.values())
    if options.record is not None:
        add_record(options.record, options.minutes, options.seed, counts)
    print("clean" if failures == 0 else f"{failures} failures, kept in {KEPT}")
    return 1 if failures else 0


def fuzz(name: str, seconds: float, seed: int) -> dict[str, int]:
    """Run one target for so long; failures are counted, kept and passed by."""
    target, counts = importlib.import_module(f"tests.fuzz.{name}"), Counter[str](cases=0, failures=0)
    ends = time.monotonic() + seconds
    outcomes = _outcomes(target, seed)
    while counts["failures"] < MOST_FAILURES and time.monotonic() < ends:
        counts["cases"] += 1
        try:
            counts[next(outcomes)] += 1
        except AssertionError as error:
            counts["failures"] += 1
            _keep(name, seed, error)
            outcomes = _outcomes(target, seed + 1)
        seed += 1
    return dict(counts)


def _outcomes(target: ModuleType, first: int) -> Iterator[str]:
    """How each case ends, from a seed on."""
    if hasattr(target, "outcomes"):  # in another process, which a case may bring down
        return cast(Iterator[str], target.outcomes(first, 10**9))
    return map(target.replay, itertools.count(first))


def _keep(name: str, seed: int, error: BaseException) -> None:
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{name}-{seed}.txt").write_text(
        "".join(traceback.format_exception(error)), encoding="utf-8", errors="replace"
    )
    print(f"{name}: {str(error)[:500]!a}\n    again: python -m tests.fuzz --only {name} --replay {seed}", flush=True)


def add_record(file: Path, minutes: float, seed: int, counts: dict[str, dict[str, int]]) -> None:
    """Add a run to a record, the newest last."""
    runs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    runs.append({**origin(), "minutes": minutes, "seed": seed, "counts": counts})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def origin() -> dict[str, Any]:
    """When and where a record was made, and of which state of the project."""
    from attnpress.kernels import cpu

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit or None,
        "machine": {
            "system": platform.platform(terse=True),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        },
        "cpu_targets": list(cpu.supported_targets()) if cpu.is_built() else [],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9), help="of the first case")
    parser.add_argument("--replay", type=int, metavar="SEED", help="this one case only, with its traceback")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add date, commit, machine and counts to it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
