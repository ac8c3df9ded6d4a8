"""Linear layers in 8 bits on the CPU: oneDNN's product as torch carries it, and what stands around it in one pass each.

The numbers are those of `core.linear`; the integer sums are exact, the float32 steps after them may differ in the last
bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnpress.core import linear as reference
from attnpress.core.linear import Coded
from attnpress.kernels import cpu

ROWS = 512
"""Tokens multiplied at once, for each thread: enough for oneDNN's full speed, without sums that take much memory."""


def is_supported() -> bool:
    """True where products of bytes are exact: see `attnpress.kernels.cpu.has_vnni`."""
    return cpu.has_vnni()


class PackedProduct:
    """A linear layer's product, with its weight as oneDNN wants it.

    Args:
        codes, weight_scale: int8 [N, K] and float32 [N], from `core.linear.weight_codes`.
        bias: float32 [N], or None.
    """

    def __init__(self, codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scale, self._bias = weight_scale, bias
        self._zero = torch.zeros(len(codes), dtype=torch.int32)
        # Some rows at a time: torch adds bytes in a copy of them that is eight times as large.
        self._column = torch.cat([rows.sum(1) for rows in codes.split(128)]).float() * weight_scale

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor | Coded, activated: bool) -> Tensor | Coded:
        """The layer.

        Args:
            x: float [..., K], or codes of such.
            activated: apply GELU and hand out codes.

        Returns:
            float32 [..., N], or codes of such if `activated`.
        """
        coded = x if isinstance(x, Coded) else token_codes(x)
        outer, width = coded.scale.shape, len(self._scale)
        if activated:
            out = Coded(torch.empty(*outer, width, dtype=torch.uint8), torch.empty(outer), torch.empty(outer))
            self._by_rows(coded, finish_codes, [out.codes.view(-1, width), out.scale.view(-1), out.zero.view(-1)])
            return out
        return self._floats(coded, finish_product).view(*outer, width)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def normed(self, x: Tensor | Coded, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The layer without activation, added to float32 `residual` [..., N] and normalized: float32 [..., N]."""
        coded = x if isinstance(x, Coded) else token_codes(x)
        flat = residual.reshape(-1, len(self._scale)).contiguous()
        return self._floats(coded, functools.partial(finish_normed, norm), flat).view(residual.shape)

    def _floats(self, coded: Coded, finish: Callable[..., None], *rows: Tensor) -> Tensor:
        """What `finish` makes of the product, float32 [tokens, N]: in its own memory, where there is one product."""
        flat = _flat(coded)
        if len(flat.codes) <= _rows_at_once():
            sums = self._sums(flat.codes)
            finish(sums, flat.scale, flat.zero, self._column, self._bias, *rows, sums)
            return sums
        floats = torch.empty(len(flat.codes), len(self._scale))
        self._by_rows(coded, finish, [*rows, floats])
        return floats

    def _by_rows(self, coded: Coded, finish: Callable[..., None], rows: Sequence[Tensor]) -> None:
        """Fill results, some tokens at a time."""
        parts = (part.split(_rows_at_once()) for part in (*_flat(coded), *rows))
        for codes, scale, zero, *others in zip(*parts, strict=True):
            finish(self._sums(codes), scale, zero, self._column, self._bias, *others)

    def weight(self) -> Tensor:
        """Codes of the weight: int8 [N, K]."""
        codes: Tensor = self._packed.to_dense().mT.contiguous()
        return codes

    def _sums(self, codes: Tensor) -> Tensor:
        """Products of the codes times the scale of the output: float32."""
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, self._packed, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return sums


def _flat(coded: Coded) -> Coded:
    return Coded(coded.codes.flatten(0, -2), coded.scale.flatten(), coded.zero.flatten())


def _rows_at_once() -> int:
    return ROWS * torch.get_num_threads()


def token_codes(x: Tensor) -> Coded:
    """`core.linear.token_codes`: the compiled one where it is built."""
    if not _is_compiled():
        return reference.token_codes(x)
    return Coded(*torch.ops.attnpress.token_codes(x.float().contiguous()))


def finish_product(sums: Tensor, scale: Tensor, zero: Tensor, column: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Make products of codes the layer's output.

    Args:
        sums: float32 [rows, N], the scale of the output already in them.
        scale, zero: float32 [rows], of the tokens.
        column: float32 [N], sums of the codes of the weight, times their scale.
        bias: float32 [N], or None.
        out: float32 [rows, N], filled; may be `sums`.
    """
    if _is_compiled():
        torch.ops.attnpress.finish_product(sums, scale, zero, column, bias, out)
        return
    torch.mul(sums - zero.unsqueeze(1) * column, scale.unsqueeze(1), out=out)
    if bias is not None:
        out += bias


def finish_normed(
    norm: nn.LayerNorm, sums: Tensor, scale: Tensor, zero: Tensor, column: Tensor, bias: Tensor | None,
    residual: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """`finish_product`, then add `residual`, then normalize over N: `out` and `residual` are float32 [rows, N]."""
    if _is_compiled():
        torch.ops.attnpress.finish_normed(
            sums, scale, zero, column, bias, residual, norm.weight, norm.bias, norm.eps, out
        )
        return
    finish_product(sums, scale, zero, column, bias, out)
    out.copy_(norm(out + residual))


def finish_codes(
    sums: Tensor, scale: Tensor, zero: Tensor, column: Tensor, bias: Tensor | None,
    codes: Tensor, code_scale: Tensor, code_zero: Tensor,
) -> None:  # fmt: skip
    """`finish_product`, then GELU, and codes of that: uint8 [rows, N], float32 [rows] twice, filled."""
    if _is_compiled():
        torch.ops.attnpress.finish_codes(sums, scale, zero, column, bias, codes, code_scale, code_zero)
        return
    floats = torch.empty_like(sums)
    finish_product(sums, scale, zero, column, bias, floats)
    for target, found in zip((codes, code_scale, code_zero), reference.token_codes(F.gelu(floats)), strict=True):
        target.copy_(found)


@functools.cache
def _is_compiled() -> bool:
    if cpu.is_built():
        cpu.load()
    return cpu.is_built()
