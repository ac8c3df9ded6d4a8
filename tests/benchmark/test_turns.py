"""Turns: who is timed when, on what, and what happens when a side fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from attnpress.benchmark.turns import Side, SideError, in_turns, median_of, paired_ratio, settle, spread, take_turn

SIDES = """
import os, sys, time
from attnpress.benchmark.turns import Prepared

def logged(log, name, seconds):
    def run():
        print("a library that prints")
        with open(log, "a") as file:
            file.write(name)
        time.sleep(seconds)
    return Prepared(run, {"process": os.getpid(), "capability": os.environ.get("ATEN_CPU_CAPABILITY")})

def broken():
    raise ValueError("no such graph")

def deadly():
    sys.exit("out of memory")
"""

MakeSide = Callable[..., Side]


@pytest.fixture
def make_side(tmp_path: Path) -> MakeSide:
    (tmp_path / "sides_of_test.py").write_text(SIDES, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return lambda name, **variables: Side(name, {"PYTHONPATH": path, **variables})


def test_sides_alternate_in_processes_of_their_own(make_side: MakeSide, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with make_side("a") as a, make_side("b", ATEN_CPU_CAPABILITY="avx2") as b:
        facts = [side.prepare("sides_of_test:logged", log=str(log), name=side.name, seconds=0.03) for side in (a, b)]
        times = in_turns([a, b], seconds=0.06, rounds=3)
    assert len({os.getpid(), *(fact["process"] for fact in facts)}) == 3
    assert [fact["capability"] for fact in facts] == [os.environ.get("ATEN_CPU_CAPABILITY"), "avx2"]
    assert set(times) == {"a", "b"}
    assert {name: len(turns) for name, turns in times.items()} == {"a": 3, "b": 3}
    assert all(found >= 30 for turn in times["a"] + times["b"] for found in turn), "milliseconds of calls of 30"
    assert "".join(ch for ch, before in zip(log.read_text(), " " + log.read_text(), strict=False) if ch != before) == "ababab"  # fmt: skip # noqa: E501


def test_a_machine_that_slows_down_for_a_while_leaves_the_ratio() -> None:
    ours, theirs = [[1.0, 1.1, 1.0]] * 3 + [[5.0, 5.0]] * 2, [[3.0, 3.0]] * 3 + [[15.0]] * 2
    assert paired_ratio(theirs, ours) == 3
    assert median_of(ours) == 1.1
    assert spread(ours) > 1


def test_short_calls_are_warmed_up_and_long_ones_stand_alone() -> None:
    calls: list[float] = []

    def short() -> None:
        calls.append(0)

    assert len(take_turn(short, 0.001)) == len(calls) - 1
    assert len(take_turn(lambda: time.sleep(0.02), 0.01)) == 1


def test_a_side_that_cannot_be_prepared_says_why_and_can_go_on(make_side: MakeSide, tmp_path: Path) -> None:
    with make_side("openvino") as side:
        with pytest.raises(SideError, match="openvino: ValueError: no such graph"):
            side.prepare("sides_of_test:broken")
        side.prepare("sides_of_test:logged", log=str(tmp_path / "log"), name="x", seconds=0)
        assert len(side.turn(0)) == 1


def test_a_process_that_dies_is_told_with_its_last_words(make_side: MakeSide) -> None:
    with make_side("eager") as side, pytest.raises(SideError, match=r"eager: its process died \(out of memory\)"):
        side.prepare("sides_of_test:deadly")


def test_a_thread_that_spins_is_waited_for_and_one_that_never_sleeps_is_an_error() -> None:
    stop = time.monotonic() + 0.3

    def spin() -> None:
        while time.monotonic() < stop:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    with pytest.raises(SideError, match="threads still spin after 0 seconds"):
        settle(patience=0)
    settle()
    assert time.monotonic() >= stop
    thread.join()
