"""Int8 layers and their plans in checkpoints: saved, loaded, damaged, from earlier versions."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, BertForMaskedLM

from attnpress.core.linear import Bits, ProductPlan
from attnpress.deployment.attention import deploy
from attnpress.deployment.linear import calibrate_linear
from attnpress.models.binding import bind
from attnpress.models.encoder import plan_of, set_plan
from attnpress.models.hub import AttnPressConfig, ModelError
from attnpress.models.linear import Int8Linear
from attnpress.training.calibration import calibrate
from tests.deployment.int8_models import BATCH, BATCHES, FAMILY, PRUNED, compressed, hidden, plan_in, planned, real
from tests.models.factories import VOCABULARY, make_model


def test_saved_then_loaded_then_deployed_gives_the_same_bits(tmp_path: Path) -> None:
    model = planned()
    model.save_pretrained(tmp_path)
    expected = hidden(deploy(model, "reference", linear="int8"))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert plan_of(loaded) == plan_of(model)
    assert torch.equal(hidden(deploy(loaded, "reference", linear="int8")), expected)


@pytest.mark.parametrize("name", FAMILY)
def test_the_deployed_form_is_saved_in_8_bits_and_loaded_without_floats(name: str, tmp_path: Path) -> None:
    model = planned(name)
    set_plan(model, {**plan_in(model), "1.down": ProductPlan(quantized=False)})
    expected = hidden(deploy(model, "reference", linear="int8"))
    model.save_pretrained(tmp_path / "one")
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        stored = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a mapping
    assert stored["encoder.layer.0.attention.self.product.codes"] == "I8"
    assert "encoder.layer.0.attention.self.query.weight" not in stored
    assert stored["embeddings.word_embeddings.halves"] == "I16"
    assert "embeddings.word_embeddings.weight" not in stored
    assert stored["encoder.layer.1.output.dense.weight"] == "F32"
    loaded = AutoModel.from_pretrained(tmp_path / "one")
    readable = hidden(loaded)
    assert float((real(readable) - real(expected)).norm() / real(expected).norm()) < 1e-3
    assert torch.equal(hidden(deploy(loaded, "reference")), expected)
    assert all(module.codes is None for module in loaded.modules() if isinstance(module, Int8Linear))
    loaded.save_pretrained(tmp_path / "two")
    assert torch.equal(hidden(deploy(AutoModel.from_pretrained(tmp_path / "two"), "reference")), expected)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is in memory of a mapped file")
def test_nothing_of_the_deployed_forms_file_stays_in_memory(tmp_path: Path) -> None:
    """Else its codes would be there twice: as the file has them, and packed."""
    model: Any = BertForMaskedLM(copy.deepcopy(cast(Any, make_model("BERT").config))).eval()
    calibrate(bind(model, PRUNED), BATCHES)
    deploy(model, "reference", linear="int8").save_pretrained(tmp_path)
    loaded: Any = deploy(BertForMaskedLM.from_pretrained(tmp_path), "reference")
    table = loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings().weight is table, "tied ones stay tied, and in float"
    assert resident(tmp_path) == 0
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("name", FAMILY)
def test_the_word_embedding_is_in_half_precision_where_the_plan_has_it(name: str) -> None:
    model = planned(name)
    words = model.get_input_embeddings().weight.detach()
    plan = plan_in(model)
    assert plan["embedding"].quantized
    assert (plan["embedding"].error or 0) > 0
    deploy(model, "reference", linear="int8")
    found = model.get_input_embeddings()(torch.arange(VOCABULARY))
    assert torch.equal(found, words.half().float())
    assert model.dtype == found.dtype == torch.float32
    older = planned(name)
    set_plan(older, {key: entry for key, entry in plan.items() if key != "embedding"})
    assert deploy(older, "reference", linear="int8").get_input_embeddings().weight.dtype == torch.float32


def resident(folder: Path) -> int:
    """Bytes in memory of the files of a folder that this process has mapped."""
    lines, inside, size = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines(), False, 0
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            size += int(line.split()[1]) * 1024
    return size


@pytest.mark.parametrize("loader", [AutoModel, BertForMaskedLM], ids=["without the head", "as saved"])
def test_embeddings_are_found_in_the_file_whatever_head_the_model_has(loader: Any, tmp_path: Path) -> None:
    model: Any = BertForMaskedLM(cast(Any, make_model("BERT").config)).eval()
    calibrate(bind(model, PRUNED), BATCHES)
    deploy(model, "reference", linear="int8").save_pretrained(tmp_path)
    loaded: Any = deploy(loader.from_pretrained(tmp_path), "reference")
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    with torch.no_grad():
        assert torch.equal(hidden(loaded.base_model), hidden(model.bert))


HELD = [{}, {"ATTNPRESS_CPU_TARGET": "avx2"}, {"ATTNPRESS_CPU_TARGET": "scalar"}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}]


@pytest.mark.parametrize("bits", [7, 8])
def test_what_was_saved_in_8_bits_gives_the_same_bits_on_every_processor(
    bits: Bits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed()
    calibrate_linear(model, BATCHES, tolerance=10.0, bits=bits)
    assert {product.bits for product in plan_in(model).values()} == {bits}
    expected = hidden(deploy(model, "reference", linear="int8"))
    model.save_pretrained(tmp_path)
    for held in HELD:
        with monkeypatch.context() as patch:
            for name, value in held.items():
                patch.setenv(name, value)
            loaded = AutoModel.from_pretrained(tmp_path)
            assert {m.bits for m in loaded.modules() if isinstance(m, Int8Linear)} == {bits}
            assert torch.equal(hidden(deploy(loaded, "reference")), expected), held


def test_a_checkpoint_from_before_there_was_a_choice_of_bits_loads_with_8() -> None:
    folder = Path(__file__).parents[1] / "models" / "int8_before_bits"
    found = load_file(folder / "expected.safetensors")
    expected = {name: found.pop(name) for name in ("last_hidden_state", "pooler_output")}
    model = AutoModel.from_pretrained(folder)
    assert {product.bits for product in plan_in(model).values()} == {8}
    with torch.no_grad():
        for given in (model(**found), deploy(model, "reference")(**found)):
            for name, value in expected.items():
                real_value = value[found["attention_mask"].bool()] if value.dim() == 3 else value
                near = given[name][found["attention_mask"].bool()] if value.dim() == 3 else given[name]
                assert torch.allclose(near, real_value, atol=1e-3)


def test_a_plan_without_bits_is_one_of_8() -> None:
    plain = AttnPressConfig(linear={"0.up": ProductPlan(0.5)}).to_dict()
    assert plain["linear"]["0.up"].pop("bits") == 7
    assert AttnPressConfig.from_dict(plain).linear == {"0.up": ProductPlan(0.5, bits=8)}
    plain["linear"]["0.up"]["bits"] = 6
    with pytest.raises(ModelError, match=r"damaged: bits"):
        AttnPressConfig.from_dict(plain)
    with pytest.raises(ValueError, match="7 or 8"):
        calibrate_linear(compressed(), BATCHES, bits=cast(Any, 6))


def test_a_damaged_deployed_form_is_refused(tmp_path: Path) -> None:
    deploy(planned(), "reference", linear="int8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["linear"]["1.up"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="its int8 layers are not those of this model"):
        AutoModel.from_pretrained(tmp_path)


def test_damaged_plans_are_refused(tmp_path: Path) -> None:
    planned().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["linear"]["0.up"]["error"] = "much"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"damaged: error.*much"):
        AutoModel.from_pretrained(tmp_path)


def test_int8_layers_are_loaded_in_float32_alone(tmp_path: Path) -> None:
    deploy(compressed(), "reference", linear="int8").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"compute in float32: load it without torch\.bfloat16"):
        AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert AutoModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32
