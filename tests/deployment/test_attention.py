"""deploy: a model on the kernel gives what it gave in training, compiled and exported too."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from attnpress.config import DENSE, AttentionSpec, ProbsSpec, RuleName, TensorSpec
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.soft_gate import GAIN
from attnpress.deployment import attention as deployment
from attnpress.deployment.attention import deploy, undeploy
from attnpress.kernels import cpu, gpu, ops
from attnpress.kernels.cpu import BackendUnavailableError
from attnpress.models.binding import attentions, bind
from attnpress.training.calibration import calibrate
from tests.kernels.factories import needs_kernel

PRUNED = AttentionSpec(sparsity=0.7)


def tiny_bert(spec: AttentionSpec, *, calibrated: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model: PreTrainedModel = bind(BertForSequenceClassification(config).eval(), spec)
    if calibrated:
        calibrate(model, [make_batch(seed) for seed in range(3)])
    return model


def make_batch(seed: int = 0, rows: int = 4, length: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=generator)
    ids = torch.randint(1, 50, (rows, length), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_kernel), "reference"])
@pytest.mark.parametrize("rule", ["relative", "threshold", "topk"])
def test_a_deployed_model_predicts_the_same_bits(rule: RuleName, backend: str) -> None:
    model = tiny_bert(AttentionSpec(sparsity=0.7, rule=rule, q=TensorSpec(bits=4)))
    batch = make_batch(9)
    expected = logits(model, batch)
    assert deploy(model, backend) is model
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(undeploy(model), batch), expected)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_kernel), "reference"])
def test_trained_thresholds_are_cut_hard_by_every_backend(backend: str) -> None:
    model = tiny_bert(AttentionSpec(sparsity=0.7, threshold_penalty=1.0))
    batch = make_batch(9)
    before = logits(model, batch)
    with torch.no_grad():
        for module in attentions(model).values():
            module.trained_cutoff -= 0.5 / GAIN
    expected = logits(model, batch)
    assert not torch.equal(expected, before), "half a nat further"
    assert torch.equal(logits(deploy(model, backend), batch), expected)


@needs_kernel
def test_a_deployed_model_really_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deploy(tiny_bert(PRUNED), "cpu")
    monkeypatch.setenv(cpu.TARGET_VARIABLE, "mmx")
    with pytest.raises(RuntimeError, match="no such target"):
        logits(model, make_batch())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = tiny_bert(PRUNED)
    torch.nn.Module.to(model, dtype)
    expected = logits(model, make_batch(9))
    assert torch.equal(logits(deploy(model, "cpu"), make_batch(9)), expected)


@needs_kernel
def test_a_deployed_model_compiles_without_a_graph_break() -> None:
    model = deploy(tiny_bert(PRUNED), "cpu")
    expected = logits(model, make_batch(9))
    model.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(model, make_batch(9)), expected)


@needs_kernel
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor_calls_the_kernel_and_keeps_its_bits() -> None:
    query, key, value = (torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    spec, scales = AttentionSpec(), Scales(*(torch.full((1, 3, 1, 1), 0.02) for _ in range(3)))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.attention(AttentionCall(query * 2, key, value, None, scales, None, spec, 0.25)) + 1

    cpu.load()
    compiled = torch.compile(attend, fullgraph=True)  # the default backend generates and builds C++
    assert torch.equal(compiled(query, key, value), attend(query, key, value))


@needs_kernel
def test_a_deployed_model_exports() -> None:
    model = deploy(tiny_bert(PRUNED), "cpu")
    batch = make_batch(9)
    exported = torch.export.export(model, (), batch)
    graphs = [module.graph for module in exported.graph_module.modules() if hasattr(module, "graph")]
    assert any("attnpress.attention" in str(node.target) for graph in graphs for node in graph.nodes)
    assert torch.equal(logits(exported.module(), batch), logits(model, batch))


def test_a_model_that_was_never_bound() -> None:
    with pytest.raises(ValueError, match="call bind"):
        deploy(BertForSequenceClassification(BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=1)))


@needs_kernel
@pytest.mark.parametrize("rule", ["mass", "nm"])
def test_what_the_kernel_cannot_run_is_named_with_its_module(rule: RuleName) -> None:
    model = tiny_bert(AttentionSpec(sparsity=0.5, rule=rule))
    with pytest.raises(ValueError, match=rf"bert\.encoder\.layer\.0.*no kernel for rule '{rule}'"):
        deploy(model, "cpu")
    assert len(attentions(model)) == 2


FORETOLD = AttentionSpec(sparsity=0.5, rule="threshold", predictor_bits=4)


@needs_kernel
def test_a_foretold_mask_is_refused_with_the_mend() -> None:
    model = tiny_bert(FORETOLD)
    expected = logits(model, make_batch())
    with pytest.raises(ValueError, match=r"layer\.0.*not support predicted masks \(predictor_bits 4\); use"):
        deploy(model, "cpu")
    assert torch.equal(logits(deploy(model, "reference"), make_batch()), expected)


def test_a_dense_model_keeps_the_frameworks_attention() -> None:
    model = tiny_bert(DENSE, calibrated=False)
    expected = logits(model, make_batch())
    assert torch.equal(logits(deploy(model, "reference"), make_batch()), expected)


def test_without_a_compiler_auto_says_so_once_and_names_stay_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    cpu.load.cache_clear()
    deployment._say_once.cache_clear()
    model = tiny_bert(PRUNED)
    expected = logits(model, make_batch())
    with pytest.warns(UserWarning, match="not built"):
        deploy(model)
    deploy(model)  # a second warning would be an error here
    assert torch.equal(logits(model, make_batch()), expected)
    with pytest.raises(BackendUnavailableError):
        deploy(model, "cpu")
    monkeypatch.undo()
    cpu.load.cache_clear()


def test_a_deployed_model_does_not_train() -> None:
    model = deploy(tiny_bert(PRUNED), "reference")
    model.train()
    with pytest.raises(RuntimeError, match="undeploy"):
        model(**make_batch())


@pytest.mark.parametrize("linear", ["float", "int8"])
def test_going_backward_through_a_deployed_model_is_an_error_with_the_mend(linear: deployment.Linear) -> None:
    model = deploy(tiny_bert(PRUNED), "reference", linear=linear)
    loss = model(**make_batch(), labels=torch.zeros(4, dtype=torch.int64)).loss
    with pytest.raises(RuntimeError, match=r"no gradients: call attnpress\.undeploy\(model\)"):
        loss.backward()


def test_what_stands_on_a_deployed_model_may_train() -> None:
    model = deploy(tiny_bert(PRUNED), "reference")
    model.requires_grad_(False)
    head = torch.nn.Linear(2, 1)
    head(model(**make_batch()).logits).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.any()


FLOAT_P = AttentionSpec(sparsity=0.5, p=ProbsSpec(bits=None))


@pytest.mark.parametrize(
    "spec", [AttentionSpec(sparsity=0.5, rule="mass"), AttentionSpec(sparsity=0.5, rule="nm"), FLOAT_P, FORETOLD]
)
def test_auto_takes_a_backend_that_can_run_the_spec_and_says_so_once(
    spec: AttentionSpec, recwarn: pytest.WarningsRecorder
) -> None:
    deployment._say_reference.cache_clear()
    deployment._say_once.cache_clear()
    model = tiny_bert(spec)
    expected = logits(model, make_batch())
    for _ in range(2):
        assert torch.equal(logits(deploy(model), make_batch()), expected)
    assert len([warning for warning in recwarn if "reference" in str(warning.message)]) == 1
    recwarn.clear()


@needs_kernel
def test_auto_takes_the_kernel_where_it_can_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    model = bind(tiny_bert(PRUNED, calibrated=False), PRUNED, {"1": AttentionSpec(sparsity=0.5, rule="mass")})
    calibrate(model, [make_batch(seed) for seed in range(3)])
    seen: list[str] = []
    real = ops.attention

    def noted(*args: Any, backend: str, **kwargs: Any) -> Tensor:
        seen.append(backend)
        return real(*args, backend=backend, **kwargs)

    deploy(model)
    monkeypatch.setattr(ops, "attention", noted)
    logits(model, make_batch())
    assert seen == ["cpu", "reference"]
    recwarn.clear()


def test_auto_takes_the_kernel_of_the_gpu_that_a_model_is_on(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def chosen(spec: AttentionSpec) -> str:
        module: Any = SimpleNamespace(cutoff=SimpleNamespace(is_cuda=True), spec=spec, head_dim=16)
        return deployment._choose(module)

    deployment._say_reference.cache_clear()
    monkeypatch.setattr(gpu, "why_unavailable", lambda: None)
    assert chosen(PRUNED) == chosen(DENSE) == "gpu"
    assert not recwarn.list
    assert chosen(AttentionSpec(sparsity=0.5, rule="nm")) == "reference"
    monkeypatch.setattr(gpu, "why_unavailable", lambda: "triton is not installed")
    assert chosen(PRUNED) == "reference"
    said = [str(recwarn.pop().message) for _ in range(2)]
    assert "since backend 'gpu' has no kernel for rule 'nm'" in said[0]
    assert "since backend 'gpu' cannot run here: triton is not installed" in said[1]


@needs_kernel
@pytest.mark.parametrize(("linear", "padding"), [("float", "keep"), ("float", "skip"), ("int8", "skip")])
def test_threads_get_what_each_gets_alone(linear: deployment.Linear, padding: deployment.Padding) -> None:
    model = deploy(tiny_bert(PRUNED), "cpu", linear=linear, padding=padding)
    batches = [make_batch(seed, rows=2 + seed % 3, length=8 + 4 * seed) for seed in range(8)]
    alone = [logits(model, batch) for batch in batches]
    start = threading.Barrier(4)

    def serve(first: int) -> list[bool]:
        start.wait()
        order = [(first + step) % 8 for step in range(40)]
        return [torch.equal(logits(model, batches[at]), alone[at]) for at in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(serve, range(0, 8, 2)))


def by_torch(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: PreTrainedModel = torch.load(file, weights_only=False)
    return found


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch])
@pytest.mark.parametrize(("linear", "padding"), [("float", "skip"), ("int8", "skip"), ("int8", "keep")])
def test_copies_and_pickles_give_the_same_bits(
    linear: deployment.Linear, padding: deployment.Padding, duplicate: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    model = deploy(tiny_bert(PRUNED), "reference", linear=linear, padding=padding)
    batch = make_batch(5)
    expected = logits(model, batch)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, batch), expected)
    assert torch.equal(logits(deploy(twin, "reference", linear=linear, padding=padding), batch), expected)


def test_the_state_of_an_int8_model_loads_into_another() -> None:
    model = deploy(tiny_bert(PRUNED), "reference", linear="int8")
    torch.manual_seed(1)
    assert isinstance(model.config, BertConfig)
    other = bind(BertForSequenceClassification(model.config).eval(), PRUNED)
    calibrate(other, [make_batch(7)])
    deploy(other, "reference", linear="int8")
    assert not torch.equal(logits(other, make_batch()), logits(model, make_batch()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, make_batch()), logits(model, make_batch()))


def test_without_padding_outputs_may_be_tuples() -> None:
    model = deploy(tiny_bert(PRUNED), "reference", padding="skip")
    with torch.no_grad():
        found = model(**make_batch(), return_dict=False)
    assert torch.equal(found[0], logits(model, make_batch()))
