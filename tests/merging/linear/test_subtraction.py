import numpy as np
import pytest
import torch
from support.references import Case

from clmerge.merging import ExtSub


def unit(row, zero=0.0):
    size = np.linalg.norm(row)
    return row / size if size > zero else np.zeros_like(row)


def deficiency(expert, row, shared):
    direction = unit(expert)
    if shared == "both":
        nothing = not expert.any() or not row.any()
        direction = np.zeros_like(row) if nothing else unit(direction + unit(row), zero=1e-6)
    return row - (row @ direction) * direction


def ext_sub(strength, shared):
    def batch(vectors, tasks):
        merged = {}
        for name, expert in vectors[0].items():
            merged[name] = expert.copy()
            for vector in vectors[1:] if expert.size else []:
                rows = len(expert) if expert.ndim > 1 else 1
                pairs = zip(np.split(expert.ravel(), rows), np.split(vector[name].ravel(), rows), strict=True)
                found = np.concatenate([deficiency(own, other, shared) for own, other in pairs])
                merged[name] -= strength * found.reshape(expert.shape)
        return merged

    return batch


CASES = {
    "ExtSub": Case(ExtSub, ext_sub(1.0, "both")),
    "ExtSub expert": Case(lambda: ExtSub(0.5, shared="expert"), ext_sub(0.5, "expert")),
}


def merged(merger, *taus):
    for tau in taus:
        merger.update({"w": tau})
    return merger.compute()["w"]


def test_nothing_is_taken_along_the_shared_direction():
    expert, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    taken = expert - merged(ExtSub(), expert, other)
    torch.testing.assert_close(taken, torch.tensor([[-2.5, 2.5]]))  # the shared direction is the diagonal
    torch.testing.assert_close(merged(ExtSub(shared="expert"), expert, other), expert - other)


def test_rows_are_compared_one_by_one():
    expert = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(merged(ExtSub(shared="expert"), expert, other), torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))


def test_an_expert_loses_nothing_to_itself():
    expert = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(ExtSub(strength=3.0), expert, expert, 2 * expert), expert)


@pytest.mark.parametrize("expert", [[0.0, 0.0], [-2.0, -4.0]])
def test_what_shares_nothing_is_subtracted_whole(expert):
    other = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(
        merged(ExtSub(strength=0.5), torch.tensor(expert), other), torch.tensor(expert) - other / 2
    )


def test_another_kind_of_sharing_is_refused():
    with pytest.raises(ValueError, match="shared"):
        ExtSub(shared="none")
