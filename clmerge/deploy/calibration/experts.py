"""What the experts say of the adaptation images of their own tasks, kept when a task ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clmerge.deploy.calibration.images import batches_of, kept_images
from clmerge.deploy.calibration.operated import FEATURES, behind_blocks
from clmerge.models import Backbone
from clmerge.streams import AdaptationData, StreamDataModule
from clmerge.training.module import ContinualClassifier
from clmerge.weights.modes import eval_mode

Outputs = dict[str, Tensor]
"""By place: features, or means over the tokens of a block's output, of several images, ``(num_images, width)``."""


class ExpertOutputs:
    """Outputs of every task's expert on the adaptation images that are kept of the task, in their order."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, Outputs]] = {}

    def __getitem__(self, task: int) -> Outputs:
        return self._found[task][1]

    def observe(
        self,
        module: ContinualClassifier,
        adaptation: AdaptationData,
        data: StreamDataModule,
        task: int,
        blocks: Sequence[str] = (),
    ) -> None:
        """Keep what the module, the expert of a task, says of the task's images.

        Args:
            module: The classifier with the expert's weights.
            adaptation: The images.
            data: Provides them.
            task: Index of the task, the latest.
            blocks: Paths of blocks below the backbone.
        """
        images = adaptation.images(data, range(task + 1))
        kept = kept_images(adaptation, data, range(task + 1))
        device = next(module.parameters()).device
        with eval_mode(module):
            found = outputs_of(module.backbone, batches_of(kept[task], data.eval_batch_size, device), blocks)
        self._found[task] = torch.tensor(images[task].plan.indices), found
        for other, (places, outputs) in self._found.items():  # a full buffer drops images of earlier tasks
            wanted = {*images[other].plan.indices} if other in images else set()
            rows = torch.tensor([place in wanted for place in places.tolist()], dtype=torch.bool)
            self._found[other] = places[rows], {place: tensor[rows] for place, tensor in outputs.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives."""
        return {str(task): {"images": images, "outputs": dict(found)} for task, (images, found) in self._found.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state_dict``."""
        self._found = {int(task): (one["images"], dict(one["outputs"])) for task, one in state.items()}


@torch.no_grad()
def outputs_of(backbone: Backbone, batches: Iterable[Tensor], blocks: Sequence[str] = ()) -> Outputs:
    """Return features of images and means over tokens behind blocks, float32 on the CPU.

    Args:
        backbone: The backbone, in evaluation mode.
        batches: The images.
        blocks: Paths of blocks below the backbone.

    Raises:
        ValueError: If what a block returns is not ``(images, tokens, width)``.
    """
    found: dict[str, list[Tensor]] = {FEATURES: [], **{place: [] for place in blocks}}
    count = 0

    def note(place: str, tokens: Any) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != count:
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"expected blocks that return (images, tokens, width), got {got} of {place}")
        found[place].append(tokens.mean(dim=1).float().cpu())

    with behind_blocks(backbone, blocks, note):
        for images in batches:
            count = len(images)
            found[FEATURES].append(backbone(images).float().cpu())
    return {place: torch.cat(parts) for place, parts in found.items()}
