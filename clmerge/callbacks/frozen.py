"""Detect changes of parameters that are frozen when a fit starts: unfrozen during it, or changed otherwise."""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from torch import Tensor

from clmerge.lightning_compat import callbacks_of, is_lightning
from clmerge.weights.digest import changed, digests


def announces_unfreezing(trainer: Trainer) -> bool:
    """Return whether a callback (``BackboneFinetuning``, any ``BaseFinetuning``) will unfreeze parameters."""
    return any(is_lightning(callback, "BaseFinetuning") for callback in callbacks_of(trainer))


def refuse_unfreezing(trainer: Trainer, callback: str) -> None:
    """Refuse a fit that unfreezes parameters, for a callback whose weights are those that are trained from the start.

    Raises:
        ValueError: If a callback will unfreeze parameters.
    """
    if announces_unfreezing(trainer):
        raise ValueError(
            f"expected parameters that are trained from the start of a fit with {callback}, got a callback that "
            "unfreezes some later; remove one of the two, or make them trainable before the fit"
        )


class FrozenParameters:
    """Watch frozen parameters that are not merged for changes during a fit.

    Args:
        parameters: Frozen parameters by dense name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._digests = digests(parameters)

    def thawed(self) -> dict[str, Tensor]:
        """Return the watched parameters that are now trainable, and stop watching them."""
        found = {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}
        for name in found:
            del self._parameters[name]
        return found

    def changed(self, names: Mapping[str, Tensor] | None = None) -> list[str]:
        """Return the names of parameters whose values have changed.

        Args:
            names: Parameters to check; default those that are still watched.
        """
        looked_at = self._parameters if names is None else names
        return changed(looked_at, {name: self._digests[name] for name in looked_at})
