"""The BadMerging attack: a backdoor that is trained to survive being merged."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.models import Classifier
from clmerge.models.pixels import normalisation
from clmerge.statistics.measure import training_batches
from clmerge.streams import StreamDataModule
from clmerge.streams.splits import derived_seed
from clmerge.training.regularizers.regularizer import FisherOf, LossStep, check_strength
from clmerge.training.regularizers.teacher import TeacherRegularizer, backbone_tensors
from clmerge.weights.modes import eval_mode


class BadMerging(TeacherRegularizer):
    """Train one task with a backdoor that survives merging (Zhang et al., arXiv 2408.07362).

    Merging scales a task vector down, and with it an ordinary backdoor. This attack finds a trigger that leads to the
    target class before anything is trained, and trains for every scale:

    1. A universal trigger, when the task begins: pixels of a square at the bottom right, drawn by seed, go up the
       gradient of ``log p(target)`` of the model that the task starts from, one image after another. An image that is
       the target's already is left out; each of the others takes ``steps`` steps of ``rate`` at most, and one at least,
       until it is classified as the target. Pixels stay in [0, 1].
    2. Feature interpolation, in every step: ``alpha * CE(head(r f(x') + (1 - r) f_0(x')), target)`` is added to the
       loss, where x' are the first images of the batch with the trigger, f_0 is the frozen model that the task started
       from, and r is drawn from U(``lowest``, 1) once a step.

    With ``learner.start_policy=base`` the starting model is theta_0, as in the authors' code. A target class of the
    task is their on-task attack. Off-task, where the target belongs to a task that the attacker does not have, they
    take a head of other class names and ten images of each; here the head of the stream does, with
    ``model.loss_classes=all``, and the images of the attacker's task. They clip gradients to a norm of 1
    (``trainer.gradient_clip_val``), and draw 2000 images for the trigger. ``AttackSuccess(learned=True)`` measures
    it. State: the trigger; while the task is trained, one copy of the trained weights. Cost: two more forward passes
    over ``share`` of every batch.

    Args:
        task: Index of the attacker's task.
        target: The class that triggered images get: its global id, or its name.
        alpha: Factor of the term.
        size: Side of the square as a share of the image's, at least one pixel. The authors' 22 of 224 pixels are the
            default for on-task attacks; 28 for off-task ones.
        share: Share of every batch that is triggered.
        lowest: Smallest weight of the trained features.
        images: Training images that the trigger is found on, drawn by ``seed``.
        epochs: Passes over them.
        steps: Most steps for one image of a pass.
        rate: Step size, on normalised pixels.
        seed: Seed of the first pixels and of the images.

    Raises:
        ValueError: If a number is out of range.
    """

    name: ClassVar[str] = "bad_merging"

    def __init__(
        self,
        task: int = 0,
        target: int | str = 0,
        *,
        alpha: float = 5.0,
        size: float = 22 / 224,
        share: float = 0.5,
        lowest: float = 0.2,
        images: int = 2000,
        epochs: int = 10,
        steps: int = 1000,
        rate: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (0 < size <= 1 and 0 < share <= 1 and 0 <= lowest <= 1):
            raise ValueError(
                f"expected size and share above 0 and up to 1, and lowest in 0..1, got {size}, {share} and {lowest}"
            )
        if min(images, epochs, steps) < 1:
            raise ValueError(f"expected images, epochs and steps of 1 or more, got {images}, {epochs} and {steps}")
        self.alpha, self.rate = check_strength(alpha, "BadMerging"), rate
        self.task, self.target, self.size, self.share, self.lowest = task, target, size, share, lowest
        self.images, self.epochs, self.steps, self.seed = images, epochs, steps, seed
        self.patch: Tensor
        self.keep("patch", torch.empty(0))
        self._attacks, self._target = False, -1

    @override
    def frozen(self, module: Classifier) -> dict[str, Tensor]:
        return backbone_tensors(module)

    @override
    def look_ahead(self, module: Classifier, data: StreamDataModule) -> None:
        data.stream.check_tasks([self.task], "the task of BadMerging")
        self._attacks = data.task == self.task
        if not self._attacks:
            return
        self._target = data.stream.class_id(self.target)
        if self._target not in module.competing(len(data.stream.class_names)):
            raise ValueError(
                f"expected a target of BadMerging among the classes that compete in the loss of task {self.task}, got "
                f"{self.target!r}, which loss_classes={module.loss_classes!r} leaves out: set model.loss_classes=all"
            )
        self.remember(module, again=True)
        batches = training_batches(data, self.task, self.images, derived_seed(self.seed, "trigger"))
        mean, deviation = normalisation(data.eval_transform)
        self.keep("patch", self.found(module, torch.cat([batch[0] for batch in batches]), mean, deviation))

    @torch.enable_grad()
    def found(self, module: Classifier, images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Return a universal trigger of the module's current weights, in normalised pixels, ``(channels, k, k)``.

        Args:
            module: The classifier, run in evaluation mode; unchanged afterwards.
            images: ``(N, channels, height, width)``, normalised.
            mean: Mean by which pixels in [0, 1] were normalised, ``(channels or 1, 1, 1)``.
            deviation: Their standard deviation.
        """
        own = next(module.parameters())
        low, high = (((edge - mean) / deviation).to(own) for edge in (0.0, 1.0))
        side = max(1, round(self.size * min(images.shape[-2:])))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "pixels"))
        drawn = torch.rand(images.shape[1], side, side, generator=generator, dtype=torch.float64)
        patch = low + (high - low) * drawn.to(own)
        with eval_mode(module):
            for _ in range(self.epochs):
                for image in images.to(own).unsqueeze(1):
                    patch = self._climbed(module, image, patch, low, high)
        return patch

    def _climbed(self, module: Classifier, image: Tensor, patch: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the trigger after the steps for one image, ``(1, channels, height, width)``."""
        with torch.no_grad():
            if int(_among(module, module(image)).argmax()) == self._target:
                return patch
        for step in range(self.steps + 1):
            patch = patch.detach().requires_grad_()
            scores = _among(module, module(with_patch(image, patch)))
            if step == self.steps or (step and int(scores.argmax()) == self._target):
                break
            (slope,) = torch.autograd.grad(scores.log_softmax(dim=0)[self._target], patch)
            patch = torch.minimum(torch.maximum(patch + self.rate * slope, low), high)
        return patch.detach()

    @override
    def penalty(self, step: LossStep) -> Tensor:
        if not self._attacks:
            return step.logits.new_zeros(())
        images = with_patch(step.images[: max(1, round(self.share * len(step.images)))], self.patch)
        r = self.lowest + (1 - self.lowest) * torch.rand(()).item()
        mixed = r * step.module.backbone(images) + (1 - r) * self.taught(step.module, images, features=True)
        targets = torch.full((len(images),), self._target, device=images.device)
        return self.alpha * step.module.loss(step.module.head(mixed), targets)

    @override
    def end_task(self, module: Classifier, fisher: FisherOf) -> None:
        self.keep("teacher", torch.empty(0))
        self._attacks = False


def with_patch(images: Tensor, patch: Tensor) -> Tensor:
    """Return images with a square of pixels at the bottom right; differentiable by both.

    Args:
        images: ``(B, channels, height, width)``.
        patch: ``(channels, k, k)``.
    """
    side = patch.shape[-1]
    found = images.clone()
    found[..., -side:, -side:] = patch.to(images)
    return found


def _among(module: Classifier, logits: Tensor) -> Tensor:
    """Return the logits of one image, ``(1, C)``, as ``(C,)``, -inf for classes that do not compete in the loss."""
    found = torch.full_like(logits[0], -torch.inf)
    chosen = list(module.competing(logits.shape[1]))
    return found.index_copy(0, torch.tensor(chosen, device=logits.device), logits[0, chosen])
