"""Numbers on the command line: each has a range, and is refused by its option's name in one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnpress.cli import build_parser, main
from attnpress.cli.option_types import OptionError, positive, share, whole

COMMANDS = {
    "--rows": ["export", "run", "--to", "trace"],
    "--batch": ["run", "run", "--input", "in.jsonl", "--output", "out.jsonl"],
    "--seq-len": ["bench"],
    "--threads": ["bench"],
    "--sparsity": ["bench"],
    "--layer": ["bench"],
}


@pytest.mark.parametrize("option", COMMANDS)
@pytest.mark.parametrize("value", ["-1", "-7", "99999999999999999999"])
def test_a_number_out_of_range_is_one_line(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*COMMANDS[option], option, value]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"attnpress: {option}: ")
    assert told.rstrip().endswith(f"found {value}")
    assert len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["nan", "inf", "1", "1e300"])
def test_a_share_is_from_0_to_below_1(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--sparsity", value]) == 1
    assert "--sparsity: sparsity is the fraction of pairs pruned, from 0 to below 1" in capsys.readouterr().err


def test_ends_belong_to_a_range() -> None:
    number, part = whole("--n", 2, 5), share("--s", "a share")
    assert [number("2"), number("5"), part("0"), part("0.99")] == [2, 5, 0.0, 0.99]
    for text in ("1", "6"):
        with pytest.raises(OptionError, match=rf"--n: .*found {text}"):
            number(text)


def test_what_has_to_be_above_0_is() -> None:
    number = positive("--e", 10)
    assert [number("0.5"), number("10")] == [0.5, 10.0]
    for text in ("0", "-1", "10.1", "nan", "inf"):
        with pytest.raises(OptionError, match=rf"--e: above 0 and up to 10, found {text}"):
            number(text)


@pytest.mark.parametrize("value", ["x", "1.5", "9" * 5000])
def test_what_is_no_whole_number_is_wrong_usage(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--threads", value])
    assert ended.value.code == 2
    assert "argument --threads: invalid whole number value" in capsys.readouterr().err


def test_every_option_that_takes_a_number_has_a_range() -> None:
    bare = [action.dest for action in options(build_parser()) if action.type in (int, float)]
    assert bare == []
    ranged = {action.option_strings[0] for action in options(build_parser()) if action.type and action.option_strings}
    assert set(COMMANDS) <= ranged


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inside in action.choices.values():
                yield from options(inside)
        else:
            yield action
