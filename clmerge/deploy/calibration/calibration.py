"""The interface of calibrations of merged models."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from clmerge.deploy.predictors import Merged, Predictor
from clmerge.settings import Configured
from clmerge.streams import Stream, StreamDataModule
from clmerge.training.module import ContinualClassifier
from clmerge.weights.task_vector import State


class Calibration(Configured, ABC):
    """Adjust a merged model after every task. The result is evaluated as a separate model, ``MERGER+NAME``.

    Calibration never changes the accumulators or the weights in training. Subclasses keep every constructor argument
    under its own name.

    Attributes:
        name: The suffix of the merger's name.
        sources: arXiv ids of the papers.
        observes: Whether it looks at the model that each task ended with.
    """

    sources: ClassVar[tuple[str, ...]] = ()
    observes: ClassVar[bool] = False

    @property
    @abstractmethod
    def data(self) -> str:
        """The images that it looks at: ``current`` (training images of each task at its end) or a named buffer."""

    def described(self) -> dict[str, Any]:
        """Return class, settings and papers, for results."""
        return {"class_path": type(self).__name__, "init_args": self.settings(), "sources": list(self.sources)}

    def check(self, module: ContinualClassifier, stream: Stream) -> None:
        """Refuse a classifier or a stream that cannot be calibrated, before anything is trained.

        Args:
            module: The classifier.
            stream: The stream.

        Raises:
            ValueError: If it cannot.
        """

    def observe(self, module: ContinualClassifier, data: StreamDataModule, task: int) -> None:
        """Collect what the un-merged model of a task, its expert, shows on the task's images; needs ``observes``.

        Args:
            module: The classifier with the expert's weights.
            data: Provides the task's images.
            task: Index of the task.
        """

    def collect(self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int) -> None:
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

        Names that begin with ``surgery.`` are those of adapters beside the module (``Surgery``).

        Args:
            model: Name of the merger.
            module: A copy of the classifier with that merger's weights; may be changed.
            data: Provides images.
            task: Index of the task that was merged last.
            seed: Seed of everything random.
        """

    def predictor(self, module: ContinualClassifier, state: State) -> Predictor:
        """Return what answers images.

        Args:
            module: A copy of the classifier with the calibrated weights, for predictors with a module of their own.
            state: The calibrated weights, with whatever else ``calibrate`` returned.
        """
        return Merged(state)

    @abstractmethod
    def nbytes(self, module: ContinualClassifier, data: StreamDataModule, task: int, *, models: int = 1) -> int:
        """Return the bytes that are kept of the tasks up to ``task``; nothing that was collected is needed for it.

        Args:
            module: The classifier.
            data: Provides the stream's images.
            task: Index of the last task.
            models: For how many calibrated models together.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run: tensors and primitives."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state_dict``."""
