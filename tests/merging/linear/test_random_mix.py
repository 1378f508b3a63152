import numpy as np
import torch
from support.references import Batch, Case, uniform

from clmerge.merging import RandomMix


def random_mix(seed: int, scale: float) -> Batch:
    def batch(vectors, tasks):
        mixed = {}
        for name, entries in vectors[0].items():
            undecided = np.ones(entries.shape, dtype=bool)
            mixed[name] = np.zeros(entries.shape)
            for position in reversed(range(len(vectors))):  # the last task that replaced an entry owns it
                drawn = uniform("mix", seed, tasks[position], name, entries.shape)
                owned = undecided & (drawn < 1 / (position + 1))
                mixed[name] = np.where(owned, scale * vectors[position][name], mixed[name])
                undecided = undecided & ~owned
        return mixed

    return batch


CASES = {
    "RandomMix": Case(RandomMix, random_mix(0, 1.0)),
    "RandomMix seed": Case(lambda: RandomMix(scale=0.5, seed=3), random_mix(3, 0.5)),
}


def mix(num_tasks, seed=0, size=60_000):
    merger = RandomMix(seed=seed)
    for task in range(num_tasks):
        merger.update({"w": torch.full((size,), float(task))})
    return merger.compute()["w"]


def test_every_task_owns_the_same_share_at_every_t():
    for num_tasks in (1, 2, 6):
        counts = torch.bincount(mix(num_tasks).long(), minlength=num_tasks)
        expected = 60_000 / num_tasks
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_squared < 20.5  # 0.1 % quantile for five degrees of freedom


def test_entries_are_chosen_independently():
    entries = mix(2)
    pairs = entries[::2] * 2 + entries[1::2]
    counts = torch.bincount(pairs.long(), minlength=4)
    assert ((counts - 7500) ** 2 / 7500).sum().item() < 16.3  # 0.1 % quantile for three degrees of freedom


def test_the_seed_decides():
    assert torch.equal(mix(3), mix(3))
    assert not torch.equal(mix(3), mix(3, seed=1))
