"""The clock: several sides of a comparison, each in its own process, timed in turns.

Threads of some libraries spin for a while after a call and slow other code. So each side has its own process, and its
turn ends only when all its threads sleep. Turns are short and repeated, so that all sides are measured under the same
load.
"""

from __future__ import annotations

import json
import os
import pkgutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType
from typing import Any

ROUNDS = 15
SETTLED = 0.05
"""A process that uses less than this share of one processor counts as asleep."""

Run = Callable[[], object]


class SideError(RuntimeError):
    """A side could not be prepared or timed. The message is that of its process."""


@dataclass(frozen=True)
class Prepared:
    """The function to time, and facts to report about it."""

    run: Run
    facts: dict[str, Any] = field(default_factory=dict)


class Side:
    """A process in which one side is prepared and timed; a context manager.

    Args:
        name: for messages and results.
        environment: additional variables of that process.
    """

    def __init__(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def prepare(self, make: str, **arguments: Any) -> dict[str, Any]:
        """Let the process call `make`, "package.module:function" returning a `Prepared`; returns its facts."""
        facts: dict[str, Any] = self._ask({"make": make, "arguments": arguments})
        return facts

    def turn(self, seconds: float) -> list[float]:
        """Milliseconds of the calls that fit into this many seconds, at least one."""
        times: list[float] = self._ask({"seconds": seconds})
        return times

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise SideError(f"{self.name}: its process died ({self._last_words()})") from None
        if "error" in reply:
            raise SideError(f"{self.name}: {reply['error']}")
        return reply["answer"]

    def _last_words(self) -> str:
        status = self._process.wait()
        self._said.seek(0)
        return (self._said.read().strip().splitlines() or [f"exit status {status}"])[-1]

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.__exit__(kind, error, trace)
        self._said.close()


def in_turns(sides: Sequence[Side], seconds: float, rounds: int = ROUNDS) -> dict[str, list[list[float]]]:
    """Milliseconds of the calls in each turn of each prepared side, by name; `seconds` each, in `rounds` turns."""
    settle()
    times: dict[str, list[list[float]]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            times[side.name].append(side.turn(seconds / rounds))
    return times


def median_of(turns: Sequence[Sequence[float]]) -> float:
    """Median of all calls of all turns."""
    return statistics.median(chain.from_iterable(turns))


def spread(turns: Sequence[Sequence[float]]) -> float:
    """Interquartile range of all calls, as a fraction of their median."""
    low, middle, high = statistics.quantiles(chain.from_iterable(turns), n=4)
    return (high - low) / middle


def paired_ratio(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> float:
    """Ratio of their time to ours: the median over rounds, each comparing two adjacent turns.

    The load of a shared machine changes slowly. It affects both turns of a round, so their ratio is stable.
    """
    pairs = zip(theirs, ours, strict=True)
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def take_turn(run: Run, seconds: float) -> list[float]:
    """Milliseconds of calls after a warm-up call; a call as long as the turn counts alone."""
    times = [_milliseconds(run)]
    if times[0] >= seconds * 1e3:
        return times
    times.clear()
    stop = time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        times.append(_milliseconds(run))
    return times


def settle(patience: float = 10.0) -> None:
    """Wait until no thread of this process is awake.

    Raises:
        SideError: a thread does not sleep.
    """
    stop = time.monotonic() + patience
    while True:
        busy, begin = time.process_time(), time.monotonic()
        time.sleep(0.02)
        if time.process_time() - busy < SETTLED * (time.monotonic() - begin):
            return
        if time.monotonic() > stop:
            raise SideError(f"threads still spin after {patience} seconds and would slow the others: look for a pool")


def serve() -> None:
    """Main loop of a side's process: answer requests, one line of JSON each, until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the replies
    prepared: Prepared | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "make" in request:
                prepared = pkgutil.resolve_name(request["make"])(**request["arguments"])
                answer: Any = prepared.facts
            else:
                assert prepared is not None, "prepare comes first"
                answer = take_turn(prepared.run, request["seconds"])
            settle()
            reply = {"answer": answer}
        except Exception as error:  # sent to the parent, which raises it
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def _milliseconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3
