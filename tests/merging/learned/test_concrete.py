import pytest
import torch
from support.learning import distance, doubles, learn
from support.references import Case, total

from clmerge.merging import ConcreteMask
from clmerge.merging.learned.concrete import rescaled_mask
from clmerge.merging.learned.learned import Moment

CASES = {
    "ConcreteMask unlearned": Case(lambda: ConcreteMask(steps=0), total(0.3)),
    "ConcreteMask with scales": Case(lambda: ConcreteMask(0.5, learn_scale=True, steps=0), total(0.5)),
}


def test_the_relaxed_mask_in_numbers():
    x = torch.logit(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert torch.sigmoid(x / 0.5).tolist() == pytest.approx([0.012195, 0.5, 0.987805], abs=1e-6)
    assert rescaled_mask(x, 0.5).tolist() == pytest.approx([0.02439, 1, 1.97561], abs=1e-5)
    assert float(rescaled_mask(torch.randn(50), 0.5).mean()) == pytest.approx(1, abs=1e-6)


def test_a_mask_that_keeps_all_is_task_arithmetic():
    merger = ConcreteMask(0.5)
    taus = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])]
    merged = merger._combine("w", taus, {"mask w": torch.full((2,), 100.0)}, Moment())
    assert merged.tolist() == [2.0, 0.0]


def test_entries_that_help_are_kept_and_others_are_dropped():
    merger = learn(ConcreteMask(1.0, steps=200, lr=0.05), [doubles(w=[1.0, 1.0])], distance([2.0, 0.0]))
    merged = merger.compute()["w"]
    assert merged[0] > 1.7
    assert merged[1] < 0.3


def test_noise_is_a_function_of_seed_task_and_step_and_the_result_has_none():
    merger, other = ConcreteMask(seed=1), ConcreteMask(seed=2)
    taus, mask = [torch.ones(5)], {"mask w": torch.zeros(5)}
    at = merger._combine("w", taus, mask, Moment(3, 1))
    assert torch.equal(at, merger._combine("w", taus, mask, Moment(3, 1)))
    for changed in (
        merger._combine("w", taus, mask, Moment(4, 1)),
        merger._combine("w", taus, mask, Moment(3, 2)),
        other._combine("w", taus, mask, Moment(3, 1)),
    ):
        assert not torch.equal(at, changed)
    assert merger._combine("w", taus, mask, Moment()).tolist() == pytest.approx([0.3] * 5)
    with pytest.raises(ValueError, match="temperature above 0"):
        ConcreteMask(temperature=0)
