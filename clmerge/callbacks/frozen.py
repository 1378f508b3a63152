"""Parameters that are frozen when a fit starts: whether they are unfrozen, or changed in another way, during it."""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from torch import Tensor

from clmerge.lightning_compat import callbacks_of, is_lightning
from clmerge.weights.digest import changed, digests


def announces_unfreezing(trainer: Trainer) -> bool:
    """Return whether a callback (``BackboneFinetuning``, any ``BaseFinetuning``) will unfreeze what is frozen."""
    return any(is_lightning(callback, "BaseFinetuning") for callback in callbacks_of(trainer))


class FrozenParameters:
    """Watch parameters that are frozen, and not merged, for what a fit does to them.

    Args:
        parameters: Frozen parameters by dense name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._digests = digests(parameters)

    def thawed(self) -> dict[str, Tensor]:
        """Return those that are trainable now, and watch them no longer."""
        found = {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}
        for name in found:
            del self._parameters[name]
        return found

    def changed(self, names: Mapping[str, Tensor] | None = None) -> list[str]:
        """Return names of parameters that do not have the values they had at first.

        Args:
            names: Which ones; default those that are still watched.
        """
        looked_at = self._parameters if names is None else names
        return changed(looked_at, {name: self._digests[name] for name in looked_at})
