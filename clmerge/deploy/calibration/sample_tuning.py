"""Tune a merged model on a few images of every class."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from typing_extensions import override

from clmerge.deploy.calibration.calibration import Calibration
from clmerge.streams import Stream, StreamDataModule
from clmerge.streams.plan import Transform
from clmerge.streams.replay import Images, replay_memory
from clmerge.streams.samplers import EpochSampler, SeededDataset
from clmerge.streams.splits import derived_seed
from clmerge.training.module import ContinualClassifier, lr_factor


class SampleTuning(Calibration):
    """Train the merged model for a few epochs on a few images of every class (Chitale et al., arXiv 2311.02428).

    The paper sums LoRA task vectors and tunes the sum on 10 samples per class; here any merger and any mode of tuning
    is supported. Trained weights, optimizer, learning rate, shape of the schedule (without warm-up) and augmentation
    are those of the tasks; the loss covers all classes seen so far. A trainable head is tuned as well.

    The buffer holds ``per_class`` training images of every class seen, drawn by the data module's seed; images of
    earlier tasks stay in it. Only their indices are kept, and the images are read from the stream; ``results.json``
    counts their decoded bytes, which a system without the old data would have to store.

    Args:
        per_class: Images per class; 10 in the paper.
        epochs: Passes over the buffer; the default is our choice.

    Raises:
        ValueError: If a number is not positive.
    """

    name = "tuned"
    sources: ClassVar[tuple[str, ...]] = ("2311.02428",)

    def __init__(self, *, per_class: int = 10, epochs: int = 10) -> None:
        if per_class < 1 or epochs < 1:
            raise ValueError(f"expected per_class and epochs of 1 or more, got {per_class} and {epochs}")
        self.per_class = per_class
        self.epochs = epochs

    @property
    @override
    def data(self) -> str:
        return f"buffer({self.per_class} per class)"

    @override
    def check(self, module: ContinualClassifier, stream: Stream) -> None:
        if not module.trained_names:
            raise ValueError("expected a backbone that is trained for SampleTuning, got a frozen one")

    def buffer(self, data: StreamDataModule, task: int, transform: Transform | None = None) -> Images:
        """Return the kept images of the tasks up to ``task``.

        Args:
            data: Provides the stream's images.
            task: Index of the last task.
            transform: Applied to each image (default: none).
        """
        stream = data.stream
        classes = {target for index in range(task + 1) for target in stream.dataset(index, "train").targets}
        return replay_memory(stream, task + 1, self.per_class * len(classes), transform, seed=data.seed)

    @override
    def calibrate(
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int, seed: int
    ) -> dict[str, Tensor]:
        images = self.buffer(data, task, module.backbone.train_transform)
        order = EpochSampler(images, seed=derived_seed(seed, "order"))
        seeded = SeededDataset(images, seed=derived_seed(seed, "images"))
        loader = DataLoader(seeded, batch_size=data.batch_size, sampler=order, num_workers=0)
        if module.loss_classes == "current":
            module.loss_classes = "seen"
        module.head.train_blocks(None)
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        optimizer = module.optimizer_factory(list(trained.values()))
        total = self.epochs * len(loader)
        cosine = module.schedule == "cosine"
        schedule = LambdaLR(optimizer, partial(lr_factor, total=total, warmup=0, cosine=cosine))
        device = next(module.parameters()).device
        module.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derived_seed(seed, "dropout"))
            for epoch in range(self.epochs):
                order.set_epoch(epoch)
                for batch, labels in loader:
                    optimizer.step(partial(_gradients, module, optimizer, batch.to(device), labels.to(device)))
                    schedule.step()
        buffers = {name: buffer for name, buffer in module.named_buffers() if "running_" in name}
        return {**trained, **buffers}

    @override
    def nbytes(self, module: ContinualClassifier, data: StreamDataModule, task: int, *, models: int = 1) -> int:
        return self.buffer(data, task).nbytes


def _gradients(module: ContinualClassifier, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Any:
    optimizer.zero_grad()
    loss = module.loss(module(images), labels)
    torch.autograd.backward(loss)
    return loss
