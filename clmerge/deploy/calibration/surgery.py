"""Representation surgery: adapters that take the features of a merged model back to those of the experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam
from typing_extensions import override

from clmerge.deploy.calibration.calibration import Calibration
from clmerge.deploy.calibration.experts import ExpertOutputs, outputs_of
from clmerge.deploy.calibration.images import VALIDATION, Kept, batches_of, check_adaptation, kept_images
from clmerge.deploy.calibration.operated import (
    FEATURES,
    Adapters,
    Surgical,
    behind_blocks,
    blocks_of,
    from_tensors,
    split_state,
    to_tensors,
)
from clmerge.deploy.predictors import Predictor
from clmerge.models import Backbone
from clmerge.models.tuning.tangent import TangentModule
from clmerge.streams import AdaptationData, Stream, StreamDataModule
from clmerge.streams.splits import derived_seed
from clmerge.training.module import ContinualClassifier
from clmerge.weights.modes import eval_mode
from clmerge.weights.task_vector import State


class Surgery(Calibration):
    """Take away the bias of a merged model's features by a small adapter per task (Yang et al., arXiv 2402.02705).

    ``z' = z - up relu(down z)``, fitted so that features of a task's images are those that its expert had (by the mean
    absolute difference). With ``deep`` there is one behind every block, too, and means over tokens are compared
    (Surgery V2, arXiv 2410.14389). What every expert says of its own adaptation images is kept when its task ends.
    After every merge the adapters of **all** tasks are fitted anew, because the merged features have moved.

    An image's adapter is that of its task. The papers know the task; here the nearest direction of the tasks' mean
    features gives it, without looking at other images, unless ``routed`` is false: such a model, ``_told``, has
    task-aware accuracies alone. A deep routed model computes an image twice.

    Args:
        adaptation: Images of all tasks so far, and how many of them a step has; labels are not used.
        deep: Whether blocks have adapters, too; for vision transformers.
        routed: Whether the task of an image is found, rather than given.
        rank: Hidden units of every adapter.
        steps: Steps of Adam per task.
        lr: Learning rate.

    Raises:
        ValueError: For a setting out of range.
    """

    name = "surgery"
    sources: ClassVar[tuple[str, ...]] = ("2402.02705", "2410.14389")
    observes: ClassVar[bool] = True

    def __init__(
        self,
        *,
        adaptation: AdaptationData = VALIDATION,
        deep: bool = False,
        routed: bool = True,
        rank: int = 16,
        steps: int = 1000,
        lr: float = 1e-3,
    ) -> None:
        if rank < 1 or steps < 0 or not lr > 0:
            raise ValueError(
                f"expected rank of 1 or more, steps of 0 or more and a positive lr, got {rank}, {steps}, {lr}"
            )
        self.adaptation = adaptation
        self.deep = deep
        self.routed = routed
        self.rank = rank
        self.steps = steps
        self.lr = lr
        self.name = "surgery" + "2" * deep + "_told" * (not routed)
        self.experts = ExpertOutputs()
        self._widths: dict[str, int] = {}

    @property
    @override
    def data(self) -> str:
        return self.adaptation.told(labels=False)

    @override
    def check(self, module: ContinualClassifier, stream: Stream) -> None:
        check_adaptation(self.adaptation, stream, "Surgery")
        backbone = module.backbone
        self._widths = {FEATURES: backbone.feature_dim}
        if not self.deep:
            return
        blocks = [] if any(isinstance(part, TangentModule) for part in module.modules()) else blocks_of(backbone)
        image, _ = stream.dataset(0, "train", backbone.eval_transform)[0]
        device = next(module.parameters()).device
        with eval_mode(module):
            probe = [torch.stack([image, image]).to(device)]
            found = outputs_of(backbone, probe, blocks) if blocks else {}
        if not blocks:
            raise ValueError(
                f"expected a vision transformer, whose blocks get adapters, for Surgery with deep=true, got "
                f"{type(backbone).__name__} with {module.tuning!r}; leave deep out for adapters behind the features"
            )
        self._widths |= {place: tensor.shape[1] for place, tensor in found.items()}

    @override
    def observe(self, module: ContinualClassifier, data: StreamDataModule, task: int) -> None:
        self.experts.observe(module, self.adaptation, data, task, self._blocks)

    @property
    def _blocks(self) -> list[str]:
        return [place for place in self._widths if place != FEATURES]

    @override
    def calibrate(
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int, seed: int
    ) -> dict[str, Tensor]:
        tasks = range(task + 1)
        kept = kept_images(self.adaptation, data, tasks)
        device = next(module.parameters()).device
        module.eval().requires_grad_(False)
        size = data.eval_batch_size
        own = {t: outputs_of(module.backbone, batches_of(kept[t], size, device))[FEATURES] for t in tasks}
        found = []
        for t in tasks:
            places = self._new(device, seed, t)
            order = _positions(len(own[t]), self.adaptation.batch_size, derived_seed(seed, "order", t))
            wanted = {place: tensor.to(device) for place, tensor in self.experts[t].items()}
            self._fit(module.backbone, places, own[t].to(device), wanted, kept, t, order)
            found.append(places)
        joined = {place: _joined([each[place] for each in found]) for place in found[0]}
        centroids = torch.stack([functional.normalize(own[t], dim=-1).mean(dim=0) for t in tasks])
        return to_tensors(joined, centroids if self.routed else None)

    def _new(self, device: torch.device, seed: int, task: int) -> dict[str, Adapters]:
        """Return the untrained adapters of a task, which change nothing."""
        found = {}
        for place, width in self._widths.items():
            generator = torch.Generator().manual_seed(derived_seed(seed, "adapter", place, task))
            down = torch.empty(1, self.rank, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
            found[place] = Adapters(down, torch.zeros(1, width, self.rank)).to(device)
        return found

    def _fit(
        self,
        backbone: Backbone,
        places: Mapping[str, Adapters],
        own: Tensor,
        wanted: Mapping[str, Tensor],
        kept: Kept,
        task: int,
        order: Iterator[Tensor],
    ) -> None:
        optimizer = Adam([parameter for one in places.values() for parameter in one.parameters()], lr=self.lr)
        blocks = [place for place in places if place != FEATURES]
        for _ in range(self.steps):
            chosen = next(order)
            z, losses = own[chosen], []
            tasks = torch.zeros(len(chosen), dtype=torch.long, device=z.device)
            if blocks:

                def adapted(place: str, tokens: Tensor) -> Tensor:
                    changed: Tensor = places[place](tokens, tasks)  # noqa: B023  called before the next step
                    losses.append((changed.mean(dim=1) - wanted[place][chosen]).abs().mean())  # noqa: B023
                    return changed

                images = torch.stack([kept[task][position][0] for position in chosen.tolist()])
                with behind_blocks(backbone, blocks, adapted):
                    z = backbone(images.to(z.device))
            losses.append((places[FEATURES](z, tasks) - wanted[FEATURES][chosen]).abs().mean())
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(losses).sum())
            optimizer.step()

    @override
    def predictor(self, module: ContinualClassifier, state: State) -> Predictor:
        return Surgical(from_tensors(module, split_state(state)[1]))

    @override
    def nbytes(self, module: ContinualClassifier, data: StreamDataModule, task: int, *, models: int = 1) -> int:
        tasks = range(task + 1)
        images = sum(map(len, self.adaptation.images(data, tasks).values()))
        width = sum(self._widths.values())
        centroids = 4 * self._widths[FEATURES] * len(tasks) * self.routed
        adapters = len(tasks) * adapter_bytes(self._widths.values(), self.rank)
        experts = images * (4 * width + 8)
        return models * (adapters + centroids) + experts + self.adaptation.nbytes(data, tasks)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.experts.state_dict()

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.experts.load_state_dict(state)


def adapter_bytes(widths: Iterable[int], rank: int) -> int:
    """Return the bytes of one task's adapters.

    Args:
        widths: Number of features at every place.
        rank: Hidden units.

    Example:
        >>> adapter_bytes([512], 16), adapter_bytes([512, *[768] * 12], 16)  # CLIP ViT-B/32: V1, V2
        (65536, 1245184)
    """
    return 4 * sum(2 * rank * width for width in widths)


def _joined(several: Sequence[Adapters]) -> Adapters:
    """Return the adapters of several tasks at one place as one."""
    return Adapters(*(torch.cat([getattr(one, side).detach() for one in several]) for side in ("down", "up")))


def _positions(number: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of positions without end; all are drawn before one is drawn again."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(number, generator=generator)])
        yield left[:size]
        left = left[size:]
