"""Tell a module's regularizers when tasks begin and end, and measure for them what they need."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from clmerge.statistics.measure import measure
from clmerge.streams import StreamDataModule
from clmerge.training.module import ContinualClassifier
from clmerge.training.regularizers import Regularizer, current_weights


class RegularizedTasks:
    """The regularizers of a module over a stream.

    Args:
        module: The classifier.
        data: Serves the present task's training images.
        num_images: Training images per task that Fisher information is measured on.
        seed: Seed of the choice of images.
    """

    def __init__(self, module: ContinualClassifier, data: StreamDataModule, *, num_images: int, seed: int) -> None:
        self.module = module
        self.data = data
        self.num_images = num_images
        self.seed = seed
        self.regularizers: list[Regularizer] = list(module.regularizers)  # type: ignore[arg-type]

    def begin(self, device: torch.device) -> None:
        """Begin a task; the module is as the start policy left it, and knows the task's classes.

        Args:
            device: Where to measure; the module stays there.
        """
        if self.regularizers:
            self.module.to(device)
        for regularizer in self.regularizers:
            regularizer.begin_task(self.module, self._fisher)

    def end(self, device: torch.device) -> dict[str, int]:
        """End a task; the module is as it was trained.

        Args:
            device: Where to measure; the module stays there.

        Returns:
            Bytes of what is remembered, by ``regularizer.NAME``.
        """
        if self.regularizers:
            self.module.to(device)  # the Trainer has moved it to the CPU
        sizes: Counter[str] = Counter()
        for regularizer in self.regularizers:
            regularizer.end_task(self.module, self._fisher)
            sizes[f"regularizer.{regularizer.name}"] += regularizer.nbytes
        return dict(sizes)

    def _fisher(self) -> Mapping[str, Tensor]:
        """Measure the Fisher information of the module as it stands, on images of the present task."""
        base = current_weights(self.module)
        task, size = self.data.task, self.num_images
        measured = measure(
            {"fisher"}, self.module, self.data, task, base=base, num_steps=0, num_images=size, seed=self.seed
        )["fisher"]
        assert isinstance(measured, Mapping)
        return measured
