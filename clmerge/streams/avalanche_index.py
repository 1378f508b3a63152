"""Let Avalanche cut data sets of indices into experiences, and return the indices.

Avalanche assigns the samples to experiences. The images are served by clmerge's own data set class, because
AvalancheDataset takes up to 25 % more time on small images and new-style Avalanche benchmarks serve the test
stream with the training transform until ``.eval()`` is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any


def avalanche_benchmarks() -> Any:
    """Import ``avalanche.benchmarks`` without the two warnings that its optional solvers raise at import."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no QP solver found", category=UserWarning)
        warnings.filterwarnings("ignore", message="JAXopt is no longer maintained", category=DeprecationWarning)
        import avalanche.benchmarks

        return avalanche.benchmarks


class IndexDataset:
    """A data set of positions: item ``i`` is ``(i, target)``.

    Args:
        targets: class id of every sample.
    """

    def __init__(self, targets: Sequence[int]) -> None:
        self.targets = list(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, self.targets[index]


def experience_indices(experience: Any) -> list[int]:
    """Return the ascending positions that an experience over an `IndexDataset` holds."""
    dataset = experience.dataset
    return sorted(int(dataset[position][0]) for position in range(len(dataset)))


def one_experience_each(train: Sequence[Sequence[int]], test: Sequence[Sequence[int]]) -> Any:
    """Build an Avalanche benchmark with one experience per data set.

    Args:
        train: per experience, the global class ids of its training samples.
        test: per experience, the global class ids of its test samples.

    Returns:
        A benchmark with class timeline and task labels, whose items are ``(i, target, task)``.
    """
    benchmarks = avalanche_benchmarks()
    to_avalanche = benchmarks.utils.as_classification_dataset
    benchmark = benchmarks.benchmark_from_datasets(
        train=[to_avalanche(IndexDataset(targets)) for targets in train],
        test=[to_avalanche(IndexDataset(targets)) for targets in test],
    )
    # Task labels first: task_incremental_benchmark drops the timeline's attributes.
    return benchmarks.with_classes_timeline(benchmarks.task_incremental_benchmark(benchmark))
