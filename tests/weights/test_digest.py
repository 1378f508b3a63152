import pytest
import torch

from clmerge.weights.digest import changed, digest, digests


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.complex64, torch.bool]
)
def test_one_entry_changes_the_digest(dtype):
    tensor = torch.ones(3, 4).to(dtype)
    before = digest(tensor)
    assert digest(tensor.t().contiguous().t()) == before, "the layout does not matter"
    tensor[1, 2] = 0
    assert digest(tensor) != before


def test_scalars_and_empty_tensors_have_one():
    assert digest(torch.tensor(1.0)) != digest(torch.tensor(2.0))
    assert digest(torch.empty(0)) == 0


def test_changes_through_data_are_seen():
    tensors = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.ones(3))}
    before = digests(tensors)
    tensors["b"].data.mul_(2)
    assert changed(tensors, before) == ["b"]
    assert changed(tensors, {"a": before["a"]}) == []
