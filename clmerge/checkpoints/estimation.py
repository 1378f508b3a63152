"""Running statistics of merged weights on training images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from clmerge.checkpoints.names import align_names
from clmerge.checkpoints.reader import Checkpoint, TorchCheckpoint
from clmerge.merging.checks import is_finite
from clmerge.weights.batch_norm import estimated_statistics
from clmerge.weights.parametrization import folded, running_statistics

_MODEL = "model."


class Estimation:
    """Estimate running statistics of merged weights, as in ``fit``.

    Args:
        backbone: The backbone to run; the weights of its part ``model`` are overwritten.
        images: Returns the training images in batches, on the backbone's device.
        what: Description of the images.
    """

    def __init__(self, backbone: nn.Module, images: Callable[[], Iterable[Tensor]], what: str) -> None:
        self.what = what
        self._backbone = backbone
        self._images = images
        self._names: dict[str, str] = {}

    def prepare(self, base: Checkpoint, wanted: Sequence[str]) -> None:
        """Find the backbone's tensors among those of a checkpoint.

        Args:
            base: A checkpoint with the names and shapes of the merged tensors.
            wanted: The statistics to estimate.

        Raises:
            ValueError: If the checkpoint lacks a weight, or the backbone lacks one of the statistics.
        """
        owner = f"the model of {self.what}"
        with folded(self._backbone) as backbone:
            model = backbone.get_submodule("model")
            own, known = model.state_dict(), running_statistics(model)
            weights = dict(model.named_parameters(remove_duplicate=False))
        opened = TorchCheckpoint(Path(base.source), [], [base], base.kind)
        align_names(opened, own, owner)
        self._names = {name: opened.stored(name) for name in opened.entries if name in own}
        for name in self._names:
            if opened.entries[name].shape != own[name].shape:
                raise ValueError(
                    f"expected {name!r} of shape {tuple(own[name].shape)} as in {owner}, got "
                    f"{opened.entries[name].shape} in {base.source}; name a configuration of the model that is merged"
                )
        covered = {id(weights[name]) for name in self._names if name in weights}  # a tied weight has several names
        if missing := [name for name, weight in weights.items() if id(weight) not in covered]:
            raise ValueError(
                f"expected the weights of {owner} in {base.source}, got no {missing[0]!r}; name a configuration of the "
                "model that is merged"
            )
        found = {self._names[name] for name in known if name in self._names}
        if unknown := [name for name in wanted if name not in found]:
            raise ValueError(
                f"expected the running statistics of {base.source} in {owner}, got no {unknown[0]!r}; name a "
                "configuration of the model that is merged"
            )

    def run(self, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the running statistics of merged weights, by the names of the checkpoint.

        Args:
            merged: The merged tensors by name, with all names of the checkpoint.

        Raises:
            RuntimeError: If the statistics are not finite.
        """
        with folded(self._backbone) as backbone:
            state = {name: merged[stored] for name, stored in self._names.items()}
            backbone.get_submodule("model").load_state_dict(state, strict=False)
            found = estimated_statistics(backbone, self._images())
        for name, tensor in found.items():
            if not is_finite(tensor):
                raise RuntimeError(
                    f"expected finite running statistics of the merged weights, got NaN or Inf in {name!r} on "
                    f"{self.what}; merge with a smaller scale, or choose another --buffers"
                )
        return {self._names[name.removeprefix(_MODEL)]: tensor for name, tensor in found.items()}
