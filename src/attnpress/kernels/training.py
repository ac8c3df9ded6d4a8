"""The training forward with the integers of the compiled kernel.

A training step needs P codes and sums of the forward pass, and the kernel computes them several times faster than float
products do. Both give the same integers, so outputs and gradients are equal bit for bit. Without gradients, products
are used: `evaluate --backend` then compares two independent computations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnpress.core.arguments import is_real
from attnpress.core.call import AttentionCall
from attnpress.core.fake_quantize import CodedRows, StepKernel, Survivors, fake_quantize_attention
from attnpress.core.rules import runs_on
from attnpress.core.tail import TailSums
from attnpress.kernels import cpu, head_size
from attnpress.kernels.ops import DTYPES, compiled_integers


def training_attention(call: AttentionCall) -> Tensor:
    """`fake_quantize_attention`, which uses the compiled kernel where gradients are computed and it can run.

    Args:
        call: as for `fake_quantize_attention`.

    Returns:
        float32 [B, Hq, Sq, D], stored so that its transpose [B, Sq, Hq, D] is contiguous.

    Raises:
        ValueError: an argument is invalid. The message names it.
    """
    return fake_quantize_attention(call, COMPILED if _trains(call) and _is_supported(call) else None)


def code_rows(call: AttentionCall) -> CodedRows:
    """The integers of a call by the compiled kernel, which must support it."""
    found = compiled_integers(call.with_(causal=False, bounds=None))
    divisor = found["code_sum"].float().clamp_(min=1)
    if call.spec.p.mode == "unit" and not call.spec.p.renormalize:
        divisor = torch.full_like(divisor, float(call.spec.p.qmax))
    return CodedRows(found["p_codes"], divisor, _tail_sums(found), found["weighted"].float())


def survivor_gradients(survivors: Survivors) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the codes of Q, K and V from pairs with a code, float32 [B, Hq, S, D] each.

    The same bits on every target and at any number of threads.
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.attnpress.attention_gradients(*survivors)
    return found


COMPILED = StepKernel(code_rows, survivor_gradients)


def _tail_sums(found: dict[str, Tensor]) -> TailSums | None:
    if "tail_count" not in found:
        return None
    return TailSums(
        found["tail_count"].float(),
        found["tail_distance"].double(),
        found["tail_exponent"],
        found["tail_level"],
        found["tail_value"].float(),
        found["tail_score"].double() if "tail_score" in found else None,
        found["tail_slope"].double() if "tail_slope" in found else None,
    )


def _trains(call: AttentionCall) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))


def _is_supported(call: AttentionCall) -> bool:
    """True if the compiled kernel can run here, and supports the call."""
    query, key, value, spec = call.query, call.key, call.value, call.spec
    return (
        all(is_real(x) and x.dtype in DTYPES and x.numel() > 0 for x in (query, key, value))
        and key.shape == value.shape
        and head_size.fits(query.shape[-1])
        and None not in spec.bits.values()
        and runs_on("cpu", spec)
        and cpu.why_unavailable() is None
    )
