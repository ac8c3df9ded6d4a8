r"""What a tail is and could be: errors of attention outputs, in float32, of levels and first-order terms.

    python -m benchmarks.tail_ablation --data squad/dev-v1.1.json --json benchmarks/records/tail_ablation.json

MiniLM on two batches of paragraphs: thresholds, lifts, directions and slopes are fitted to the first, per head, and the
second is measured. Every layer gets Q and K of the dense model, nothing is quantized, and pairs are pruned by their
distance from the row maximum. Error: relative root-mean-square error of the output at real tokens, mean over layers.

- `mean`: a level from the mean distance, with a lift a head; `decay`: the mean distance times one number a head, by
  least squares on the logarithm of the mean weight; `layer`: one lift for all heads of a layer; `exact mass`: the true
  mean weight of the pruned pairs of each row, which needs an exponential for each of them.
- `spread b`: the level's exponent also has b times the variance of the scores of the pruned pairs (1/2 would be right
  for a normal distribution), and a lift fitted to that.
- `linear r`: first order in the score as r directions see it. `gain`: the first-order term times one number a head,
  by least squares on the weights.

Tails as they are built have neither `decay`, `spread` nor `gain` (docs/decisions/0058).
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from attnpress.benchmark.machine import provenance
from attnpress.config import AttentionSpec
from attnpress.core.attention import dense_attention
from attnpress.core.call import AttentionCall
from attnpress.core.tail import Moments, fit_directions
from attnpress.models.binding import attending, attentions, bind
from attnpress.models.loading import load_tokenizer, quiet, resolve_model
from attnpress.models.outputs import outputs
from benchmarks.encode_inputs import squad_rows
from benchmarks.without_training import MODEL

TEXTS, RANKS, SPREADS, FAR = 8, (4, 8, 16, 32), (0.25,), 80.0


def captured(batch: dict[str, Tensor]) -> list[AttentionCall]:
    """What each layer of the dense model is asked; any scales will do, since codes are not used."""
    model = bind(AutoModel.from_pretrained(resolve_model(MODEL)).eval(), AttentionSpec())
    found: list[AttentionCall] = []

    def attend(call: AttentionCall) -> Tensor:
        found.append(call)
        return dense_attention(call.query, call.key, call.value, call.valid, call.scaling)

    modules = list(attentions(model).values())
    for module in modules:
        module.set_scales({name: torch.tensor(0.05) for name in "qkv"})
    with attending(dict.fromkeys(modules, attend)):
        list(outputs(model, [batch]))
    return found


@dataclass
class Rows:
    """Exact weights of one call over their row maximum, and who is pruned; [B, H, Sq, Sk] or [B, H, Sq, 1]."""

    weight: Tensor
    distance: Tensor
    kept: Tensor
    pruned: Tensor
    count: Tensor
    real: Tensor

    def mean_of(self, x: Tensor) -> Tensor:
        """Over the pruned pairs of each row."""
        return (x * self.pruned).sum(-1, keepdim=True) / self.count

    def share(self, x: Tensor) -> Tensor:
        """Over the whole weight of each row."""
        return x / self.weight.sum(-1, keepdim=True).clamp(min=1)

    def mass(self) -> Tensor:
        """Share of the pruned pairs in each row."""
        return self.share((self.weight * self.pruned).sum(-1, keepdim=True))

    def per_head(self, x: Tensor) -> Tensor:
        """Sum over real rows, [1, H, 1, 1]."""
        return (x * self.real).sum((0, 2, 3), keepdim=True)


def allowed(call: AttentionCall) -> Tensor:
    """Pairs of real tokens, bool [B, H, Sq, Sk]."""
    pairs = torch.ones(*call.query.shape[:3], call.key.shape[2], dtype=torch.bool)
    for mask in (call.valid, call.real):
        pairs = pairs if mask is None else pairs & mask
    return pairs


def distances(call: AttentionCall) -> Tensor:
    """Of scores from their row maximum, in nats; FAR where there is no pair."""
    scores = (call.query @ call.key.mT * call.scaling).masked_fill(~allowed(call), -torch.inf)
    top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    return (top - scores).clamp(max=FAR)


def thresholds(call: AttentionCall, sparsity: float) -> Tensor:
    """Distance of each head that keeps 1 - sparsity of its pairs, [1, H, 1, 1]."""
    pairs, far = allowed(call), distances(call)
    heads = [far[:, h][pairs[:, h]] for h in range(far.shape[1])]
    return torch.stack([x.kthvalue(max(1, int((1 - sparsity) * len(x)))).values for x in heads]).view(1, -1, 1, 1)


def rows_of(call: AttentionCall, cut: Tensor) -> Rows:
    """Who survives the cut."""
    pairs, far = allowed(call), distances(call)
    kept, pruned = (far <= cut) & pairs, (far > cut) & pairs
    count = pruned.sum(-1, keepdim=True).clamp(min=1)
    return Rows(torch.exp(-far) * pairs, far, kept, pruned.float(), count, pairs.any(-1, keepdim=True))


def fit_decay(rows: Rows) -> Tensor:
    """The line of the logarithm of the mean weight over the mean distance, weighted by mass: its slope, a head."""
    x, y = rows.mean_of(rows.distance), -rows.mean_of(rows.weight).clamp(min=1e-30).log()
    mass = rows.mass()
    whole, sx, sy, sxx, sxy = (rows.per_head(z * mass) for z in (torch.ones_like(x), x, y, x * x, x * y))
    return (whole * sxy - sx * sy) / (whole * sxx - sx * sx).clamp(min=1e-12)


def raw_levels(rows: Rows, decay: Tensor) -> dict[str, Tensor]:
    """Levels before any lift, by name."""
    mean = rows.mean_of(rows.distance)
    spread = rows.mean_of((rows.distance - mean) ** 2)
    spreads = {f"spread {b}": torch.exp(-mean + b * spread) for b in SPREADS}
    return {"": torch.exp(-mean), "decay": torch.exp(-decay * mean), **spreads}


def lifts(rows: Rows, levels: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factor a head that gives each level the mass of what is pruned, as `core.tail.fit_lift` does."""
    held = rows.per_head(rows.mass())
    made = {name: rows.per_head(rows.share(u * rows.pruned.sum(-1, keepdim=True))) for name, u in levels.items()}
    return {name: held / found for name, found in made.items()} | {"layer": held.sum() / made[""].sum()}


def directions(call: AttentionCall) -> Moments:
    """Moments of Q and K at real tokens."""
    heads, dim = call.query.shape[1], call.query.shape[3]
    found = Moments.none_yet(heads, dim, call.query.device)
    real = allowed(call).any(-1, keepdim=True)[:, :1].float()
    found.add(call.query, call.key, real, real)
    return found


def seen_scores(call: AttentionCall, rows: Rows, moments: Moments, rank: int) -> Tensor:
    """First-order terms of the pruned pairs in nats, which add up to 0 in a row."""
    fitted = fit_directions(moments, rank)
    # Integer directions at their full resolution; their offsets move all scores of a row alike.
    q, k = call.query @ fitted.query, call.key @ fitted.key
    exact = (
        call.query @ call.key.mT if rank >= call.query.shape[-1] else q @ k.mT * fitted.step.view(1, -1, 1, 1) / 2**24
    )
    scores = exact * call.scaling
    return (scores - rows.mean_of(scores)) * rows.pruned


def slope(rows: Rows, level: Tensor, seen: Tensor) -> Tensor:
    """Least squares of what is left of the weights, over the row's mass, a head."""
    share, wanted = rows.share(level), rows.share(rows.weight)
    over, under = (x.sum(-1, keepdim=True) for x in (wanted * seen * share, (seen * share) ** 2))
    return rows.per_head(over) / rows.per_head(under).clamp(min=1e-30)


def error(call: AttentionCall, rows: Rows, tail: Tensor) -> float:
    """Of the output, with these weights in place of what is pruned."""
    exact = rows.share(rows.weight) @ call.value
    weights = rows.weight * rows.kept + tail * rows.pruned
    found = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30) @ call.value
    return float(((found - exact) * rows.real).norm() / (exact * rows.real).norm())


def layer(fit: AttentionCall, test: AttentionCall, sparsity: float) -> dict[str, float]:
    """Errors of one layer by variant."""
    cut = thresholds(fit, sparsity)
    old, new = rows_of(fit, cut), rows_of(test, cut)
    decay, moments = fit_decay(old), directions(fit)
    before, levels = raw_levels(old, decay), raw_levels(new, decay)
    factors = lifts(old, before)
    found = {
        "none": 0 * levels[""],
        "mean, layer": factors["layer"] * levels[""],
        "exact mass": new.mean_of(new.weight),
    }
    for name in levels:
        found[f"mean, {name}".removesuffix(", ")] = factors[name] * levels[name]
    errors = {name: error(test, new, tail) for name, tail in found.items()}
    for rank in RANKS:
        ours, theirs = (seen_scores(call, rows, moments, rank) for call, rows in ((fit, old), (test, new)))
        for name in levels:
            u = factors[name] * levels[name]
            fitted = slope(old, factors[name] * before[name], ours)
            words = f"linear {rank}, {name}".removesuffix(", ")
            errors[words] = error(test, new, u * (1 + theirs))
            errors[f"{words}, gain"] = error(test, new, u * (1 + fitted * theirs))
    return errors


def main() -> None:
    """One row for each variant and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    torch.set_grad_enabled(False)
    tokenizer = load_tokenizer(resolve_model(MODEL))
    texts = [row["passage"] for row in squad_rows(options.data)]
    chosen = texts[:: len(texts) // (2 * TEXTS)][: 2 * TEXTS]
    halves: list[Any] = [tokenizer(chosen[i::2], padding=True, truncation=True, return_tensors="pt") for i in (0, 1)]
    fit, test = (captured(dict(half)) for half in halves)
    rows: dict[str, dict[str, float]] = {}
    for sparsity in options.sparsity:
        layers = [layer(*pair, sparsity) for pair in zip(fit, test, strict=True)]
        for name in layers[0]:
            rows.setdefault(name, {})[str(sparsity)] = round(statistics.mean(each[name] for each in layers), 4)
    record = {"texts": TEXTS, "rows": rows, "provenance": provenance("none")}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    for name, errors in rows.items():
        print(f"{name:40}", errors)


if __name__ == "__main__":
    main()
