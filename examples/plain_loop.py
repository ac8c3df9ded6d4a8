"""Progressive pruning in a training loop of your own: `SparsityDriver` is told before and after each step.

    python examples/plain_loop.py

A tiny random BERT learns which of two words a sentence holds more of; nothing is downloaded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import attnpress

STEPS, TARGET = 60, 0.8


def make_batch(generator: torch.Generator, rows: int = 32, length: int = 16) -> dict[str, Tensor]:
    """Sentences of the words 2 and 3 among others; label 1 where 3 is the more frequent. Padded at the end."""
    ids = torch.randint(2, 12, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.randint(4, length + 1, (rows, 1), generator=generator)
    ids = ids * mask
    labels = ((ids == 3).sum(-1) > (ids == 2).sum(-1)).long()
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def main() -> tuple[float, float]:
    """Train; returns the mean loss of the last ten steps, and the share of pairs pruned on fresh data."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = attnpress.bind(BertForSequenceClassification(config), attnpress.AttentionSpec())
    attnpress.calibrate(model, [make_batch(generator) for _ in range(4)])

    driver = attnpress.SparsityDriver(model, attnpress.ScheduleSpec("cubic", end=0.7), TARGET, total=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    model.train()
    for step in range(STEPS):
        driver.begin(step)  # refits the thresholds to the sparsity of this step, and watches its pairs
        loss = model(**make_batch(generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.end()  # adds what was seen to the running histogram
        losses.append(float(loss.detach()))
    driver.freeze()

    return sum(losses[-10:]) / 10, pruned_share(model, make_batch(generator))


def pruned_share(model: torch.nn.Module, batch: dict[str, Tensor]) -> float:
    """Fraction of the batch's valid pairs that the frozen thresholds prune."""
    from attnpress.models.watchers import Counting, watched

    counting = [(module, Counting(module)) for module in attnpress.attentions(model).values()]
    with torch.no_grad(), watched(counting):
        model.eval()(**batch)
    shares = [float(watcher.counts.total().pruned_fraction()) for _, watcher in counting]
    return sum(shares) / len(shares)


if __name__ == "__main__":
    loss, pruned = main()
    print(f"loss {loss:.3f}, {pruned:.1%} of the valid pairs pruned")
