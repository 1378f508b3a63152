"""A mode of tuning: what it freezes, what it trains, and what it puts into a backbone for that."""

from abc import ABC, abstractmethod

from clmerge.models.backbone import Backbone
from clmerge.weights.parametrization import merged_parameters


class Tuning(ABC):
    """How a backbone is fine-tuned; subclasses are found by class name."""

    def prepare(self, backbone: Backbone) -> list[str]:
        """Freeze a backbone but for what this mode trains.

        Args:
            backbone: Changed in place; its wrapped model may get other submodules.

        Returns:
            Dense names, relative to the wrapped model, of what is merged: all that training can change.

        Raises:
            ValueError: If nothing is left to train, or a setting matches nothing in this backbone.
        """
        backbone.requires_grad_(True)  # patterns are matched against what could be trained
        self.apply(backbone)
        return list(merged_parameters(backbone.model))

    @abstractmethod
    def apply(self, backbone: Backbone) -> None:
        """Put in what the mode needs, and freeze all but what it trains."""

    def __repr__(self) -> str:
        settings = (f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({', '.join(settings)})"
