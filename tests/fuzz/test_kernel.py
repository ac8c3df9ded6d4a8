"""Seeds of the kernel's fuzzer that are kept: each call that failed once, and some of every kind."""

from __future__ import annotations

import pytest

from tests.fuzz import kernel
from tests.kernels.factories import needs_kernel


@needs_kernel
@pytest.mark.filterwarnings("ignore::attnpress.core.attention.NanWarning")
@pytest.mark.parametrize("seed", kernel.REGRESSIONS)
def test_seed(seed: int) -> None:
    kernel.replay(seed)
