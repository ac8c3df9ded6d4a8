"""The Triton kernel against the reference: the same integers. Runs where a kernel can: on a GPU, or in the interpreter.

No file of its own for pytest to find: test_gpu.py runs it in Triton's interpreter, and benchmarks/device.py on a GPU.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from attnpress.config import AttentionSpec, ProbsSpec, RuleName, TensorSpec
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.exponential import power_table
from attnpress.kernels import gpu, ops
from attnpress.kernels.triton.steps import power
from tests.kernels.agreement import NAMES
from tests.kernels.factories import DTYPES, EXTREMES, MASKS, Case, cases, make_case

pytestmark = [
    pytest.mark.filterwarnings("ignore::attnpress.core.attention.NanWarning"),
    pytest.mark.skipif(gpu.why_unavailable() is not None, reason=f"GPU kernel: {gpu.why_unavailable()}"),
]

SHAPE = (1, 2, 1, 13, 37, 16) if gpu.INTERPRETED else (2, 4, 2, 150, 333, 64)
"""Of several tiles, the last not full; the interpreter takes a sixth of a second for its own."""

PRUNED, TENSOR = AttentionSpec(sparsity=0.8), TensorSpec(granularity="tensor")


def of_bits(bits: int, **changes: Any) -> AttentionSpec:
    tensor = TensorSpec(bits=bits)
    return AttentionSpec(tensor, tensor, tensor, ProbsSpec(bits=bits), sparsity=0.8, **changes)


def sized(dim: int) -> tuple[int, int, int, int, int, int]:
    return (*SHAPE[:5], dim)


def on_device(case: Case) -> Case:
    scales = {field.name: getattr(case.scales, field.name) for field in dataclasses.fields(case.scales)}
    moved = {name: None if scale is None else scale.to(gpu.device()) for name, scale in scales.items()}
    tensors = {name: getattr(case, name) for name in ("query", "key", "value", "valid", "cutoff")}
    placed = {name: None if x is None else x.to(gpu.device()) for name, x in tensors.items()}
    return case.with_(scales=Scales(**moved), **placed)


@triton.jit  # type: ignore[untyped-decorator]
def power_kernel(distance: Any, found: Any, COUNT: tl.constexpr) -> None:  # noqa: N803 - Triton's own style
    n = tl.arange(0, COUNT)
    tl.store(found + n, power(tl.load(distance + n), tl.full([COUNT], 1.0, tl.float32)))


def attend(case: Case, **options: Any) -> Tensor:
    return ops.attention(on_device(case), backend="gpu", **options).cpu()


def assert_same(case: Case) -> None:
    expected = case.integer()
    found = gpu.integers(*ops.gpu_arguments(on_device(case)))
    for name in (*NAMES, "k_codes", "v_codes"):
        assert torch.equal(found[name].cpu(), getattr(expected, name)), name
    assert torch.equal(found["output"].cpu(), expected.output)


def test_powers_of_every_exponent() -> None:
    distance = torch.arange(2**15, dtype=torch.float32, device=gpu.device())
    found = torch.empty(2**15, dtype=torch.int32, device=gpu.device())
    power_kernel[(1,)](distance, found, 2**15)
    expected = power_table(torch.device("cpu"))
    assert torch.equal(found[: len(expected)].cpu(), expected)
    assert int(found[len(expected) :].abs().max()) == 0


@pytest.mark.parametrize("mode", ["row", "unit"])
def test_pairs_that_are_not_allowed_stay_out_however_small_the_scale(mode: Any) -> None:
    case = make_case(SHAPE, AttentionSpec(p=ProbsSpec(mode=mode)), mask="holes")
    tiny = torch.full((1, 1, 1, 1), 2.0**-40)  # no distance makes a pair less probable
    assert_same(case.with_(scales=dataclasses.replace(case.scales, q=tiny, k=tiny)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, causal: bool) -> None:
    assert_same(make_case((2, *SHAPE[1:]), PRUNED, mask=mask, causal=causal, cutoff=3.0))


@pytest.mark.parametrize("mode", ["row", "unit", "renormalized"])
@pytest.mark.parametrize("rule", ["relative", "threshold", "topk"])
def test_rules_and_modes(rule: RuleName, mode: str) -> None:
    probs = ProbsSpec(mode="row" if mode == "row" else "unit", renormalize=mode == "renormalized")
    spec = AttentionSpec(TensorSpec(bits=5), TensorSpec(bits=4), p=probs, rule=rule, sparsity=0.7)
    assert_same(make_case(SHAPE, spec, mask="holes", cutoff=2.0))


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits(bits: int) -> None:
    assert_same(make_case(SHAPE, of_bits(bits), mask="padding", cutoff=3.0))


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(),
        AttentionSpec(p=ProbsSpec(signed=True)),
        AttentionSpec(q=TensorSpec(granularity="token")),
        AttentionSpec(q=TensorSpec(granularity="token", power_of_two=True), sparsity=0.5),
        AttentionSpec(TENSOR, TENSOR, TENSOR),
        AttentionSpec(v=TensorSpec(granularity="channel")),
        AttentionSpec(rule="topk"),
    ],
    ids=["dense", "signed", "token", "token 2^f", "tensor", "channel", "topk of all"],
)  # fmt: skip
def test_granularities(spec: AttentionSpec) -> None:
    assert_same(make_case(SHAPE, spec, mask="padding", cutoff=2.0 if spec.sparsity else None))


@pytest.mark.parametrize(("mask", "causal"), [("none", True), ("padding", False), ("holes", True)])
def test_smoothed_keys(mask: str, causal: bool) -> None:
    assert_same(make_case(SHAPE, AttentionSpec(smooth_key=True), mask=mask, causal=causal))


@pytest.mark.parametrize("dim", [20, 64, 80, 128, 256])
def test_head_sizes(dim: int) -> None:
    assert_same(make_case(sized(dim), PRUNED, cutoff=3.0, mask="window"))


@pytest.mark.parametrize(("extreme", "rule"), [*((extreme, "relative") for extreme in EXTREMES), ("equal", "topk")])
def test_extreme_values(extreme: str, rule: RuleName) -> None:
    spec = AttentionSpec(TensorSpec(4, granularity="token"), TensorSpec(bits=4), rule=rule, sparsity=0.6)
    assert_same(make_case(SHAPE, spec, extreme=extreme, cutoff=2.0))


@pytest.mark.parametrize(("dtype", "transposed"), [*zip(DTYPES, (False, True, True), strict=True)])
def test_dtypes_and_strides(dtype: torch.dtype, transposed: bool) -> None:
    assert_same(make_case(SHAPE, PRUNED, dtype=dtype, transposed=transposed, cutoff=3.0))


@pytest.mark.parametrize("mask", ["none", "holes"])
@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 3, 40, 16), (1, 2, 1, 40, 3, 16), (1, 1, 1, 40, 70, 16), (3, 1, 1, 1, 1, 16)]
)
def test_grouped_heads_and_lengths(shape: tuple[int, int, int, int, int, int], mask: str) -> None:
    assert_same(make_case(shape, PRUNED, cutoff=3.0, causal=True, mask=mask))


def test_largest_scores_and_sums() -> None:
    case = make_case((1, 1, 1, 8, 70, 256), AttentionSpec(rule="topk", sparsity=0.5))
    case.query.fill_(100.0)  # every code is the largest there is
    case.key.fill_(100.0)
    case.value.fill_(100.0)
    case.key[:, :, ::3].neg_()
    assert_same(case)


def test_scores_that_rise_and_far_maxima() -> None:
    case = make_case(sized(32), PRUNED, cutoff=3.0)
    case.key.mul_(torch.linspace(0.01, 8, SHAPE[4]).view(1, 1, -1, 1))
    assert_same(case)


@pytest.mark.parametrize("shape", [(37,), (13, 1), (2, 1, 37), (2, 1, 13, 1), (2, 2, 1, 1)], ids=str)
def test_masks_of_any_shape_and_byte(shape: tuple[int, ...]) -> None:
    bytes_ = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2))
    valid = (bytes_ * (bytes_ > 80)).to(torch.uint8).view(torch.bool)
    assert_same(make_case((2, 2, 1, 13, 37, 16), PRUNED, cutoff=2.0).with_(valid=valid))


@settings(max_examples=3 if gpu.INTERPRETED else 10, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(longest=24 if gpu.INTERPRETED else 200))
def test_any_call(case: Case) -> None:
    assert_same(case.with_(spec=dataclasses.replace(case.spec, tail="none")))


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3, 16), (1, 2, 2, 0, 3, 16), (1, 2, 2, 3, 0, 16)])
def test_empty_tensors(shape: tuple[int, int, int, int, int, int]) -> None:
    output = attend(make_case(shape, PRUNED))
    assert torch.equal(output, torch.zeros(output.shape))


def test_the_operator_gives_what_was_compared() -> None:
    case = make_case(SHAPE, PRUNED, mask="holes", causal=True, cutoff=3.0)
    assert torch.equal(attend(case), case.integer().output)


@pytest.mark.parametrize("changes", [{}, {"smooth_key": True}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_get_what_each_gets_alone(changes: dict[str, Any], causal: bool) -> None:
    lengths = [7, 0, 20, 1, 12]
    case = make_case((1, 2, 1, 40, 40, 16), AttentionSpec(sparsity=0.6, **changes), cutoff=2.0, causal=causal)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    found = ops.attention(on_device(case).with_(bounds=bounds), backend="gpu").cpu()
    for begin, end in pairwise(bounds.tolist()):
        at = slice(begin, end)
        alone = case.with_(query=case.query[:, :, at], key=case.key[:, :, at], value=case.value[:, :, at])
        assert torch.equal(found[:, :, at], alone.integer().output)


def test_output_layout_is_that_of_the_other_backends() -> None:
    case = make_case(SHAPE, PRUNED)
    assert attend(case).stride() == ops.attention(case, backend="reference").stride()


def test_operator_passes_the_checks_of_torch() -> None:
    for mask, causal in (("none", False), ("padding", True)):
        case = on_device(make_case((1, 1, 1, 9, 11, 16), PRUNED, mask=mask, cutoff=2.0, causal=causal))
        torch.library.opcheck(torch.ops.attnpress.attention_gpu.default, ops.gpu_arguments(case.with_(causal=causal)))


def test_operator_refuses_what_would_read_beyond_its_tensors() -> None:
    case = on_device(make_case((1, 2, 2, 4, 4, 16), PRUNED, cutoff=2.0))
    good = list(ops.gpu_arguments(case))
    bad: dict[int, Any] = {
        0: torch.zeros(1, 2, 4, 18), 1: torch.zeros(1, 2, 5, 16), 3: torch.ones(1, 1, 3, 4, dtype=torch.bool),
        5: 0.0, 6: torch.ones(2), 7: torch.ones(1, 3, 1, 1), 9: torch.ones(3), 10: "mass", 11: 1.0, 12: "rows",
        13: 128, 16: 256, 19: torch.ones(2),
    }  # fmt: skip
    for place, value in bad.items():
        value = value.to(gpu.device()) if isinstance(value, Tensor) else value
        with pytest.raises(ValueError, match=r"\w"):
            torch.ops.attnpress.attention_gpu(*(value if i == place else x for i, x in enumerate(good)))
    for bounds in ([0, 99], [3, 1], [0]):  # nonsense in, no sense out, but no crash
        good[19] = torch.tensor(bounds, device=gpu.device())
        torch.ops.attnpress.attention_gpu(*good)


@pytest.mark.parametrize("name", ["k", "v"])
def test_scales_are_refused_in_the_words_of_the_reference(name: str) -> None:
    case = make_case(SHAPE, PRUNED, cutoff=2.0)
    case = case.with_(scales=dataclasses.replace(case.scales, **dict[str, Any]({name: torch.ones(1, 3, 1, 1)})))
    messages = []
    for backend, call in (("gpu", on_device(case)), ("reference", case)):
        with pytest.raises(ValueError, match=f"{name}_scale") as caught:
            ops.attention(call, backend=backend)
        messages.append(str(caught.value).replace("cuda:0", "cpu"))
    assert messages[0] == messages[1]


def test_what_the_kernel_cannot_take_is_named() -> None:
    case = on_device(make_case((1, 2, 2, 5, 5, 16), AttentionSpec()))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"spec": AttentionSpec(rule="mass", sparsity=0.5)}, "backend 'gpu' has no kernel for rule 'mass'"),
        ({"spec": AttentionSpec(tail="mean", sparsity=0.5)}, "backend 'gpu' cannot run tail 'mean'; use backend 'cpu'"),
        ({"spec": AttentionSpec(v=TensorSpec(bits=None))}, "set bits for all"),
        ({"query": case.query.double()}, "query: backend 'gpu' takes float32"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            ops.attention(case.with_(**change), backend="gpu")
    many = torch.zeros(1, 1, gpu.MOST_KEYS + 1, 4, device=gpu.device())
    one = torch.ones(1, 1, 1, 1, device=gpu.device())
    call = AttentionCall(many[:, :, :1], many, many, None, Scales(one, one, one), None, AttentionSpec(), 1.0)
    with pytest.raises(ValueError, match="takes up to 66311 keys per query"):
        ops.attention(call, backend="gpu")


def test_a_compiled_function_and_an_exported_program_give_the_same() -> None:
    case = on_device(make_case(SHAPE, PRUNED, cutoff=2.0, mask="padding"))

    class Attend(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
            return ops.attention(case.with_(query=query, key=key, value=value, valid=valid), backend="gpu")

    assert case.valid is not None
    arguments = (case.query, case.key, case.value, case.valid)
    expected = Attend()(*arguments)
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), expected)
    exported = torch.export.export(Attend(), arguments)
    assert "attention_gpu" in str(exported.graph)
    assert torch.equal(exported.module()(*arguments), expected)


@pytest.mark.parametrize("padding", ["keep", "skip"])
def test_a_deployed_model_gives_what_the_reference_gives(padding: Any) -> None:
    pytest.importorskip("datasets")
    from attnpress.deployment.attention import deploy
    from attnpress.models.binding import bind
    from attnpress.training.calibration import calibrate
    from tests.models.factories import make_batch, make_model, outputs

    batch = {name: x.to(gpu.device()) for name, x in make_batch(lengths=(6, 3)).items()}
    model = bind(nn.Module.to(make_model(), gpu.device()).eval(), AttentionSpec(sparsity=0.7))
    calibrate(model, [batch])
    expected = outputs(deploy(model, "reference", padding=padding), batch)
    assert torch.equal(outputs(deploy(model, "gpu", padding=padding), batch), expected)
    with pytest.raises(ValueError, match="int8 linear layers run on the CPU"):
        deploy(model, "gpu", linear="int8")
