import pytest
import torch
from support.references import Case, norm, weighted

from clmerge.merging import MetaGPT

CASES = {
    "MetaGPT": Case(MetaGPT, weighted(lambda vectors, tasks: [norm(vector) ** 2 for vector in vectors])),
    "MetaGPT scale": Case(
        lambda: MetaGPT(scale=-0.5),
        weighted(lambda vectors, tasks: [norm(vector) ** 2 for vector in vectors], -0.5),
    ),
}


def test_coefficients_are_shares_of_the_squared_norm_of_the_whole_model():
    merger = MetaGPT()
    merger.update({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([2.0])})  # 5
    merger.update({"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([1.0])})  # 10
    merger.update({"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([0.0])})  # 0
    merged = merger.compute()
    assert merged["a"].tolist() == pytest.approx([1 / 3, 2.0])
    assert merged["b"].tolist() == pytest.approx([4 / 3])


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_squares_beyond_float32_do_no_harm(size):
    merger = MetaGPT()
    for value in (1.0, -3.0):
        merger.update({"w": torch.tensor([value * size])})
    assert merger.compute()["w"].item() == pytest.approx(-2.6 * size)


def test_the_only_task_with_a_norm_can_be_taken_out():
    merger = MetaGPT()
    vectors = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([3.0])}]
    for vector in vectors:
        merger.update(vector)
    merger.downdate(vectors[1])
    assert merger.compute()["w"].item() == 0.0
