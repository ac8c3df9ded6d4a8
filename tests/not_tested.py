"""What skipped tests lacked, a line for each kind of thing, with the way to get it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

LACKS = (
    (r"browser", "a browser", "apt-get install chromium"),
    (r"could not import|optional peer|not installed", "packages of requirements-dev.txt", "make test"),
    (r"distribution", "a built wheel", "make test-dist"),
    (r"kernel", "the compiled kernel", "make kernel"),
    (r"GPU", "a GPU", "run on a machine that has one"),
    (r"CPUID", "CPUID faulting, or a C compiler", "run on a processor that has it (cpuid_fault in /proc/cpuinfo)"),
    (r"VNNI|AVX", "8-bit dot products", "run on a processor with AVX-512 VNNI"),
    (r"cores|threads", "a second core", "run on a machine that has one"),
)
"""What the reason of a skipped test looks like, what was lacking, and how to get it."""


def not_tested(reasons: Iterable[str]) -> list[str]:
    """Lines for people; a reason of another kind has a line of its own."""
    counts = Counter(_lack(reason) for reason in reasons)
    return [f"not tested: {count} test{'s' * (count > 1)}, {lack}" for lack, count in counts.items()]


def _lack(reason: str) -> str:
    for pattern, thing, way in LACKS:
        if re.search(pattern, reason):
            return f"for want of {thing}; to have it: {way}"
    return reason.removeprefix("Skipped: ")
