"""What a model is given of a batch as data loaders make them: taken, left out, or refused by its key."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from attnpress.models.inputs import BatchError, forward_inputs, listed
from attnpress.models.outputs import outputs
from tests.models.factories import make_classifier

IDS, MASK = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


class Plain(nn.Module):
    """Takes what it names, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(is_encoder_decoder=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cached: bool = False) -> Tensor:
        return input_ids * self.weight


INPUTS = {"input_ids": IDS, "attention_mask": MASK}
TAKEN: dict[str, Any] = {
    "as it is": INPUTS,
    "of a tokenizer": BatchEncoding(dict(INPUTS)),
    "lists of numbers": {name: tensor.tolist() for name, tensor in INPUTS.items()},
    "arrays": {name: tensor.numpy() for name, tensor in INPUTS.items()},
    "labels": INPUTS | {"labels": torch.tensor([0, 1])},
    "labels that are texts": INPUTS | {"labels": ["no", "yes"]},
    "a label": INPUTS | {"label": torch.tensor([0, 1])},
    "a column of texts": INPUTS | {"text": ["good film", "bad"]},
    "a column of nothing": INPUTS | {"note": None},
    "spans": INPUTS | {"start_positions": torch.tensor([1, 1]), "end_positions": torch.tensor([2, 2])},
}


@pytest.mark.parametrize("batch", TAKEN.values(), ids=TAKEN.keys())
def test_batches_of_a_data_loader_are_taken(batch: Mapping[str, Any]) -> None:
    for model in (Plain(), make_classifier()):
        found = forward_inputs(model, batch)
        assert list(found) == ["input_ids", "attention_mask"]
        assert all(torch.equal(found[name], tensor) for name, tensor in INPUTS.items())


def test_none_and_flags_are_handed_on() -> None:
    given = {"input_ids": IDS, "attention_mask": None, "cached": True}
    assert {name: x for name, x in forward_inputs(Plain(), given).items() if name != "input_ids"} == {
        "attention_mask": None, "cached": True,
    }  # fmt: skip


def test_numbers_that_are_not_whole_become_the_usual_floats() -> None:
    found = forward_inputs(Plain(), {"input_ids": np.array([[0.5]]), "attention_mask": [[1.0]]})
    assert [tensor.dtype for tensor in found.values()] == [torch.float32, torch.float32]


REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([IDS, MASK], "batch 3 is a list; a batch is a mapping from the names of forward's arguments"),
    "a pair": ((INPUTS, torch.tensor([0, 1])), "batch 3 is a tuple; a batch is a mapping"),
    "a tensor": (IDS, "batch 3 is a Tensor; a batch is a mapping"),
    "nothing": ({}, "batch 3: holds no tensor that forward takes; give input_ids"),
    "labels alone": ({"labels": IDS}, "batch 3: holds no tensor that forward takes; give input_ids"),
    "no rows": ({"input_ids": IDS[:0]}, r"batch 3, key 'input_ids': is empty, of shape \[0, 4\]"),
    "a row of a data set": ({"input_ids": [2, 5, 3]}, r"batch 3, key 'input_ids': has shape \[3\], which is one"),
    "rows of two lengths": ({"input_ids": [[2, 3], [2]]}, "batch 3, key 'input_ids': cannot become a tensor .* pad "),
    "texts": ({"input_ids": ["a", "b"]}, "batch 3, key 'input_ids': cannot become a tensor"),
    "a text": ({"input_ids": "a"}, "batch 3, key 'input_ids': is a text; give the tensors that a tokenizer makes"),
    "columns as a loader turns them": (
        {"input_ids": list(IDS.T)}, "batch 3, key 'input_ids': is a list of tensors; give one tensor with a row for",
    ),
    "a misspelt name": (
        INPUTS | {"atention_mask": MASK}, "batch 3, key 'atention_mask': Plain takes no such argument; leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("batch", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_an_input_is_refused_by_its_key(batch: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message) as caught:
        forward_inputs(Plain(), batch, 3)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_keeps_the_labels_that_its_decoder_is_fed_with() -> None:
    model: Any = Plain()
    model.config.is_encoder_decoder = True
    model.forward = lambda input_ids, labels=None, decoder_input_ids=None: None
    given = {"input_ids": IDS, "labels": IDS}
    assert list(forward_inputs(model, given)) == ["input_ids", "labels"]
    assert list(forward_inputs(model, given | {"decoder_input_ids": IDS})) == ["input_ids", "decoder_input_ids"]


def test_a_wrapper_takes_what_it_wraps_takes() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Plain()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    assert torch.equal(forward_inputs(Wrapper(), {"input_ids": IDS.tolist()})["input_ids"], IDS)
    with pytest.raises(BatchError, match="key 'idx'"):
        forward_inputs(Wrapper(), INPUTS | {"idx": torch.tensor([0])})


def test_batches_are_several_and_not_used_up() -> None:
    used = iter([INPUTS])
    assert listed(used, "calibrate") == [INPUTS]
    with pytest.raises(
        BatchError, match="calibrate needs at least one batch of real data; an iterator that was already"
    ):
        listed(used, "calibrate")
    for one in (INPUTS, IDS, BatchEncoding(dict(INPUTS))):
        with pytest.raises(BatchError, match=r"calibrate takes several batches, found one .*: put it into a list"):
            listed(one, "calibrate")  # type: ignore[arg-type]


def test_tokens_that_the_model_does_not_have_are_named_with_their_range() -> None:
    with pytest.raises(BatchError, match=r"batch 1: Bert.* cannot be called .*ids int64 \[1, 2\] from 3 to 9999"):
        list(outputs(make_classifier(), [INPUTS, {"input_ids": [[3, 9999]]}]))


@pytest.mark.parametrize("batches", [None, 3])
def test_what_is_no_row_of_batches_is_refused(batches: Any) -> None:
    with pytest.raises(BatchError, match="calibrate takes a list of batches or a data loader, found"):
        listed(batches, "calibrate")
