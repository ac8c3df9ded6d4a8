"""Low-bit, sparse attention for Transformers models: quantize Q, K, V and P, prune P, and record what it cost."""

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
from attnpress.recipe import load_config
from attnpress.registration import register_when_needed

if TYPE_CHECKING:
    from attnpress.calibration import calibrate, fit_thresholds
    from attnpress.compression import compress
    from attnpress.deployment import deploy, undeploy
    from attnpress.finetune import SparsityCallback, SparsityDriver
    from attnpress.linear import calibrate_linear
    from attnpress.models.binding import attentions, bind, unbind
    from attnpress.models.hub import AttnPressConfig
    from attnpress.models.loading import load_compressed
    from attnpress.posttraining import quantize

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

# Loaded on first use: they import torch and Transformers, which `attnpress --help` must not wait for.
_LATE = {
    "AttnPressConfig": "attnpress.models.hub",
    "SparsityCallback": "attnpress.finetune",
    "SparsityDriver": "attnpress.finetune",
    "attentions": "attnpress.models.binding",
    "bind": "attnpress.models.binding",
    "calibrate": "attnpress.calibration",
    "calibrate_linear": "attnpress.linear",
    "compress": "attnpress.compression",
    "deploy": "attnpress.deployment",
    "fit_thresholds": "attnpress.calibration",
    "load_compressed": "attnpress.models.loading",
    "quantize": "attnpress.posttraining",
    "unbind": "attnpress.models.binding",
    "undeploy": "attnpress.deployment",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'attnpress' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)


register_when_needed()
