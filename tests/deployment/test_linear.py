"""Int8 linear layers and no padding: what a deployed model gives, what it refuses, and what travels with it."""

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
from torch import Tensor, nn
from transformers import AutoModel, BertForMaskedLM, PreTrainedModel, pipeline

from attnpress.config import DENSE, AttentionSpec
from attnpress.core.linear import Bits, ProductPlan
from attnpress.deployment import attention as deployment
from attnpress.deployment import linear
from attnpress.deployment.attention import deploy, undeploy
from attnpress.deployment.linear import LinearLayers, calibrate_linear, linear_layers
from attnpress.models.attached import attached_to
from attnpress.models.binding import attentions, bind, unbind
from attnpress.models.encoder import Packing, plan_of, set_plan
from attnpress.models.hub import AttnPressConfig, ModelError
from attnpress.models.linear import Int8Linear
from attnpress.training.calibration import calibrate, watching
from tests.kernels.factories import needs_kernel
from tests.models.factories import PAD, VOCABULARY, make_model

BACKENDS = [pytest.param("cpu", marks=needs_kernel), "reference"]
FAMILY = ("BERT", "RoBERTa", "ELECTRA")
PRUNED = AttentionSpec(sparsity=0.5)


def ragged(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).view(-1, 1)
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


BATCHES = [ragged(9, 4, 12, seed=1), ragged(5, 5, 16, 2, seed=2)]
BATCH = ragged(3, 11, 7, 1, 11, seed=3)


def compressed(name: str = "BERT", spec: AttentionSpec = PRUNED) -> Any:
    model = bind(make_model(name), spec)
    if not spec.is_dense:
        calibrate(model, BATCHES)
    return model


def planned(name: str = "BERT", tolerance: float = 10.0) -> Any:
    model = compressed(name)
    calibrate_linear(model, BATCHES, tolerance=tolerance)
    return model


def plan_in(model: Any) -> dict[str, ProductPlan]:
    found = plan_of(model)
    assert found, "nothing was planned"
    return found


def hidden(model: PreTrainedModel, batch: dict[str, Tensor] = BATCH, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch, **options).last_hidden_state
    return found


def real(x: Tensor, batch: dict[str, Tensor] = BATCH) -> Tensor:
    return x[batch["attention_mask"].bool()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILY)
def test_without_padding_real_tokens_get_the_same(name: str, backend: str) -> None:
    model = compressed(name)
    expected = hidden(deploy(model, backend))
    found = hidden(deploy(model, backend, padding="skip"))
    assert torch.allclose(real(found), real(expected), rtol=1e-4, atol=1e-4)
    assert not found[~BATCH["attention_mask"].bool()].any()
    assert torch.equal(hidden(deploy(model, backend)), expected), "padding is back"


def test_only_real_tokens_reach_the_layers() -> None:
    model: Any = deploy(compressed(), "reference", padding="skip")
    seen: list[tuple[int, ...]] = []
    layer = model.encoder.layer[1]
    layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    hidden(model)
    hidden(model, ragged(6, 6))
    assert seen == [(1, 33), (2, 6)], "a batch without padding stays as it is"


def test_each_row_gets_what_it_gets_alone() -> None:
    model = deploy(compressed(), "reference", padding="skip")
    together = hidden(model)
    for row, length in enumerate(BATCH["attention_mask"].sum(1).tolist()):
        alone = hidden(model, {key: value[row : row + 1, :length] for key, value in BATCH.items()})
        assert torch.allclose(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_hidden_states_of_all_layers_are_those_of_the_padded_batch(how: str) -> None:
    model = compressed()
    if how == "configuration":
        model.config.output_hidden_states = True
    options = {"output_hidden_states": True} if how == "argument" else {}
    with torch.no_grad():
        expected = deploy(model, "reference")(**BATCH, **options).hidden_states
        found = deploy(model, "reference", padding="skip")(**BATCH, **options).hidden_states
    assert len(found) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_statistics_see_the_padded_batch() -> None:
    def pairs(model: PreTrainedModel) -> float:
        with watching(attentions(model).values(), slice(None)):
            hidden(model)
        return sum(float(state.take_seen(0.0)[1]) for state in attentions(model).values())

    model = compressed()
    expected = sum(length**2 for length in (3, 11, 7, 1, 11)) * 2 * 4
    assert pairs(deploy(model, "reference", padding="skip")) == pairs(undeploy(model)) == expected


def test_masks_of_pairs_keep_their_padding() -> None:
    model = compressed()
    batch = {**BATCH, "attention_mask": torch.ones(5, 1, 11, 11).tril().bool()}
    expected = hidden(deploy(model, "reference"), batch)
    assert torch.equal(hidden(deploy(model, "reference", padding="skip"), batch), expected)


def test_a_failed_call_leaves_nothing_behind() -> None:
    model = deploy(compressed(), "reference", padding="skip")
    expected = hidden(model)
    handle = model.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden(model)
    handle.remove()
    full = ragged(6, 6)
    assert torch.equal(hidden(model, full), hidden(deploy(compressed(), "reference"), full))
    assert torch.equal(hidden(model), expected)


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


def test_an_int8_model_says_what_it_cannot_do() -> None:
    model = deploy(planned(), "reference", linear="int8")
    with pytest.raises(ValueError, match="load the model again"):
        undeploy(model)
    with pytest.raises(ValueError, match="load the model again"):
        calibrate_linear(model, BATCHES)


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
    exact = hidden(model)
    plan = calibrate_linear(model, BATCHES)
    assert {key.partition(".")[2] for key in plan if key != "embedding"} == kinds
    assert "embedding" in plan
    assert all(0 < (product.error or 0) < 0.2 for product in plan.values())
    deployed = deploy(copy.deepcopy(model), "reference", linear="int8")
    assert linear_layers(deployed).int8 == 2 * len(kinds)
    assert 0 < float((hidden(deployed) - exact).norm() / exact.norm()) < 0.3
    for saved in (model, deployed):  # float weights with their plan, and int8 ones
        saved.save_pretrained(tmp_path / name)
        again = deploy(type(model).from_pretrained(tmp_path / name), "reference", linear="int8")
        assert torch.equal(hidden(again), hidden(deployed))
    assert {str(said.message).partition(": ")[2][:15] for said in recwarn} <= {"padding is kept"}


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
