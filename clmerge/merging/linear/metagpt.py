"""MetaGPT: scaling coefficients in closed form, from the norms of the task vectors."""

import math

from typing_extensions import override

from clmerge.merging.linear.weighted_sum import WeightedSum
from clmerge.merging.norms import vector_norm
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class MetaGPT(WeightedSum):
    """Add task vectors by their share of the squared norms (Zhou et al., arXiv 2406.11385).

    The result is ``scale * sum(lambda_t tau_t)`` with ``lambda_t = |tau_t|^2 / sum(|tau_s|^2)`` and the norm of the
    whole vector, the minimiser of the average loss difference if the model is linear and task vectors are
    orthogonal. Both sums are streamed. A task with nearly all of the squared norm cannot be removed, because only
    rounding error would remain. State: 4 bytes per parameter.

    Args:
        scale: Scaling coefficient; 1 is the paper's rule.

    Example:
        >>> import torch
        >>> merger = MetaGPT()
        >>> merger.update({"w": torch.tensor([1.0, 0.0])})
        >>> merger.update({"w": torch.tensor([0.0, 3.0])})
        >>> merger.compute()
        {'w': tensor([0.1000, 2.7000])}
    """

    name = "metagpt"
    summary = "sum of the task vectors, weighted by their share of the squared norms"
    source = "2406.11385"
    scope = "model"

    @override
    def _log_weights(self, vector: State, step: Step) -> dict[str, float]:
        norm = vector_norm(vector)
        return dict.fromkeys(vector, 2 * math.log(norm) if norm else -math.inf)
