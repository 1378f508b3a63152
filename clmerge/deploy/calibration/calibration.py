"""What a calibration of merged models is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from clmerge.streams import StreamDataModule
from clmerge.training.module import ContinualClassifier


class Calibration(ABC):
    """Adjust a merged model after every task. The result is evaluated as a model of its own, ``MERGER+NAME``.

    Neither the accumulators nor the weights in training ever see it.

    Attributes:
        name: What is added to the merger's name.
    """

    name: ClassVar[str]

    def check(self, module: ContinualClassifier) -> None:  # noqa: B027  need not be overridden
        """Refuse a classifier that cannot be calibrated.

        Raises:
            ValueError: If it cannot.
        """

    def collect(  # noqa: B027  need not be overridden
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int
    ) -> None:
        """Keep what is needed of a task that was just merged, while its data is there.

        Args:
            model: Name of the merger.
            module: The classifier with that merger's weights in place.
            data: Serves the task's training images.
            task: Index of the task.
        """

    @abstractmethod
    def calibrate(
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int, seed: int
    ) -> dict[str, Tensor]:
        """Return what the calibrated model has in place of the merged model's tensors, by the module's own names.

        Args:
            model: Name of the merger.
            module: A copy of the classifier with that merger's weights, to be used up.
            data: Serves images.
            task: Index of the task that was merged last.
            seed: Seed of everything random.
        """

    @abstractmethod
    def nbytes(self, data: StreamDataModule, task: int) -> int:
        """Return the bytes of what is kept of the tasks up to ``task``, for all models together."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and primitives."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  need not be overridden
        """Restore what ``state_dict`` returned."""
