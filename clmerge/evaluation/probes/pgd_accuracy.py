"""How often a model is right when its images are moved against it."""

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from clmerge.evaluation.probes.probe import ImageProbe, Occasion, Seen, View
from clmerge.models.adversary import Ball, Norm, attacked
from clmerge.results.measured import Measured
from clmerge.streams import Stream
from clmerge.streams.plan import SplitPlan
from clmerge.streams.splits import derived_seed

_RADIUS: dict[Norm, float] = {"linf": 8 / 255, "l2": 0.5}


class PGDAccuracy(ImageProbe):
    """Share of test images that a model gets right, clean and after an attack within a ball (arXiv 1706.06083).

    The attack raises the cross-entropy over the competing classes by steps of ``eps / 4`` from a random point of the
    ball, the same for all images and models. It sees the whole model; one that gets its robustness from vanishing
    gradients looks better than it is. Its name is ``pgd_linf`` or ``pgd_l2``, and ``values`` has the accuracy on the
    same images without an attack, ``clean``. Costs ``steps`` forward and backward passes for every model.

    Args:
        norm: Norm of the ball.
        eps: Its radius in pixels of [0, 1]; default the customary 8/255 for ``linf`` and 0.5 for ``l2``.
        steps: Steps of the attack.
        restarts: Attacks on every image, each from a random point; one that succeeds is enough.
        num_images: Images of every task, drawn once.
        tasks: Tasks whose images are attacked; default all of the stream.
        after: Measure after every task or the last.
        seed: Seed of images and random points.

    Raises:
        ValueError: If a number is out of range.
    """

    name = "pgd_linf"
    better = "higher"
    is_share = True
    needs_gradient: ClassVar[bool] = True
    sources = ("1706.06083",)

    def __init__(
        self,
        norm: Norm = "linf",
        eps: float | None = None,
        steps: int = 20,
        restarts: int = 1,
        num_images: int = 64,
        tasks: list[int] | None = None,
        after: Literal["every", "last"] = "last",
        seed: int = 0,
    ) -> None:
        if steps < 1 or restarts < 1 or num_images < 1:
            raise ValueError(
                f"expected steps, restarts and num_images of 1 or more, got {steps}, {restarts} and {num_images}"
            )
        self.norm, self.eps, self.steps, self.restarts = norm, eps, steps, restarts
        self.num_images, self.tasks, self.after, self.seed = num_images, tasks, after, seed
        self.name = f"pgd_{norm}"
        self._ball = Ball(norm, _RADIUS[norm] if eps is None else eps)

    @override
    def check(self, stream: Stream) -> None:
        stream.check_tasks(self.tasks or (), "tasks of PGDAccuracy")

    @override
    def parts(self, stream: Stream) -> Mapping[str, Mapping[int, SplitPlan]]:
        tasks: Sequence[int] = range(len(stream.tasks)) if self.tasks is None else self.tasks
        return {"attacked": {task: self._drawn(stream.dataset(task, "test").plan, task) for task in tasks}}

    def _drawn(self, plan: SplitPlan, task: int) -> SplitPlan:
        draw = random.Random(derived_seed(self.seed, "attacked", task))
        kept = sorted(draw.sample(range(len(plan.indices)), min(self.num_images, len(plan.indices))))
        return SplitPlan(plan.images, tuple(plan.indices[p] for p in kept), tuple(plan.targets[p] for p in kept))

    @override
    def look(self, view: View) -> Tensor:
        labels = view.labels
        clean = view.scores.argmax(dim=1) == labels
        known = view.scores.gather(1, labels.unsqueeze(1))[:, 0].isfinite()  # a head may not have learned the class

        def loss(images: Tensor) -> Tensor:
            scores = view.score(images)
            # Competitors alone: -inf has no gradient.
            found = functional.cross_entropy(scores[known].double(), labels[known], reduction="none")
            return torch.cat([found, scores[~known].nan_to_num(0.0, 0.0, 0.0).sum(dim=1) * 0.0])

        robust = clean.clone()
        for restart in range(self.restarts if known.any() else 0):
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "restart", restart))
            start = self._ball.random(view.images[:1], generator).expand_as(view.images)
            images = attacked(
                view.images,
                loss,
                self._ball,
                start=start,
                steps=self.steps,
                step_size=self._ball.eps / 4,
                normalise=view.normalise,
            )
            robust &= view.score(images).argmax(dim=1) == labels
        return torch.stack([robust, clean], dim=1).double()

    @override
    def summary(self, seen: Mapping[str, Seen], occasion: Occasion) -> Measured:
        found = seen["attacked"]
        per_task, n = found.per_task(found.rows[:, 0], occasion.num_tasks)
        clean, _ = found.per_task(found.rows[:, 1], occasion.num_tasks)
        return Measured(occasion.mean_over_seen(per_task), per_task, {"clean": occasion.mean_over_seen(clean)}, n)
