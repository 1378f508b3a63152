"""The interface of calibrations of merged models."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from clmerge.streams import StreamDataModule
from clmerge.training.module import ContinualClassifier


class Calibration(ABC):
    """Adjust a merged model after every task. The result is evaluated as a separate model, ``MERGER+NAME``.

    Calibration never changes the accumulators or the weights in training.

    Attributes:
        name: The suffix of the merger's name.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def data(self) -> str:
        """The images that it looks at: ``current`` (training images of each task at its end) or a named buffer."""

    def check(self, module: ContinualClassifier) -> None:  # noqa: B027  need not be overridden
        """Refuse a classifier that cannot be calibrated.

        Raises:
            ValueError: If it cannot.
        """

    def collect(  # noqa: B027  need not be overridden
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int
    ) -> None:
        """Collect data of a task that was just merged, while its images are available.

        Args:
            model: Name of the merger.
            module: The classifier with that merger's weights.
            data: Provides the task's training images.
            task: Index of the task.
        """

    @abstractmethod
    def calibrate(
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int, seed: int
    ) -> dict[str, Tensor]:
        """Return the tensors in which the calibrated model differs from the merged one, by the module's own names.

        Args:
            model: Name of the merger.
            module: A copy of the classifier with that merger's weights; may be changed.
            data: Provides images.
            task: Index of the task that was merged last.
            seed: Seed of everything random.
        """

    @abstractmethod
    def nbytes(self, data: StreamDataModule, task: int) -> int:
        """Return the bytes of the data kept of the tasks up to ``task``, for all models together."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run: tensors and primitives."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  need not be overridden
        """Restore a state returned by ``state_dict``."""
