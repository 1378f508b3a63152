"""What federated rounds send."""

from typing import Literal

from typing_extensions import override

from clmerge.evaluation.probes.probe import Occasion, WeightProbe
from clmerge.results.measured import Measured
from clmerge.weights.task_vector import State


class CommunicatedBytes(WeightProbe):
    """Bytes of the merged parameters that were sent to clients and back, for all tasks learned so far.

    Every client that takes part in a round gets the model and returns its own, in float32. Without branches a task is
    one client and one round. What is trained and not merged, such as a head, is not counted.

    Args:
        after: Measure after every task or the last.
    """

    name = "communicated_bytes"
    better = "lower"

    def __init__(self, after: Literal["every", "last"] = "every") -> None:
        self.after = after

    @override
    def measure(self, weights: State, base: State, occasion: Occasion) -> Measured:
        sent = occasion.uploads * occasion.num_seen
        one_way = 4.0 * sent * sum(tensor.numel() for tensor in base.values())
        return Measured(2 * one_way, values={"down": one_way, "up": one_way}, n=sent)
