import pytest
import torch
from support.learning import doubles, learn
from support.references import Case, total

from clmerge.merging import ZipMerge

CASES = {"ZipMerge unlearned": Case(lambda: ZipMerge(steps=0), total(1.0))}


def test_a_column_that_no_task_needs_goes_out():
    wanted = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    merger = learn(
        ZipMerge(steps=500, lr=0.02, overlap=0.0),
        [doubles(w=[[1.0, 1.0]])],
        lambda vector, *_: (vector["w"] - wanted).square().sum(),
    )
    assert merger.coefficients["w"][0].tolist() == pytest.approx([1, 0], abs=1e-3)


def test_the_overlap_keeps_tasks_apart():
    def loss(vector, objective, tasks):
        return (vector["w"].sum() - 1).square()

    vectors = [doubles(w=[[1.0, 0.5]]), doubles(w=[[0.5, 1.0]])]
    free, apart = (
        learn(ZipMerge(steps=300, lr=0.01, overlap=overlap), vectors, loss).coefficients["w"].prod(dim=0).abs().mean()
        for overlap in (0.0, 1.0)
    )
    assert apart < free
    merger = ZipMerge(overlap=0.5)
    coefficients = {"w": torch.tensor([[1.0, -2.0], [3.0, 4.0]])}
    assert float(merger._penalty(coefficients)) == 0.5 * (3 + 8) / 2
    with pytest.raises(ValueError, match="overlap of 0 or more"):
        ZipMerge(overlap=-1.0)


def test_other_parameters_are_summed():
    merger = learn(ZipMerge(steps=2), [{"b": torch.ones(2)}] * 3, lambda vector, *_: vector["b"].sum())
    assert merger.compute()["b"].tolist() == [3, 3]
    assert merger.coefficients == {}
