"""What attnpress keeps on a module of a user's model, besides its compressed attention: one object, one attribute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnpress.core.linear import ProductPlan

ATTRIBUTE = "_attnpress"


@dataclass(frozen=True)
class Attached:
    """It is replaced, never changed, so that a copy of a module's attributes undoes it.

    Attributes:
        implementation: of a Transformers model that is bound: the attention implementation before that.
        plan: of an encoder: what its int8 layers are, or are to be, by product; None where nothing was planned.
        packing: of an encoder: what has it run without padding (`models.encoder.Packing`); None if nothing does.
    """

    implementation: str | None = None
    plan: Mapping[str, ProductPlan] | None = None
    packing: Any = None


def attached_to(module: nn.Module | None) -> Attached:
    """What is kept on a module; all None where nothing is."""
    found: Attached = Attached() if module is None else vars(module).get(ATTRIBUTE, Attached())
    return found


def attach(module: nn.Module, **changes: Any) -> None:
    """Keep what is named on a module; where all is None, nothing is left on it."""
    kept = dataclasses.replace(attached_to(module), **changes)
    if kept == Attached():
        vars(module).pop(ATTRIBUTE, None)
    else:
        setattr(module, ATTRIBUTE, kept)
