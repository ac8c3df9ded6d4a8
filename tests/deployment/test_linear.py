"""Int8 linear layers and no padding: what a deployed model gives, what it refuses, and what travels with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, pipeline

from attnpress.config import DENSE, AttentionSpec
from attnpress.core.linear import ProductPlan
from attnpress.deployment import attention as deployment
from attnpress.deployment import linear
from attnpress.deployment.attention import deploy, undeploy
from attnpress.deployment.linear import LinearLayers, calibrate_linear, linear_layers
from attnpress.models.attached import attached_to
from attnpress.models.binding import bind, unbind
from attnpress.models.encoder import Packing, plan_of, set_plan
from attnpress.models.linear import Int8Linear
from attnpress.training.calibration import calibrate
from tests.deployment.int8_models import BACKENDS, BATCHES, FAMILY, PRUNED, compressed, hidden, plan_in, planned, real
from tests.models.factories import VOCABULARY, make_model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILY)
def test_int8_layers_stay_near_and_padding_changes_nothing(name: str, backend: str) -> None:
    model = planned(name)
    before = real(hidden(model))
    padded = hidden(deploy(copy.deepcopy(model), backend, linear="int8", padding="keep"))
    assert 0 < float((real(padded) - before).norm() / before.norm()) < 0.1
    deployed = deploy(model, backend, linear="int8")
    assert torch.equal(real(hidden(deployed)), real(padded)), "sums of integers do not depend on the batch"
    assert sum(isinstance(module, Int8Linear) for module in deployed.modules()) == 8
    assert torch.equal(hidden(deploy(deployed, backend, linear="int8")), hidden(deployed)), "deployed again"


def test_float_weights_are_let_go() -> None:
    model = planned()
    before = sum(parameter.numel() for parameter in model.encoder.parameters())
    deploy(model, "reference", linear="int8")
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 2 * 4 * 32
    assert before > 10_000


def test_padding_never_counts() -> None:
    model, other = compressed(), compressed()
    spoiled = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in BATCHES]
    for batch in spoiled:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    assert calibrate_linear(model, BATCHES) == calibrate_linear(other, spoiled)


def test_what_costs_too_much_stays_in_float() -> None:
    model, layer = (found := compressed()), found.encoder.layer[0]
    with torch.no_grad():  # one input far beyond the others, which counts for nothing: its steps lose the others
        layer.intermediate.dense.bias[3], layer.output.dense.weight[:, 3] = 4000.0, 0.0
    plan = calibrate_linear(model, BATCHES, tolerance=0.05)
    left = [name for name, product in plan.items() if not product.quantized]
    assert left == ["0.down"]
    assert plan["0.down"].error == max(product.error or 0.0 for product in plan.values())
    deploy(model, "reference", linear="int8")
    assert type(layer.output.dense) is torch.nn.Linear
    assert isinstance(layer.intermediate.dense, Int8Linear)
    assert not layer.intermediate.dense.activated
    assert linear_layers(model) == LinearLayers(int8=7, ordered=1, library=1), "the pooler is computed in one order"


def test_every_mixture_of_float_and_int8_runs() -> None:
    expected = real(hidden(planned()))
    for name in plan_in(planned()):
        model = planned()
        plan = {key: ProductPlan(quantized=key != name) for key in plan_in(model)}
        set_plan(model, plan)
        found = real(hidden(deploy(model, "reference", linear="int8")))
        assert float((found - expected).norm() / expected.norm()) < 0.1, name


def test_an_int8_model_says_what_it_cannot_do() -> None:
    model = deploy(planned(), "reference", linear="int8")
    with pytest.raises(ValueError, match="load the model again"):
        undeploy(model)
    with pytest.raises(ValueError, match="load the model again"):
        calibrate_linear(model, BATCHES)


def test_without_a_plan_all_products_are_int8_and_a_plan_goes_with_its_binding() -> None:
    deployed = deploy(compressed(), "reference", linear="int8")
    assert sum(isinstance(module, Int8Linear) for module in deployed.modules()) == 8
    model = planned()
    assert plan_of(unbind(model)) is None
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_linear(compressed(), [])


@pytest.mark.parametrize("name", ["ALBERT", "GPT-2", "ViT"])
def test_other_families_keep_float_and_padding_and_say_so_once(name: str, recwarn: pytest.WarningsRecorder) -> None:
    linear.say_float.cache_clear()
    deployment._say_padding.cache_clear()
    model = bind(make_model(name), DENSE)
    assert calibrate_linear(model, BATCHES) == {}
    deploy(deploy(model, "reference", linear="int8"), "reference", linear="int8")
    said = [str(warning.message) for warning in recwarn]
    assert [line.partition(": ")[2][:20] for line in said] == ["linear layers stay i", "padding is kept; onl"]
    recwarn.clear()


ONE_BY_ONE = {
    "DistilBERT": {"query", "key", "value", "attention", "up", "down"},
    "ModernBERT": {"qkv", "attention", "up", "down"},
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_layers_of_other_families_are_int8_one_by_one(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    kinds = ONE_BY_ONE[name]
    model = bind(make_model(name).eval(), PRUNED)
    calibrate(model, BATCHES)
    exact = real(hidden(model))
    plan = calibrate_linear(model, BATCHES)
    assert {key.partition(".")[2] for key in plan if key != "embedding"} == kinds
    assert "embedding" in plan
    assert all(0 < (product.error or 0) < 0.2 for product in plan.values())
    deployed = deploy(copy.deepcopy(model), "reference", linear="int8")
    assert linear_layers(deployed).int8 == 2 * len(kinds)
    assert 0 < float((real(hidden(deployed)) - exact).norm() / exact.norm()) < 0.3
    for saved in (model, deployed):  # float weights with their plan, and int8 ones
        saved.save_pretrained(tmp_path / name)
        again = deploy(type(model).from_pretrained(tmp_path / name), "reference", linear="int8")
        assert torch.equal(hidden(again), hidden(deployed))
    assert not list(recwarn), "padding is left out"


def test_windows_and_rotations_of_modernbert_stay_with_int8_layers() -> None:
    model = bind(make_model("ModernBERT").eval(), AttentionSpec())
    long = {"input_ids": torch.arange(3, 3 + 40).view(1, 40) % (VOCABULARY - 3) + 3}
    calibrate(model, [long])
    float_layers = deploy(copy.deepcopy(model), "reference", padding="keep")
    int8_layers = deploy(model, "reference", linear="int8", padding="keep")
    moved = {"input_ids": long["input_ids"].roll(1, 1)}
    with torch.no_grad():
        near, exact = (each(**long).last_hidden_state for each in (int8_layers, float_layers))
        other = float_layers(**moved).last_hidden_state
    assert float((near - exact).norm() / exact.norm()) < 0.2 < float((other - exact).norm() / exact.norm())


def test_a_dense_layer_keeps_padding(recwarn: pytest.WarningsRecorder) -> None:
    deployment._say_padding.cache_clear()
    model = bind(make_model(), PRUNED, {"0": DENSE})
    calibrate(model, BATCHES)
    expected = hidden(deploy(model, "reference"))
    assert torch.equal(hidden(deploy(model, "reference", padding="skip")), expected)
    assert "padding is kept" in str(recwarn.pop().message)


def test_the_layers_of_a_model_are_counted_by_what_computes_them() -> None:
    model = compressed()
    assert linear_layers(model) == LinearLayers(int8=0, ordered=0, library=13)
    assert linear_layers(deploy(model, "reference")) == LinearLayers(int8=0, ordered=0, library=13)
    assert linear_layers(deploy(model, "reference", linear="int8")) == LinearLayers(int8=8, ordered=1, library=0)


def test_a_pipeline_runs_an_int8_model(finished: Path) -> None:
    from attnpress.models.loading import load_compressed, load_tokenizer

    folder = finished / "progressive"
    model: Any = load_compressed(folder, "classification", ("no", "yes"))
    tokenizer: Any = load_tokenizer(str(folder))
    texts = ["the film is good good good", "a dull and poor plot", "bad bad bad"]
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, batch_size=3)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    calibrate_linear(model, [batch], tolerance=10.0)
    deploy(model, "reference", linear="int8")
    found = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, batch_size=3)
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    assert isinstance(attached_to(model.bert.encoder).packing, Packing)


class Wrapper(nn.Module):
    """What people put around an encoder."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Any:
        return self.encoder(**inputs)


def test_a_wrapper_and_what_it_holds_are_deployed_as_one(tmp_path: Path) -> None:
    wrapper: Any = Wrapper(make_model("BERT"))
    bind(wrapper, PRUNED)
    calibrate(wrapper, BATCHES)
    plan = calibrate_linear(wrapper, BATCHES, tolerance=10.0)
    assert plan_of(wrapper.encoder) == plan
    expected = hidden(deploy(wrapper, "reference", linear="int8"))
    assert torch.equal(hidden(deploy(wrapper.encoder, "reference", linear="int8")), expected), "int8 already"
    wrapper.encoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(hidden(deploy(loaded, "reference")), expected)
    with pytest.raises(ValueError, match="int8"):
        undeploy(wrapper.encoder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_keep_linear_layers_in_float_until_they_are_merged() -> None:
    peft = pytest.importorskip("peft")
    linear.say_float.cache_clear()
    torch.manual_seed(0)
    adapters = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(compressed(), adapters).eval()
    expected = real(hidden(model))
    with pytest.warns(UserWarning, match=r"lora\.layer\.Linear; merge adapters first"):
        deploy(model, "reference", linear="int8", padding="keep")
    assert torch.equal(real(hidden(model)), expected)
    merged = deploy(model.merge_and_unload(), "reference", linear="int8")
    assert linear_layers(merged).int8 > 0
    assert float((real(hidden(merged)) - expected).norm() / expected.norm()) < 0.1


def test_only_the_first_of_several_encoders_becomes_int8_and_that_is_said() -> None:
    model = nn.ModuleList([compressed(), compressed("RoBERTa")])
    with pytest.warns(UserWarning, match=r"ModuleList holds several encoders, and only the first one's linear layers"):
        deploy(model, "reference", linear="int8")
    first, second = model
    assert (linear_layers(first).int8, linear_layers(second).int8) == (8, 0)
    deploy(second, "reference", linear="int8")
    assert linear_layers(second).int8 == 8


def test_a_layer_that_is_used_twice_becomes_int8_once() -> None:
    model = compressed()
    model.encoder.layer[1] = model.encoder.layer[0]
    expected = real(hidden(model))
    deploy(model, "reference", linear="int8")
    assert linear_layers(model).int8 == 4
    assert float((real(hidden(model)) - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_int8_model_is_not_converted(dtype: torch.dtype) -> None:
    model = deploy(compressed(), "reference", linear="int8")
    expected = hidden(model)
    with pytest.raises(TypeError, match=f"int8 linear layers computes in float32 and cannot be converted to {dtype}"):
        model.to(dtype)
    assert torch.equal(hidden(model.float().to("cpu")), expected)
