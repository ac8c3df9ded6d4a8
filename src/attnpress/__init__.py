"""Low-bit, sparse attention for Transformers models: quantize Q, K, V and P, prune P, and record the cost."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from attnpress.config import (
    DENSE,
    AttentionSpec,
    CalibrationSpec,
    ConfigError,
    DataSpec,
    DistillationSpec,
    ProbsSpec,
    RunConfig,
    ScheduleSpec,
    TensorSpec,
    TrainSpec,
)
from attnpress.config.recipe import load_config
from attnpress.models.registration import register_when_needed

if TYPE_CHECKING:
    from attnpress.deployment.attention import deploy, undeploy
    from attnpress.deployment.linear import calibrate_linear
    from attnpress.models.binding import attentions, bind, unbind
    from attnpress.models.hub import AttnPressConfig
    from attnpress.models.loading import load_compressed
    from attnpress.posttraining import quantize
    from attnpress.runs.compression import compress
    from attnpress.training.calibration import calibrate, fit_thresholds
    from attnpress.training.callbacks import SparsityCallback
    from attnpress.training.driver import SparsityDriver

__version__ = version("attnpress")

__all__ = [
    "DENSE",
    "AttentionSpec",
    "AttnPressConfig",
    "CalibrationSpec",
    "ConfigError",
    "DataSpec",
    "DistillationSpec",
    "ProbsSpec",
    "RunConfig",
    "ScheduleSpec",
    "SparsityCallback",
    "SparsityDriver",
    "TensorSpec",
    "TrainSpec",
    "attentions",
    "bind",
    "calibrate",
    "calibrate_linear",
    "compress",
    "deploy",
    "fit_thresholds",
    "load_compressed",
    "load_config",
    "quantize",
    "unbind",
    "undeploy",
]

# Loaded on first use, so that `attnpress --help` does not wait for the import of torch and Transformers.
_LATE = {
    "AttnPressConfig": "models.hub",
    "SparsityCallback": "training.callbacks",
    "SparsityDriver": "training.driver",
    "attentions": "models.binding",
    "bind": "models.binding",
    "calibrate": "training.calibration",
    "calibrate_linear": "deployment.linear",
    "compress": "runs.compression",
    "deploy": "deployment",
    "fit_thresholds": "training.calibration",
    "load_compressed": "models.loading",
    "quantize": "posttraining",
    "unbind": "models.binding",
    "undeploy": "deployment",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'attnpress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"attnpress.{_LATE[name]}"), name)


register_when_needed()
