"""A bound model under what the ecosystem does to models: compiling, exporting, autocast, checkpointing, adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel

from attnpress.config import AttentionSpec, ScheduleSpec
from attnpress.deployment.attention import deploy, undeploy
from attnpress.models.binding import attentions, bind
from attnpress.training.calibration import calibrate
from attnpress.training.driver import SparsityDriver
from tests.kernels.factories import needs_kernel
from tests.models.factories import DECODERS, MODELS, make_batch, make_classifier, make_model, outputs

SPEC = AttentionSpec(sparsity=0.5)

pytestmark = [
    # What torch's own tracing of an autograd.Function does inside, and PEFT 0.21 with Transformers 5.23.
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def compressed(name: str = "BERT") -> PreTrainedModel:
    model = bind(make_model(name), SPEC)
    calibrate(model, [make_batch(name)])
    return model


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = model(**batch).last_hidden_state
    # Not its square: after a layer norm that hardly changes, and gradients would be noise.
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# torch.compile and torch.export.


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", MODELS)
def test_a_bound_model_compiles_without_a_graph_break(name: str) -> None:
    model, batch = compressed(name), make_batch(name)
    expected = outputs(model, batch)
    model.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(outputs(model, batch), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_trains_with_the_same_gradients() -> None:
    model, batch = without_dropout(compressed()).train(), make_batch()
    expected = gradients(model, batch)
    model.compile(backend="aot_eager", fullgraph=True)
    found = gradients(model, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_model_exports(name: str) -> None:
    model, batch = compressed(name).requires_grad_(False), make_batch(name)
    if name in DECODERS:
        model.config.use_cache = False  # a cache among the outputs is more than torch.export takes
    exported = torch.export.export(model, (), batch)
    assert torch.equal(outputs(exported.module(), batch), outputs(model, batch))


# Precision and memory.


def test_a_model_trains_under_autocast() -> None:
    model = bind(make_classifier(num_labels=2), SPEC)
    batch, labels, losses = make_batch(), torch.tensor([0, 1, 1]), []
    calibrate(model, [batch])
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT", "ModernBERT"])
def test_gradient_checkpointing_gives_the_same_gradients_and_thresholds(name: str, reentrant: bool) -> None:
    batch, found, seen = make_batch(name), [], []
    for checkpointing in (False, True):
        model = without_dropout(compressed(name)).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads() if reentrant and name != "ViT" else None
        driver = SparsityDriver(model, ScheduleSpec("constant"), 0.5, total=4)
        driver.begin(0)
        found.append(gradients(model, batch))
        driver.end()
        driver.begin(1)
        seen.append([module.cutoff.clone() for module in driver.modules])
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=key)
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other)


# Adapters and quantized weights.


def lora(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))


def test_lora_on_query_and_value_is_seen_by_the_codes_and_trains() -> None:
    batch, plain = make_batch(), outputs(compressed(), make_batch())
    model = lora(without_dropout(compressed()))
    assert len(attentions(model)) == len(attentions(compressed()))
    model.eval()
    adapted = outputs(model, batch)
    assert not torch.equal(adapted, plain)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), plain)
    driver = SparsityDriver(model, ScheduleSpec("constant"), 0.8, total=2)
    driver.begin(0)
    found = gradients(model.train(), batch)
    driver.end()
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and bool(gradient.any()) for name, gradient in found.items())


def test_a_merged_adapter_saves_and_loads_as_any_compressed_model(tmp_path: Path) -> None:
    model = lora(compressed())
    model.eval()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path), make_batch()), outputs(merged, make_batch()))


def test_an_adapter_of_its_own_file_goes_onto_a_loaded_compressed_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = lora(compressed())
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert names
    assert all("lora_" in name for name in names), "scales and thresholds belong to the compressed model"
    compressed().save_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    loaded.eval()
    assert torch.equal(outputs(loaded, make_batch()), outputs(adapted, make_batch()))


def test_a_model_may_be_bound_after_its_adapter_was_put_on() -> None:
    model = lora(make_model())
    model.eval()
    batch = make_batch()
    dense = outputs(model, batch)
    bind(model.get_base_model(), AttentionSpec())
    calibrate(model, [batch])
    found = outputs(model, batch)
    assert float(torch.cosine_similarity(found.flatten(), dense.flatten(), 0)) > 0.995
    assert not torch.equal(found, dense)


@pytest.mark.parametrize("backend", ["training", "reference", pytest.param("cpu", marks=needs_kernel)])
def test_weights_in_eight_bits_by_bitsandbytes(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_model().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModel.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
    query = model.get_parameter("encoder.layer.0.attention.self.query.weight")
    assert query.dtype == torch.int8
    batch = make_batch()
    dense = outputs(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # that such a model cannot be saved whole: see test_saved_states.py
        bind(model, AttentionSpec())
    calibrate(model, [batch])
    expected = outputs(model, batch)
    assert float(torch.cosine_similarity(expected.flatten(), dense.flatten(), 0)) > 0.99
    if backend != "training":
        assert torch.equal(outputs(deploy(model, backend), batch), expected)
        undeploy(model)
    assert query.dtype == torch.int8
    assert not torch.equal(expected, dense)


def test_a_classifier_keeps_its_head_through_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = bind(make_classifier(num_labels=3), SPEC)
    calibrate(model, [make_batch()])
    adapted = peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", target_modules=["query", "value"]))
    loss = adapted(**make_batch(), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert bool(loss.isfinite())
