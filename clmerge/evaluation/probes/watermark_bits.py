"""Whether weights carry the message of a watermark."""

from typing import Literal

from typing_extensions import override

from clmerge.evaluation.probes.probe import Occasion, WeightProbe
from clmerge.evaluation.probes.significance import binomial_tail, false_positive_rate
from clmerge.names import without_secret
from clmerge.results.measured import Measured
from clmerge.weights.secrets import MarkedPart, Secret, marked_part, marked_vector
from clmerge.weights.task_vector import State


class WatermarkBits(WeightProbe):
    """Share of the secret bits of a ``WeightWatermark`` that are read out of a model's weights (arXiv 1701.04082).

    A model that was made without the key has every bit right with probability 1/2, independently of the others. The
    ``values`` are the exact binomial ``p_value`` of as many right bits or more, and after the last task
    ``false_positive_rate``: the share of random keys that the model seems to carry at ``level``. A model whose marked
    part is zero, such as the base model's task vector, has no bits: NaN. ``n`` is the number of bits.

    Args:
        key: As for ``WeightWatermark``.
        parameter: As for ``WeightWatermark``.
        bits: As for ``WeightWatermark``.
        of: As for ``WeightWatermark``; the probe's name is ``watermark_OF``.
        random_keys: Number of random keys.
        level: Largest p value at which a key counts as found.
        after: Measure after every task or the last.

    Raises:
        ValueError: For no bits, no random keys, or an unknown part.
    """

    better = "higher"
    is_share = True
    sources = ("1701.04082",)

    def __init__(
        self,
        key: str,
        parameter: str,
        bits: int = 64,
        of: MarkedPart = "task_vector",
        random_keys: int = 20,
        level: float = 0.01,
        after: Literal["every", "last"] = "every",
    ) -> None:
        if random_keys < 1:
            raise ValueError(f"expected 1 random key or more, got {random_keys}")
        self.key, self.parameter, self.bits, self.of = key, parameter, bits, marked_part(of)
        self.random_keys, self.level, self.after = random_keys, level, after
        self.name = f"watermark_{of}"
        self._secret = Secret(key, bits)

    @override
    def measure(self, weights: State, base: State, occasion: Occasion) -> Measured:
        vector = marked_vector(weights, base, self.parameter, self.of)
        if not bool(vector.any()):
            nothing = float("nan")
            return Measured(nothing, values={"p_value": nothing, "false_positive_rate": nothing}, n=self.bits)
        right = self._secret.right(vector)
        values = {"p_value": binomial_tail(right, self.bits, 0.5)}
        if occasion.last:
            others = [Secret(f"random key {index}", self.bits).right(vector) for index in range(self.random_keys)]
            values["false_positive_rate"] = false_positive_rate(others, self.bits, 0.5, self.level)
        return Measured(right / self.bits, values=values, n=self.bits)

    @override
    def __repr__(self) -> str:  # in results and reports, which others may read
        return without_secret(super().__repr__(), self.key)
