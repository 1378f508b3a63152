"""Turn a learned head so that it fits the features of the merged model."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.deploy.calibration.calibration import Calibration
from clmerge.deploy.calibration.experts import ExpertOutputs, outputs_of
from clmerge.deploy.calibration.images import VALIDATION, batches_of, check_adaptation, kept_images
from clmerge.deploy.calibration.operated import FEATURES
from clmerge.models import CosineHead, LinearHead
from clmerge.streams import AdaptationData, Stream, StreamDataModule
from clmerge.training.module import ContinualClassifier
from clmerge.weights.modes import eval_mode


class HeadRotation(Calibration):
    """Turn the head by the rotation between the experts' features and the merged model's (arXiv 2412.13526).

    The paper finds that a head and merged features differ by an orthogonal map, and trains a classifier on a few
    images; here the map is the closed form: the rotation R that brings the merged features of adaptation images nearest
    to those that each image's expert had, and the weights of the head become ``W R^T``. One map for all tasks; it needs
    no label, and no task of a test image. What the experts say of the images is kept when their task ends.

    Only for heads that learn their classes (``LinearHead``, ``CosineHead``).

    Args:
        adaptation: Images of all tasks so far; labels are not used.
        ridge: Pulls the rotation towards none, relative to the mean over directions of what the images say: few images
            say nothing of most directions. Our choice; at 0 those turn arbitrarily.

    Raises:
        ValueError: If ``ridge`` is negative.
    """

    name = "rotated"
    sources: ClassVar[tuple[str, ...]] = ("2412.13526",)
    observes: ClassVar[bool] = True

    def __init__(self, *, adaptation: AdaptationData = VALIDATION, ridge: float = 1.0) -> None:
        if not ridge >= 0:
            raise ValueError(f"expected ridge of 0 or more, got {ridge}")
        self.adaptation = adaptation
        self.ridge = ridge
        self.experts = ExpertOutputs()

    @property
    @override
    def data(self) -> str:
        return self.adaptation.told(labels=False)

    @override
    def check(self, module: ContinualClassifier, stream: Stream) -> None:
        check_adaptation(self.adaptation, stream, "HeadRotation")
        if not isinstance(module.head, LinearHead | CosineHead):
            raise ValueError(
                f"expected a LinearHead or a CosineHead for HeadRotation, got {type(module.head).__name__}, whose "
                "weights are not trained with the experts' features"
            )

    @override
    def observe(self, module: ContinualClassifier, data: StreamDataModule, task: int) -> None:
        self.experts.observe(module, self.adaptation, data, task)

    @override
    @torch.no_grad()
    def calibrate(
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int, seed: int
    ) -> dict[str, Tensor]:
        kept = kept_images(self.adaptation, data, range(task + 1))
        device, size = next(module.parameters()).device, data.eval_batch_size
        with eval_mode(module):
            found = [outputs_of(module.backbone, batches_of(kept[t], size, device))[FEATURES] for t in kept]
        turn = rotation(torch.cat(found), torch.cat([self.experts[t][FEATURES] for t in kept]), self.ridge)
        changed = {}
        for name, rows in module.head.named_parameters():
            dim = len(turn)
            turned = (rows[:, :dim].double().cpu() @ turn.T).to(rows)
            changed[f"head.{name}"] = torch.cat([turned, rows[:, dim:]], dim=1)
        return changed

    @override
    def nbytes(self, module: ContinualClassifier, data: StreamDataModule, task: int, *, models: int = 1) -> int:
        images = sum(map(len, self.adaptation.images(data, range(task + 1)).values()))
        return images * (4 * module.backbone.feature_dim + 8) + self.adaptation.nbytes(data, range(task + 1))

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.experts.state_dict()

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.experts.load_state_dict(state)


def rotation(found: Tensor, wanted: Tensor, ridge: float = 0.0) -> Tensor:
    """Return the orthogonal map R that minimises ``|wanted - found R|^2 + ridge s |R - 1|^2``, ``(D, D)``, float64.

    Args:
        found: Features, ``(num_images, D)``.
        wanted: What they should be, ``(num_images, D)``.
        ridge: Weight of the distance from no rotation, relative to ``s = |found| |wanted| / D``.

    Example:
        >>> turned = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> rotation(torch.eye(2), turned).round()
        tensor([[ 0.,  1.],
                [-1.,  0.]], dtype=torch.float64)
    """
    found, wanted = found.double(), wanted.double()
    dim = found.shape[1]
    scale = ridge * found.norm() * wanted.norm() / dim
    u, _, vh = torch.linalg.svd(found.T @ wanted + scale * torch.eye(dim, dtype=torch.float64))
    turn: Tensor = u @ vh
    return turn
