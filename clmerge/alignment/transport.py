"""Carry task vectors of one base model over to another (base swap)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from clmerge.alignment.activations import correlations
from clmerge.alignment.matching import Aligner, WeightMatching
from clmerge.alignment.reparametrization import Reparametrization
from clmerge.alignment.spec import PermutationSpec
from clmerge.weights import State, TaskVector


@dataclass
class Swap:
    """The two base models of a swap, and what may be measured on them.

    Attributes:
        source: The old network with its base weights.
        target: The new network with its base weights, by the same names.
        spec: Returns the specification of the old network, or raises a ValueError that says why there is none.
        names: Names of the parameters of a task vector.
        images: Returns batches of images of the tasks so far, without labels.
        gradients: Returns, for a task and a number of images per class, the gradient of the loss at the new base for
            every image in turn.
    """

    source: nn.Module
    target: nn.Module
    spec: Callable[[], PermutationSpec]
    names: tuple[str, ...]
    images: Callable[[int], Iterable[Tensor]]
    gradients: Callable[[int, int], Iterable[State]]

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return parameters and buffers of both networks by name."""
        source, target = (
            {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}
            for module in (self.source, self.target)
        )
        return source, target

    def require_equal_shapes(self, transport: str) -> None:
        """Refuse networks of other shapes.

        Raises:
            ValueError: If a parameter is missing or of another shape.
        """
        ours, theirs = self.weights()
        for name in self.names:
            if name not in theirs or ours[name].shape != theirs[name].shape:
                found = "none" if name not in theirs else tuple(theirs[name].shape)
                raise ValueError(
                    f"expected {name!r} of shape {tuple(ours[name].shape)} in the new base for {transport}, got "
                    f"{found}: another architecture, which only Procrustes bridges, if its layers have the same names"
                )


class Transport(ABC):
    """A rule that turns task vectors of an old base into task vectors of a new one.

    Attributes:
        data: What it reads: ``none``, ``images`` or ``labelled images`` of the tasks.
        aligned: The map of units that it found, if it is one.
        why: Why it was chosen, if it chose itself.
        barriers: Barriers between the bases that it measured to choose: ``before`` matching, and ``after`` it.
    """

    data: str = "none"
    aligned: Reparametrization | None = None
    why: str = ""
    barriers: Mapping[str, float] = MappingProxyType({})

    @property
    def chosen(self) -> "Transport":
        """What carries vectors over: itself, unless it chose another."""
        return self

    @abstractmethod
    def prepare(self, swap: Swap) -> None:
        """Measure what does not depend on the task.

        Raises:
            ValueError: If the two bases cannot be bridged by this rule.
        """

    @abstractmethod
    def transport(self, tau: State, task: int) -> TaskVector:
        """Return the vector for the new base.

        Args:
            tau: The task vector of the old base; not changed.
            task: Index of the task.
        """

    def features(self, weights: Tensor) -> Tensor:
        """Carry weights that read the features, ``(classes, D)``, over; default as they are."""
        return weights

    def __repr__(self) -> str:
        settings = ", ".join(
            f"{key}={value!r}"
            for key, value in vars(self).items()
            if not key.startswith("_") and key not in ("aligned", "why", "barriers", "data")
        )
        return f"{type(self).__name__}({settings})"


class Identity(Transport):
    """Add task vectors to the new base as they are, for a base that was trained on from the old one."""

    def prepare(self, swap: Swap) -> None:
        """Check the shapes."""
        swap.require_equal_shapes("Identity")

    def transport(self, tau: State, task: int) -> TaskVector:
        """Return a copy."""
        return {name: tensor.clone() for name, tensor in tau.items()}


class Permuted(Transport):
    """Carry task vectors over by the map of units that makes the old base most like the new one (TransFusion).

    After Rinaldi et al., arXiv 2505.22697, with a map that leaves the function alone: one order of the residual stream,
    and one order of heads for queries, keys, values and outputs.

    Args:
        aligner: Finds the map; default ``WeightMatching``.
        images: Images that an aligner which compares activations is shown.
    """

    def __init__(self, aligner: Aligner | None = None, *, images: int = 256) -> None:
        self.aligner = aligner or WeightMatching()
        self.images = images
        self.data = "images" if self.aligner.needs_correlations else "none"

    def prepare(self, swap: Swap) -> None:
        """Match the old base to the new one."""
        swap.require_equal_shapes("Permuted")
        spec = swap.spec()
        ours, theirs = swap.weights()
        found = (
            correlations(swap.target, swap.source, spec, swap.images(self.images))
            if self.aligner.needs_correlations
            else None
        )
        self.aligned = self.aligner.match(theirs, ours, spec, correlations=found)

    def transport(self, tau: State, task: int) -> TaskVector:
        """Return the vector in the units of the new base."""
        assert self.aligned is not None
        return self.aligned.apply(tau, origin="the task vector")

    def features(self, weights: Tensor) -> Tensor:
        """Return the weights with the features' columns in the order of the new base."""
        assert self.aligned is not None
        found = self.aligned.maps.get(self.aligned.spec.outputs)
        return weights if found is None else weights.index_select(1, found.index)


class GradientSignMask(Transport):
    """Keep the entries of a vector that point downhill at the new base (GradFix; Rinaldi et al., arXiv 2510.09658).

    An entry stays if its sign is that of the negative gradient, and is 0 otherwise, so that the vector never points
    uphill. For bases that are near each other; on independent ones the signs are noise.

    Args:
        images_per_class: Labelled training images per class and task.
        vote: ``mean``: sign of the summed gradient; ``majority``: most of the images' signs.
        before: A transport that is done first, such as ``Permuted``; default none.
    """

    data = "labelled images"

    def __init__(
        self, images_per_class: int = 2, *, vote: Literal["mean", "majority"] = "mean", before: Transport | None = None
    ) -> None:
        if images_per_class < 1:
            raise ValueError(f"expected images_per_class of 1 or more, got {images_per_class}")
        self.images_per_class = images_per_class
        self.vote = vote
        self.before = before or Identity()
        self._swap: Swap | None = None

    def prepare(self, swap: Swap) -> None:
        """Prepare the transport that is done first."""
        self.before.prepare(swap)
        self.aligned = self.before.aligned
        self._swap = swap

    def transport(self, tau: State, task: int) -> TaskVector:
        """Return the masked vector."""
        assert self._swap is not None
        moved = self.before.transport(tau, task)
        votes: dict[str, Tensor] = {}
        for gradient in self._swap.gradients(task, self.images_per_class):
            for name in moved:
                told = gradient[name].cpu().sign() if self.vote == "majority" else gradient[name].cpu()
                votes[name] = told + votes[name] if name in votes else told.clone()
        return {name: torch.where(tensor.sign() == -votes[name].sign(), tensor, 0.0) for name, tensor in moved.items()}

    def features(self, weights: Tensor) -> Tensor:
        """As the transport that is done first."""
        return self.before.features(weights)
