"""Fixtures of several files of this folder."""

from __future__ import annotations

import pytest

from attnpress.kernels import cpu
from attnpress.kernels.cpu import TARGET_VARIABLE


@pytest.fixture(params=cpu.supported_targets() if cpu.is_built() else ["none"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each target that this processor supports, in force."""
    monkeypatch.setenv(TARGET_VARIABLE, request.param)
    assert not cpu.is_built() or cpu.active_target() == request.param
    return str(request.param)
