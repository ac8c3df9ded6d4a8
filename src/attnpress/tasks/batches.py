"""Batches of training rows, for calibration."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from attnpress.config import CalibrationSpec
from attnpress.distributed import this_process
from attnpress.tasks import TaskData


def training_batches(data: TaskData, spec: CalibrationSpec, seed: int) -> list[dict[str, Any]]:
    """This rank's share of the calibration batches: random training rows, chosen by the seed."""
    state, generator = this_process(), torch.Generator().manual_seed(seed)
    loader = DataLoader(data.train, spec.batch_size, shuffle=True, generator=generator, collate_fn=data.collate)
    # Every rank needs as many batches, so a last batch that is too small to share is dropped.
    batches = [batch for batch in islice(loader, spec.batches) if len(batch["input_ids"]) >= state.num_processes]
    return [{k: v[state.process_index :: state.num_processes] for k, v in batch.items()} for batch in batches]
