"""Compressed sparse rows of P codes."""

from __future__ import annotations

import torch

from attnpress.core.sparse_rows import csr_of


def test_rows_of_all_heads_follow_each_other() -> None:
    codes = torch.tensor([[[[0, 7], [0, 0]], [[1, 2], [0, 3]]]], dtype=torch.uint8)
    found = csr_of(codes)
    assert found["csr_start"].tolist() == [0, 1, 1, 3, 4]
    assert found["csr_key"].tolist() == [1, 0, 1, 1]
    assert found["csr_code"].tolist() == [7, 1, 2, 3]
    assert [found[name].dtype for name in ("csr_start", "csr_key", "csr_code")] == [
        torch.int64,
        torch.int32,
        torch.uint8,
    ]


def test_nothing_survives_of_no_key() -> None:
    found = csr_of(torch.zeros(2, 1, 3, 0, dtype=torch.uint8))
    assert found["csr_start"].tolist() == [0] * 7
    assert found["csr_key"].shape == (0,)
