"""A mode of tuning: which parameters it freezes, trains, and adds to a backbone."""

from abc import ABC, abstractmethod

from clmerge.models.backbone import Backbone
from clmerge.weights.parametrization import merged_parameters


class Tuning(ABC):
    """How a backbone is fine-tuned; subclasses are found by class name."""

    def prepare(self, backbone: Backbone) -> list[str]:
        """Add this mode's parameters to a backbone, and freeze everything that it does not train.

        Args:
            backbone: Changed in place; its wrapped model may get other submodules.

        Returns:
            Dense names, relative to the wrapped model, of the weights to merge: all that training can change.

        Raises:
            ValueError: If nothing is left to train, or a setting matches nothing in this backbone.
        """
        backbone.requires_grad_(True)  # patterns are matched against all parameters
        self.apply(backbone)
        return list(merged_parameters(backbone.model))

    @abstractmethod
    def apply(self, backbone: Backbone) -> None:
        """Add the mode's parameters, and freeze all parameters that it does not train."""

    def __repr__(self) -> str:
        settings = (f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({', '.join(settings)})"
