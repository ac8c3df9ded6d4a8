"""State that attnpress keeps on a module besides compressed attention: one object in one attribute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from attnpress.core.linear import ProductPlan

ATTRIBUTE = "_attnpress"


@dataclass(frozen=True)
class Attached:
    """Immutable state of a module, replaced as a whole: restoring the module's old attributes undoes changes.

    Attributes:
        implementation: for a bound Transformers model, its previous attention implementation.
        warning: for a bound Transformers model, the hook that warns if it no longer uses compressed attention.
        plan: for an encoder, the plan of its int8 layers, by product; None if there is no plan.
        packing: for an encoder, the hooks that run it without padding (`models.encoder.Packing`); None if there are
            none.
    """

    implementation: str | None = None
    warning: RemovableHandle | None = None
    plan: Mapping[str, ProductPlan] | None = None
    packing: Any = None


def attached_to(module: nn.Module | None) -> Attached:
    """The state kept on a module; all fields are None if there is none."""
    found: Attached = Attached() if module is None else vars(module).get(ATTRIBUTE, Attached())
    return found


def attach(module: nn.Module, **changes: Any) -> None:
    """Set fields of the state kept on a module; if all are None, remove the state."""
    kept = dataclasses.replace(attached_to(module), **changes)
    if kept == Attached():
        vars(module).pop(ATTRIBUTE, None)
    else:
        setattr(module, ATTRIBUTE, kept)
