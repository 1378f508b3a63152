import pytest
import torch

from clmerge.merging.norms import inner_product, squared_norm, vector_norm


def test_squares_that_overflow_float32_do_not():
    assert squared_norm(torch.tensor([3e30, 4e30])) == pytest.approx(2.5e61)
    assert inner_product(torch.tensor([3e30]), torch.tensor([-2e30])) == pytest.approx(-6e60)


def test_all_blocks_of_large_and_strided_tensors_count():
    entries = torch.ones(700, 600)[:, ::2]
    assert squared_norm(entries) == 210_000
    assert inner_product(entries, 2 * entries) == 420_000


def test_empty_and_scalar_parameters():
    assert vector_norm({"none": torch.zeros(0, 3), "one": torch.tensor(-2.0)}) == 2.0


def test_float64_is_read_not_written():
    entries = torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert (inner_product(entries, 2 * entries), squared_norm(entries)) == (26.0, 13.0)
    assert entries.tolist() == [2.0, 3.0]
