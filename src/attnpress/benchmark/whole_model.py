"""bench of whole models: a deployed model against the stock one, with the share of attention that bounds the gain."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attnpress.benchmark.attention import (
    BenchmarkError,
    Comparison,
    check_counts,
    check_held,
    check_peers,
    check_sparsity,
    check_threads,
    compared,
    held,
    require,
)
from attnpress.benchmark.lengths import HISTOGRAMS, ragged_lengths
from attnpress.benchmark.machine import cores, instructions, peak_megabytes, provenance, resident_megabytes
from attnpress.benchmark.runtimes import RUNTIMES
from attnpress.benchmark.stock import STOCK, attention_seconds, load_stock, make_stock
from attnpress.benchmark.turns import Prepared, Run, Side, in_turns
from attnpress.config import AttentionSpec
from attnpress.core.call import Attend, AttentionCall
from attnpress.deployment.attention import Linear, deploy
from attnpress.deployment.linear import linear_layers
from attnpress.kernels import cpu, ops
from attnpress.models.binding import attending, attentions, bind
from attnpress.models.linear import Int8Linear
from attnpress.models.loading import longest_input
from attnpress.models.outputs import outputs
from attnpress.training.calibration import REFITS, calibrate, watching

TORCH = {"sdpa": ("sdpa", torch.float32), "sdpa-bf16": ("sdpa", torch.bfloat16), "eager": ("eager", torch.float32)}
"""Transformers peers: attention implementation and dtype."""
PEERS = (*TORCH, *RUNTIMES)
USUAL_PEERS = ("sdpa", "eager")
SECONDS = 4.0
INPUTS = "inputs.safetensors"
EXPECTED = "expected.safetensors"
TOLD = ("peak_mb", "model_mb", "file_mb", "attention", "difference")
FIELDS = (*TOLD, "unpruned_difference", "sparsity", "linear_layers", "activation_bits", "target")
"""Facts of a side with their own fields in `ModelTiming`; the former exist for each side."""
SHARE_CALLS = 3
CALIBRATION_TOKENS = 512
"""Scales are calibrated on this many tokens, since calibration needs S x S matrices; thresholds on all."""
ROWS = 256
"""Evenly spaced query rows per head for fitting thresholds."""


@dataclass(frozen=True, kw_only=True)
class ModelTiming(Comparison):
    """A comparison of one forward pass of whole models; inputs are random tokens.

    Attributes:
        seq_len: tokens of the longest row.
        sparsity: of P, over all layers.
        ragged: the task whose lengths the rows have, padded to the longest; None without padding.
        linear: our linear layers during timing: "float", or "int8" (then without padding).
        linear_layers: number of our layers by implementation; see `attnpress.deployment.linear.LinearLayers`.
        activation_bits: widths of the input codes of our int8 layers, without duplicates; empty if there are none.
        ours_attention, peer_attention: attention's share of the forward pass, measured in separate passes.
        ceiling: 1 / (1 - peer_attention), the ratio if attention took no time. None if the peer's runtime does not
            report its attention.
        ours_peak_mb, peer_peak_mb: largest resident memory of the side's whole process in a forward pass, including
            libraries; 0 if the system does not report it.
        ours_model_mb, peer_model_mb: the same, minus the memory before the model was loaded: weights, activations, and
            libraries that only the model needs. The model is created in another process.
        ours_file_mb, peer_file_mb: size of the files that the side loads.
        ours_difference, peer_difference: relative distance of the last hidden state from that of the same model in
            float32 without pruning, on real tokens. Ours includes the effect of pruning on weights that were never
            trained with it.
        ours_unpruned_difference: the same for our side without pruning: the effect of quantization only, as for the
            peers.
    """

    model: str
    ours_attention: float
    peer_attention: float | None
    ceiling: float | None
    ragged: str | None
    linear: Linear
    linear_layers: dict[str, int]
    activation_bits: list[int]
    ours_difference: float
    ours_unpruned_difference: float
    peer_difference: float
    ours_peak_mb: float
    peer_peak_mb: float
    ours_model_mb: float
    peer_model_mb: float
    ours_file_mb: float
    peer_file_mb: float


def bench_models(
    models: Iterable[str],
    seq_lens: Iterable[int],
    *,
    sparsity: float = 0.95,
    batch: int = 1,
    threads: int = 1,
    peers: Iterable[str] = USUAL_PEERS,
    seconds: float = SECONDS,
    linear: Linear = "float",
    ragged: Iterable[str] = (),
) -> list[ModelTiming]:
    """Time whole models, deployed against stock.

    Args:
        models: of `models.stock.STOCK`; random weights if no package provides trained ones.
        seq_lens: tokens; each model is timed at each length, against each peer.
        sparsity: target of the thresholds.
        batch, threads: of each side.
        peers: of PEERS.
        seconds: timing of each side, at least seven calls.
        linear: of our side; "int8" converts all linear layers of the encoder to 8 bits.
        ragged: tasks of `lengths.HISTOGRAMS`; each model is also timed on a batch with their lengths.

    Raises:
        BenchmarkError: an unknown model, peer or task; a number out of its range; a length beyond a model's positions;
            int8 was requested but linear layers stay in float; or a peer cannot be restricted to ATTNPRESS_CPU_TARGET.
        BackendUnavailableError: the kernel is not built.
        SideError: a side failed, for instance because a package with weights is not installed.
    """
    names, chosen, tasks = list(peers), list(models), list(ragged)
    if wrong := [task for task in tasks if task not in HISTOGRAMS]:
        raise BenchmarkError(f"no lengths of {', '.join(wrong)!r}; use some of {', '.join(HISTOGRAMS)}")
    check_counts(batch=[batch])
    lengths = [*seq_lens, *(max(ragged_lengths(task, batch)) for task in tasks)]
    unknown = [name for name in chosen if name not in STOCK]
    if unknown or not chosen:
        raise BenchmarkError(f"no model called {', '.join(unknown)!r}; use some of {', '.join(STOCK)}")
    check_peers(names, PEERS)
    for name in names:
        if name in RUNTIMES:
            require(name, RUNTIMES[name].extra, *RUNTIMES[name].packages)
    check_counts(lengths=lengths, threads=[threads])
    check_threads(threads)
    check_sparsity(sparsity)
    check_held(names)
    sources = [None] * (len(lengths) - len(tasks)) + tasks
    cases = [
        {
            "model": name,
            "length": length,
            "batch": batch,
            "sparsity": sparsity,
            "threads": threads,
            "linear": linear,
            "ragged": source,
        }
        for name in chosen
        for length, source in zip(lengths, sources, strict=True)
    ]
    return [timing for case in cases for timing in _timings(case, names, seconds)]


def _timings(case: dict[str, Any], peers: Sequence[str], seconds: float) -> Iterator[ModelTiming]:
    """Each case uses new processes, so that memory of an earlier model does not count."""
    names, shape = ("ours", *dict.fromkeys(peers)), {key: case[key] for key in ("model", "length", "batch", "ragged")}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with ThreadPoolExecutor(cores()) as pool:  # each waits for its own process; none of them is timed
            built = pool.map(lambda name: _build(name, f"{folder}/{name}", shape, case), names)
            facts: dict[str, dict[str, Any]] = dict(zip(names, built, strict=True))
        sides = [stack.enter_context(Side(name, held())) for name in names]
        for side in sides:
            place = {"name": side.name, "folder": f"{folder}/{side.name}", "threads": case["threads"]}
            facts[side.name] |= side.prepare(f"{__name__}:prepare", **place)
        times = in_turns(sides, seconds)
    for peer in peers:
        yield _timing(case, peer, times, facts)


def _build(name: str, folder: str, shape: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    with Side(name, held()) as side:
        extra = {key: case[key] for key in ("sparsity", "linear")}
        return side.prepare(f"{__name__}:build", name=name, folder=folder, **shape, **extra)


def _timing(
    case: dict[str, Any], peer: str, times: Mapping[str, Sequence[Sequence[float]]], facts: dict[str, dict[str, Any]]
) -> ModelTiming:
    ours, theirs = facts["ours"], facts[peer]
    share, layers = theirs["attention"], ours["linear_layers"]
    return ModelTiming(
        model=case["model"],
        seq_len=case["length"],
        batch=case["batch"],
        threads=case["threads"],
        sparsity=round(ours["sparsity"], 4),
        ragged=case["ragged"],
        linear="int8" if layers["int8"] else "float",
        linear_layers=layers,
        activation_bits=ours["activation_bits"],
        **compared(times, peer, ours["target"]),
        ceiling=None if share is None else 1 / (1 - share),
        ours_unpruned_difference=ours["unpruned_difference"],
        **{f"ours_{key}": ours[key] for key in TOLD},
        **{f"peer_{key}": theirs[key] for key in TOLD},
        provenance={**provenance("transformers", *_packages(peer)), **_surroundings(ours=ours, peer=theirs)},
    )


def _surroundings(**sides: dict[str, Any]) -> dict[str, Any]:
    """Instructions, threads and precision of each side that have no field."""
    return {side: {key: value for key, value in facts.items() if key not in FIELDS} for side, facts in sides.items()}


def _packages(peer: str) -> tuple[str, ...]:
    return RUNTIMES[peer].packages if peer in RUNTIMES else ()


def build(
    name: str,
    folder: str,
    model: str,
    length: int,
    batch: int,
    sparsity: float,
    linear: Linear = "float",
    ragged: str | None = None,
) -> Prepared:
    """Write the files that a side loads, in a process that is not timed."""
    stock, place = make_stock(model, "eager" if name == "ours" else "sdpa"), Path(folder)
    longest = longest_input(stock)
    if longest is not None and length > longest:
        raise BenchmarkError(f"{model} has positions for {longest} tokens, not {length}")
    inputs = _tokens(stock.config.vocab_size, ragged_lengths(ragged, batch) if ragged else [length] * batch)
    place.mkdir(parents=True)
    facts: dict[str, Any] = {}
    expected = _hidden(_forward(stock, inputs)())
    if name in RUNTIMES:
        RUNTIMES[name].write(stock, inputs, place / RUNTIMES[name].file)
    else:
        if name == "ours":
            facts["sparsity"] = _deploy(stock, inputs, sparsity)
            if linear == "int8":
                _put_into_int8(stock, model)
            facts["unpruned_difference"] = _difference(_unpruned(stock, inputs, sparsity), expected, inputs)
        stock.save_pretrained(place)
    facts["file_mb"] = sum(file.stat().st_size for file in place.iterdir()) / 1e6
    save_file(inputs, place / INPUTS)
    save_file({"last_hidden_state": expected}, place / EXPECTED)
    return Prepared(lambda: None, facts)


def prepare(name: str, folder: str, threads: int) -> Prepared:
    """Prepare a side by name in its own process, from the files of `build`: a peer of `PEERS`, or "ours"."""
    torch.set_num_threads(threads)
    place, before = Path(folder), resident_megabytes()
    inputs = load_file(place / INPUTS)
    facts: dict[str, Any] = {"instructions": instructions(), "attention": None}
    if name in RUNTIMES:
        served = RUNTIMES[name].serve(place / RUNTIMES[name].file, inputs, threads)
        run = served.run
        facts |= served.facts
    else:
        stock = deploy(load_stock(place), "cpu") if name == "ours" else load_stock(place, *TORCH[name])
        run = _forward(stock, inputs)
        facts["threads"] = torch.get_num_threads()
        if name == "ours":
            facts |= {"target": cpu.active_target(), **_layers(stock)}
    facts["peak_mb"] = peak_megabytes(run)
    facts["model_mb"] = facts["peak_mb"] - before
    facts["difference"] = _difference(_hidden(run()), load_file(place / EXPECTED)["last_hidden_state"], inputs)
    if name not in RUNTIMES:
        with attention_seconds(stock) as seconds:
            facts["attention"] = _share(run, seconds)
    return Prepared(run, facts)


def _put_into_int8(model: Any, name: str) -> None:
    """Deploy with int8 linear layers, or raise the reason as an error; warnings would be lost in this process."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        deploy(model, "cpu", linear="int8")
    if not linear_layers(model).int8:
        raise BenchmarkError(f"{name} has no int8 linear layers: {'; '.join(str(each.message) for each in said)}")


def _layers(model: nn.Module) -> dict[str, Any]:
    """Implementations of the linear layers, and the bits of the input codes of int8 ones."""
    bits = {module.bits for module in model.modules() if isinstance(module, Int8Linear)}
    return {"linear_layers": asdict(linear_layers(model)), "activation_bits": sorted(bits)}


def _hidden(found: Any) -> Tensor:
    """The last hidden state of a model's output, from any library: float32 [B, S, H]."""
    hidden = getattr(found, "last_hidden_state", None)
    return torch.as_tensor(found[0] if hidden is None else hidden).float().contiguous()


def _difference(found: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, on real tokens."""
    real = inputs["attention_mask"].bool()
    exact = expected[real].double()
    return float((found[real].double() - exact).norm() / exact.norm())


def _unpruned(model: Any, inputs: dict[str, Tensor], sparsity: float) -> Tensor:
    """Output of a deployed model without pruning; pruning is restored afterwards."""
    modules = list(attentions(model).values())
    for module in modules:
        module.set_sparsity(0.0)
    found = _hidden(_forward(model, inputs)())
    for module in modules:
        module.set_sparsity(sparsity)
    return found


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
    calls: list[tuple[int, int]] = []
    with attending(dict.fromkeys(modules, _counting(calls))):
        _pass(model, inputs)
    return 1 - sum(survivors for survivors, _ in calls) / sum(pairs for _, pairs in calls)


def _pass(model: Any, inputs: dict[str, Tensor]) -> None:
    for _ in outputs(model, [inputs]):
        pass


def _counting(found: list[tuple[int, int]]) -> Attend:
    """The kernel with counts; survivors and valid pairs of each call are appended to the list."""

    def attend(call: AttentionCall) -> Tensor:
        integers, valid = ops.compiled_integers(call), call.valid
        codes = integers["p_codes"]
        counted = torch.tensor(True) if valid is None else valid & valid.mT  # without rows of padding
        found.append((int((codes * counted).count_nonzero()), int(counted.expand(codes.shape).count_nonzero())))
        return integers["output"]

    return attend


def _forward(model: Any, inputs: dict[str, Tensor]) -> Run:
    def run() -> Any:
        with torch.inference_mode():
            return model(**inputs)

    return run


def _share(run: Run, seconds: list[float]) -> float:
    """Median share of the calls whose times are in `seconds`, after a warm-up call."""
    shares = []
    for _ in range(1 + SHARE_CALLS):
        seconds.clear()
        begin = time.perf_counter()
        run()
        shares.append(sum(seconds) / (time.perf_counter() - begin))
    return statistics.median(shares[1:])
