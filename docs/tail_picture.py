"""Draws figures/tail.svg: one row of P, what survives of it, and the levels that `mean` and `linear` give to the rest.

python docs/tail_picture.py
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from attnpress.config import AttentionSpec
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.probe import probe

KEYS, DIM, TOP = 24, 16, 0.3
LEFT, BOTTOM, STEP, TALL = 44, 206, 24, 180


def rows_of_p() -> dict[str, Tensor]:
    """Exact P of one row, and what each tail makes of it, by name; [KEYS] each."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, 1, n, DIM, generator=generator) for n in (1, KEYS, KEYS))
    query = 1.3 * query
    scales = Scales(*(x.abs().amax().view(1, 1, 1, 1) / 127 for x in (query, key, value)))
    cutoff = torch.tensor([-math.log(0.45)])
    spec = AttentionSpec(sparsity=0.9, tail_rank=DIM)
    specs = {tail: dataclasses.replace(spec, tail=tail) for tail in ("none", "mean", "linear")}
    calls = {
        tail: AttentionCall(query, key, value, None, scales, cutoff, own, DIM**-0.5) for tail, own in specs.items()
    }
    found = {tail: probe(call) for tail, call in calls.items()}
    return {"exact": found["none"].before[0, 0, 0]} | {tail: one.after[0, 0, 0] for tail, one in found.items()}


def bar(place: int, height: float, colour: str, left: float, wide: float) -> str:
    """One bar of P, its height in shares of TOP."""
    tall = height / TOP * TALL
    x = LEFT + place * STEP + left
    return f'<rect x="{x:.1f}" y="{BOTTOM - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{colour}"/>'


def dash(place: int, height: float, colour: str) -> str:
    """A short line at a level of P."""
    y = BOTTOM - height / TOP * TALL
    x = LEFT + place * STEP + 2
    return f'<path d="M{x} {y:.1f}h20" stroke="{colour}" stroke-width="2.5"/>'


def svg(rows: dict[str, Tensor]) -> str:
    """The picture."""
    exact, mean, linear = (rows[name].tolist() for name in ("exact", "mean", "linear"))
    kept = [x > 0 for x in rows["none"].tolist()]
    parts = [bar(i, x, "#cbd5e1", 4, 16) for i, x in enumerate(exact)]
    parts += [bar(i, x, "#2563eb", 9, 6) for i, x in enumerate(mean) if kept[i]]
    parts += [dash(i, x, "#ea580c") for i, x in enumerate(mean) if not kept[i]]
    parts += [dash(i, x, "#15803d") for i, x in enumerate(linear) if not kept[i]]
    words = [("#cbd5e1", "P, exact"), ("#2563eb", "survivors"), ("#ea580c", "tail mean: one level"),
             ("#15803d", "tail linear: follows the score")]  # fmt: skip
    x = LEFT
    for colour, text in words:
        parts.append(f'<rect x="{x}" y="228" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="237">{text}</text>')
        x += 40 + 7 * len(text)
    parts.append(f'<path d="M{LEFT} {BOTTOM}h{KEYS * STEP}" stroke="#475569"/>')
    parts.append(f'<text x="{LEFT}" y="18">one row of P: {KEYS} keys, {sum(kept)} survive</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + KEYS * STEP + 16} 248" role="img" '
        'font-family="sans-serif" font-size="12" fill="#334155">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "figures" / "tail.svg").write_text(svg(rows_of_p()), encoding="utf-8")
