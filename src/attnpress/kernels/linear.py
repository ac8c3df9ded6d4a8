"""8-bit linear layers on the CPU: an exact product of codes, with the surrounding operations fused into one pass.

Results equal `core.linear` and `core.ordered` bit for bit, with any of the multiplications:
    oneDNN           part of torch, on x86 with AVX2; 8-bit codes need VNNI
    oneDNN, halves   8-bit codes without VNNI: the weight as a sum of two, so that pairs of products fit 16 bits
    float32 blocks   other processors: sums of so few products that float32 is exact
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnpress.core import linear as reference
from attnpress.core import ordered
from attnpress.core.linear import Coded
from attnpress.kernels import cpu

ROWS = 512
"""Tokens multiplied at once per thread: enough for oneDNN's full speed with small intermediate sums."""


class Multiplication(Protocol):
    """Exact products of codes with one weight."""

    def __call__(self, codes: Tensor) -> Tensor:
        """Sums of products of uint8 [rows, K] with the weight: float32 [rows, N], rounded once from integers."""

    def weight(self) -> Tensor:
        """Codes of the weight: int8 [N, K]."""


class OneDnn:
    """Product of bytes by oneDNN.

    Args:
        weight: int8 [N, K]. Without VNNI, two neighbouring products must sum to less than 2^15.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale, self._zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)

    def __call__(self, codes: Tensor) -> Tensor:
        """See `Multiplication`."""
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, self._packed, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return sums

    def weight(self) -> Tensor:
        """See `Multiplication`."""
        codes: Tensor = self._packed.to_dense().mT.contiguous()
        return codes


class OneDnnHalves:
    """Like `OneDnn`, with the weight split into two halves, one below the other: 2 * 255 * 64 < 2^15."""

    def __init__(self, weight: Tensor) -> None:
        half = weight >> 1
        self._halves = OneDnn(torch.cat([half, weight - half], 1))

    def __call__(self, codes: Tensor) -> Tensor:
        """See `Multiplication`; the integer sums include both halves."""
        return self._halves(torch.cat([codes, codes], 1))

    def weight(self) -> Tensor:
        """See `Multiplication`."""
        first, second = self._halves.weight().chunk(2, 1)
        return first + second


class FloatBlocks:
    """Float32 products over blocks of inputs so small that their sums stay below 2^24, the limit of exact integers.

    Args:
        weight: int8 [N, K].
        bits: of the input codes.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        self._weight = weight
        self._inputs = 2**24 // (reference.WEIGHT_QMAX * (2**bits - 1))

    def __call__(self, codes: Tensor) -> Tensor:
        """See `Multiplication`."""
        parts = zip(codes.split(self._inputs, 1), self._weight.split(self._inputs, 1), strict=True)
        sums = [(part.float() @ weight.float().mT).to(torch.int32) for part, weight in parts]
        return torch.stack(sums).sum(0, dtype=torch.int32).float()

    def weight(self) -> Tensor:
        """See `Multiplication`."""
        return self._weight


def multiplication(weight: Tensor, bits: int) -> Multiplication:
    """The fastest exact multiplication on this processor.

    Args:
        weight: int8 [N, K].
        bits: of the input codes, 7 or 8.
    """
    if not cpu.has_avx2() or not weight.numel():
        return FloatBlocks(weight, bits)
    return OneDnn(weight) if bits < 8 or cpu.has_vnni() else OneDnnHalves(weight)


class PackedProduct:
    """A linear layer's product, with its weight packed for the multiplication. It is copied and pickled by its codes.

    Args:
        codes, weight_scale: int8 [N, K] and float32 [N], from `core.linear.weight_codes`.
        bias: float32 [N], or None.
        bits: of the input codes.
    """

    def __init__(self, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int = 8) -> None:
        self._multiply = multiplication(codes, bits)
        self._scale, self._bias, self._bits = weight_scale, bias, bits
        self._column = reference.column_sums(codes)

    def __reduce__(self) -> tuple[Any, ...]:
        # No temporary tensors: torch passes tensors to other processes as file descriptors, and the descriptor of a
        # freed tensor may already belong to another file.
        return _unpickled, (self.weight().numpy(), self._scale, self._bias, self._bits)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor | Coded, activated: bool, next_bits: int = 8) -> Tensor | Coded:
        """Compute the layer.

        Args:
            x: float [..., K], or its codes.
            activated: apply GELU and output codes.
            next_bits: of those codes.

        Returns:
            float32 [..., N], or its codes if `activated`.
        """
        coded = self._coded(x)
        outer, width = coded.scale.shape, len(self._scale)
        if activated:
            out = Coded(torch.empty(*outer, width, dtype=torch.uint8), torch.empty(outer), torch.empty(outer))
            finish = functools.partial(finish_codes, next_bits)
            self._by_rows(coded, finish, [out.codes.view(-1, width), out.scale.view(-1), out.zero.view(-1)])
            return out
        return self._floats(coded, finish_product).view(*outer, width)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def normed(self, x: Tensor | Coded, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The layer without activation, added to float32 `residual` [..., N] and normalized: float32 [..., N]."""
        flat = residual.reshape(-1, len(self._scale)).contiguous()
        return self._floats(self._coded(x), functools.partial(finish_normed, norm), flat).view(residual.shape)

    def _coded(self, x: Tensor | Coded) -> Coded:
        return x if isinstance(x, Coded) else token_codes(x, self._bits)

    def _floats(self, coded: Coded, finish: Callable[..., None], *rows: Tensor) -> Tensor:
        """The product after `finish`, float32 [tokens, N]."""
        flat = _flat(coded)
        if len(flat.codes) <= _rows_at_once():
            sums = self._multiply(flat.codes)
            self._finish(finish, sums, flat, *rows, sums)
            return sums
        floats = torch.empty(len(flat.codes), len(self._scale))
        self._by_rows(coded, finish, [*rows, floats])
        return floats

    def _by_rows(self, coded: Coded, finish: Callable[..., None], rows: Sequence[Tensor]) -> None:
        """Fill results, some tokens at a time."""
        parts = (part.split(_rows_at_once()) for part in (*_flat(coded), *rows))
        for codes, scale, zero, *others in zip(*parts, strict=True):
            self._finish(finish, self._multiply(codes), Coded(codes, scale, zero), *others)

    def _finish(self, finish: Callable[..., None], sums: Tensor, coded: Coded, *rows: Tensor) -> None:
        finish(sums, coded.scale, coded.zero, self._column, self._scale, self._bias, *rows)

    def weight(self) -> Tensor:
        """Codes of the weight: int8 [N, K]."""
        return self._multiply.weight()


def _unpickled(codes: Any, weight_scale: Tensor, bias: Tensor | None, bits: int) -> PackedProduct:
    return PackedProduct(torch.from_numpy(codes), weight_scale, bias, bits)


def _flat(coded: Coded) -> Coded:
    return Coded(coded.codes.flatten(0, -2), coded.scale.flatten(), coded.zero.flatten())


def _rows_at_once() -> int:
    return ROWS * torch.get_num_threads()


def token_codes(x: Tensor, bits: int = 8) -> Coded:
    """`core.linear.token_codes`, by compiled code if it is built."""
    if not _is_compiled():
        return reference.token_codes(x, bits)
    return Coded(*torch.ops.attnpress.token_codes(x.float().contiguous(), bits))


def finish_product(
    sums: Tensor, scale: Tensor, zero: Tensor, column: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """`core.linear.finish` into `out`.

    Args:
        sums: float32 [rows, N].
        scale, zero: float32 [rows], of the tokens.
        column, weight_scale: float32 [N].
        bias: float32 [N], or None.
        out: float32 [rows, N]; may be `sums`.
    """
    if _is_compiled():
        torch.ops.attnpress.finish_product(sums, scale, zero, column, weight_scale, bias, out)
        return
    out.copy_(reference.finish(sums, Coded(sums, scale, zero), column, weight_scale, bias))


def finish_normed(
    norm: nn.LayerNorm,
    sums: Tensor,
    scale: Tensor,
    zero: Tensor,
    column: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out: Tensor,
) -> None:
    """`finish_product`, then add `residual`, then normalize over N: `out` and `residual` are float32 [rows, N]."""
    if _is_compiled():
        torch.ops.attnpress.finish_normed(
            sums, scale, zero, column, weight_scale, bias, residual, norm.weight, norm.bias, norm.eps, out
        )
        return
    finished = reference.finish(sums, Coded(sums, scale, zero), column, weight_scale, bias)
    out.copy_(ordered.layer_norm(finished + residual, norm.weight, norm.bias, norm.eps))


def finish_codes(
    bits: int,
    sums: Tensor,
    scale: Tensor,
    zero: Tensor,
    column: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    code_scale: Tensor,
    code_zero: Tensor,
) -> None:
    """`finish_product`, then GELU, and codes of that: uint8 [rows, N], float32 [rows] twice, filled."""
    if _is_compiled():
        torch.ops.attnpress.finish_codes(
            sums, scale, zero, column, weight_scale, bias, bits, codes, code_scale, code_zero
        )
        return
    finished = reference.finish(sums, Coded(sums, scale, zero), column, weight_scale, bias)
    found = reference.token_codes(ordered.gelu(finished), bits)
    for target, part in zip((codes, code_scale, code_zero), found, strict=True):
        target.copy_(part)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`core.ordered.layer_norm`, by compiled code if it is built."""
    if not _is_compiled():
        return ordered.layer_norm(x.float(), weight, bias, epsilon)
    normed: Tensor = torch.ops.attnpress.layer_norm(x.float().contiguous(), weight, bias, epsilon)
    return normed


def gelu(x: Tensor) -> Tensor:
    """`core.ordered.gelu`, by compiled code if it is built."""
    if not _is_compiled():
        return ordered.gelu(x.float())
    activated: Tensor = torch.ops.attnpress.gelu(x.float().contiguous())
    return activated


def tanh(x: Tensor) -> Tensor:
    """`core.ordered.tanh`, by compiled code if it is built."""
    if not _is_compiled():
        return ordered.tanh(x.float())
    activated: Tensor = torch.ops.attnpress.tanh(x.float().contiguous())
    return activated


def ordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`core.ordered.ordered_linear`, by compiled code if it is built."""
    if not _is_compiled():
        return ordered.ordered_linear(x.float(), weight, bias)
    out: Tensor = torch.ops.attnpress.ordered_linear(x.float().contiguous(), weight, bias)
    return out


PASSES = ordered.Passes(layer_norm, ordered_linear, gelu, tanh)


@functools.cache
def _is_compiled() -> bool:
    if cpu.is_built():
        cpu.load()
    return cpu.is_built()
