"""bench, of whole models: a deployed model beside the stock one, with the share of attention that bounds the gain."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpress.benchmark.attention import (
    BenchmarkError,
    Comparison,
    check_counts,
    check_peers,
    check_sparsity,
    compared,
    held,
)
from attnpress.benchmark.lengths import HISTOGRAMS, ragged_lengths
from attnpress.benchmark.machine import peak_megabytes, provenance
from attnpress.benchmark.turns import Prepared, Run, Side, in_turns
from attnpress.calibration import REFITS, calibrate, outputs, watching
from attnpress.config import AttentionSpec
from attnpress.deployment import Linear, deploy
from attnpress.kernels import cpu, ops
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import attentions, bind
from attnpress.models.stock import STOCK, attention_seconds, longest_input, make_stock

PEERS = ("sdpa", "eager")
SECONDS = 4.0
SHARE_CALLS = 3
CALIBRATION_TOKENS = 512
"""Scales are taken from this much of the input: calibration holds S x S matrices. Thresholds see all of it."""
ROWS = 256
"""Query rows of each head that thresholds are fitted to, evenly spaced over the input."""


@dataclass(frozen=True, kw_only=True)
class ModelTiming(Comparison):
    """A comparison of one forward pass of whole models; inputs are random tokens.

    Attributes:
        seq_len: tokens of the longest row.
        sparsity: of P, over all layers.
        ragged: the task whose lengths the rows have, padded to the longest; None where no row has padding.
        linear: "float" (float32 but for attention), or "int8" for our linear layers too, all of them, without padding.
        ours_attention, peer_attention: share of the forward pass that attention takes, measured in passes of their own.
        ceiling: 1 / (1 - peer_attention): the ratio that attention in no time would give.
        ours_peak_mb, peer_peak_mb: largest memory of the side's whole process in a forward pass, libraries included;
            0 where the system does not tell.
    """

    model: str
    ours_attention: float
    peer_attention: float
    ceiling: float
    ragged: str | None
    linear: Linear
    ours_peak_mb: float
    peer_peak_mb: float


def bench_models(
    models: Iterable[str], seq_lens: Iterable[int], *, sparsity: float = 0.95, batch: int = 1, threads: int = 1,
    peers: Iterable[str] = PEERS, seconds: float = SECONDS, linear: Linear = "float", ragged: Iterable[str] = (),
) -> list[ModelTiming]:  # fmt: skip
    """Time whole models, deployed against stock.

    Args:
        models: of `models.stock.STOCK`; random weights where no package carries trained ones.
        seq_lens: tokens; each model is timed at each length, against each peer.
        sparsity: what thresholds are fitted to.
        batch, threads: of each side.
        peers: of PEERS.
        seconds: how long each side is timed, at least seven calls.
        linear: of ours; see `ModelTiming`.
        ragged: tasks of `lengths.HISTOGRAMS`: each model is also timed on a batch with its lengths.

    Raises:
        BenchmarkError: an unknown model, peer or task; a number below 1; a sparsity outside [0, 1); a length that a
            model has no positions for.
        BackendUnavailableError: the kernel is not built.
        SideError: a side failed, for instance because a package that carries weights is not installed.
    """
    names, chosen, tasks = list(peers), list(models), list(ragged)
    if wrong := [task for task in tasks if task not in HISTOGRAMS]:
        raise BenchmarkError(f"no lengths of {', '.join(wrong)!r}; use some of {', '.join(HISTOGRAMS)}")
    lengths = [*seq_lens, *(max(ragged_lengths(task, batch)) for task in tasks)]
    unknown = [name for name in chosen if name not in STOCK]
    if unknown or not chosen:
        raise BenchmarkError(f"no model called {', '.join(unknown)!r}; use some of {', '.join(STOCK)}")
    check_peers(names, PEERS)
    check_counts(lengths=lengths, threads=[threads], batch=[batch])
    check_sparsity(sparsity)
    cpu.load()
    sources = [None] * (len(lengths) - len(tasks)) + tasks
    cases = [
        {"model": name, "length": length, "batch": batch, "sparsity": sparsity, "threads": threads, "linear": linear,
         "ragged": source}
        for name in chosen for length, source in zip(lengths, sources, strict=True)
    ]  # fmt: skip
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name, held())) for name in ("ours", *dict.fromkeys(names))]
        return [timing for case in cases for timing in _timings(case, sides, names, seconds)]


def _timings(
    case: dict[str, Any], sides: Sequence[Side], peers: Sequence[str], seconds: float
) -> Iterator[ModelTiming]:
    facts = {side.name: side.prepare(f"{__name__}:prepare", name=side.name, **case) for side in sides}
    times = in_turns(sides, seconds)
    for peer in peers:
        share = facts[peer]["attention"]
        yield ModelTiming(
            model=case["model"], seq_len=case["length"], batch=case["batch"], threads=case["threads"],
            sparsity=round(facts["ours"]["sparsity"], 4), ragged=case["ragged"], linear=case["linear"],
            **compared(times, peer), ours_attention=facts["ours"]["attention"], peer_attention=share,
            ceiling=1 / (1 - share), ours_peak_mb=facts["ours"]["peak_mb"], peer_peak_mb=facts[peer]["peak_mb"],
            provenance={**provenance("transformers"), "peer": {"instructions": facts[peer]["instructions"]}},
        )  # fmt: skip


def prepare(
    name: str, model: str, length: int, batch: int, sparsity: float, threads: int, linear: Linear = "float",
    ragged: str | None = None,
) -> Prepared:  # fmt: skip
    """A side by its name, in its own process: a peer of `PEERS`, or "ours"."""
    torch.set_num_threads(threads)
    stock = make_stock(model, "eager" if name == "ours" else name)
    if length > longest_input(stock):
        raise BenchmarkError(f"{model} has positions for {longest_input(stock)} tokens, not {length}")
    inputs = _tokens(stock.config.vocab_size, ragged_lengths(ragged, batch) if ragged else [length] * batch)
    facts: dict[str, Any] = {"instructions": torch.backends.cpu.get_cpu_capability()}
    if name == "ours":
        facts["sparsity"] = _deploy(stock, inputs, sparsity)
        if linear == "int8":
            deploy(stock, "cpu", linear="int8")
    run = _forward(stock, inputs)
    facts["peak_mb"] = peak_megabytes(run)
    with attention_seconds(stock) as seconds:
        facts["attention"] = _share(run, seconds)
    return Prepared(run, facts)


def _tokens(vocabulary: int, lengths: Sequence[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.arange(max(lengths)) < torch.tensor(lengths).view(-1, 1)
    ids = torch.randint(1, vocabulary, real.shape, generator=generator)
    return {"input_ids": ids * real, "attention_mask": real.long()}


def _deploy(model: Any, inputs: dict[str, Tensor], sparsity: float) -> float:
    """Compress and deploy; returns the sparsity over the valid pairs of all layers."""
    shown = {name: tokens[:, :CALIBRATION_TOKENS] for name, tokens in inputs.items()}
    calibrate(bind(model, AttentionSpec(sparsity=sparsity)), [shown])
    deploy(model, "cpu")
    modules, stride = list(attentions(model).values()), max(1, inputs["input_ids"].shape[1] // ROWS)
    for _ in range(REFITS):
        with watching(modules, slice(None, None, stride)):
            _pass(model, inputs)
        for module in modules:
            module.take_seen(0.0)
            module.set_sparsity(sparsity)
    counted = [_counting(module) for module in modules]
    _pass(model, inputs)
    deploy(model, "cpu")
    calls = [call for calls in counted for call in calls]
    return 1 - sum(survivors for survivors, _ in calls) / sum(pairs for _, pairs in calls)


def _pass(model: Any, inputs: dict[str, Tensor]) -> None:
    for _ in outputs(model, [inputs]):
        pass


def _counting(module: CompressedAttention) -> list[tuple[int, int]]:
    """Have the module count on the kernel; the list gets survivors and valid pairs of each call."""
    found: list[tuple[int, int]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, *rest: Any) -> Tensor:
        scales, cutoff, spec, scaling, _ = rest
        integers = ops.compiled_integers(query, key, value, valid, scales, cutoff, spec, scaling)
        codes = integers["p_codes"]
        counted = torch.tensor(True) if valid is None else valid & valid.mT  # not what padding attends to
        found.append((int((codes * counted).count_nonzero()), int(counted.expand(codes.shape).count_nonzero())))
        return integers["output"]

    module.attend = attend
    return found


def _forward(model: Any, inputs: dict[str, Tensor]) -> Run:
    def run() -> None:
        with torch.inference_mode():
            model(**inputs)

    return run


def _share(run: Run, seconds: list[float]) -> float:
    """Median share of the calls whose times appear in `seconds`, after one that fills caches."""
    shares = []
    for _ in range(1 + SHARE_CALLS):
        seconds.clear()
        begin = time.perf_counter()
        run()
        shares.append(sum(seconds) / (time.perf_counter() - begin))
    return statistics.median(shares[1:])
