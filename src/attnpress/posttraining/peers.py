"""bench --encode: an encoder in attnpress's default form beside what other runtimes make of it, on texts of its user.

Peers run the graph of the same Transformers model in int8, by the quantizers behind sentence-transformers' backends:
ONNX Runtime with dynamic ranges, OpenVINO with ranges from a batch of eight calibration texts. Tokenizing,
batching, pooling and normalizing are those of the dense model on every side.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attnpress.benchmark.attention import BenchmarkError, Comparison, check_counts, check_peers, check_threads, compared
from attnpress.benchmark.attention import require as require_packages
from attnpress.benchmark.machine import instructions, peak_megabytes, provenance, resident_megabytes
from attnpress.benchmark.runtimes import RUNTIMES
from attnpress.benchmark.turns import Prepared, Side, in_turns
from attnpress.deployment import deploy
from attnpress.kernels import cpu
from attnpress.models.encoders import Encoder, Rows, load_encoder, saved_encoder
from attnpress.models.loading import quiet
from attnpress.models.pipeline import called_with_batches, is_pipeline
from attnpress.models.served import Served
from attnpress.posttraining.agreement import agreement
from attnpress.posttraining.forms import make
from attnpress.posttraining.measure import megabytes
from attnpress.posttraining.run import CALIBRATION, USUAL
from attnpress.tasks.texts import read_texts

TORCH = "torch"
PEERS = (TORCH, *RUNTIMES)
OTHER_BATCH = 7
"""Another number of texts at once, with other neighbours and other padding: whose answers change by it?"""

ANSWERS = "answers.safetensors"


@dataclass(frozen=True, kw_only=True)
class EncodeTiming(Comparison):
    """One peer's times and answers beside ours, for the same texts.

    Attributes:
        model, texts: what is timed, and how many texts a call has; `seq_len` is their median length in tokens.
        ours_agreement, peer_agreement: with the float32 model, headline first; see `agreement`.
        ours_changed, peer_changed: share of texts whose answer is other bits in batches of OTHER_BATCH.
        ours_model_mb, peer_model_mb: memory for the model and a call.
        ours_file_mb, peer_file_mb: of its folder.
    """

    model: str
    texts: int
    ours_agreement: dict[str, float]
    peer_agreement: dict[str, float]
    ours_changed: float
    peer_changed: float
    ours_model_mb: float
    peer_model_mb: float
    ours_file_mb: float
    peer_file_mb: float


def bench_encode(
    model: str,
    texts: str,
    columns: Sequence[str] = (),
    *,
    peers: Sequence[str] = PEERS,
    threads: int = 1,
    batch: int = 32,
    count: int = 64,
    seconds: float = 20.0,
) -> list[EncodeTiming]:
    """Time an encoder in attnpress's default form against its peers, and compare all answers with float32's.

    Args:
        model, texts, columns: as `quantize` takes them.
        peers: of PEERS.
        threads, batch: of each side.
        count: texts of a call that is timed; others serve for calibration.
        seconds: for which each side is timed.

    Raises:
        BenchmarkError: an unknown peer, or one that is not installed; more threads than cores; too few texts.
        ModelError, TaskError: as `quantize` raises them.
        SideError: a side failed.
    """
    names = list(dict.fromkeys(peers))
    check_peers(names, PEERS)
    for name in names:
        if name in RUNTIMES:
            require_packages(name, RUNTIMES[name].extra, *RUNTIMES[name].packages)
    check_threads(threads)
    check_counts(batch=[batch], count=[count])
    rows = read_texts(texts, columns).rows
    if len(rows) < CALIBRATION + count:
        raise BenchmarkError(f"--texts {texts}: {len(rows)} texts; {CALIBRATION} for calibration and {count} to time")
    calibration, timed = rows[:CALIBRATION], rows[CALIBRATION : CALIBRATION + count]
    dense = load_encoder(model)
    lengths = sorted(dense.lengths(timed))
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (place / "rows.json").write_text(json.dumps(timed), encoding="utf-8")
        sides = []
        facts: dict[str, dict[str, Any]] = {}
        for name in ("ours", *names):
            written = build(name, dense, calibration, place / name)
            side = stack.enter_context(Side(name))
            asked = {"folder": str(place / name), "rows": str(place / "rows.json"), "threads": threads, "batch": batch}
            facts[name] = written | side.prepare(f"{__name__}:prepare", name=name, **asked)
            sides.append(side)
        times = in_turns(sides, seconds, 5)
        exact = dense.answer(timed, batch)
        for name in facts:
            answers = load_file(place / name / ANSWERS)["answers"]
            facts[name]["agreement"] = agreement(dense.kind, exact, answers)
    shared = {"model": model, "texts": count, "batch": batch, "threads": threads}
    shared |= {"seq_len": lengths[len(lengths) // 2], "sparsity": facts["ours"]["sparsity"]}
    return [_timing(shared, name, times, facts) for name in names]


def _timing(
    shared: dict[str, Any], peer: str, times: Mapping[str, Sequence[Sequence[float]]], facts: dict[str, dict[str, Any]]
) -> EncodeTiming:
    told = {
        f"{side}_{key}": facts[name][key]
        for side, name in (("ours", "ours"), ("peer", peer))
        for key in ("agreement", "changed", "model_mb", "file_mb")
    }
    packages = RUNTIMES[peer].packages if peer in RUNTIMES else ()
    said = {side: facts[name]["said"] for side, name in (("ours", "ours"), ("peer", peer))}
    where = {**provenance("transformers", *packages), **said, "form": asdict(USUAL)}
    return EncodeTiming(**shared, **compared(times, peer, facts["ours"]["said"]["target"]), **told, provenance=where)


def build(name: str, dense: Encoder, calibration: Rows, folder: Path) -> dict[str, Any]:
    """Write what a side loads: a model that `Encoder.save` saved, and the graph of a runtime beside it.

    Returns:
        Of ours, its sparsity.
    """
    made = make(dense, USUAL, calibration) if name == "ours" else None
    (dense if made is None else made.encoder).save(folder)
    if name in RUNTIMES:
        longest = max(dense.batches(calibration, 8), key=lambda batch: batch["input_ids"].shape[1])
        RUNTIMES[name].write(called_with_batches(dense.model), dict(longest), folder / RUNTIMES[name].file)
        (folder / "model.safetensors").rename(folder / "float.safetensors")
    return {} if made is None else {"sparsity": made.survivors.sparsity}


def prepare(name: str, folder: str, rows: str, threads: int, batch: int) -> Prepared:
    """A side by its name, in its own process."""
    quiet()
    torch.set_num_threads(threads)
    texts, place = json.loads(Path(rows).read_text(encoding="utf-8")), Path(folder)
    said: dict[str, Any] = {"instructions": instructions()}
    float_weights = place / "float.safetensors"
    if name in RUNTIMES:  # loaded for its tokenizer and pooling, then without its weights
        float_weights.rename(place / "model.safetensors")
    before = resident_megabytes()
    encoder = saved_encoder(place)
    if name == "ours":
        deploy(encoder.model, "cpu")
        said["target"] = cpu.active_target()
    elif name in RUNTIMES:
        (place / "model.safetensors").unlink()
        said |= _serve(encoder, name, place, threads)
    peak = peak_megabytes(lambda: encoder.answer(texts, batch)) - before
    answers = encoder.answer(texts, batch)
    other = encoder.answer(texts, OTHER_BATCH)
    save_file({"answers": answers.contiguous()}, place / ANSWERS)
    changed = float((answers != other).any(-1).double().mean())
    facts = {"model_mb": max(0.0, peak), "file_mb": megabytes(place), "changed": changed, "said": said}
    return Prepared(lambda: encoder.answer(texts, batch), facts)


def _serve(encoder: Encoder, name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Have a runtime compute the Transformers model of an encoder from now on; returns what it says of itself."""
    inner = called_with_batches(encoder.model)
    session = RUNTIMES[name].session(folder / RUNTIMES[name].file, threads)
    served = Served(inner, session.run)
    if is_pipeline(encoder.model):
        path = next(path for path, module in encoder.model.named_modules() if module is inner)
        encoder.model.set_submodule(path, served)
    else:
        encoder.model = served
    return dict(session.facts)
