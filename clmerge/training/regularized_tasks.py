"""Call a module's regularizers at the start and end of tasks, with the Fisher information they need."""

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
        data: Provides the current task's training images.
        num_images: Training images per task on which Fisher information is measured.
        seed: Seed of the choice of images.
    """

    def __init__(self, module: ContinualClassifier, data: StreamDataModule, *, num_images: int, seed: int) -> None:
        self.module = module
        self.data = data
        self.num_images = num_images
        self.seed = seed
        self.regularizers: list[Regularizer] = list(module.regularizers)  # type: ignore[arg-type]

    def begin(self, device: torch.device) -> None:
        """Begin a task; the start policy has been applied, and the module knows the task's classes.

        Args:
            device: Device for measurements; the module stays there.
        """
        if self.regularizers:
            self.module.to(device)
        for regularizer in self.regularizers:
            regularizer.look_ahead(self.module, self.data)
            regularizer.begin_task(self.module, self._fisher)

    def begin_branch(self) -> None:
        """Begin one of several fits of the task; the module holds the weights that it starts from."""
        for regularizer in self.regularizers:
            regularizer.begin_branch(self.module)

    def end(self, device: torch.device) -> dict[str, int]:
        """End a task; the module holds the trained weights.

        Args:
            device: Device for measurements; the module stays there.

        Returns:
            Bytes of the regularizers' state, by ``regularizer.NAME``.
        """
        if self.regularizers:
            self.module.to(device)  # the Trainer has moved it to the CPU
        sizes: Counter[str] = Counter()
        for regularizer in self.regularizers:
            regularizer.end_task(self.module, self._fisher)
            sizes[f"regularizer.{regularizer.name}"] += regularizer.nbytes
        return dict(sizes)

    def _fisher(self) -> Mapping[str, Tensor]:
        """Measure the Fisher information of the module's current weights on images of the current task."""
        base = current_weights(self.module)
        task, size = self.data.task, self.num_images
        measured = measure(
            {"fisher"}, self.module, self.data, task, base=base, num_steps=0, num_images=size, seed=self.seed
        )["fisher"]
        assert isinstance(measured, Mapping)
        return measured
