"""quantize: any encoder and texts of its own in, a compressed model with a proof of what that cost out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from attnpress.benchmark.machine import provenance
from attnpress.config import ConfigError, Count, Sparsity, TailName
from attnpress.config.recipe import spec_to_dict
from attnpress.config.specs import Epochs
from attnpress.deployment.linear import linear_layers
from attnpress.files import check_folder, whole_folder, write_text
from attnpress.kernels import cpu
from attnpress.kernels.cpu import BackendUnavailableError
from attnpress.models.encoders import Encoder, check_compressible, encoder_of, load_encoder
from attnpress.models.pipeline import is_pipeline
from attnpress.posttraining.agreement import agreement, loss_of
from attnpress.posttraining.card import quantized_card
from attnpress.posttraining.forms import Form, Lesson, Made, make
from attnpress.posttraining.interrupted import kept_training
from attnpress.posttraining.measure import Cost, costs
from attnpress.posttraining.search import BITS, SPARSITIES, Trials, most_compressed
from attnpress.records.quantized import FILE, CostRecord, QuantizedRecord, TextsRecord, TrialRecord
from attnpress.tasks.texts import Text, Texts, read_texts, texts_of

WHAT = "quantized model"
"""Kind of the output folder, in its marker."""

CALIBRATION, JUDGED = 32, 200
"""Maximum numbers of texts for calibration and for evaluation."""

FEW = 100
"""Below this number of texts, figures are unreliable."""

USUAL = Form(bits=8, sparsity=0.5, tail="mean", linear="int8")
"""The default form."""

Say = Callable[[str], None]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QuantizeSpec:
    """How to quantize an encoder. None selects a default, or is searched for `max_loss`.

    Attributes:
        sparsity: fraction of the valid pairs of a query and a key to prune.
        bits: of Q, K, V and P.
        tail: contribution of pruned pairs: "none", "mean" or "linear".
        linear: "int8" for 8-bit linear layers without padding, "float" to keep them.
        max_loss: maximum decrease of the agreement from 1; the most compressed form within it is made.
        distill: epochs of training on the dense model's answers to texts that are not judged, with rising sparsity.
        threads: for timing; torch's own number by default.
    """

    sparsity: Sparsity | None = None
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    tail: TailName | None = None
    linear: Literal["float", "int8"] | None = None
    max_loss: Annotated[float, Field(ge=0, lt=1)] | None = None
    distill: Epochs | None = None
    threads: Count | None = None


@dataclass(frozen=True)
class Quantized:
    """A compressed model.

    Attributes:
        model: of the same class as the dense one, deployed on this CPU.
        record: what was done, with its cost.
    """

    model: Any
    record: QuantizedRecord


def quantize(
    model: Any,
    texts: Sequence[str] | Sequence[Sequence[str]] | str | Path,
    *,
    output: str | Path | None = None,
    tokenizer: Any = None,
    columns: Sequence[str] = (),
    spec: QuantizeSpec | None = None,
    notify: Say = lambda _: None,
    **options: Any,
) -> Quantized:
    """Compress an encoder after training, with texts alone.

    Args:
        model: a Hub name, a folder or "package:NAME"; or a Transformers model, a SentenceTransformer or a CrossEncoder,
            which is not changed.
        texts: a few hundred texts that resemble the data, or pairs for a model of pairs; or a path, see
            `tasks.texts.read_texts`.
        output: folder for the compressed model, its record and its card; None writes nothing.
        tokenizer: of a Transformers model that is not given by name.
        columns: one or two text columns of a file.
        spec: how to quantize; or its fields as keyword arguments.
        notify: receives progress messages.

    Returns:
        The compressed model, deployed, and its record. Problems are also reported as warnings.

    Raises:
        ModelError, UnsupportedModelError: there is no such model, or it is not supported.
        TaskError: there are no usable texts.
        ConfigError: int8 linear layers were requested, but this model's stay in float.
        LossError: no form loses as little as `max_loss`.
        OutputError: the folder contains something that attnpress did not write.
        BackendUnavailableError: the CPU kernel is not built.
    """
    asked = spec or QuantizeSpec(**options)
    if not cpu.is_built():
        raise BackendUnavailableError(
            "quantize: the compiled CPU kernel is not built, and the model is judged and timed on it; run "
            "`make kernel` (it needs a C++ compiler)"
        )
    place = None if output is None else Path(output)
    if place is not None:
        check_folder(place, WHAT)
    found = read_texts(str(texts), columns) if isinstance(texts, str | Path) else texts_of(texts)
    notify("loading the model")
    if isinstance(model, str | Path):
        name, dense = str(model), load_encoder(str(model))
    else:
        check_compressible(model)
        name, dense = type(model).__name__, encoder_of(model, tokenizer)
    return _Task(name, dense, found, asked, place, notify).run()


@dataclass
class _Task:
    """One call of `quantize`."""

    name: str
    dense: Encoder
    found: Texts
    asked: QuantizeSpec
    output: Path | None
    notify: Say

    def __post_init__(self) -> None:
        rows = self.found.rows
        _check_pairs(self.dense, rows[0])
        if len(rows) < 2:
            raise ConfigError(
                "texts: only one; at least two are needed, to calibrate on and to judge on: give hundreds"
            )
        if self.asked.distill is not None and self.asked.max_loss is not None:
            raise ConfigError("--distill trains one form, and --max-loss tries many: give --sparsity instead")
        cut = min(CALIBRATION, len(rows) // 2)
        kept = cut + (min(JUDGED, (len(rows) - cut + 2) // 3) if self.asked.distill is not None else JUDGED)
        self.calibration, self.judged = rows[:cut], rows[cut:kept]
        self.training = [*self.calibration, *rows[kept:]] if self.asked.distill is not None else []
        self.texts = self._texts()

    def run(self) -> Quantized:
        """Everything in turn."""
        self.notify(f"{self.dense.kind}: the dense model answers {len(self.judged)} texts")
        self.expected = self.dense.answer(self.judged)
        trials: list[TrialRecord] = []
        form = self._form()
        if self.asked.max_loss is not None:
            form, trials = self._search(form, self.asked.max_loss)
        self.notify(f"making it: {_words(form)}")
        with self._lesson(form) as lesson:
            made = make(self.dense, form, self.calibration, lesson)
            self._check_linear(made)
            return self._written(made, trials)

    @contextmanager
    def _lesson(self, form: Form) -> Iterator[Lesson | None]:
        """What to train on, if anything; inside the `with` block an interrupted training is kept."""
        epochs = self.asked.distill
        if epochs is None:
            yield None
            return
        made_from = self._sources() | {"form": dataclasses.asdict(form), "epochs": epochs}
        with kept_training(self.output, made_from, self.notify) as folder:
            self.notify(f"teaching it on {len(self.training)} texts, {epochs:g} epochs")
            yield Lesson(self.training, epochs, folder)

    def _sources(self) -> dict[str, Any]:
        return {"weights": _weights(self.dense), "texts": self.texts.sha256}

    def _form(self) -> Form:
        given = {key: getattr(self.asked, key) for key in ("bits", "sparsity", "tail", "linear")}
        return dataclasses.replace(USUAL, **{key: value for key, value in given.items() if value is not None})

    def _search(self, begin: Form, max_loss: float) -> tuple[Form, list[TrialRecord]]:
        beside = None if self.output is None else self.output.with_name(f".{self.output.name}.trials.json")
        trials = Trials(beside, self._sources() | {"tail": begin.tail, "max_loss": max_loss})
        bits = BITS if self.asked.bits is None else (self.asked.bits,)
        sparsities = SPARSITIES if self.asked.sparsity is None else (self.asked.sparsity,)
        best = most_compressed(begin, max_loss, self._judge, trials, bits=bits, sparsities=sparsities)
        trials.forget()
        return Form(best.bits, best.sparsity, begin.tail, begin.linear), list(trials.done.values())

    def _judge(self, form: Form) -> TrialRecord:
        made = make(self.dense, form, self.calibration)
        loss = loss_of(self.dense.kind, self._agreement(made))
        self.notify(f"tried {_words(form)}: loses {loss:.4f}")
        return TrialRecord(form.bits, form.sparsity, form.linear, loss, made.survivors.work)

    def _agreement(self, made: Made) -> dict[str, float]:
        queries = [row[0] for row in self.judged] if self.dense.kind == "reranker" else ()
        return agreement(self.dense.kind, self.expected, made.encoder.answer(self.judged), queries)

    def _check_linear(self, made: Made) -> None:
        if self.asked.linear == "int8" and made.form.linear == "float":
            raise ConfigError(
                f"--linear int8: all linear layers of {type(made.encoder.model).__name__} stay in float: its family "
                "has none in int8, its weights are not float32, or they lose too much; drop --linear"
            )

    def _written(self, made: Made, trials: list[TrialRecord]) -> Quantized:
        threads = self.asked.threads or torch.get_num_threads()
        self.notify("judging it")
        found = self._agreement(made)
        with _folder(self.output) as folder, tempfile.TemporaryDirectory() as dense:
            made.encoder.save(folder)
            self.dense.save(Path(dense))
            self.notify("timing both, in turns")
            before, after, target = costs(Path(dense), folder, self.judged, threads)
            record = self._record(made, found, before, after, trials, threads=threads, target=target)
            write_text(folder / FILE, json.dumps(dataclasses.asdict(record), indent=1) + "\n")
            write_text(folder / "README.md", quantized_card(record, _class_name(made.encoder)))
        if record.speedup < 1:
            _warn(f"the compressed model is slower than the dense one on this machine ({record.speedup:.2f} times)")
        return Quantized(made.encoder.model, record)

    def _record(
        self, made: Made, found: dict[str, float], before: Cost, after: Cost, trials: list[TrialRecord], **ran: Any
    ) -> QuantizedRecord:
        left = made.survivors
        return QuantizedRecord(
            model=self.name,
            kind=self.dense.kind,
            texts=self.texts,
            agreement=found,
            attention=spec_to_dict(made.form.attention),
            linear=made.form.linear,
            linear_layers=dataclasses.asdict(linear_layers(made.encoder.model)),
            float_products=made.float_products,
            sparsity=left.sparsity,
            keys_per_query=left.keys,
            dense_keys=left.dense_keys,
            work=left.work,
            dense=CostRecord(**dataclasses.asdict(before)),
            compressed=CostRecord(**dataclasses.asdict(after)),
            provenance=provenance("transformers"),
            distill=self.asked.distill,
            max_loss=self.asked.max_loss,
            trials=trials,
            **ran,
        )

    def _texts(self) -> TextsRecord:
        used = [*self.calibration, *self.judged, *self.training[len(self.calibration) :]]
        lengths = sorted(self.dense.lengths(used))
        cut, skipped = sum(length > self.dense.longest for length in lengths), self.found.skipped.total()
        if len(used) < FEW:
            _warn(f"only {len(used)} texts: figures are rough; a few hundred give better ones")
        if lengths[0] == lengths[-1] and len(used) > 2:
            _warn(f"all texts have {lengths[0]} tokens; give texts of the lengths that the model will see")
        if cut:
            _warn(
                f"{cut} of {len(used)} texts are longer than the {self.dense.longest} tokens that the model takes, and "
                "are cut, as it cuts them in use"
            )
        if skipped:
            reason, _ = self.found.skipped.most_common(1)[0]
            _warn(f"{skipped} rows were left out ({reason})")
        digest = hashlib.sha256(json.dumps(used).encode()).hexdigest()
        return TextsRecord(
            len(self.calibration),
            len(self.judged),
            lengths[0],
            lengths[len(lengths) // 2],
            lengths[-1],
            cut,
            skipped,
            self.found.repeated,
            digest,
            len(self.training),
        )


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    else:
        with whole_folder(output, WHAT) as scratch:
            yield scratch


def _check_pairs(dense: Encoder, first: Text) -> None:
    if dense.kind == "reranker" and is_pipeline(dense.model) and len(first) == 1:
        raise ConfigError("texts: a reranker scores pairs; name two columns: --column query passage")
    if dense.kind == "embedder" and len(first) == 2:
        raise ConfigError("texts: an embedder takes single texts; name one column: --column text")


def _class_name(encoder: Encoder) -> str:
    return type(encoder.model).__name__


def _weights(encoder: Encoder) -> str:
    """A hash of the model's weights: not of its files, which a model that Python holds has none of."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _words(form: Form) -> str:
    tail = f", tail {form.tail}" if form.sparsity and form.tail != "none" else ""
    return f"{form.bits} bits, sparsity {form.sparsity:g}{tail}, linear layers in {form.linear}"


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
