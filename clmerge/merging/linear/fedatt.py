"""FedAtt: weigh the tasks per parameter tensor, by the distance from the base model."""

import math

from typing_extensions import override

from clmerge.merging.linear.weighted_sum import WeightedSum
from clmerge.merging.norms import squared_norm
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class FedAtt(WeightedSum):
    """Average every parameter with attention on the tasks that changed it most (Ji et al., arXiv 1812.07108).

    The result is ``scale * sum(a_t tau_t)``, where for every parameter tensor the ``a_t`` are the softmax over the
    tasks of ``|tau_t| / temperature``, with ``|tau_t|`` the distance from theta0. Theta0 is fixed, so the weight of a
    task depends on that task alone, and the softmax is streamed. The sign is that of the released code,
    ``softmax(+|.|)``: larger changes count more. As in that code, each parameter tensor is a layer of its own. Two
    differences: the released code uses the largest singular value of matrices as distance (scipy's norm of order 2),
    here it is the Euclidean norm of all entries; and its noise for privacy is left out. A task with nearly all of the
    attention on a parameter cannot be removed. State: 4 bytes per parameter.

    Args:
        temperature: Temperature of the softmax: the larger, the more equal the weights; 1 is the paper's rule. A
            negative value prefers the tasks nearest to theta0.
        scale: Step size towards the average; the paper's epsilon.

    Raises:
        ValueError: If ``temperature`` is 0.

    Example:
        >>> import torch
        >>> merger = FedAtt()
        >>> merger.update({"moved": torch.tensor([2.0]), "still": torch.tensor([1.0])})
        >>> merger.update({"moved": torch.tensor([10.0]), "still": torch.tensor([1.0])})
        >>> merger.compute()
        {'moved': tensor([9.9973]), 'still': tensor([1.])}
    """

    name = "fedatt"
    summary = "mean of every parameter, weighted by the softmax of how far each task moved it"
    source = "1812.07108"
    scope = "parameter"

    def __init__(self, temperature: float = 1.0, *, scale: float = 1.0) -> None:
        super().__init__(scale)
        if not temperature:
            raise ValueError(f"expected a temperature other than 0, got {temperature}")
        self.temperature = temperature

    @override
    def _log_weights(self, vector: State, step: Step) -> dict[str, float]:
        return {name: math.sqrt(squared_norm(vector[name])) / self.temperature for name in vector}
