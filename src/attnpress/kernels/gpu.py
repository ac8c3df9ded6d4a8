"""The GPU kernel: `torch.ops.attnpress.attention_gpu`, compiled by Triton at first use, and whether it can run here.

The operator is registered on all machines, so that programs with it can be loaded, traced and exported anywhere. With
TRITON_INTERPRET=1, Triton runs kernels in Python on CPU tensors: slow, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from attnpress.kernels.cpu import BackendUnavailableError, fake_attention

INTERPRETER_VARIABLE = "TRITON_INTERPRET"

INTERPRETED = os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "y", "yes")
"""True if Triton runs kernels in its interpreter; Triton also reads the variable when first imported."""

LEAST_CAPABILITY = (8, 0)
"""Lowest compute capability for which Triton supports products of bytes on tensor cores."""

MOST_KEYS = (2**31 - 1) // (255 * 127)
"""Maximum number of keys for which sums of code * v_code fit 32 bits."""

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? valid, bool causal, float scaling, Tensor? q_scale, "
    "Tensor k_scale, Tensor v_scale, Tensor? cutoff, str rule, float sparsity, str mode, int q_qmax, int k_qmax, "
    "int v_qmax, int p_qmax, bool smooth_key, bool power_of_two, Tensor? bounds=None) -> Tensor"
)


def why_unavailable() -> str | None:
    """The reason why the kernel cannot run here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'attnpress[gpu]')"
    if INTERPRETED:
        return None
    if torch.version.hip is not None:
        return "it is made for NVIDIA GPUs, and this torch for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
        return f"{torch.cuda.get_device_name()} has compute capability {found}, and {least} is needed"
    return None


def load() -> None:
    """Check that the kernel can run.

    Raises:
        BackendUnavailableError: with the reason.
    """
    reason = why_unavailable()
    if reason is not None:
        raise BackendUnavailableError(f"backend 'gpu' cannot run here: {reason}; use backend 'cpu' or 'reference'")


def device_name() -> str:
    """Name of the device, for messages."""
    if INTERPRETED:
        return f"Triton's interpreter ({INTERPRETER_VARIABLE} is set): in Python, for tests"
    return (
        f"{torch.cuda.get_device_name()}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    )


def check_keys(keys: int) -> None:
    """Refuse rows whose sums could exceed 32 bits.

    Raises:
        ValueError: there are more keys than MOST_KEYS.
    """
    if keys > MOST_KEYS:
        raise ValueError(
            f"key: backend 'gpu' takes up to {MOST_KEYS} keys per query, since its sums have 32 bits, found {keys}; "
            "use backend 'cpu' or 'reference'"
        )


def device() -> torch.device:
    """The device that tensors must be on."""
    return torch.device("cpu" if INTERPRETED else "cuda")


def integers(*arguments: Any) -> dict[str, Tensor]:
    """The integers of a call by their names in `IntegerAttention`; the arguments are those of the operator."""
    from attnpress.kernels.triton.launch import KernelCall
    from attnpress.kernels.triton.launch import integers as launched

    return launched(KernelCall(*arguments))


def _attention(*arguments: Any, **named: Any) -> Tensor:
    load()
    from attnpress.kernels.triton.launch import KernelCall, attend

    call = KernelCall(*arguments, **named)
    call.check()
    if call.bounds is None:
        check_keys(call.key.shape[2])
    return attend(call)


operator = torch.library.custom_op("attnpress::attention_gpu", _attention, mutates_args=(), schema=SCHEMA)
operator.register_fake(fake_attention)
