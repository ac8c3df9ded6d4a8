r"""Time of the CPU kernel against the error of its output, with each tail: what a tail's work buys in fewer survivors.

    python -m benchmarks.tail_front --data squad/dev-v1.1.json --calibrate-on squad/train-v1.1-subset.json \
        --json benchmarks/records/tail_front.json

MiniLM, 8 bits for Q, K, V and P, thresholds per head, nothing trained. Every layer is given the Q, K and V of the dense
model on the same paragraphs. Error: relative root-mean-square error of the attention output at real tokens, mean over
layers. Time: of one call per layer, one thread, processor time as in `tail_cost.py`, all variants in turn. `ratio` is
that time over the time of the same calls with nothing pruned.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from attnpress.benchmark.machine import provenance
from attnpress.config import AttentionSpec, TailName
from attnpress.core.attention import dense_attention
from attnpress.core.call import AttentionCall
from attnpress.kernels import ops
from attnpress.models.binding import attending, attentions, bind
from attnpress.models.loading import load_tokenizer, quiet, resolve_model
from attnpress.models.outputs import outputs
from attnpress.models.watchers import Counting, watched
from attnpress.training.calibration import calibrate, fit_thresholds
from benchmarks.encode_inputs import squad_rows
from benchmarks.tail_cost import least
from benchmarks.without_training import MODEL

TAILS: dict[str, tuple[TailName, int]] = {
    "none": ("none", 1), "mean": ("mean", 1), "linear 8": ("linear", 8), "linear 32": ("linear", 32)
}  # fmt: skip
CALIBRATION, TEXTS = 32, 8


@dataclasses.dataclass
class Point:
    """One tail at one sparsity: its calls, one a layer, and what is known of them."""

    tail: str
    asked: float
    calls: list[AttentionCall]
    facts: dict[str, float]


def exact_output(call: AttentionCall) -> Tensor:
    """What the dense model's attention gives."""
    return dense_attention(call.query, call.key, call.value, call.valid, call.scaling)


def point(model: Any, batch: dict[str, Tensor], tail: str, asked: float) -> Point:
    """Capture the calls of the sparsity in force; each layer sees what the dense layers before it gave."""
    calls: list[AttentionCall] = []

    def attend(call: AttentionCall) -> Tensor:
        calls.append(call)
        return exact_output(call)

    modules = list(attentions(model).values())
    counting = {module: Counting(module) for module in modules}
    with watched(counting.items()), attending(dict.fromkeys(modules, attend)):
        list(outputs(model, [batch]))
    counts = [watcher.counts.total() for watcher in counting.values()]
    total = sum(counts[1:], counts[0])
    error = statistics.mean(_error(call) for call in calls)
    facts = {"sparsity": float(total.sparsity()), "keys_per_row": float(total.keys_per_row()), "error": error}
    return Point(tail, asked, calls, facts)


def _error(call: AttentionCall) -> float:
    exact, found = exact_output(call), ops.attention(call)
    real = torch.ones_like(exact, dtype=torch.bool) if call.real is None else call.real.expand_as(exact)
    return float((found - exact)[real].norm() / exact[real].norm())


def points(options: argparse.Namespace) -> list[Point]:
    """Nothing pruned, then each tail at each sparsity, calibrated on other texts."""
    tokenizer = load_tokenizer(resolve_model(MODEL))

    def encoded(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

    texts, others = ([row["passage"] for row in squad_rows(file)] for file in (options.data, options.calibrate_on))
    texts = sorted(texts, key=len)
    middle = len(texts) // 2
    batch = encoded(texts[middle : middle + TEXTS])
    some = sorted(others[:: max(1, len(others) // CALIBRATION)][:CALIBRATION], key=len)
    calibration = [encoded(some[i : i + TEXTS]) for i in range(0, len(some), TEXTS)]
    found = []
    for tail, (name, rank) in TAILS.items():
        model = bind(AutoModel.from_pretrained(resolve_model(MODEL)), AttentionSpec(tail=name, tail_rank=rank))
        calibrate(model, calibration)
        if tail == "none":
            found.append(point(model, batch, "nothing pruned", 0.0))
        for sparsity in options.sparsity:
            for module in attentions(model).values():
                module.set_sparsity(sparsity)
            fit_thresholds(model, calibration)
            found.append(point(model, batch, tail, sparsity))
            print(tail, sparsity, found[-1].facts, flush=True)
    return found


def _all_layers(calls: list[AttentionCall]) -> Callable[[], Any]:
    return lambda: [ops.attention(call) for call in calls]


def main() -> None:
    """One row for each tail and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibrate-on", type=Path, required=True, help="another SQuAD file")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each variant")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found = points(options)
    tokens = found[0].calls[0].query.shape[2]
    times = least({f"{one.tail} {one.asked:g}": _all_layers(one.calls) for one in found}, options.seconds)
    dense = next(iter(times.values()))
    rows = [
        {"tail": one.tail, "asked": one.asked, **one.facts, "ms": ms, "ratio": ms / dense}
        for one, ms in zip(found, times.values(), strict=True)
    ]
    record = {"texts": TEXTS, "tokens": tokens, "rows": rows, "provenance": provenance("none")}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        print(f"{row['tail']:15} {row['sparsity']:.3f} error {row['error']:.3f} time {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
