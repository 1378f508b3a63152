"""Outputs of models with different weights on the same images, and comparisons of two of them."""

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
    """Results of one model on the images of one task.

    Attributes:
        loss: Mean cross-entropy over the competing classes.
        error: Share of misclassified images.
        predictions: Predicted class of every image, ``(N,)``.
        features: Features of every image, ``(N, D)``, float32.
        right: Whether every image is classified right, ``(N,)``.
    """

    loss: float
    error: float
    predictions: Tensor
    features: Tensor
    right: Tensor


class Observer:
    """Run a classifier with other weights on a bounded number of images.

    Args:
        module: A classifier with attributes ``backbone`` (images to features) and ``head`` (features to logits), such
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
        """Return the results of the model with these weights.

        Args:
            weights: Weights by the module's parameter and buffer names; the module's own are used for missing names.
            batches: Images ``(B, 3, H, W)`` and global class ids ``(B,)``.
            classes: Global ids of the competing classes. Default: all that the head knows.

        Raises:
            RuntimeError: If the module has no tensor with one of the names.
        """
        if unknown := [name for name in weights if name not in self._own]:
            raise RuntimeError(
                f"expected weights by the names of the module, got {unknown[0]!r}, which it does not have"
            )
        state = {self._own[name]: tensor.to(self._device) for name, tensor in weights.items()}
        columns = None if classes is None else torch.tensor(sorted(classes), device=self._device)
        loss = wrong = 0.0
        predicted, features, right = [], [], []
        with eval_mode(self._whole):
            for images, labels in batches:
                seen, logits = functional_call(self._whole, state, (images.to(self._device),))
                logits, labels = logits.float(), labels.to(self._device)
                if columns is not None:
                    logits, labels = logits[:, columns], torch.searchsorted(columns, labels)
                loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
                best = logits.argmax(dim=1)
                right.append((best == labels).cpu())
                wrong += float((best != labels).sum())
                predicted.append(best.cpu())
                features.append(seen.float().cpu())
        predictions = torch.cat(predicted)
        count = len(predictions)
        return Behaviour(loss / count, wrong / count, predictions, torch.cat(features), torch.cat(right))


class _FeaturesAndLogits(nn.Module):
    """Return features and logits from one pass, for use with ``functional_call``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def forward(self, images: Tensor) -> Any:
        module: Any = self.module
        features = module.backbone(images)
        return features, module.head(features)


def first_images(loader: Iterable[Any], count: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches with the first ``count`` images and labels of a loader, or all if it has fewer.

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
        right: Those of the other model, ``(N,)``.

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
    """Return the loss or error barrier: the largest rise above the line between the ends (arXiv 1912.05671).

    ``max over a of v(a) - ((1 - a) v(0) + a v(1))`` (Frankle et al.). It is 0 if the two models are linearly connected,
    and never negative, since both ends lie on the line. NaN if a value is not finite: a model has diverged.

    Args:
        positions: Shares ``a`` of the second model, ascending from 0 to 1, both included.
        values: Loss or error at each position.

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
