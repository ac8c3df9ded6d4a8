"""Observers choose a static scale from calibration data. Padding never enters a statistic.

An observer sees one tensor of one attention module batch by batch, and computes its scale at the end. Statistics of
several ranks merge exactly: maxima by maximum, histograms of integer counts by sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnpress.core.quantizer import positive_scale

EMA_MOMENTUM = 0.9
PERCENTILE = 99.99
BINS_PER_OCTAVE = 128
LOW_OCTAVE, HIGH_OCTAVE = -24, 16
"""Range of the histograms, that of float16; other magnitudes count in the first or last bin."""
CANDIDATES = 100

REDUCED = {"tensor": (0, 1, 2, 3), "head": (0, 2, 3), "channel": (0, 2)}
"""Dimensions of [B, H, S, D] that share a scale."""

Reduce = Callable[[Tensor, str], Tensor]
"""(tensor, "max" or "sum") -> the tensor reduced over all ranks."""


def alone(tensor: Tensor, _: str) -> Tensor:
    """The reduction for a single process."""
    return tensor


class Observer:
    """Largest magnitude of each batch, or a logarithmic histogram of magnitudes, depending on the method.

    Args:
        name: "absmax", "ema" (moving average of batch maxima), "percentile" (99.99) or "mse".
        granularity: "tensor", "head" or "channel".
        qmax: largest code.
        power_of_two: round the scale up to a power of two.
    """

    def __init__(self, name: str, granularity: str, qmax: int, *, power_of_two: bool = False) -> None:
        self.name, self.qmax, self.power_of_two = name, qmax, power_of_two
        self.reduced = REDUCED[granularity]
        self.maxima: list[Tensor] = []
        self.histogram: Tensor | None = None
        self.not_finite: Tensor | int = 0
        """How many values of real tokens were NaN or infinite, and so left out; `scale` adds those of other ranks."""

    def update(self, x: Tensor, valid: Tensor | None) -> None:
        """Observe one batch.

        Args:
            x: [B, H, S, D], B or S may be 0; non-finite values are left out.
            valid: bool broadcastable to x, True for real tokens.
        """
        magnitude = x.detach().float().abs()
        odd = magnitude.isfinite().logical_not_()
        self.not_finite = self.not_finite + (odd if valid is None else odd & valid).sum(dtype=torch.float64)
        magnitude.nan_to_num_(nan=0.0, posinf=0.0)
        if valid is not None:
            magnitude = magnitude.masked_fill(~valid, 0.0)
        magnitude = magnitude if magnitude.numel() else magnitude.new_zeros(1, x.shape[1], 1, x.shape[3])
        self.maxima.append(magnitude.amax(self.reduced, keepdim=True))
        if self.name in ("percentile", "mse"):
            counts = _log_histogram(magnitude, self.reduced)
            self.histogram = counts if self.histogram is None else self.histogram + counts

    def scale(self, reduce: Reduce = alone) -> Tensor:
        """The chosen scale, float32, broadcastable to x.

        Args:
            reduce: merges statistics over ranks; every rank must have seen the same number of batches.

        Raises:
            ValueError: no batch was seen, or none with a finite value.
        """
        if not self.maxima:
            raise ValueError("nothing was observed: calibrate on at least one batch with a real token")
        maxima = reduce(torch.stack(self.maxima), "max")
        self.not_finite = int(reduce(torch.as_tensor(self.not_finite), "sum"))
        largest = maxima.amax(0)
        if self.not_finite and not bool(largest.any()):
            raise ValueError(f"all of {self.not_finite} values observed are NaN or infinite: look for broken weights")
        if self.name == "ema":
            largest = _moving_average(maxima)
        if self.histogram is not None:
            histogram = reduce(self.histogram, "sum")
            choose = _percentile if self.name == "percentile" else self._least_squares
            largest = torch.minimum(largest, choose(histogram).view(largest.shape))
        return positive_scale(largest / self.qmax, power_of_two=self.power_of_two)

    def _least_squares(self, histogram: Tensor) -> Tensor:
        """The clipping magnitude with the least squared quantization error; float32 [groups]."""
        magnitude = _bin_centers(histogram.device)
        top = _percentile(histogram, 100.0).double()
        ratios = torch.linspace(1 / CANDIDATES, 1, CANDIDATES, device=histogram.device)
        errors = []
        for ratio in ratios:
            step = positive_scale(top * ratio / self.qmax, power_of_two=self.power_of_two).double().unsqueeze(-1)
            rounded = (magnitude / step).round().clamp(max=self.qmax) * step
            errors.append(((rounded - magnitude) ** 2 * histogram).sum(-1))
        return (top * ratios[torch.stack(errors).argmin(0)]).float()


def _moving_average(maxima: Tensor) -> Tensor:
    average = maxima[0]
    for batch in maxima[1:]:
        mixed = torch.where(average > 0, EMA_MOMENTUM * average + (1 - EMA_MOMENTUM) * batch, batch)
        average = torch.where(batch > 0, mixed, average)  # 0 marks a batch without real tokens
    return average


def _log_histogram(magnitude: Tensor, reduced: tuple[int, ...]) -> Tensor:
    """Counts of nonzero magnitudes per group and logarithmic bin; float64 [groups, bins]."""
    kept = [dim for dim in range(4) if dim not in reduced]
    grouped = magnitude.permute(*kept, *reduced).flatten(len(kept)) if kept else magnitude.reshape(1, -1)
    grouped = grouped.reshape(-1, grouped.shape[-1])
    bins = ((torch.log2(grouped) - LOW_OCTAVE) * BINS_PER_OCTAVE).floor_()
    count = (HIGH_OCTAVE - LOW_OCTAVE) * BINS_PER_OCTAVE
    index = bins.clamp_(0, count - 1).long() + torch.arange(len(grouped), device=bins.device).unsqueeze(-1) * count
    return torch.bincount(index[grouped > 0], minlength=len(grouped) * count).view(-1, count).double()


def _bin_centers(device: torch.device) -> Tensor:
    bins = torch.arange((HIGH_OCTAVE - LOW_OCTAVE) * BINS_PER_OCTAVE, device=device, dtype=torch.float64)
    return torch.exp2((bins + 0.5) / BINS_PER_OCTAVE + LOW_OCTAVE)


def _percentile(histogram: Tensor, percent: float = PERCENTILE) -> Tensor:
    """Upper edge of the bin that contains the percentile of the magnitudes; float32 [groups]."""
    running = histogram.cumsum(-1)
    wanted = running[:, -1:] * (percent / 100)
    index = (running < wanted).sum(-1).clamp(max=histogram.shape[-1] - 1).double()
    edge = torch.exp2((index + 1) / BINS_PER_OCTAVE + LOW_OCTAVE)
    return torch.where(running[:, -1] > 0, edge, torch.zeros_like(edge)).float()
