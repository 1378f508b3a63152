import numpy as np
import pytest
import torch
from support.references import Case, stacked

from clmerge.merging import LMCocktail


def cocktail(temperature):
    """Softmax of the losses of base and experts, half the squared distance of all entries from 0.25."""

    def batch(vectors, tasks):
        zero = {name: np.zeros_like(entries) for name, entries in vectors[0].items()}
        losses = [sum(((e - 0.25) ** 2).sum() / 2 for e in model.values()) for model in [zero, *vectors]]
        shares = np.exp(-(np.array(losses) - min(losses)) / temperature)
        shares = shares / shares.sum()
        return {name: np.tensordot(shares[1:], stacked(vectors, name), axes=1) for name in vectors[0]}

    return batch


CASES = {
    "LMCocktail": Case(LMCocktail, cocktail(1.0), homogeneous=False, condition=10),
    "LMCocktail equal": Case(lambda: LMCocktail(20.0, batches=1), cocktail(20.0), homogeneous=False),
}


def test_every_model_sees_the_same_batches_of_the_latest_task():
    seen = []

    def gradients(objective, tasks, *, seed, expert):
        batches = iter(range(10))

        def gradient(vector):
            value = vector.pop("w").item()  # a gradient may take the vector apart
            seen.append((tuple(tasks), seed, next(batches), value))
            return abs(value - 3.0), {}

        assert objective.needs_labels
        return gradient

    merger = LMCocktail(batches=2, seed=5)
    for task, value in ((4, 1.0), (7, 3.0)):
        merger.update({"w": torch.tensor([value])}, task=task, gradients=gradients)
    assert seen[4:] == [((7,), 5, batch, model) for model in (0.0, 1.0, 3.0) for batch in range(2)]
    shares = np.exp([-3.0, -2.0, 0.0])
    assert merger.weights == pytest.approx((shares / shares.sum())[1:].tolist())


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"batches": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LMCocktail(**wrong)
