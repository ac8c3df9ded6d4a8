"""The teacher's terms of the loss, against the formulas that define them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnpress.core.distillation import attention_loss, logits_loss


def test_attention_loss_is_relative_and_blind_to_padding() -> None:
    teacher = [torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    tokens = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert attention_loss(teacher, teacher, tokens) == 0
    assert float(attention_loss([1.5 * one for one in teacher], teacher, tokens)) == pytest.approx(0.25)
    wild = [one.clone() for one in teacher]
    for one in wild:
        one[0, 3:] = 1e6
    assert attention_loss(wild, teacher, tokens) == 0


def test_attention_loss_is_finite_where_the_teacher_gives_only_zeros() -> None:
    silent, tokens = torch.zeros(1, 2, 1, 3), torch.ones(1, 2)
    assert attention_loss([silent], [silent], tokens) == 0
    assert attention_loss([silent + 1], [silent], tokens) == 6


def test_logits_loss_is_a_divergence_of_softened_predictions() -> None:
    tokens = torch.ones(2, 3)
    student = SimpleNamespace(logits=torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    teacher = SimpleNamespace(logits=torch.tensor([[2.0, 1.0], [0.0, 3.0]]))
    p, q = (torch.softmax(one.logits.double() / 2, -1) for one in (teacher, student))
    expected = float((p * (p / q).log()).sum(-1).mean()) * 4
    assert float(logits_loss(student, teacher, 2.0, tokens)) == pytest.approx(expected, rel=1e-5)
    assert float(logits_loss(teacher, teacher, 2.0, tokens)) == pytest.approx(0, abs=1e-6)


def test_logits_loss_of_regression_and_of_spans() -> None:
    near, far = (SimpleNamespace(logits=torch.tensor([[value]])) for value in (1.0, 3.0))
    assert float(logits_loss(near, far, 2.0, torch.ones(1, 1))) == 4
    tokens = torch.tensor([[1, 1, 0]])
    teacher = SimpleNamespace(start_logits=torch.tensor([[1.0, 2.0, 9.0]]), end_logits=torch.tensor([[0.0, 1.0, 5.0]]))
    padded = SimpleNamespace(start_logits=torch.tensor([[1.0, 2.0, -4.0]]), end_logits=torch.tensor([[0.0, 1.0, 7.0]]))
    assert float(logits_loss(padded, teacher, 1.0, tokens)) == pytest.approx(0, abs=1e-6), "padding does not count"
    swapped = SimpleNamespace(start_logits=teacher.end_logits, end_logits=teacher.start_logits.flip(-1))
    assert float(logits_loss(swapped, teacher, 1.0, tokens)) > 0
