"""All that has to be seen on a GPU, in one run of less than ten minutes: exactness, inference, a training step.

    python benchmarks/device.py --json benchmarks/records/device.json       # `make device`, with an NVIDIA GPU
    python benchmarks/device.py --tiny                                      # anywhere: does the script itself work?

Exactness: tests/kernels/gpu_exactness.py, which compares every integer with the reference. Inference: 12 heads of 64
with padding masks, beside scaled_dot_product_attention in bfloat16 (with the mask, and its flash kernel without one)
and SageAttention where that is installed (it takes no mask). Training: a step of a BERT of MiniLM's size, dense with
SDPA, compressing as it is, and compressing with the elementwise chain of the forward compiled by torch.compile; time in
turns, and peak memory of a step alone. `--tiny` runs kernels in Triton's interpreter; its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SUITE = "tests/kernels/gpu_exactness.py"
PATIENCE = 400
"""Seconds for the exactness suite, most of which Triton compiles."""

HEADS, DIM, SPARSITY = 12, 64, 0.9
LIMIT = 1.7
"""Nats below a row's maximum up to which pairs are kept: of normal scores, about a tenth are at 512 keys."""

TILES = ((128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3), (64, 64, 8, 3))
"""Rows, keys, warps and stages to try at 2048 tokens."""

INFERENCE = {512: 32, 2048: 8, 8192: 2}
TRAINING = {128: 32, 512: 8}
"""Batch by length."""

BARS = {"step": 1.5, "peak": 1.2, "inference": 1.0}

PARTS = ("inference", "tiles", "training", "exactness")
"""In their order: the longest last."""

Run = Callable[[], Any]


def exactness(*, tiny: bool) -> dict[str, Any]:
    """Run the suite in a process of its own; counts of its tests, and the end of what it said if any failed."""
    some = ["-k", "test_bits or test_rules_and_modes"] if tiny else []
    if not tiny and importlib.util.find_spec("xdist") is not None:  # most of its time goes into compilation
        some = ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", SUITE, "--quiet", "-p", "no:cacheprovider", *some]
    start = time.perf_counter()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        said = ended.stdout + ended.stderr
    except subprocess.TimeoutExpired as expired:
        said = f"{(expired.stdout or b'').decode()}\nstopped after {PATIENCE} seconds"
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", said)}
    passed = counts.get("passed", 0) > 0 and set(counts) <= {"passed", "skipped"}
    return {
        "met": passed,
        "seconds": round(time.perf_counter() - start),
        **counts,
        **({} if passed else {"said": said[-6000:]}),
    }


def in_turns(sides: dict[str, Run], rounds: int, calls: int) -> dict[str, float]:
    """Median milliseconds of a call of each side; sides take turns, after one round that is not counted.

    By the GPU's own events, in this process: `attnpress.benchmark.turns`, with a process for each side, is for
    processors, whose threads get into each other's way.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            taken = _milliseconds(run, calls)
            if number:
                found[name].append(taken / calls)
    return {name: round(statistics.median(times), 4) for name, times in found.items()}


def _milliseconds(run: Run, calls: int) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def peak_megabytes(run: Run) -> float | None:
    """What a call needs on the GPU beyond what was there; None without one."""
    if not torch.cuda.is_available():
        return None
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def inference(length: int, batch: int, rounds: int, calls: int) -> dict[str, Any]:
    """Our kernel and its peers on one shape; the mask leaves each sequence half to all of its keys."""
    from attnpress.config import AttentionSpec
    from attnpress.core.call import AttentionCall, Scales
    from attnpress.kernels import gpu, ops

    device, torch_seed = gpu.device(), torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, length, HEADS, DIM, generator=torch_seed).transpose(1, 2).to(device, torch.bfloat16)
        for _ in range(3)
    )
    lengths = torch.randint(length // 2, length + 1, (batch, 1, 1, 1), generator=torch_seed)
    valid = (torch.arange(length) < lengths).to(device)
    scales = Scales(*(_scale(x) for x in (query, key, value)))
    cutoff, spec, scaling = torch.full((HEADS,), LIMIT, device=device), AttentionSpec(sparsity=SPARSITY), DIM**-0.5

    call = AttentionCall(query, key, value, valid, scales, cutoff, spec, scaling)

    def ours() -> Tensor:
        return ops.attention(call, backend="gpu")

    sides: dict[str, Run] = {"ours": ours, "sdpa": lambda: F.scaled_dot_product_attention(query, key, value, valid)}
    if device.type == "cuda":
        sides |= _unmasked(query, key, value)
    with torch.no_grad():
        times = in_turns(sides, rounds, calls)
        peaks = {name: peak_megabytes(sides[name]) for name in ("ours", "sdpa")}
        error = (ours() - sides["sdpa"]().float()).square().mean().sqrt()
    speedup = times["sdpa"] / times["ours"]
    return {
        "seq_len": length, "batch": batch, "kept": _kept(query, key, valid), "milliseconds": times,
        "peak_megabytes": peaks, "speedup": round(speedup, 3), "met": speedup >= BARS["inference"],
        "off_dense": round(float(error), 5),
    }  # fmt: skip


def tiles(length: int, batch: int, rounds: int, calls: int) -> dict[str, float]:
    """Milliseconds of our kernel by tiles, to choose those of `launch` by."""
    from attnpress.kernels.triton import launch

    usual = launch._tiles
    found = {}
    try:
        for sizes in TILES:
            launch._tiles = lambda rows, dim, sizes=sizes: launch.Tiles(*sizes)
            found[" x ".join(map(str, sizes))] = inference(length, batch, rounds, calls)["milliseconds"]["ours"]
    finally:
        launch._tiles = usual
    return found


def _unmasked(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Run]:
    """Peers that take no mask, and so do more: they attend to padding."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value)

    sides: dict[str, Run] = {"sdpa_flash_without_mask": flash}
    if importlib.util.find_spec("sageattention") is not None:
        sage: Any = importlib.import_module("sageattention")
        q, k, v = (x.contiguous() for x in (query, key, value))
        sides["sage_without_mask"] = lambda: sage.sageattn(q, k, v, tensor_layout="HND", is_causal=False)
    return sides


def _scale(x: Tensor) -> Tensor:
    return (x.float().abs().amax((0, 2, 3), keepdim=True) / 127).clamp(min=2.0**-40)


def _kept(query: Tensor, key: Tensor, valid: Tensor) -> float:
    """Share of the valid pairs of the first head that the rule keeps, by float scores."""
    scores = (query[:1, :1].float() @ key[:1, :1].float().mT * DIM**-0.5).masked_fill(~valid[:1], -torch.inf)
    return round(
        float((scores >= scores.amax(-1, keepdim=True) - LIMIT).sum() / (valid[:1].sum() * scores.shape[2])), 4
    )


def training(length: int, batch: int, rounds: int, *, tiny: bool) -> dict[str, Any]:
    """Steps of each kind in turns, then the peak memory of one step of each."""
    from attnpress.core import fake_quantize

    eager = fake_quantize.code_pairs
    compiled = torch.compile(eager, backend="eager" if tiny else "inductor")
    dense, ours = _step(None, length, batch, tiny=tiny), _step(SPARSITY, length, batch, tiny=tiny)

    def with_compiled() -> None:
        fake_quantize.code_pairs = compiled
        try:
            ours()
        finally:
            fake_quantize.code_pairs = eager

    sides: dict[str, Run] = {"dense": dense, "compressing": ours, "compressing, chain compiled": with_compiled}
    times = in_turns(sides, rounds, 1)
    peaks = {name: peak_megabytes(run) for name, run in sides.items()}
    ratios = {name: round(times[name] / times["dense"], 3) for name in times}
    found: dict[str, Any] = {"seq_len": length, "batch": batch, "milliseconds": times, "of_dense": ratios}
    found |= {"peak_megabytes": peaks, "met": ratios["compressing"] <= BARS["step"]}
    if peaks["dense"]:
        found["peak_of_dense"] = {name: round((peak or 0.0) / peaks["dense"], 3) for name, peak in peaks.items()}
        found["met"] &= found["peak_of_dense"]["compressing"] <= BARS["peak"]
    return found | {"chain_compiled_has_the_same_codes": _same_codes(eager, compiled, length)}


def _same_codes(eager: Any, compiled: Any, length: int) -> bool:
    """Whether the compiled chain gives the P codes of the contract; a compiler may fuse and approximate."""
    from attnpress.config import AttentionSpec

    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-127, 128, (2, HEADS, length, DIM), generator=draw).float().to(device) for _ in range(2))
    alpha = torch.full((1, 1, 1, 1), 3e-4, device=device)
    rest = (None, None, alpha, torch.full((HEADS,), LIMIT, device=device), AttentionSpec(sparsity=SPARSITY))
    return bool(torch.equal(eager(q, k, *rest).codes, compiled(q, k, *rest).codes))


def _step(sparsity: float | None, length: int, batch: int, *, tiny: bool) -> Run:
    """A training step with AdamW; compressing ones watch every eighth row and refit, as the driver does."""
    from transformers import BertConfig, BertForSequenceClassification

    from attnpress.config import AttentionSpec
    from attnpress.models.attention import HISTOGRAM_DECAY, ROW_STRIDE
    from attnpress.models.binding import attentions, bind

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 1} if tiny else {"hidden_size": 384, "num_hidden_layers": 6}
    config = BertConfig(**sizes, num_attention_heads=HEADS, intermediate_size=4 * sizes["hidden_size"])
    model = BertForSequenceClassification(config).to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(1000, 30000, (batch, length), device=model.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    modules = []
    if sparsity is not None:
        bind(model, AttentionSpec(sparsity=sparsity))
        modules = list(attentions(model).values())
        for module in modules:
            module.set_scales({name: torch.tensor(4 / 127) for name in ("q", "k", "v")})
            module.histogram += 1.0
            module.set_sparsity(sparsity)
    count = iter(range(10**9))

    def step() -> None:
        number = next(count)
        for module in modules:
            module.set_sparsity(module.spec.sparsity)
            module.rows = slice(number % ROW_STRIDE, None, ROW_STRIDE)
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for module in modules:
            module.rows = None
            module.take_seen(HISTOGRAM_DECAY)

    return step


def main() -> int:
    """Measure, print, and write JSON if asked; 1 if the integers differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    options = parser.parse_args()
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("torch finds no NVIDIA GPU here; --tiny tries the script without one")
    sizes = ({16: 1}, {16: 2}, 1, 1) if options.tiny else (INFERENCE, TRAINING, 20, 10)
    lengths, steps, rounds, calls = sizes
    from attnpress.benchmark.machine import provenance  # now: Triton asks for its interpreter when it is imported
    from attnpress.files import write_json

    packages = [name for name in ("transformers", "triton", "sageattention") if importlib.util.find_spec(name)]
    found = {**provenance(*packages), "command": " ".join(["python", *sys.argv]), "tiny": options.tiny}
    parts: dict[str, Run] = {
        "inference": lambda: [inference(length, batch, rounds, calls) for length, batch in lengths.items()],
        "tiles": lambda: tiles(*list(lengths.items())[len(lengths) // 2], rounds, calls),
        "training": lambda: [training(length, batch, rounds, tiny=options.tiny) for length, batch in steps.items()],
        "exactness": lambda: exactness(tiny=options.tiny),
    }
    for name in options.only:  # what was found is written after each
        found[name] = parts[name]()
        print(json.dumps({name: found[name]}, indent=1), flush=True)
        if options.json is not None:
            write_json(options.json, found)
    return 0 if found.get("exactness", {"met": True})["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
