"""Linear layers in 8 bits on the CPU: oneDNN's product as torch carries it, with what follows fused into it.

The numbers are those of `core.linear`; the integer sums are exact, the float32 steps after them oneDNN's own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from attnpress.core.linear import Step, input_codes, weight_codes
from attnpress.kernels import cpu

ACTIVATIONS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
}
"""Names of activations as Transformers has them: oneDNN's post operation, and its algorithm."""


@functools.cache
def is_supported() -> bool:
    """True where products of bytes are exact: without VNNI, oneDNN adds pairs of them in 16 bits, which saturate."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_vnni_supported())


class Int8Linear(nn.Module):
    """Stands where an `nn.Linear` stood, in evaluation mode, on float32 or on codes.

    Args:
        weight: [N, K], any float dtype; only its codes are kept.
        bias: [N], or None.
        step: of the input.
        activation: of ACTIVATIONS, applied to the product.
        output: if given, the result is uint8 of this step, else float32.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, step: Step, activation: str = "none", output: Step | None = None
    ) -> None:
        super().__init__()
        codes, self.weight_scale = weight_codes(weight)
        # Plain attributes: a packed weight is opaque, and state_dict could not store it.
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self.weight_zero = torch.zeros(len(codes), dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().float().clone()
        self.step, self.activation, self.output = step, activation, output
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """The layer.

        Args:
            x: float [..., K], or uint8 [..., K]: codes of this layer's own step.

        Returns:
            float32, or uint8 with `output`, [..., N].
        """
        codes = x if x.dtype == torch.uint8 else quantize(x, self.step)
        name, algorithm = ACTIVATIONS[self.activation]
        scale, zero, dtype = 1.0, 0, torch.float32
        if self.output is not None:
            scale, zero, dtype = self.output.scale, self.output.zero_point, torch.uint8
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, self.step.scale, self.step.zero_point, self.packed, self.weight_scale, self.weight_zero, self.bias,
            scale, zero, dtype, name, [], algorithm,
        )  # fmt: skip
        return out

    def extra_repr(self) -> str:
        """For people."""
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"


def quantize(x: Tensor, step: Step) -> Tensor:
    """`core.linear.input_codes`: the compiled one where it is built."""
    if not _is_compiled():
        return input_codes(x, step)
    codes: Tensor = torch.ops.attnpress.input_codes(x.float().contiguous(), step.scale, step.zero_point)
    return codes


@functools.cache
def _is_compiled() -> bool:
    if cpu.is_built():
        cpu.load()
    return cpu.is_built()
