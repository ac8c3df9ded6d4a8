"""Watchers observe the calls of attention modules, to calibrate, count or record them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from attnpress.config.rules import RULES
from attnpress.core.attention import Pairs, key_validity, prune_and_code, repeat_heads
from attnpress.core.call import AttentionCall
from attnpress.core.cost import PairCounts, count_pairs
from attnpress.core.exponential import exponent_rate
from attnpress.core.fake_quantize import (
    additive_mask,
    batch_part,
    batch_slices,
    code_pairs,
    scores_operands,
    unpruned_bins,
)
from attnpress.core.observer import Observer
from attnpress.core.quantizer import smooth_key
from attnpress.core.tail import Moments, level, prunes, tail_masses
from attnpress.core.thresholds import pair_histogram
from attnpress.models.attention import CompressedAttention, Watcher

Kind = TypeVar("Kind", bound=Watcher)


@contextmanager
def watched(watchers: Iterable[tuple[CompressedAttention, Watcher]]) -> Iterator[None]:
    """Attach its watcher to each module inside the `with` block."""
    placed = list(watchers)
    for module, watcher in placed:
        start(module, watcher)
    try:
        yield
    finally:
        for module, watcher in placed:
            stop(module, type(watcher))


def start(module: CompressedAttention, watcher: Kind) -> Kind:
    """Put a watcher on a module's list, replacing one of the same class; returns it."""
    stop(module, type(watcher))
    module.watchers.append(watcher)
    return watcher


def stop(module: CompressedAttention, kind: type[Watcher]) -> None:
    """Remove the watcher of a class from a module's list, if there is one."""
    module.watchers = [watcher for watcher in module.watchers if type(watcher) is not kind]


class Observing(Watcher):
    """Passes Q, K and V to an observer for each static scale; meanwhile the module runs uncompressed."""

    uncompressed = True

    def __init__(self, module: CompressedAttention) -> None:
        self.observers = {
            name: Observer(spec.observer_name, spec.granularity, spec.qmax, power_of_two=spec.power_of_two)
            for name, spec in module.quantized().items()
        }

    def see(self, module: CompressedAttention, call: AttentionCall) -> None:
        """Update the observers; padding is excluded."""
        key, keys = call.key, _real_keys(call)
        if module.spec.smooth_key:
            key = smooth_key(key, key_validity(call.valid))
        shown = {"q": (call.query, call.real), "k": (key, keys), "v": (call.value, keys)}
        for name, observer in self.observers.items():
            observer.update(*shown[name])


class Fitting(Watcher):
    """Collects the unpruned pairs of some query rows, to fit thresholds and lifts.

    Args:
        rows: of the queries.
    """

    before_thresholds = True

    def __init__(self, rows: slice) -> None:
        self.rows = rows

    def see(self, module: CompressedAttention, call: AttentionCall) -> None:
        """Add to `module.seen`, and with a tail to `module.seen_masses`."""
        q, k, alpha = scores_operands(call.with_(query=call.query[:, :, self.rows]))
        k, valid, real = repeat_heads(k, module.heads), _rows(call.valid, self.rows), _rows(call.real, self.rows)
        bias, shape = None if valid is None else additive_mask(valid), (*q.shape[:3], k.shape[2])
        counted, spec = _counted(shape, valid, real, q.device), module.spec
        for part in batch_slices(shape, q.device):
            masks, step = (batch_part(valid, part), batch_part(bias, part)), batch_part(alpha, part)
            bins = unpruned_bins(q[part], k[part], *masks, step, spec)
            module.seen += pair_histogram(bins, counted[part])
            if spec.tail != "none" and prunes(spec, call.cutoff):
                coded = prune_and_code(q[part] @ k[part].mT, masks[0], step, call.cutoff, spec)
                module.seen_masses += _masses(module, coded, step, counted[part])


class Counting(Watcher):
    """Counts the pairs of each head: valid, pruned, and with code zero.

    Attributes:
        counts: so far.
    """

    def __init__(self, module: CompressedAttention) -> None:
        device = module.cutoff.device
        self.counts = PairCounts(*(none.to(device) for none in PairCounts.none_yet(module.heads).tensors()))

    def see(self, module: CompressedAttention, call: AttentionCall) -> None:
        """Add the pairs of a call; without pruning, all are kept."""
        shape = (*call.query.shape[:3], call.key.shape[2])
        counted = _counted(shape, call.valid, call.real, call.query.device)
        if module.runs_uncompressed:
            self.counts += count_pairs(counted, None, counted)
            return
        q, k, alpha = scores_operands(call)
        k, bias = repeat_heads(k, module.heads), None if call.valid is None else additive_mask(call.valid)
        for part in batch_slices(shape, q.device):
            masks = batch_part(call.valid, part), batch_part(bias, part)
            found = code_pairs(q[part], k[part], *masks, batch_part(alpha, part), call.cutoff, module.spec)
            self.counts += count_pairs(found.codes, found.beyond, counted[part])


class Gathering(Watcher):
    """Collects the moments of the codes of Q and K, from which the directions of a tail are fitted.

    Attributes:
        moments: so far.
    """

    def __init__(self, module: CompressedAttention) -> None:
        self.moments = Moments.none_yet(module.kv_heads, module.head_dim, module.cutoff.device)

    def see(self, module: CompressedAttention, call: AttentionCall) -> None:
        """Add the real tokens of a call."""
        q, k, _ = scores_operands(call)
        rows = torch.ones(len(q), 1, q.shape[2], 1, device=q.device) * (1 if call.real is None else call.real)
        real = _real_keys(call)
        keys = torch.ones(len(k), 1, k.shape[2], 1, device=k.device) * (1 if real is None else real)
        self.moments.add(q, k, rows, keys)


class Looking(Watcher):
    """Passes each call to a function.

    Args:
        look: receives the module and the call.
    """

    def __init__(self, look: Callable[[CompressedAttention, AttentionCall], None]) -> None:
        self.look = look

    def see(self, module: CompressedAttention, call: AttentionCall) -> None:
        """Pass the call on."""
        self.look(module, call)


class Capturing(Watcher):
    """Collects the outputs [B, S, H, D] of a module, in order.

    Args:
        outputs: list to append to.
    """

    def __init__(self, outputs: list[Tensor]) -> None:
        self.outputs = outputs

    def hear(self, output: Tensor) -> None:
        """Append the output, with its gradient."""
        self.outputs.append(output)


def _masses(module: CompressedAttention, pairs: Pairs, alpha: Tensor, counted: Tensor) -> Tensor:
    """The mass that tails hold in the counted rows, and the mass that levels without lift give them."""
    rest = pairs.valid & (pairs.codes == 0)
    distance = torch.where(rest, pairs.distance, 0).sum(-1, keepdim=True, dtype=torch.float64)
    bare, qmax = torch.zeros_like(module.lift), module.spec.p.qmax
    _, one = level(distance, rest.sum(-1, keepdim=True), exponent_rate(alpha), bare, qmax)
    masses = tail_masses(pairs.probability, rest, one / qmax, counted.any(-1, keepdim=True))
    # A head without pruning has no tail.
    return masses if RULES[module.spec.rule].counts else masses * (module.cutoff != torch.inf).unsqueeze(-1)


def _real_keys(call: AttentionCall) -> Tensor | None:
    """Keys of real tokens, bool [B or 1, 1, Sk or 1, 1]; None if all are real."""
    valid, real = call.valid, call.real
    return key_validity(valid if real is None or valid is None else valid & real)


def _counted(shape: Sequence[int], valid: Tensor | None, real: Tensor | None, device: torch.device) -> Tensor:
    """Valid pairs of real rows: bool [B, 1 or Hq, Sq, Sk]; `shape` is [B, Hq, Sq, Sk]."""
    pairs = torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool, device=device)
    for mask in (valid, real):
        pairs = pairs if mask is None else pairs & mask
    return pairs


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return x if x is None or x.shape[2] == 1 else x[:, :, rows]
