"""Small layers of a deployed model: codes and scales as buffers, and the current product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnpress.core.inference import without_gradient
from attnpress.core.linear import ACTIVATION_BITS, Bits, Coded, linear, token_codes, weight_codes
from attnpress.core.ordered import gelu, layer_norm


class Product(Protocol):
    """An implementation that computes the layer in place of the readable product, with its own codes of the weight."""

    def __call__(self, x: Tensor | Coded, activated: bool, next_bits: int) -> Tensor | Coded:
        """The layer's output; see `Int8Linear`."""

    def normed(self, x: Tensor | Coded, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The layer's output, added to `residual` and normalized; see `Int8Output`."""

    def weight(self) -> Tensor:
        """Codes of the weight: int8 [N, K]."""


MakeProduct = Callable[[Tensor, Tensor, Tensor | None, int], Product]
"""From codes and scales of the weight, the bias, and the bits of the input's codes."""


class _Float32(nn.Module):
    """Base class of layers that compute in float32, so that no model that has them can be converted."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32:
        found = fn(torch.empty(0)).dtype
        if found != torch.float32:
            raise TypeError(f"a model with int8 linear layers computes in float32 and cannot be converted to {found}")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class Int8Linear(_Float32):
    """Int8 replacement for one `nn.Linear`, or for several with the same input, for inference.

    Args:
        in_features, out_features: K, N.
        bias: whether there is one.
        activated: apply GELU, and output codes for the next layer instead of floats.
        bits, next_bits: of the codes of its input, and of its output codes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activated: bool = False,
        bits: Bits = ACTIVATION_BITS,
        next_bits: Bits = ACTIVATION_BITS,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.activated = in_features, out_features, activated
        self.bits, self.next_bits = bits, next_bits
        self.product: Product | None = None
        self._make: MakeProduct | None = None
        self.codes: Tensor | None
        self.weight_scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def like(
        cls,
        layers: Sequence[nn.Linear],
        activated: bool = False,
        bits: Bits = ACTIVATION_BITS,
        next_bits: Bits = ACTIVATION_BITS,
    ) -> Int8Linear:
        """An empty layer with the outputs of all these layers side by side."""
        bias = all(layer.bias is not None for layer in layers)
        outputs = sum(layer.out_features for layer in layers)
        return cls(layers[0].in_features, outputs, bias, activated, bits, next_bits)

    def take(self, layers: Sequence[nn.Linear]) -> None:
        """Quantize the weights of these layers to 8 bits."""
        self.codes, self.weight_scale = weight_codes(torch.cat([layer.weight.detach() for layer in layers]))
        if self.bias is not None:
            self.bias = torch.cat([layer.bias.detach().float() for layer in layers])

    def use(self, make: MakeProduct) -> None:
        """Compute the layer by another product, made from codes, scales and bias. Its own codes are freed."""
        if self.codes is not None:
            self._make, self.product = make, make(self.codes, self.weight_scale, self.bias, self.bits)
            self.codes = None

    def forward(self, x: Tensor | Coded) -> Tensor | Coded:
        """Compute the layer.

        Args:
            x: float [..., K], or its codes.

        Returns:
            float32 [..., N], or its codes if `activated`.
        """
        if self.product is not None:
            found = self.product(x, self.activated, self.next_bits)
        else:
            assert self.codes is not None
            coded = x if isinstance(x, Coded) else token_codes(x, self.bits)
            out = linear(coded, self.codes, self.weight_scale, self.bias)
            found = token_codes(gelu(out), self.next_bits) if self.activated else out
        return found if isinstance(x, Coded) or isinstance(found, Coded) else without_gradient(found, x)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        make, product = self._make, self.product
        if product is not None:
            self.codes, self.product = product.weight(), None
        super()._load_from_state_dict(*args, **kwargs)
        if make is not None and self.product is None:
            self.use(make)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.product is not None:
            destination[f"{prefix}codes"] = self.product.weight()

    def extra_repr(self) -> str:
        """For people."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, activated={self.activated}, "
            f"bits={self.bits}"
        )


class HalfEmbedding(_Float32):
    """Word embedding in half precision, for inference. Values are stored as int16, safe from dtype conversions.

    Args:
        num_embeddings, embedding_dim: N, K.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.halves: Tensor
        self.register_buffer("halves", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int16))

    def take(self, embeddings: Sequence[nn.Embedding]) -> None:
        """Store the weights of an embedding in half precision."""
        (embedding,) = embeddings
        self.halves = embedding.weight.detach().half().view(torch.int16)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up tokens [...]; float32 [..., K]."""
        return self.halves[ids].view(torch.float16).float()

    def extra_repr(self) -> str:
        """For people."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Output(nn.Module):
    """Replacement for an encoder layer's output module: product, residual and layer norm in one pass.

    Args:
        replaced: with `dense`, a dropout without effect in inference, and `LayerNorm` over the last dimension.
        product: for `dense`.
    """

    def __init__(self, replaced: Any, product: Int8Linear) -> None:
        super().__init__()
        self.dense, self.LayerNorm = product, replaced.LayerNorm

    def forward(self, hidden_states: Tensor | Coded, input_tensor: Tensor) -> Tensor:
        """Product of the hidden states [..., K], added to the input [..., N] and normalized: float32 [..., N]."""
        norm = self.LayerNorm
        if self.dense.product is not None:
            normed = self.dense.product.normed(hidden_states, input_tensor, norm)
        else:
            normed = layer_norm(self.dense(hidden_states) + input_tensor, norm.weight, norm.bias, norm.eps)
        return without_gradient(normed, input_tensor, norm.weight)
