"""What models that differ in weights do on the same images, and how two of them are compared."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from typing_extensions import override

from clmerge.weights.modes import eval_mode


class Behaviour(NamedTuple):
    """What one model does on the images of one task.

    Attributes:
        loss: Mean cross-entropy over the competing classes.
        error: Share of images that are classified wrong.
        predictions: Predicted class of every image, ``(N,)``.
        features: Features of every image, ``(N, D)``, float32.
    """

    loss: float
    error: float
    predictions: Tensor
    features: Tensor


class Observer:
    """Run a classifier with other weights on a bounded number of images.

    Args:
        module: A classifier with the parts ``backbone`` (images to features) and ``head`` (features to logits), such
            as :class:`clmerge.training.module.ContinualClassifier`. Its own weights are never changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._whole = _FeaturesAndLogits(module)
        self._device = next(module.parameters()).device
        both = (*module.named_parameters(), *module.named_buffers())
        self._own = {name.replace("_orig_mod.", ""): f"module.{name}" for name, _ in both}

    @torch.no_grad()
    def __call__(
        self, weights: Mapping[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]], classes: Sequence[int] | None
    ) -> Behaviour:
        """Return what the model does with these weights.

        Args:
            weights: By the module's parameter and buffer names; what is not named stays the module's own.
            batches: Images ``(B, 3, H, W)`` and global class ids ``(B,)``.
            classes: Global ids of the classes that compete. Default: all that the head knows.

        Raises:
            RuntimeError: If the module has no tensor of such a name.
        """
        if unknown := [name for name in weights if name not in self._own]:
            raise RuntimeError(
                f"expected weights by the names of the module, got {unknown[0]!r}, which it does not have"
            )
        state = {self._own[name]: tensor.to(self._device) for name, tensor in weights.items()}
        columns = None if classes is None else torch.tensor(sorted(classes), device=self._device)
        loss = wrong = 0.0
        predicted, features = [], []
        with eval_mode(self._whole):
            for images, labels in batches:
                seen, logits = functional_call(self._whole, state, (images.to(self._device),))
                logits, labels = logits.float(), labels.to(self._device)
                if columns is not None:
                    logits, labels = logits[:, columns], torch.searchsorted(columns, labels)
                loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
                best = logits.argmax(dim=1)
                wrong += float((best != labels).sum())
                predicted.append(best.cpu())
                features.append(seen.float().cpu())
        predictions = torch.cat(predicted)
        return Behaviour(loss / len(predictions), wrong / len(predictions), predictions, torch.cat(features))


class _FeaturesAndLogits(nn.Module):
    """Both from one pass, by way of ``functional_call``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def forward(self, images: Tensor) -> Any:
        module: Any = self.module
        features = module.backbone(images)
        return features, module.head(features)


def first_images(loader: Iterable[Any], count: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches with the first ``count`` images and labels of a loader, fewer if it has fewer.

    Args:
        loader: Batches that begin with images and labels.
        count: Number of images, at least 1.

    Raises:
        ValueError: If there are no images.
    """
    batches: list[tuple[Tensor, Tensor]] = []
    left = count
    for images, labels, *_ in loader:
        batches.append((images[:left], labels[:left]))
        left -= len(batches[-1][0])
        if left <= 0:
            break
    if left == count:
        raise ValueError("expected images of every task to diagnose models on, got a loader without any")
    return batches


def disagreement(left: Tensor, right: Tensor) -> float:
    """Return the share of images for which two models predict different classes.

    Args:
        left: Predicted classes, ``(N,)``.
        right: The same of the other model.

    Example:
        >>> disagreement(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
        0.25
    """
    return float((left != right).double().mean())


def representation_bias(features: Tensor, reference: Tensor) -> float:
    """Return the mean absolute difference of two models' features (Yang et al., arXiv 2402.02705).

    Args:
        features: Features of a merged model, ``(N, D)``.
        reference: Features of the expert on the same images, ``(N, D)``.

    Returns:
        The L1 distance per image and feature, averaged over both.

    Example:
        >>> representation_bias(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
        1.5
    """
    return float((features.double() - reference.double()).abs().mean())


def barrier(positions: Sequence[float], values: Sequence[float]) -> float:
    """Return how far a loss or an error rises above the line between its ends (Frankle et al., arXiv 1912.05671).

    ``max over a of v(a) - ((1 - a) v(0) + a v(1))``. It is 0 where the two models are linearly connected, and never
    below, since both ends lie on the line. NaN if a value is not finite: the models have diverged.

    Args:
        positions: Shares ``a`` of the second model, from 0 to 1, ascending, both ends among them.
        values: What was measured there.

    Raises:
        ValueError: If the positions do not begin with 0 and end with 1, or the lengths differ.

    Example:
        >>> barrier([0.0, 0.5, 1.0], [1.0, 3.0, 2.0])
        1.5
    """
    if len(positions) != len(values) or len(positions) < 2 or positions[0] != 0.0 or positions[-1] != 1.0:
        raise ValueError(
            f"expected a value for every position from 0 to 1, got {len(values)} values at {list(positions)}"
        )
    if not all(map(math.isfinite, values)):
        return math.nan
    return max(
        value - ((1.0 - share) * values[0] + share * values[-1]) for share, value in zip(positions, values, strict=True)
    )
