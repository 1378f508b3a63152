"""Classifier alignment: train a head again on features drawn from one Gaussian per class."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from typing_extensions import override

from clmerge.deploy.calibration.calibration import Calibration
from clmerge.deploy.calibration.gaussians import ClassGaussians
from clmerge.streams import Stream, StreamDataModule
from clmerge.training.module import ContinualClassifier
from clmerge.weights.modes import eval_mode

BATCH_SIZE = 256
MOMENTUM, WEIGHT_DECAY, RIDGE = 0.9, 5e-4, 1e-4  # as in the authors' code


class HeadAlignment(Calibration):
    """Align the head to all classes seen, after merging (SLCA, arXiv 2303.05118; CoFiMA, arXiv 2312.08977).

    After a task is merged, mean and covariance of its classes' features are measured with the merged model, on
    all of its training images. After every task but the first, a copy of the head is trained by SGD on features drawn
    from all Gaussians so far, with the cross-entropy of ``z / n / temperature``: n is the mean over tasks of the norm
    of their logits. The merged backbone is unchanged. As in the authors' code, means of older tasks are scaled by
    ``0.9 + 0.1 t / T`` and 1e-4 is added to the variances.

    With ``robust`` the loss is that of LCA (arXiv 2603.09888): the mean over classes of the cross-entropy of the draws
    that are nearest to the mean of their own class, plus ``robust`` times how far apart their losses are. LCA measures
    its Gaussians with the un-merged expert, has batches of 128, and draws 512 per class for 10 epochs at lr 0.005.

    Only for trainable heads (``LinearHead``, ``CosineHead``): a text head has nothing to train and is refused. State:
    one mean and one covariance per class, task and merger, ``4 D (D + 1)`` bytes, counted in ``results.json``.

    Args:
        per_class: Features drawn per Gaussian and epoch; 256 in SLCA.
        epochs: Epochs, each with new draws; 5 in SLCA.
        lr: Learning rate, decaying to zero by a cosine over the epochs; 0.01 in SLCA.
        temperature: Temperature of the normalised logits, 0.1 in SLCA; with none, logits are not normalised.
        robust: Weight of LCA's term; 0.1 there.

    Raises:
        ValueError: For a setting out of range.
    """

    name = "aligned"
    sources: ClassVar[tuple[str, ...]] = ("2303.05118", "2312.08977", "2603.09888")

    def __init__(
        self,
        *,
        per_class: int = 256,
        epochs: int = 5,
        lr: float = 0.01,
        temperature: float | None = 0.1,
        robust: float = 0.0,
    ) -> None:
        if not robust >= 0:
            raise ValueError(f"expected robust of 0 or more, got {robust}")
        if per_class < 1 or epochs < 1 or not lr > 0 or (temperature is not None and not temperature > 0):
            raise ValueError(
                f"expected positive settings, got per_class={per_class}, epochs={epochs}, lr={lr}, "
                f"temperature={temperature}"
            )
        self.per_class = per_class
        self.epochs = epochs
        self.lr = lr
        self.temperature = temperature
        self.robust = robust
        self.gaussians: dict[str, ClassGaussians] = {}

    @property
    @override
    def data(self) -> str:
        return "current"

    @override
    def check(self, module: ContinualClassifier, stream: Stream) -> None:
        if module.head.open_vocabulary:
            raise ValueError(
                f"expected a head that learns its classes for HeadAlignment, got {type(module.head).__name__}: text "
                "embeddings are not trained; use a LinearHead or CosineHead, or SampleTuning"
            )

    @override
    @torch.no_grad()
    def collect(self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int) -> None:
        # Every process measures on all images, so that the Gaussians are equal on all of them.
        loader = DataLoader(data.eval_dataloader("train", [task]).dataset, batch_size=data.eval_batch_size)
        device = next(module.parameters()).device
        features, labels = [], []
        with eval_mode(module):
            for images, targets, *_ in loader:
                features.append(module.backbone(images.to(device)).double().cpu())
                labels.append(targets)
        self.gaussians.setdefault(model, ClassGaussians()).add(torch.cat(features), torch.cat(labels), task)

    @override
    def calibrate(
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int, seed: int
    ) -> dict[str, Tensor]:
        if task == 0:
            return {}
        gaussians = self.gaussians[model]
        shrink = 0.9 + 0.1 * (gaussians.tasks + 1) / (task + 1)
        # Logits of unknown classes are -inf: they are left out before anything is divided.
        tasks = [torch.tensor(data.stream.tasks[index].classes) for index in range(task + 1)]
        known = torch.unique(torch.cat(tasks))
        groups = [torch.searchsorted(known, classes) for classes in tasks]
        classes = torch.searchsorted(known, gaussians.classes)
        labels, means = classes.repeat_interleave(self.per_class), gaussians.means * shrink[:, None]
        device = next(module.parameters()).device
        head = module.head.requires_grad_(True)
        optimizer = SGD(head.parameters(), lr=self.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        schedule = CosineAnnealingLR(optimizer, self.epochs)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            drawn = gaussians.sample(self.per_class, generator=generator, ridge=RIDGE, shrink=shrink).flatten(0, 1)
            for chosen in torch.split(torch.randperm(len(drawn), generator=generator), BATCH_SIZE):
                logits = head(drawn[chosen].to(device))[:, known]
                if self.temperature is not None:
                    logits = normalized(logits, groups) / self.temperature
                optimizer.zero_grad()
                own = labels[chosen].to(device)
                if self.robust:
                    near = classes[torch.cdist(drawn[chosen], means).argmin(dim=1)].to(device)
                    loss = local_loss(functional.cross_entropy(logits, own, reduction="none"), own, near, self.robust)
                else:
                    loss = functional.cross_entropy(logits, own)
                torch.autograd.backward(loss)
                optimizer.step()
            schedule.step()
        return {f"head.{name}": parameter for name, parameter in head.named_parameters()}

    @override
    def nbytes(self, module: ContinualClassifier, data: StreamDataModule, task: int, *, models: int = 1) -> int:
        number = sum(len(set(data.stream.dataset(index, "train").targets)) for index in range(task + 1))
        return models * number * ClassGaussians.bytes_each(module.backbone.feature_dim)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {model: one.state_dict() for model, one in self.gaussians.items()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gaussians = {model: ClassGaussians() for model in state}
        for model, one in self.gaussians.items():
            one.load_state_dict(state[model])


def local_loss(losses: Tensor, labels: Tensor, nearest: Tensor, robust: float) -> Tensor:
    """Return LCA's loss: the mean over classes of mean and spread of the losses of draws near their own class.

    Args:
        losses: Loss of every draw, ``(B,)``.
        labels: Class of every draw, ``(B,)``.
        nearest: Class whose mean is the nearest, ``(B,)``; a class without such a draw has the mean of all of its own.
        robust: Weight of the spread.
    """
    terms = []
    for label in torch.unique(labels):
        own = losses[labels == label]
        near = losses[(labels == label) & (nearest == label)]
        terms.append(near.mean() + robust * gap(near) if len(near) else own.mean())
    return torch.stack(terms).mean()


def gap(losses: Tensor) -> Tensor:
    """Return the mean difference of two different losses, zero for one alone.

    Example:
        >>> gap(torch.tensor([1.0, 2.0, 4.0]))
        tensor(2.)
    """
    number = len(losses)
    return (losses[:, None] - losses).abs().sum() / max(1, number * (number - 1))


def normalized(logits: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Divide logits by the mean over tasks of the norm of the task's logits.

    Args:
        logits: ``(B, C)``.
        groups: Columns of each task's classes.

    Example:
        >>> groups = [torch.tensor([0, 1]), torch.tensor([2])]
        >>> normalized(torch.tensor([[3.0, 4.0, 1.0]]), groups)  # norms 5 and 1, mean 3
        tensor([[1.0000, 1.3333, 0.3333]])
    """
    norms = torch.stack([logits[:, group].norm(dim=1) for group in groups]).mean(dim=0)
    return logits / (norms[:, None] + 1e-7)
