"""bench --encode: an encoder in attnpress's default form beside what other runtimes make of it, on texts of its user.

Peers run the graph of the same Transformers model in int8, by the quantizers behind sentence-transformers' backends:
ONNX Runtime with dynamic ranges, OpenVINO with ranges from the texts that ours is calibrated on. Tokenizing,
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
from torch import Tensor

from attnpress.benchmark.attention import (
    BenchmarkError,
    Comparison,
    check_counts,
    check_held,
    check_peers,
    check_threads,
    compared,
    held,
)
from attnpress.benchmark.attention import require as require_packages
from attnpress.benchmark.machine import instructions, peak_megabytes, provenance, resident_megabytes
from attnpress.benchmark.runtimes import RUNTIMES, export
from attnpress.benchmark.turns import Prepared, Side, in_turns, paired_ratios
from attnpress.deployment import deploy
from attnpress.kernels import cpu
from attnpress.models.encoders import Encoder, Kind, Rows, load_encoder, saved_encoder
from attnpress.models.loading import quiet
from attnpress.models.pipeline import called_with_batches, is_pipeline
from attnpress.models.served import Served
from attnpress.posttraining.agreement import agreement
from attnpress.posttraining.forms import BATCH, Form, make
from attnpress.posttraining.measure import megabytes
from attnpress.posttraining.quality import Exam, exam
from attnpress.posttraining.run import CALIBRATION, USUAL
from attnpress.tasks.texts import Texts, read_texts

TORCH = "torch"
OURS = "ours"
FLOAT = "float32"
PEERS = (TORCH, *RUNTIMES)
ROUNDS = 5
OTHER_BATCHES = (1, 7)
"""Other numbers of texts at once, without padding and with other neighbours and padding: whose answers change by it?"""

TOLD = ("changed", "model_mb", "file_mb")
"""What a side says of itself that has a field for each side."""

TEXTS, ANSWERS, WEIGHTS, GRAPH = "texts.json", "answers.safetensors", "model.safetensors", "float32.onnx"


@dataclass(frozen=True)
class Quality:
    """A figure of all answers by what people know of the texts.

    Attributes:
        measure: its name.
        float32, ours, peer: of the dense model, of attnpress and of the peer, fractions.
    """

    measure: str
    float32: float
    ours: float
    peer: float


@dataclass(frozen=True, kw_only=True)
class EncodeTiming(Comparison):
    """One peer's times and answers beside ours, for the same texts.

    Attributes:
        model, texts: what is timed, and how many texts a call has; `seq_len` is their median length in tokens.
        ratios: peer over ours in each round; `ratio` is their median.
        judged: texts, or pairs for a model of pairs, of which agreement and quality are.
        ours_agreement, peer_agreement: with the float32 model, headline first; see `agreement`.
        quality: None where nothing is known of the texts.
        ours_changed, peer_changed: share of texts of a call whose answer is other bits alone or in batches of 7.
        ours_model_mb, peer_model_mb: memory for the model and a call.
        ours_file_mb, peer_file_mb: of its folder.
    """

    model: str
    texts: int
    ratios: list[float]
    judged: int
    ours_agreement: dict[str, float]
    peer_agreement: dict[str, float]
    quality: Quality | None
    ours_changed: float
    peer_changed: float
    ours_model_mb: float
    peer_model_mb: float
    ours_file_mb: float
    peer_file_mb: float


@dataclass(frozen=True)
class _Bench:
    """What every side is asked.

    Attributes:
        names: of the peers.
        place: the folder in which all sides lie.
        rows, asked: texts of a call that is timed, and the exam.
        queries: of a reranker's pairs that have no scores; see `agreement`.
    """

    names: Sequence[str]
    place: Path
    rows: Rows
    asked: Exam
    queries: Sequence[str]
    kind: Kind
    batch: int
    seconds: float


def bench_encode(
    model: str,
    texts: str,
    columns: Sequence[str] = (),
    *,
    scores: str | None = None,
    form: Form = USUAL,
    peers: Sequence[str] = PEERS,
    threads: Sequence[int] = (1,),
    batch: int = 32,
    count: int = 64,
    judged: int = 256,
    seconds: float = 10.0,
) -> list[EncodeTiming]:
    """Time an encoder in a compressed form against its peers, and compare all answers with float32's.

    Args:
        model, texts, columns: as `quantize` takes them; an embedder also takes pairs, see `exam`.
        scores: the column of the pairs' scores by people.
        form: of ours.
        peers: of PEERS.
        threads: of each side, one number after the other.
        batch: texts at once, of each side.
        count: texts of a call that is timed.
        judged: rows of the file, at most, whose answers are compared; others serve for calibration.
        seconds: for which each side is timed.

    Returns:
        For each number of threads, each peer.

    Raises:
        BenchmarkError: an unknown peer, or one that is not installed; more threads than cores; too few texts; texts
            that this kind of model does not take.
        ModelError, TaskError: as `quantize` raises them.
        SideError: a side failed.
    """
    names, numbers = list(dict.fromkeys(peers)), list(dict.fromkeys(threads))
    _check(names, numbers, batch=[batch], count=[count], judged=[judged])
    found = read_texts(texts, columns, CALIBRATION + max(count, judged), scores)
    dense = load_encoder(model)
    _check_rows(dense, found)
    calibration, asked = divided(dense.kind, found)
    if len(asked.timed) < count:
        what = "texts" if len(found.rows[0]) == 1 else "pairs"
        raise BenchmarkError(
            f"--texts {texts}: {len(found.rows)} {what}; {CALIBRATION} for calibration and {count} to time"
        )
    queries = [row[0] for row in asked.rows] if dense.kind == "reranker" and not found.scores else []
    with tempfile.TemporaryDirectory() as place:
        bench = _Bench(names, Path(place), asked.timed[:count], asked, queries, dense.kind, batch, seconds)
        built = {name: build(name, dense, calibration, bench.place / name, form) for name in (OURS, *names)}
        (bench.place / TEXTS).write_text(json.dumps({"timed": bench.rows, "judged": asked.rows}), encoding="utf-8")
        runs = {number: _run(bench, built, number, judged=number == max(numbers)) for number in numbers}
        judgement = _judgement(bench, dense)
    lengths = sorted(dense.lengths(bench.rows))
    shared = {
        "model": model, "texts": count, "batch": batch, "seq_len": lengths[len(lengths) // 2],
        "judged": len(asked.rows), "sparsity": built[OURS]["sparsity"],
    }  # fmt: skip
    return [
        _timing(shared | {"threads": number}, name, *run, judgement, form)
        for number, run in runs.items()
        for name in names
    ]


def divided(kind: Kind, found: Texts) -> tuple[Rows, Exam]:
    """Texts for calibration, and what is asked about the others."""
    calibration: Rows = found.rows[:CALIBRATION]
    if kind == "embedder":
        calibration = [(text,) for row in calibration for text in row][:CALIBRATION]
    return calibration, exam(kind, found.rows[CALIBRATION:], found.scores)


def _check(names: Sequence[str], threads: Sequence[int], **counts: Sequence[int]) -> None:
    check_peers(names, PEERS)
    for name in names:
        if name in RUNTIMES:
            require_packages(name, RUNTIMES[name].extra, *RUNTIMES[name].packages)
    check_held(names)
    check_counts(threads=threads, **counts)
    check_threads(max(threads))


def _check_rows(dense: Encoder, found: Texts) -> None:
    pairs = len(found.rows[0]) == 2
    if dense.kind == "reranker" and is_pipeline(dense.model) and not pairs:
        raise BenchmarkError("--texts: a reranker scores pairs; name two columns: --column query passage")
    if found.scores and (dense.kind == "classifier" or not pairs):
        raise BenchmarkError(
            "--scores: are those of pairs, for an embedder or a reranker; name both columns of the texts by --column, "
            "or drop --scores"
        )


def _run(
    bench: _Bench, built: Mapping[str, dict[str, Any]], threads: int, judged: bool
) -> tuple[dict[str, list[list[float]]], dict[str, dict[str, Any]]]:
    """Times and facts of all sides with so many threads; with `judged`, their answers lie in their folders then."""
    with ExitStack() as stack:
        sides, facts = [], {}
        asked = {"place": str(bench.place), "threads": threads, "batch": bench.batch, "judged": judged}
        for name in built:
            side = stack.enter_context(Side(name, held()))
            facts[name] = built[name] | side.prepare(f"{__name__}:prepare", name=name, **asked)
            sides.append(side)
        return in_turns(sides, bench.seconds, ROUNDS), facts


@dataclass(frozen=True)
class _Judgement:
    """Of one side's answers."""

    agreement: dict[str, float]
    measure: str | None
    quality: float


def _judgement(bench: _Bench, dense: Encoder) -> dict[str, _Judgement]:
    """Agreement and quality of each side, and of the dense model by the name FLOAT."""
    answers = {name: load_file(bench.place / name / ANSWERS)["answers"] for name in (OURS, *bench.names)}
    answers[FLOAT] = answers[TORCH] if TORCH in answers else dense.answer(bench.asked.rows, bench.batch)
    return {
        name: _Judgement(
            agreement(bench.kind, answers[FLOAT], given, bench.queries), bench.asked.measure, bench.asked.judge(given)
        )
        for name, given in answers.items()
    }


def _timing(
    shared: dict[str, Any],
    peer: str,
    times: Mapping[str, Sequence[Sequence[float]]],
    facts: Mapping[str, dict[str, Any]],
    judgement: Mapping[str, _Judgement],
    form: Form,
) -> EncodeTiming:
    sides = {"ours": OURS, "peer": peer}
    told = {f"{side}_{key}": facts[name][key] for side, name in sides.items() for key in TOLD}
    told |= {f"{side}_agreement": judgement[name].agreement for side, name in sides.items()}
    packages = RUNTIMES[peer].packages if peer in RUNTIMES else ()
    said = {side: facts[name]["said"] for side, name in sides.items()}
    figures = {side: judgement[name].quality for side, name in {"float32": FLOAT, **sides}.items()}
    measure = judgement[FLOAT].measure
    return EncodeTiming(
        **shared,
        **compared(times, peer, facts[OURS]["said"]["target"]),
        **told,
        ratios=paired_ratios(times[peer], times[OURS]),
        quality=Quality(measure, **figures) if measure else None,
        provenance={**provenance("transformers", *packages), **said, "form": asdict(form)},
    )


def build(name: str, dense: Encoder, calibration: Rows, folder: Path, form: Form = USUAL) -> dict[str, Any]:
    """Write what a side loads: a model that `Encoder.save` saved, and the graph of a runtime in place of its weights.

    Returns:
        The size of the folder; of ours, its sparsity too.
    """
    made = make(dense, form, calibration) if name == OURS else None
    (dense if made is None else made.encoder).save(folder)
    if name in RUNTIMES:
        batches, graph = [dict(batch) for batch in dense.batches(calibration, BATCH)], folder.parent / GRAPH
        if not graph.exists():
            export(called_with_batches(dense.model), batches[0], graph)
        RUNTIMES[name].quantize(graph, batches, folder / RUNTIMES[name].file)
        (folder / WEIGHTS).rename(_float_weights(folder))
    facts: dict[str, Any] = {"file_mb": megabytes(folder)}
    return facts if made is None else facts | {"sparsity": made.survivors.sparsity}


def _float_weights(folder: Path) -> Path:
    """Where those of a runtime's model are, which it does not need."""
    return folder.with_name(f"{folder.name}.{WEIGHTS}")


def prepare(name: str, place: str, threads: int, batch: int, judged: bool) -> Prepared:
    """A side by its name, in its own process; with `judged`, its answers to all texts go into its folder."""
    quiet()
    torch.set_num_threads(threads)
    folder = Path(place) / name
    texts: dict[str, Rows] = json.loads((Path(place) / TEXTS).read_text(encoding="utf-8"))
    said: dict[str, Any] = {"instructions": instructions()}
    before = resident_megabytes()
    encoder = _loaded(name, folder)
    if name == OURS:
        deploy(encoder.model, "cpu")
        said["target"] = cpu.active_target()
    elif name in RUNTIMES:
        said |= _serve(encoder, name, folder, threads)
    timed = texts["timed"]
    peak = peak_megabytes(lambda: encoder.answer(timed, batch)) - before
    if judged:
        save_file({"answers": encoder.answer(texts["judged"], batch).contiguous()}, folder / ANSWERS)
    facts = {"model_mb": max(0.0, peak), "changed": _changed(encoder, timed, batch), "said": said}
    return Prepared(lambda: encoder.answer(timed, batch), facts)


def _changed(encoder: Encoder, rows: Rows, batch: int) -> float:
    """Share of texts whose answer has other bits alone, or among others."""
    answers = encoder.answer(rows, batch)
    differs: Tensor = torch.stack([(encoder.answer(rows, other) != answers).any(-1) for other in OTHER_BATCHES]).any(0)
    return float(differs.double().mean())


def _loaded(name: str, folder: Path) -> Encoder:
    """What `build` wrote; a runtime's with float weights, for its tokenizer and its pooling."""
    if name not in RUNTIMES:
        return saved_encoder(folder)
    weights = _float_weights(folder).rename(folder / WEIGHTS)
    encoder = saved_encoder(folder)
    weights.rename(_float_weights(folder))
    return encoder


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
