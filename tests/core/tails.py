"""Calls with tails, for tests."""

from __future__ import annotations

from typing import Any

import torch

from attnpress.config import TailName
from attnpress.config.recipe import parse_spec, spec_to_dict
from attnpress.core.call import Scales
from attnpress.core.tail import Moments, Tail, fit_directions
from tests.core.factories import Call, generator


def make_tail(call: Call, rank: int, seed: int = 0) -> Tail:
    """A lift a head, and directions fitted to the call itself."""
    heads, dim = call.query.shape[1], call.query.shape[-1]
    lift = torch.randint(0, 2000, (heads,), generator=generator(seed)).float()
    if rank >= dim:
        return Tail(lift)
    codes = call.with_(spec=make_none(call)).integer()
    moments = Moments.none_yet(call.key.shape[1], dim, torch.device("cpu"))
    one = torch.ones(len(codes.q_codes), 1, 1, 1)
    moments.add(codes.q_codes, codes.k_codes, one.expand(-1, -1, codes.q_codes.shape[2], -1),
                one.expand(-1, -1, codes.k_codes.shape[2], -1))  # fmt: skip
    return Tail(lift, fit_directions(moments, rank))


def with_tail(call: Call, tail: TailName, rank: int = 3, seed: int = 0) -> Call:
    spec = parse_spec(type(call.spec), {**plain(call), "tail": tail, "tail_rank": rank})
    scales = Scales(call.scales.q, call.scales.k, call.scales.v, tail=make_tail(call, rank, seed))
    return call.with_(spec=spec, scales=scales)


def plain(call: Call) -> dict[str, Any]:
    made: dict[str, Any] = spec_to_dict(call.spec)
    return {**made, "p": {**made["p"], "mode": "row"}}


def make_none(call: Call) -> Any:
    return parse_spec(type(call.spec), {**plain(call), "tail": "none"})
