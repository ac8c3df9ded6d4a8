"""Checkpoints that `save_pretrained` wrote before the source moved into its present folders still give the same bits.

They were made by commit dedba46: BERTs of 2 layers and width 32, calibrated, with histograms emptied to stay small.
`pruned` is in float with a plan for int8 layers, `linear_tail` has a tail with fitted directions, `int8` is `pruned` as
it was deployed. What that code made of `inputs.safetensors` is in `expected.safetensors`: attention of given Q, K and V
by the name of its module, and the output of the model with int8 layers. Both are the same bits on every processor.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from attnpress.deployment.attention import deploy
from attnpress.models.binding import attentions
from attnpress.models.forward import attention_forward
from attnpress.models.loading import WEIGHTS
from tests.kernels.factories import needs_kernel

FOLDER = Path(__file__).parent / "before_the_move"
CHECKPOINTS = ("pruned", "linear_tail", "int8")
BACKENDS = ("reference", pytest.param("cpu", marks=needs_kernel))


def load(name: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(FOLDER / name)
    return model


def attention_outputs(model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = load_file(FOLDER / "inputs.safetensors")
    query, key, value, mask = (inputs[name] for name in ("query", "key", "value", "mask"))
    with torch.no_grad():
        return {
            name: attention_forward(model.get_submodule(name), query, key, value, mask, query.shape[-1] ** -0.5)[0]
            for name in attentions(model)
        }


def assert_expected(found: dict[str, Tensor], name: str) -> None:
    expected = load_file(FOLDER / name / "expected.safetensors")
    assert found
    for part, tensor in found.items():
        assert torch.equal(tensor, expected[part]), part


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_old_checkpoint_loads_every_tensor(name: str) -> None:
    stored, state = load_file(FOLDER / name / WEIGHTS), load(name).state_dict()
    for part, tensor in stored.items():
        assert torch.equal(state[part], tensor), part
    assert {part.rsplit(".", 1)[-1] for part in state.keys() - stored.keys()} <= {"histogram"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_attention_of_an_old_checkpoint_is_the_same(name: str) -> None:
    assert_expected(attention_outputs(load(name)), name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_deployed_attention_of_an_old_checkpoint_is_the_same(name: str, backend: str) -> None:
    assert_expected(attention_outputs(deploy(load(name), backend)), name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["pruned", "int8"])
def test_int8_layers_of_an_old_checkpoint_give_the_same(name: str, backend: str) -> None:
    model = deploy(load(name), backend, linear="int8")
    inputs = load_file(FOLDER / "inputs.safetensors")
    with torch.no_grad():
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    hidden = output.last_hidden_state[inputs["attention_mask"].bool()]
    assert_expected({"last_hidden_state": hidden, "pooler_output": output.pooler_output}, name)
