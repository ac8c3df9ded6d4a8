"""Number types of the command line. Each has a range; errors name the option."""

from __future__ import annotations

import math
from collections.abc import Callable


class OptionError(Exception):
    """A number is outside its option's range. Not a ValueError, whose message argparse would replace."""


def whole(option: str, low: int, high: int) -> Callable[[str], int]:
    """The `type` of an option for an integer from `low` to `high`.

    It raises OptionError outside the range, and ValueError, which argparse explains, for other text.
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
    """The `type` of an option for a number from 0 to below 1; it raises like `whole`.

    Args:
        what: what it is a share of.
    """

    def number(text: str) -> float:
        value = float(text)
        if math.isnan(value) or not 0 <= value < 1:
            raise OptionError(f"{option}: {what}, from 0 to below 1, found {text[:40]}")
        return value

    number.__name__ = "number"
    return number


def positive(option: str, high: float) -> Callable[[str], float]:
    """The `type` of an option for a number above 0 and up to `high`; it raises like `whole`."""

    def number(text: str) -> float:
        value = float(text)
        if math.isnan(value) or not 0 < value <= high:
            raise OptionError(f"{option}: above 0 and up to {high:,g}, found {text[:40]}")
        return value

    number.__name__ = "number"
    return number
