"""Recorded attention by sequence, without padding; the input of the simulator formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from attnpress.export.recording import Recorded

PARTS = ("p_codes", "valid", "v_codes", "weighted")


@dataclass(frozen=True)
class AttendedSequence:
    """One sequence in one layer, without padding.

    Attributes:
        layer: name of the module.
        number: of the sequence, from 0.
        codes: P codes, uint8 [Hq, nq, nk].
        valid: bool [1 or Hq, nq, nk].
        v_codes: int8 [Hkv, nk, D].
        weighted: int64 [Hq, nq, D], the sum of P code times V code.
    """

    layer: str
    number: int
    codes: Tensor
    valid: Tensor
    v_codes: Tensor
    weighted: Tensor

    @property
    def survivors(self) -> Tensor:
        """Number of pairs with a P code in each row; int64 [Hq, nq]."""
        return (self.codes > 0).sum(-1)

    @property
    def pairs(self) -> Tensor:
        """Number of valid pairs in each row; int64 [Hq, nq]."""
        return self.valid.sum(-1).expand(self.codes.shape[:2])


def sequences_of(recorded: Iterable[Recorded]) -> Iterator[AttendedSequence]:
    """Each sequence of recorded batches, layer by layer, without rows and keys of padding."""
    first = 0
    for batch in recorded:
        size = 0
        for layer, t in batch.layers.items():
            size = len(t["valid"])
            for place in range(size):
                yield _sequence(layer, first + place, {name: t[name][place] for name in PARTS})
        first += size


def _sequence(layer: str, number: int, t: dict[str, Tensor]) -> AttendedSequence:
    real = t["valid"].any(0)
    rows, keys = (real.any(over).nonzero().squeeze(-1) for over in (-1, -2))
    picked = {name: t[name][:, rows][:, :, keys].contiguous() for name in ("p_codes", "valid")}
    return AttendedSequence(
        layer, number, picked["p_codes"], picked["valid"], t["v_codes"][:, keys].contiguous(), t["weighted"][:, rows]
    )


def by_layer(sequences: Iterable[AttendedSequence]) -> dict[str, list[AttendedSequence]]:
    """The sequences by name of the layer, in order."""
    found: dict[str, list[AttendedSequence]] = {}
    for one in sequences:
        found.setdefault(one.layer, []).append(one)
    return found
