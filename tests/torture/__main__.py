"""Killing, starving and crowding runs for some minutes: `make torture MINUTES=10`, or `python -m tests.torture`.

Each trial is a promise of docs/reliability.md, held against a run that nothing disturbed. What fails is printed, its
folder is kept under .fuzz/, and the exit status is 1. Trials that a machine does not allow are skipped by name.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.__main__ import KEPT, add_record
from tests.torture import disturbances, subjects
from tests.torture.disturbances import Skipped


def main(words: Sequence[str] | None = None) -> int:
    """Torture, and say what came out; 1 if a promise was broken."""
    options = _parser().parse_args(words)
    print(f"seed {options.seed}", flush=True)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="attnpress-torture-") as place:
        subject = subjects.prepare(Path(place), options.seed)
        ends = time.monotonic() + options.minutes * 60
        skipped: set[str] = set()
        for number in itertools.count():
            # All of them once, whatever the time; then those that differ most from time to time.
            names = [name for name in options.only if name not in skipped]
            if not names or (number >= len(options.only) and time.monotonic() > ends):
                break
            name = names[number % len(names)]
            _try(name, subject, options.seed + number, counts, skipped)
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    if options.record is not None:
        add_record(options.record, options.minutes, options.seed, {"torture": dict(counts)})
    failures = counts["failures"]
    print("clean" if failures == 0 else f"{failures} failures, kept in {KEPT}")
    return 1 if failures else 0


def _try(name: str, subject: subjects.Subject, seed: int, counts: Counter[str], skipped: set[str]) -> None:
    folder = subject.place / f"{name}-{seed}"
    folder.mkdir()
    try:
        for what, count in disturbances.TRIALS[name](subject, folder, random.Random(seed)).items():
            counts[what] += count
    except Skipped as reason:
        print(f"{name}: skipped, {reason}", flush=True)
        counts[f"skipped: {name}"] = 1
        skipped.add(name)
    except AssertionError as error:
        counts["failures"] += 1
        kept = KEPT / folder.name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, symlinks=True)
        print(f"{name}, seed {seed}: {str(error)[:2000]}\n    kept: {kept}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", nargs="+", choices=list(disturbances.TRIALS), default=list(disturbances.TRIALS))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--record", type=Path, metavar="FILE", help="add date, commit, machine and counts to it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
