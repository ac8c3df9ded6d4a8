"""What calibration fits for a tail: the lift that keeps its mass, and directions in which scores vary."""

from __future__ import annotations

import pytest
import torch

from attnpress.core.attention import TailedAttention, score_step
from attnpress.core.call import Scales
from attnpress.core.exponential import exponent_rate
from attnpress.core.tail import Moments, Tail, fit_directions, fit_lift, projected, tail_masses
from tests.core.factories import generator, make_call, make_spec, normal
from tests.core.tails import with_tail


def test_lift_restores_the_mass_of_the_tail() -> None:
    call = make_call(make_spec(sparsity=0.9), rows=40, keys=40, spread=3.0).with_(cutoff=torch.full((4,), 0.4))
    bare = Tail(torch.zeros(4))
    found = with_tail(call, "mean").with_(scales=Scales(call.scales.q, call.scales.k, call.scales.v, tail=bare))
    pairs = found.integer()
    assert isinstance(pairs, TailedAttention)
    alpha = score_step(call.scales.q, call.scales.k, call.scaling, 4)  # type: ignore[arg-type]
    distance = (pairs.row_max - pairs.acc).float() * exponent_rate(alpha)
    p = (torch.exp2(-distance / 1024) * 65536).round()
    rest = pairs.p_codes == 0
    masses = tail_masses(p, rest, pairs.tail_level / 255, torch.ones(2, 1, 40, 1, dtype=torch.bool))
    lift = fit_lift(masses)
    assert bool((lift > 50).all())
    lifted = Scales(call.scales.q, call.scales.k, call.scales.v, tail=Tail(lift))
    again = found.with_(scales=lifted).integer()
    assert isinstance(again, TailedAttention)
    after = tail_masses(p, rest, again.tail_level / 255, torch.ones(2, 1, 40, 1, dtype=torch.bool))
    torch.testing.assert_close(after[:, 1], after[:, 0], rtol=2e-3, atol=0)
    assert torch.equal(fit_lift(torch.zeros(3, 2, dtype=torch.float64)), torch.zeros(3))


def test_masses_do_not_depend_on_order_or_on_rows_that_do_not_count() -> None:
    p = torch.randint(0, 65537, (4, 2, 5, 9), generator=generator(0))
    rest, one = p < 30000, torch.rand(4, 2, 5, 1, generator=generator(1))
    counted = torch.ones(4, 1, 5, 1, dtype=torch.bool)
    whole = tail_masses(p, rest, one, counted)
    parts = [tail_masses(p[i : i + 1], rest[i : i + 1], one[i : i + 1], counted[i : i + 1]) for i in (3, 1, 0, 2)]
    assert torch.equal(whole, torch.stack(parts).sum(0))
    counted[1:] = False
    assert torch.equal(tail_masses(p, rest, one, counted), parts[2])


def test_directions_find_what_varies() -> None:
    """Keys vary along two axes that queries see, and most along one that no query sees."""
    dim, tokens = 16, 4000
    moments = Moments.none_yet(1, dim, torch.device("cpu"))
    mixed = torch.linalg.qr(normal(3, dim, dim)).Q
    q_axes, k_axes = torch.ones(dim), torch.ones(dim)
    q_axes[0], q_axes[1], q_axes[2], k_axes[0], k_axes[1], k_axes[2] = 20.0, 15.0, 0.01, 20.0, 15.0, 100.0
    q = ((normal(0, 1, 1, tokens, dim) * q_axes) @ mixed).round().clamp(-127, 127)
    k = ((normal(1, 1, 1, tokens, dim) * k_axes + 9) @ mixed).round().clamp(-127, 127)
    moments.add(q, k, torch.ones(1, 1, tokens, 1), torch.ones(1, 1, tokens, 1))
    found = fit_directions(moments, 2)
    made = projected(q, found.query) @ projected(k, found.key, found.offset).mT * found.step.view(-1, 1, 1)
    centred = (q @ (k - k.mean(2, keepdim=True)).mT)[0, 0]
    error = (made[0, 0] - centred).square().mean() / centred.square().mean()
    assert float(error) < 0.15
    assert float(projected(k, found.key, found.offset).abs().amax()) > 60
    assert float(projected(q, found.query).mean().abs()) < 30
    assert bool((found.query.abs().amax(1) <= 32767).all())
    one = fit_directions(moments, 1)
    assert torch.equal(one.query[..., 0].sign(), found.query[..., 0].sign())


def test_moments_of_padding_and_order() -> None:
    q, k = normal(0, 3, 4, 5, 8).mul(40).round(), normal(1, 3, 2, 5, 8).mul(40).round()
    real = torch.ones(3, 1, 5, 1)
    real[1, :, 3:] = 0
    whole, parts = (Moments.none_yet(2, 8, torch.device("cpu")) for _ in range(2))
    whole.add(q, k, real, real)
    for i in (2, 0, 1):
        parts.add(q[i : i + 1], k[i : i + 1], real[i : i + 1], real[i : i + 1])
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), parts.tensors(), strict=True))
    q[1, :, 3:], k[1, :, 3:] = 99, -99
    again = Moments.none_yet(2, 8, torch.device("cpu"))
    again.add(q, k, real, real)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), again.tensors(), strict=True))
    with pytest.raises(ValueError, match="no real token"):
        fit_directions(Moments.none_yet(2, 8, torch.device("cpu")), 2)


def test_directions_of_nothing_are_finite() -> None:
    moments = Moments.none_yet(1, 4, torch.device("cpu"))
    moments.add(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1))
    found = fit_directions(moments, 2)
    assert all(bool(x.isfinite().all()) for x in (found.query, found.key, found.offset, found.step))
