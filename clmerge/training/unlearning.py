"""Train a classifier on what is to be forgotten: gradient ascent, and the vector of SSU with its salience mask."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from clmerge.training.module import ContinualClassifier

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Returns the batches of images and labels of one epoch; called again when they are used up."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Computes a loss from logits ``(B, C)`` and global labels ``(B,)``."""


def mask_by_salience(gradients: Sequence[Tensor], deviations: float = 1.0) -> None:
    """Set the gradients to zero, in place, that are not far larger than the rest (SSU, arXiv 2406.10952).

    Entries stay whose magnitude is at least the mean plus ``deviations`` standard deviations of the magnitudes of all
    entries of all gradients together. The released code of SSU adds the masked gradient to the whole one instead,
    because it differentiates twice; this is the paper's form.

    Args:
        gradients: The gradients of one step; at least one entry.
        deviations: How many standard deviations.

    Example:
        >>> gradients = [torch.tensor([1.0, -1.0, 1.0]), torch.tensor([-9.0])]
        >>> mask_by_salience(gradients)
        >>> gradients
        [tensor([0., -0., 0.]), tensor([-9.])]
    """
    count = sum(gradient.numel() for gradient in gradients)
    mean = sum(float(gradient.abs().sum(dtype=torch.float64)) for gradient in gradients) / count
    variance = sum(float((gradient.abs().double() - mean).square().sum()) for gradient in gradients) / count
    threshold = mean + deviations * variance**0.5
    for gradient in gradients:
        gradient.mul_(gradient.abs() >= threshold)


def ascent_loss(classes: Sequence[int] | None) -> Loss:
    """Return minus the cross-entropy over some classes: gradient ascent.

    Args:
        classes: The competing classes; default all that the head knows.
    """
    return lambda logits, labels: -_cross_entropy(logits, labels, classes)


def memorising_loss(
    classes: Sequence[int] | None, *, random_labels: float = 0.0, draws: int = 3, generator: torch.Generator
) -> Loss:
    """Return the cross-entropy, plus that of labels drawn from the other classes, as SSU trains on what is to go.

    Args:
        classes: The competing classes; default all that the head knows.
        random_labels: Factor of the second term, a mean over the draws; the paper's is 0.5.
        draws: Wrong labels of every image; the paper's is 3.
        generator: Draws the labels, on the CPU.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        total = _cross_entropy(logits, labels, classes)
        known = torch.isfinite(logits[0]).nonzero().flatten().tolist() if classes is None else sorted(classes)
        if not random_labels or len(known) < 2:
            return total
        place = {class_id: index for index, class_id in enumerate(known)}
        own = torch.tensor([place[int(label)] for label in labels])
        for _ in range(draws):
            shift = torch.randint(1, len(known), (len(own),), generator=generator)
            wrong = torch.tensor(known)[(own + shift) % len(known)].to(labels.device)
            total = total + random_labels / draws * _cross_entropy(logits, wrong, classes)
        return total

    return loss


def _cross_entropy(logits: Tensor, labels: Tensor, classes: Sequence[int] | None) -> Tensor:
    logits = logits.float()
    if classes is not None:
        columns = torch.tensor(sorted(classes), device=logits.device)
        logits, labels = logits[:, columns], torch.searchsorted(columns, labels)
    return functional.cross_entropy(logits, labels)


def steps_on(
    module: ContinualClassifier, batches: Batches, loss: Loss, steps: int, *, salient: bool = False
) -> Iterator[int]:
    """Train the backbone's parameters of a module, one step of the module's own optimizer at a time.

    The head stays, the learning rate is constant, and the module is in evaluation mode, so that its running statistics
    stay, too. The caller puts the start into the module, and takes it out again.

    Args:
        module: The module; changed in place.
        batches: The images.
        loss: The loss of a batch.
        steps: Number of steps.
        salient: Whether gradients are masked by :func:`mask_by_salience`.

    Yields:
        The number of steps that were taken, after each of them.
    """
    device = next(module.parameters()).device
    trained = [p for name, p in module.named_parameters() if p.requires_grad and name.startswith("backbone.")]
    was_training = module.training
    optimizer = module.build_optimizer(trained)
    source = batches()
    module.eval()
    try:
        for step in range(1, steps + 1):
            if (batch := next(source, None)) is None:
                source = batches()
                batch = next(source)
            images, labels = (tensor.to(device) for tensor in batch)

            def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                found = loss(module(images), labels)
                found.backward()  # type: ignore[no-untyped-call]
                if salient:
                    mask_by_salience([p.grad for p in trained if p.grad is not None])
                return found

            with torch.inference_mode(False), torch.enable_grad():
                optimizer.step(closure)  # type: ignore[arg-type]
            yield step
    finally:
        for parameter in module.parameters():
            parameter.grad = None
        module.train(was_training)
