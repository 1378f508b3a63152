"""A merge rule of your own, in a file of your own: defining the class registers it.

python examples/own_rule.py
"""

from typing import Any

import torch
from torch import Tensor

from clmerge.merging import Merger, Pipeline, TrimTensor, registered_mergers


class Median3(Merger):
    """The median of the last three task vectors, entry by entry. State: 12 bytes per parameter."""

    name = "median3"
    summary = "median of the last three changes"
    order_free = False
    exact_online = False
    slots = ("newest", "middle", "oldest")

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def _fold_block(self, slots: dict[str, Tensor], tau: Tensor, step: Any, plan: Any) -> None:
        slots["oldest"].copy_(slots["middle"])
        slots["middle"].copy_(slots["newest"])
        slots["newest"].copy_(tau)

    def _read_block(self, slots: dict[str, Tensor], overview: Any) -> Tensor:
        return torch.stack(list(slots.values())).median(dim=0).values * self.scale


def main() -> None:
    """Use the rule alone and behind a sparsifier."""
    assert registered_mergers()["Median3"] is Median3
    for merger in (Median3(), Pipeline(Median3(), sparsifier=TrimTensor(density=0.5))):
        for value in (1.0, -2.0, 5.0):
            merger.update({"w": torch.tensor([value, 0.1])})
        print(merger, merger.compute()["w"].tolist())


if __name__ == "__main__":
    main()
