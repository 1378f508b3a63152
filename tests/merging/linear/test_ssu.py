import numpy as np
import torch
from support.references import Batch, Case

from clmerge.merging import SSU


def sequence(requests: list[int], strength: float) -> Batch:
    """In closed form: a vector counts by its own factor, and by what later tasks leave of it."""

    def batch(vectors, tasks):
        factors = [-strength if task in requests else 1.0 for task in tasks]
        shares = [factor * np.prod([1 - later for later in factors[t + 1 :]]) for t, factor in enumerate(factors)]
        return {
            name: sum(share * vector[name] for share, vector in zip(shares, vectors, strict=True))
            for name in vectors[0]
        }

    return batch


CASES = {
    "SSU": Case(SSU, sequence([], 1.0)),
    "SSU requests": Case(lambda: SSU(requests=[1, 3], strength=0.5), sequence([1, 3], 0.5)),
}


def test_a_request_moves_the_model_away_from_where_training_went():
    merger = SSU(requests=[2])
    for task, value in enumerate((1.0, 3.0, 4.5)):
        merger.update({"w": torch.tensor([value])}, task=task)
    assert merger.compute()["w"].item() == 1.5  # 3 - (4.5 - 3)
