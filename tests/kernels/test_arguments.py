"""What the kernel may be given: errors are those of the reference; masks of any shape and bytes give its integers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnpress.config import AttentionSpec, RuleName
from attnpress.core.call import Scales
from attnpress.kernels import ops
from tests.kernels.agreement import assert_same
from tests.kernels.factories import Case, make_case, needs_kernel

pytestmark = needs_kernel

SHAPE = (2, 4, 2, 6, 9, 16)
SPEC = AttentionSpec(sparsity=0.5, smooth_key=True)
MASKS: list[tuple[int, ...]] = [
    (), (9,), (6, 9), (6, 1), (4, 1, 9), (4, 6, 1), (2, 1, 1, 9), (2, 1, 6, 1), (1, 1, 6, 9), (1, 4, 6, 9),
    (2, 4, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_a_mask_of_any_shape_gives_the_integers_of_the_reference(
    target: str, shape: tuple[int, ...], causal: bool
) -> None:
    valid = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.3
    assert_same(make_case(SHAPE, SPEC, cutoff=2.0, causal=causal).with_(valid=valid))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (4, 6, 9), (2, 1, 1, 9), (2, 4, 6, 9)], ids=str)
def test_bytes_that_are_neither_0_nor_1_count_as_true(target: str, shape: tuple[int, ...], causal: bool) -> None:
    # Read as they are, they counted up to 255 keys each, and the kernel read far beyond its lists.
    numbers = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2))
    numbers = (numbers * (numbers > 80)).to(torch.uint8)
    case = make_case(SHAPE, SPEC, cutoff=2.0, causal=causal).with_(valid=numbers.view(torch.bool))
    assert_same(case)
    plain = case.with_(valid=numbers > 0)
    assert torch.equal(ops.attention(case.with_(causal=causal)), ops.attention(plain.with_(causal=causal)))


def errors(case: Case) -> list[tuple[type, str]]:
    found = []
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=":") as caught:
            ops.attention(case, backend=backend)
        found.append((caught.type, str(caught.value)))
    return found


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-45, 1e38, math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_scales_are_refused_in_the_words_of_the_reference(name: str, bad: float) -> None:
    case = make_case(SHAPE, SPEC, cutoff=2.0)
    scale = getattr(case.scales, name).clone()
    scale[:, -1] = bad
    compiled, reference = errors(case.with_(scales=dataclasses.replace(case.scales, **{name: scale})))
    assert compiled == reference
    assert compiled[1].startswith(f"{name}_scale: scales are 2^-40 to 2^40, found {scale[0, -1, 0, 0].item()}")


@pytest.mark.parametrize("rule", ["relative", "threshold", "topk"])
@pytest.mark.parametrize("bad", [-1.0, -1e-30, math.nan, -math.inf])
def test_thresholds_are_refused_in_the_words_of_the_reference(rule: RuleName, bad: float) -> None:
    cutoff = torch.tensor([1.0, 2.0, bad, 1.0])
    compiled, reference = errors(make_case(SHAPE, AttentionSpec(rule=rule, sparsity=0.5)).with_(cutoff=cutoff))
    assert compiled == reference
    assert compiled[1].startswith("cutoff: thresholds are 0 or more")


@pytest.mark.parametrize(
    "change",
    [
        {"scaling": -0.25}, {"scaling": 0.0}, {"scaling": math.nan}, {"scaling": math.inf}, {"scaling": 1e-30},
        {"cutoff": torch.ones(3)}, {"cutoff": torch.ones(1, 4)}, {"cutoff": torch.ones(4, dtype=torch.float64)},
        {"scales": Scales(torch.ones(4), torch.ones(2), torch.ones(2))},
        {"scales": Scales(*[torch.ones(1, 1, 1, 1, dtype=torch.float64)] * 3)},
        {"scales": Scales(torch.ones(1, 1, 1, 16), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))},
        {"valid": torch.ones(6, 8, dtype=torch.bool)}, {"valid": torch.ones(1, 1, 1, 6, 9, dtype=torch.bool)},
        {"valid": torch.ones(6, 9)}, {"valid": torch.ones(3, 1, 1, 9, dtype=torch.bool)},
        {"key": torch.zeros(2, 0, 9, 16), "value": torch.zeros(2, 0, 9, 16)}, {"key": torch.zeros(2, 2, 9)},
        {"query": torch.zeros(2, 4, 6, 16, dtype=torch.int8)},
    ],
)  # fmt: skip
def test_other_arguments_are_refused_in_the_words_of_the_reference(change: dict[str, Any]) -> None:
    compiled, reference = errors(make_case(SHAPE, SPEC, cutoff=2.0).with_(**change))
    assert compiled == reference


def test_thresholds_need_not_lie_side_by_side() -> None:
    case = make_case(SHAPE, SPEC, cutoff=2.0)
    assert_same(case.with_(cutoff=torch.tensor([1.5]).expand(4)))


def bad_arguments() -> dict[str, tuple[int, Any]]:
    one = torch.ones(1, 1, 1, 1)
    return {
        "q_scale": (6, -one), "k_scale": (7, 0 * one), "v_scale": (8, math.nan * one), "small": (7, 1e-30 * one),
        "cutoff": (9, torch.full((4,), -1.0)), "cutoff nan": (9, torch.full((4,), math.nan)), "scaling": (5, -1.0),
        "scaling nan": (5, math.nan), "scaling inf": (5, math.inf), "sparsity": (11, 1.0),
        "sparsity nan": (11, math.nan),
        "two dimensions": (0, torch.ones(4, 16)), "key of two": (1, torch.ones(4, 16)),
        "no heads": (1, torch.ones(2, 0, 9, 16)),
        "mask": (3, torch.ones(1, 1, 1, 1, dtype=torch.bool)),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_arguments())
def test_operators_check_values_themselves(name: str) -> None:
    place, value = bad_arguments()[name]
    arguments = list(ops.compiled_arguments(make_case(SHAPE, SPEC, cutoff=2.0)))
    arguments[place] = value
    packed = [*arguments[:3], torch.tensor([0, 9]), *arguments[4:]]
    for operator in ("attention", "attention_integers"):
        with pytest.raises(RuntimeError, match=r"attnpress:|Dimension out of range"):
            getattr(torch.ops.attnpress, operator)(*arguments)
    with pytest.raises(RuntimeError, match=r"attnpress:|Dimension out of range"):
        torch.ops.attnpress.attention_packed(*packed)


def test_theta_above_one_is_refused() -> None:
    case = make_case(SHAPE, AttentionSpec(rule="threshold", sparsity=0.5), cutoff=2.0)
    arguments = list(ops.compiled_arguments(case))
    arguments[9] = torch.full((4,), 1.5)
    with pytest.raises(RuntimeError, match=r"attnpress: cutoff must be 0 to 1, found 1\.5"):
        torch.ops.attnpress.attention(*arguments)


@pytest.mark.parametrize("name", ["valid", "cutoff", "k_scale"])
def test_a_tensor_without_data_is_refused(name: str) -> None:
    case = make_case(SHAPE, SPEC, cutoff=2.0)
    changes: dict[str, Any] = {
        "valid": {"valid": torch.ones(6, 9, dtype=torch.bool, device="meta")},
        "cutoff": {"cutoff": torch.ones(4, device="meta")},
        "k_scale": {"scales": dataclasses.replace(case.scales, k=torch.ones(1, 1, 1, 1, device="meta"))},
    }
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=rf"{name}: .*meta"):
            ops.attention(case.with_(**changes[name]), backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lengths", [[], [0, 0], [4, 5]])
def test_packed_calls_refuse_the_same(backend: str, lengths: list[int]) -> None:
    tokens = sum(lengths)
    case = make_case((1, 4, 2, tokens, tokens, 16), SPEC, cutoff=2.0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)

    def attend(**changes: Any) -> Tensor:
        return ops.attention(case.with_(bounds=bounds, **changes), backend=backend)

    assert attend().shape == (1, 4, tokens, 16)
    with pytest.raises(ValueError, match="cutoff: thresholds are 0 or more"):
        attend(cutoff=torch.full((4,), -1.0))
    with pytest.raises(ValueError, match="scaling: "):
        attend(scaling=-1.0)
    with pytest.raises(ValueError, match="do not fit together"):
        attend(key=torch.zeros(1, 0, tokens, 16), value=torch.zeros(1, 0, tokens, 16))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "bounds",
    [torch.tensor([0, 9], dtype=torch.int32), torch.tensor([[0, 9]]), torch.tensor([0, 9], device="meta")],
    ids=["int32", "two dimensions", "meta"],
)
def test_bounds_of_another_kind_are_refused(backend: str, bounds: Tensor) -> None:
    case = make_case((1, 4, 2, 9, 9, 16), SPEC, cutoff=2.0)
    with pytest.raises(ValueError, match="bounds: int64, rising from 0"):
        ops.attention(case.with_(bounds=bounds), backend=backend)


def test_bounds_need_not_lie_side_by_side() -> None:
    case = make_case((1, 4, 2, 9, 9, 16), SPEC, cutoff=2.0)
    bounds = torch.tensor([[0, 7], [4, 7], [9, 7]])[:, 0]
    found = ops.attention(case.with_(bounds=bounds))
    assert torch.equal(found, ops.attention(case.with_(bounds=bounds.clone())))
