"""How much of what experts share, and of what one alone knows, is left in merged models."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Knowledge:
    """Count images that several experts or one alone answer right, and those of them that other models answer right.

    Averaging keeps what models share, and what one of them alone knows fades (Fuse to Forget, arXiv 2311.07682). There,
    knowledge is shared if both models were trained on an example; here, if more than the task's own expert answers the
    image right.

    Example:
        >>> import torch
        >>> knowledge = Knowledge()
        >>> own, others = torch.tensor([True, True, True, False]), torch.tensor([True, False, False, True])
        >>> knowledge.add(own, others, {"mean": torch.tensor([True, False, True, True])})
        >>> knowledge.found()["shared"], knowledge.found()["unshared"]
        ({'n': 1, 'remembered': {'mean': 1.0}}, {'n': 2, 'remembered': {'mean': 0.5}})
    """

    def __init__(self) -> None:
        self._counts = {"shared": 0, "unshared": 0}
        self._kept: dict[str, dict[str, int]] = {"shared": {}, "unshared": {}}

    def add(self, own: Tensor, others: Tensor, models: Mapping[str, Tensor]) -> None:
        """Add the images of one task.

        Args:
            own: Whether the task's own expert is right, ``(N,)``.
            others: Whether any other expert is right, ``(N,)``.
            models: Whether each model is right, by name, ``(N,)``.
        """
        for kind, known in (("shared", own & others), ("unshared", own & ~others)):
            self._counts[kind] += int(known.sum())
            for name, right in models.items():
                self._kept[kind][name] = self._kept[kind].get(name, 0) + int((right & known).sum())

    def found(self) -> dict[str, Any]:
        """Return, for both kinds, the number of images and the share of them that each model answers right."""
        return {
            kind: {"n": n, "remembered": {name: kept / n if n else math.nan for name, kept in self._kept[kind].items()}}
            for kind, n in self._counts.items()
        }
