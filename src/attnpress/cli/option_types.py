"""Numbers on the command line: each has a range, and one outside it is refused by the option's name."""

from __future__ import annotations

import math
from collections.abc import Callable


class OptionError(Exception):
    """A number outside its option's range; no ValueError, which argparse would replace by a message of its own."""


def whole(option: str, low: int, high: int) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number from `low` to `high`.

    It raises OptionError outside the range, and ValueError, which argparse explains, for what is no whole number.
    """

    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise OptionError(f"{option}: starts at {low:,}, found {text[:40]}")
        if value > high:
            raise OptionError(f"{option}: ends at {high:,}, found {text[:40]}")
        return value

    number.__name__ = "whole number"  # argparse: invalid whole number value: 'x'
    return number


def share(option: str, what: str) -> Callable[[str], float]:
    """The `type` of an option that takes a number from 0 to below 1; it raises as `whole` does.

    Args:
        what: it is a share of.
    """

    def number(text: str) -> float:
        value = float(text)
        if math.isnan(value) or not 0 <= value < 1:
            raise OptionError(f"{option}: {what}, from 0 to below 1, found {text[:40]}")
        return value

    number.__name__ = "number"
    return number


def positive(option: str, high: float) -> Callable[[str], float]:
    """The `type` of an option that takes a number above 0 and up to `high`; it raises as `whole` does."""

    def number(text: str) -> float:
        value = float(text)
        if math.isnan(value) or not 0 < value <= high:
            raise OptionError(f"{option}: above 0 and up to {high:,g}, found {text[:40]}")
        return value

    number.__name__ = "number"
    return number
