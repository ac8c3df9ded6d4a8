"""The compiled CPU kernel: loads the library that csrc/ builds, and names the targets of this machine.

A target is the instruction set a kernel is written for: "amx", "avx512vnni", "avx2" or "scalar". The best one that the
processor supports runs; the environment variable ATTNPRESS_CPU_TARGET forces another by name, and is read at each call.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TARGET_VARIABLE = "ATTNPRESS_CPU_TARGET"

ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""What hold oneDNN to an instruction set; it ignores case."""

BELOW_AVX2 = ("scalar", "sse41", "avx")
BELOW_VNNI = (*BELOW_AVX2, "avx2", "avx512_core")
"""Values of these variables, and of ours, in lower case, that keep a process from an instruction set."""


OLDEST_TORCH = (2, 10)
"""The release of torch whose stable ABI the kernel is compiled for: the binary runs with this and every later one."""

HOW_TO_GET = (
    "install the wheel of attnpress for Linux on x86-64; or, with a C++17 compiler, run `make kernel` in a checkout or "
    "`pip install .` in an unpacked source distribution"
)
"""The ways to a package with its kernel, for messages."""

NOT_BUILT = f"the CPU kernel is not built: {HOW_TO_GET}; or use backend 'reference'"


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why and what to do."""


def library_path() -> Path | None:
    """The compiled library beside this file, or None if the package was installed without it."""
    return next(iter(sorted(Path(__file__).parent.glob("_attention*.so"))), None)


def is_built() -> bool:
    """True if the compiled library is there; it is not loaded."""
    return library_path() is not None


@functools.cache
def load() -> None:
    """Load the library, once: it defines torch.ops.attnpress.*, and this adds the functions for tracing.

    Raises:
        BackendUnavailableError: it was never built, or does not load.
    """
    path = library_path()
    if path is None:
        raise BackendUnavailableError(NOT_BUILT)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BackendUnavailableError(f"{path.name} does not load ({error}): {_how_to_load()}") from error
    torch.library.register_fake("attnpress::attention", fake_attention)
    torch.library.register_fake("attnpress::attention_packed", fake_attention)
    torch.library.register_fake("attnpress::attention_integers", _fake_integers)


def _how_to_load() -> str:
    """What to do about a library that this torch cannot load."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    if torch.torch_version.TorchVersion(torch.__version__) < oldest:
        return f"it needs torch {oldest} or newer, and torch {torch.__version__} is installed"
    return f"it does not fit torch {torch.__version__} on this system; build it again with this torch: {HOW_TO_GET}"


def why_unavailable() -> str | None:
    """What is missing for the kernel to run here; None if nothing is. Loads the library."""
    if not is_built():
        return NOT_BUILT
    try:
        active_target()
    except BackendUnavailableError as error:
        return str(error)
    return None


def supported_targets() -> list[str]:
    """Targets that this processor supports, best first."""
    load()
    names: list[str] = torch.ops.attnpress.supported_targets()
    return names


def active_target() -> str:
    """The target in force.

    Raises:
        BackendUnavailableError: ATTNPRESS_CPU_TARGET names one that is unknown, or that this processor lacks.
    """
    load()
    try:
        return str(torch.ops.attnpress.active_target())
    except RuntimeError as error:
        raise BackendUnavailableError(str(error).splitlines()[0]) from None


def has_avx2() -> bool:
    """True where oneDNN's sums of products of 7-bit codes with signed bytes are exact.

    That is on x86 with AVX2, and not held below it: ATTNPRESS_CPU_TARGET and ONEDNN_MAX_CPU_ISA count, so that one
    machine can be held to what another has. Read at each call.
    """
    return _onednn_above(BELOW_AVX2) and bool(torch.cpu._is_avx2_supported())


def has_vnni() -> bool:
    """True where those of 8-bit codes are exact too: with AVX-512 VNNI, and not held below it.

    Without VNNI pairs of products are added in 16 bits, which two of 8-bit codes can pass.
    """
    return _onednn_above(BELOW_VNNI) and bool(torch.cpu._is_vnni_supported())


def _onednn_above(below: tuple[str, ...]) -> bool:
    """True if oneDNN is there and nothing holds it below."""
    held = [os.environ.get(name, "").lower() for name in (TARGET_VARIABLE, *ONEDNN_VARIABLES)]
    return torch.backends.mkldnn.is_available() and not any(value in below for value in held)


def fake_attention(query: Tensor, *others: Any) -> Tensor:
    """What an attention operator returns, without data: float32 [B, Hq, Sq, D]."""
    # One tensor without data brings a call here; the result would then be memory that nobody wrote.
    for other in others:
        if isinstance(other, Tensor) and other.device != query.device:
            raise ValueError(f"attnpress: tensors on {query.device} and {other.device} cannot meet in one call")
    batch, heads, rows, dim = query.shape
    return query.new_empty((batch, rows, heads, dim), dtype=torch.float32).transpose(1, 2)


def _fake_integers(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, ...]:
    each = query.shape[:3]
    codes = [torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format) for x in (query, key, value)]
    return (
        *codes,
        query.new_empty((*each, 1), dtype=torch.int32),
        query.new_empty((*each, key.shape[2]), dtype=torch.uint8),
        query.new_empty((*each, 1), dtype=torch.int64),
        query.new_empty(query.shape, dtype=torch.int64),
        fake_attention(query, key, value, *options),
        *(query.new_empty((*each, 1), dtype=dtype) for dtype in (torch.int32, torch.int32, torch.int64, torch.float32)),
        query.new_empty(query.shape, dtype=torch.int64),
        query.new_empty((*each, 1), dtype=torch.int64),
        query.new_empty(query.shape, dtype=torch.int64),
    )
