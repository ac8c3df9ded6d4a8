"""Float32 passes in one order: near the true functions, and in the order that is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnpress.core.ordered import LANES, gelu, layer_norm, ordered_linear, ordered_sum, tanh


def by_hand(row: list[float]) -> float:
    """The sum of the definition, a number at a time."""
    lanes = [torch.tensor(0.0) for _ in range(LANES)]
    for place, value in enumerate(row):
        lanes[place % LANES] = lanes[place % LANES] + torch.tensor(value)
    for half in (32, 16, 8, 4):
        lanes = [lanes[j] + lanes[j + half] for j in range(half)]
    return float((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]))


@pytest.mark.parametrize("count", [1, 3, 63, 64, 65, 200])
def test_sums_are_in_the_one_order(count: int) -> None:
    x = torch.randn(4, count, generator=torch.Generator().manual_seed(count)) * 1e3
    assert ordered_sum(x).tolist() == [by_hand(row) for row in x.tolist()]


def test_another_order_gives_other_bits() -> None:
    x = torch.randn(50, 768, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(ordered_sum(x), ordered_sum(x.flip(1)))


def test_gelu_and_tanh_are_near_the_true_ones() -> None:
    x = torch.linspace(-12, 12, 20001)
    exact = x.double()
    assert torch.allclose(gelu(x).double(), F.gelu(exact), rtol=1e-6, atol=3e-7 * 12)
    assert torch.allclose(tanh(x).double(), exact.tanh(), rtol=1e-6, atol=0)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    assert torch.equal(tanh(odd)[1:].round(), torch.tensor([1.0, -1.0, 0.0]))
    assert tanh(odd)[0].isnan()


def test_the_norm_and_the_product_are_near_torch_s() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 7, 70), (5, 70), (5,)))
    scale, shift = weight[0], weight[1]
    assert torch.allclose(
        layer_norm(x + 100, scale, shift, 1e-5), F.layer_norm(x + 100, (70,), scale, shift), atol=1e-4
    )
    for added in (bias, None):
        found: Tensor = ordered_linear(x, weight, added)
        assert torch.allclose(found, F.linear(x, weight, added), atol=1e-4)
    assert ordered_linear(x[:, :0], weight, bias).shape == (2, 0, 5)
