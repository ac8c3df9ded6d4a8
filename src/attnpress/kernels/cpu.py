"""The compiled CPU kernel: loads the library built from csrc/, and selects the target of this machine.

A target is the instruction set that a kernel is compiled for: "amx", "avx512vnni", "avx2" or "scalar". The best
supported one is used. The environment variable ATTNPRESS_CPU_TARGET forces another one; it is read at each call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TARGET_VARIABLE = "ATTNPRESS_CPU_TARGET"

ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that limit oneDNN to an instruction set; values ignore case."""

BELOW_AVX2 = ("scalar", "sse41", "avx")
BELOW_VNNI = (*BELOW_AVX2, "avx2", "avx512_core")
"""Values of these variables and of TARGET_VARIABLE, in lower case, that exclude an instruction set."""


OLDEST_TORCH = (2, 10)
"""The kernel is compiled for the stable ABI of this torch release, and runs with it and every later one."""

HOW_TO_GET = (
    "install the wheel of attnpress for Linux on x86-64; or, with a C++17 compiler, run `make kernel` in a checkout or "
    "`pip install .` in an unpacked source distribution"
)
"""How to get a package with its kernel, for messages."""

NOT_BUILT = f"the CPU kernel is not built: {HOW_TO_GET}; or use backend 'reference'"


class BackendUnavailableError(RuntimeError):
    """The requested backend cannot run here. The message gives the reason and says what to do."""


def library_path() -> Path | None:
    """The compiled library beside this file; None if the package was installed without it."""
    return next(iter(sorted(Path(__file__).parent.glob("_attention*.so"))), None)


def is_built() -> bool:
    """True if the compiled library exists; it is not loaded."""
    return library_path() is not None


@functools.cache
def load() -> None:
    """Load the library once. It defines torch.ops.attnpress.*; the functions for tracing are registered here.

    Raises:
        BackendUnavailableError: the library was not built, or cannot be loaded.
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
    """Advice for a library that this torch cannot load."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    if torch.torch_version.TorchVersion(torch.__version__) < oldest:
        return f"it needs torch {oldest} or newer, and torch {torch.__version__} is installed"
    return f"it does not fit torch {torch.__version__} on this system; build it again with this torch: {HOW_TO_GET}"


def why_unavailable() -> str | None:
    """The reason why the kernel cannot run here; None if it can. Loads the library."""
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
    """The target to use.

    Raises:
        BackendUnavailableError: ATTNPRESS_CPU_TARGET names an unknown target, or one that this processor does not
            support.
    """
    load()
    try:
        return str(torch.ops.attnpress.active_target())
    except RuntimeError as error:
        raise BackendUnavailableError(str(error).splitlines()[0]) from None


def has_avx2() -> bool:
    """True if oneDNN's sums of products of 7-bit codes and signed bytes are exact.

    That requires x86 with AVX2. ATTNPRESS_CPU_TARGET and ONEDNN_MAX_CPU_ISA can disable it, to emulate other
    processors; they are read at each call.
    """
    return _onednn_above(BELOW_AVX2) and bool(torch.cpu._is_avx2_supported())


def has_vnni() -> bool:
    """True if such sums are exact for 8-bit codes too, which requires AVX-512 VNNI.

    Without VNNI, pairs of products are summed in 16 bits, which two products of 8-bit codes can overflow.
    """
    return _onednn_above(BELOW_VNNI) and bool(torch.cpu._is_vnni_supported())


def _onednn_above(below: tuple[str, ...]) -> bool:
    """True if oneDNN is available and not restricted below this instruction set."""
    held = [os.environ.get(name, "").lower() for name in (TARGET_VARIABLE, *ONEDNN_VARIABLES)]
    return torch.backends.mkldnn.is_available() and not any(value in below for value in held)


def fake_attention(query: Tensor, *others: Any) -> Tensor:
    """The result of an attention operator without data: float32 [B, Hq, Sq, D]."""
    # A single tensor on the meta device selects this function; a result on the CPU would be uninitialized memory.
    for other in others:
        if isinstance(other, Tensor) and other.device != query.device:
            raise ValueError(f"attnpress: tensors on {query.device} and {other.device} cannot meet in one call")
    batch, heads, rows, dim = query.shape
    return query.new_empty((batch, rows, heads, dim), dtype=torch.float32).transpose(1, 2)


TAIL_AT = 19
"""Position of the tail's name among the operators' arguments."""


def tail_kind(arguments: Sequence[Any]) -> str:
    """The tail in the arguments of an operator; they may end before it."""
    return str(arguments[TAIL_AT]) if len(arguments) > TAIL_AT else "none"


def _fake_integers(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, ...]:
    each = query.shape[:3]
    tailed = (0, *each[1:]) if tail_kind((query, key, value, *options)) == "none" else each
    codes = [torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format) for x in (query, key, value)]
    return (
        *codes,
        query.new_empty((*each, 1), dtype=torch.int32),
        query.new_empty((*each, key.shape[2]), dtype=torch.uint8),
        query.new_empty((*each, 1), dtype=torch.int64),
        query.new_empty(query.shape, dtype=torch.int64),
        fake_attention(query, key, value, *options),
        *(
            query.new_empty((*tailed, 1), dtype=dtype)
            for dtype in (torch.int32, torch.int32, torch.int64, torch.float32)
        ),
        query.new_empty((*tailed, query.shape[3]), dtype=torch.int64),
        query.new_empty((*tailed, 1), dtype=torch.int64),
        query.new_empty((*tailed, query.shape[3]), dtype=torch.int64),
    )
