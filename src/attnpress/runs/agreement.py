"""Comparison of the predictions of the deployed and the trained model, row by row."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from attnpress.config import ConfigError, RunConfig
from attnpress.deployment.attention import Linear, deploy, place_on
from attnpress.deployment.linear import linear_layers, plan_linear
from attnpress.kernels import cpu
from attnpress.models.loading import weights_hash
from attnpress.runs.finished import finished_folder, finished_model
from attnpress.tasks.predictions import metrics_of, predicted_logits


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A deployed model compared with the trained one, on the same rows.

    Attributes:
        backend, target: of the deployed model; target is None for the reference.
        linear: "int8" if at least one linear layer ran in 8 bits, else "float".
        float_products: products of linear layers that stayed in float because they lost too much.
        rows: of the evaluation split; in qa, windows.
        same_predictions: rows with the same class; in qa, most likely start and end; in regression, number.
        identical_logits: rows whose logits are equal bit for bit.
        largest_difference: between two logits.
        trained, deployed: metrics in points.
        weights: sha256 of the compressed model's weights.
        data: sha256 of the sources of the evaluation rows, as in `TaskData.fingerprint`.
    """

    backend: str
    target: str | None
    linear: str
    float_products: list[str]
    rows: int
    same_predictions: int
    identical_logits: int
    largest_difference: float
    trained: dict[str, float]
    deployed: dict[str, float]
    weights: str | None
    data: str | None

    @property
    def complete(self) -> bool:
        """True if every row has the same prediction."""
        return self.same_predictions == self.rows


def compare_backends(
    run_folder: Path, config: RunConfig, backend: str, linear: Linear = "float", batch_size: int = 32
) -> Agreement:
    """Compare a finished run's compressed model, as trained and as deployed on a backend, on every evaluation row.

    Args:
        linear: "int8" deploys the linear layers in 8 bits; see `plan_linear`.

    Raises:
        ConfigError: see `finished_model`; or int8 layers are requested but not supported for this model.
        BackendUnavailableError, ValueError: see `deploy`.
    """
    model, data = finished_model(run_folder, config)
    place_on(backend, model)
    trained = predicted_logits(model, data, batch_size)
    plan = plan_linear(model, lambda: data, config) if linear == "int8" else {}
    deploy(model, backend, linear=linear)
    ran: Linear = "int8" if linear_layers(model).int8 else "float"
    if linear == "int8" and ran == "float":
        raise ConfigError(
            f"--linear int8: all linear layers of {type(model).__name__} stay in float, so nothing can be compared: "
            "they are not those of a BERT, DistilBERT or ModernBERT encoder in float32, or lose too much; drop --linear"
        )
    deployed = predicted_logits(model, data, batch_size)
    identical = (trained == deployed).flatten(1).all(1)
    same = identical if data.task.kind == "regression" else (trained.argmax(-1) == deployed.argmax(-1)).all(1)
    return Agreement(
        backend,
        cpu.active_target() if backend == "cpu" else None,
        ran,
        [name for name, product in plan.items() if not product.quantized],
        len(trained),
        int(same.sum()),
        int(identical.sum()),
        float((trained - deployed).abs().max()),
        metrics_of(trained, data),
        metrics_of(deployed, data),
        weights_hash(str(finished_folder(run_folder))),
        data.fingerprint.get("eval"),
    )
