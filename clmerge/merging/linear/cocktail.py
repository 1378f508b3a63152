"""LM-Cocktail: weigh all models, the base among them, by their losses on few examples of one task."""

import math

from typing_extensions import override

from clmerge.merging.linear.mixed import Mixed
from clmerge.merging.objectives import CrossEntropy
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class LMCocktail(Mixed):
    """Mix all models for the latest task by their losses on few of its examples (LM-Cocktail, arXiv 2311.13534).

    After every task its labelled adaptation images are shown to the base model and to every expert so far, each to the
    same ones. The models' weights are ``softmax(-loss / temperature)`` over all of them; the base model's share pulls
    the mixture towards theta_0. As published this serves one target task: it is a way to learn the latest task with the
    help of the others, and no guard against forgetting.

    Needs adaptation images with labels. The task vectors are kept: 4 bytes per parameter and task, or none with a bank;
    an update takes T + 1 losses. ``WeightedAverage(by="loss")`` needs neither, but has every expert's loss on its own
    task.

    Args:
        temperature: The larger, the more equal the weights; 5 in the released examples, which are language models.
        batches: Batches of adaptation images that a loss is the mean of.
        seed: Seed of the choice of images.

    Raises:
        ValueError: If ``temperature`` is not positive or ``batches`` is below 1.
    """

    name = "lm_cocktail"
    summary = "mean of base and experts, weighted by their losses on few images of the latest task"
    source = "2311.13534"
    requires_gradient = True
    reads_labels = True

    def __init__(self, temperature: float = 1.0, *, batches: int = 4, seed: int = 0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"expected a positive temperature, got {temperature}")
        if batches < 1:
            raise ValueError(f"expected batches of 1 or more, got {batches}")
        self.temperature = temperature
        self.batches = batches
        self.seed = seed

    @override
    def _plan(self, vector: State, step: Step) -> list[float]:
        latest = self._sparsified(vector, step.task)
        count = step.position + 1
        models = [[0.0] * count, *([float(p == own) for p in range(count)] for own in range(count))]
        logits = [-self._loss(weights, latest, step) / self.temperature for weights in models]
        shares = [math.exp(logit - max(logits)) for logit in logits]
        return [share / sum(shares) for share in shares[1:]]

    def _loss(self, weights: list[float], latest: State, step: Step) -> float:
        """Return the mean loss of a model on the first batches, the same for every model."""
        assert step.gradients is not None
        mixture = self._mixture(weights, latest)
        gradient = step.gradients(CrossEntropy(), [step.task], seed=self.seed, expert=lambda task: mixture)
        return sum(gradient(dict(mixture))[0] for _ in range(self.batches)) / self.batches  # it empties what it gets
