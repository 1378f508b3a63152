"""The data module: one stream, served task by task to a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from clmerge.streams.augmentation import Augmentation
from clmerge.streams.cache import CachedImages, TaskImages, cached
from clmerge.streams.images import ImageDataset, subset
from clmerge.streams.plan import Split, Transform
from clmerge.streams.replay import Images, Replay, ReplaySampler, replay_memory
from clmerge.streams.samplers import BalancedSampler, EpochSampler, SeededDataset, ShardSampler, even_steps_batch_size
from clmerge.streams.splits import dealt, derived_seed, dirichlet_parts
from clmerge.streams.stream import Stream

if TYPE_CHECKING:
    from torchvision.transforms import v2


class StreamDataModule(LightningDataModule):
    """Serve the tasks of a stream, one at a time for training and all of them for testing.

    The order of training samples and their augmentation are pure functions of (seed, task, epoch), so that a
    resumed run sees the same batches, bit for bit, with any number of workers. Training and validation
    batches are ``(images, labels)``; test batches are ``(images, labels, task_ids)`` over all tasks of the
    stream.

    Args:
        batch_size: images per training step and process.
        eval_batch_size: images per evaluation step and process (default: ``batch_size``).
        num_workers: worker processes that load images; 0 loads them in the training process.
        seed: seed of order and augmentation.
        cache_eval: keep transformed evaluation images in memory where they fit into ``cache_mb``, because
            every merger is tested after every task.
        cache_mb: room for them, in MiB and per process.
        replay: number of images of earlier tasks to keep and train on again, a baseline; merging needs none. They are
            shared evenly by the classes seen, and every batch has as many from memory as from the task (experience
            replay). ``all`` keeps every image and shuffles them with the task's (joint training on all data so far).
            Not possible with a loss over the ``current`` classes.
        class_balanced: draw equally many training images of every class of the task in every epoch, for classes of
            very different size. An epoch stays as long: it repeats images of small classes and leaves some of large
            ones out.
        augmentation: torchvision's v2 transforms of training images, from pictures to pictures, after which the
            backbone's transform for evaluation follows. Default: the backbone's own mild augmentation.
        dirichlet: concentration of the Dirichlet distribution that draws which classes, and how many images of them,
            each branch of a task has: 0.5 as usual in federated learning, 0.1 for few classes each. Default: equal.

    Attributes:
        part: ``(index, count)``: train on one of ``count`` parts of the task's images.
        branch: Draws an order and augmentation of its own for a branch that trains on all images; 0 is the task's.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        batch_size: int = 128,
        *,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_eval: bool = True,
        cache_mb: int = 64,
        replay: Replay = 0,
        class_balanced: bool = False,
        augmentation: list[v2.Transform] | None = None,
        dirichlet: float | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(f"expected batch sizes of 1 or more, got {batch_size} and {eval_batch_size}")
        if num_workers < 0 or cache_mb < 0:
            raise ValueError(f"expected num_workers and cache_mb of 0 or more, got {num_workers} and {cache_mb}")
        if dirichlet is not None and not dirichlet > 0:
            raise ValueError(f"expected dirichlet above 0, got {dirichlet}")
        if isinstance(replay, int) and replay < 0:
            raise ValueError(f"expected replay of 0 or more images, or 'all', got {replay}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_eval = cache_eval
        self.cache_mb = cache_mb
        self.replay: Replay = replay
        self.class_balanced = class_balanced
        self.augmentation = augmentation
        self.dirichlet = dirichlet
        self._stream: Stream | None = None
        self._own_transform: Transform | None = None
        self._train_transform: Transform | None = None
        self._eval_transform: Transform | None = None
        self._task = 0
        self.part = (0, 1)
        self.branch = 0
        self._cache: dict[tuple[Split, int], CachedImages | None] = {}
        self._cached_bytes = 0  # of the images in memory
        self._image_files: Path | None = None

    def setup_stream(self, stream: Stream, train_transform: Transform | None, eval_transform: Transform | None) -> None:
        """Set the stream to serve and the backbone's image transforms; starts at task 0.

        Args:
            stream: the stream.
            train_transform: applied to training images, may be random; unused with ``augmentation``.
            eval_transform: applied to validation and test images, must not be random.
        """
        self._stream = stream
        self._own_transform, self._eval_transform = train_transform, eval_transform
        self.augment(None)
        self._task = 0
        self._cache.clear()
        self._cached_bytes = 0

    def augment(self, augmentation: Sequence[v2.Transform] | None) -> None:
        """Augment training images by other transforms than ``augmentation``; None goes back to that."""
        own = self.augmentation if augmentation is None else augmentation
        self._train_transform = self._own_transform if own is None else Augmentation(own, self._eval_transform)

    def keep_images(self, folder: Path) -> None:
        """Decode validation and test images only once: those beyond ``cache_mb`` are kept on disk.

        Args:
            folder: existing folder for the image files; the caller must remove it later.
        """
        self._image_files = folder

    @property
    def stream(self) -> Stream:
        """The stream being served.

        Raises:
            RuntimeError: before `setup_stream`.
        """
        if self._stream is None:
            raise RuntimeError(
                "expected a stream, got none: call setup_stream(stream, train_transform, eval_transform)"
            )
        return self._stream

    @property
    def eval_transform(self) -> Transform | None:
        """The transform of validation and test images."""
        return self._eval_transform

    @property
    def task(self) -> int:
        """Index of the task that is trained and validated on."""
        return self._task

    @task.setter
    def task(self, task: int) -> None:
        num_tasks = len(self.stream.tasks)
        if not 0 <= task < num_tasks:
            raise ValueError(f"expected a task in 0..{num_tasks - 1} of stream {self.stream.name}, got {task}")
        if task != self._task and self._image_files is None:
            # Validation images are used only while their task is trained; drop them to make room for test images.
            self._cached_bytes -= _bytes_in_memory(self._cache.pop(("val", self._task), None))
        self._task = task

    @property
    def num_train_images(self) -> int:
        """Number of the current task's training images, or of those in its part."""
        return len(self._current())

    def _current(self) -> ImageDataset:
        current = self.stream.dataset(self._task, "train", self._train_transform)
        return current if self.part[1] == 1 else subset(current, self.part_positions)

    @property
    def part_positions(self) -> list[int]:
        """Positions of the part's images among the current task's training images."""
        part, num_parts = self.part
        targets = self.stream.dataset(self._task, "train").targets
        seed = derived_seed(self.seed, "parts", self._task)
        if self.dirichlet is not None:
            return dirichlet_parts(targets, num_parts, self.dirichlet, seed=seed)[part]
        return dealt(targets, num_parts, seed=seed)[part]

    def _branch(self) -> list[int]:
        return [self.branch] if self.branch else []

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return the shuffled training batches of the current task, with those from memory under ``replay``."""
        current = self._current()
        memory = self.memory(self._train_transform)
        images = Images([current, *memory.parts]) if len(memory) else current
        shuffled = images if self.replay == "all" else current
        seed = derived_seed(self.seed, "order", self._task, *self._branch())
        world_size, rank = self._placement()
        order = (
            BalancedSampler(shuffled.targets, seed=seed, num_replicas=world_size, rank=rank)
            if self.class_balanced
            else EpochSampler(shuffled, seed=seed, num_replicas=world_size, rank=rank)
        )
        sampler: EpochSampler | ReplaySampler = order
        batch_size = self.batch_size
        if len(images) > len(shuffled):
            sampler = ReplaySampler(order, len(current), len(memory), batch_size=batch_size, seed=seed)
            batch_size *= 2
        return DataLoader(
            SeededDataset(images, seed=derived_seed(self.seed, "images", self._task, *self._branch())),
            batch_size=batch_size,
            sampler=sampler,
            generator=self._generator(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._on_cuda(),
        )

    def memory(self, transform: Transform | None = None) -> Images:
        """Return the images of earlier tasks that are kept while the current task is trained.

        Args:
            transform: applied to each image (default: none).
        """
        return replay_memory(self.stream, self._task, self.replay, transform, seed=self.seed)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the validation batches of the current task; an empty list if there are none."""
        images = self._images("val", self._task)
        if not len(images):
            return []
        return self._eval_loader(images, in_memory=isinstance(images, CachedImages), persistent=True)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches of all tasks in one loader."""
        return self.eval_dataloader("test")

    def eval_dataloader(
        self, split: Split | Literal["all"] = "test", tasks: Sequence[int] | None = None
    ) -> DataLoader[Any]:
        """Return batches ``(images, labels, task_ids)`` of one split of several tasks, in order.

        Args:
            split: "train", "val", "test" or "all" of them; the evaluation transform is used for every image.
            tasks: indices of the tasks (default: all of the stream).

        Raises:
            ValueError: if there are no images, or fewer images than processes.
        """
        chosen = range(len(self.stream.tasks)) if tasks is None else tasks
        splits: Sequence[Split] = ("train", "val", "test") if split == "all" else (split,)
        places = [(task, own) for task in chosen for own in splits]
        images = TaskImages([self._images(own, task) for task, own in places], [task for task, _ in places])
        return self._eval_loader(images, in_memory=images.in_memory, persistent=False)

    def dataloader_of(self, images: Mapping[int, ImageDataset]) -> DataLoader[Any]:
        """Return batches ``(images, labels, task_ids)`` of images by task, in order.

        Args:
            images: images under the evaluation transform, by the index of their task; -1 for those of none.

        Raises:
            ValueError: if there are no images, or fewer images than processes.
        """
        parts = TaskImages(list(images.values()), list(images))
        return self._eval_loader(parts, in_memory=False, persistent=False)

    def _images(self, split: Split, task: int) -> ImageDataset | CachedImages:
        images = self.stream.dataset(task, split, self._eval_transform)
        keep = split == "test" or (split == "val" and (task == self._task or self._image_files is not None))
        if not self.cache_eval or not keep:
            return images
        key = (split, task)
        if key not in self._cache:
            file = None if self._image_files is None else self._image_files / f"{split}_{task:03d}.bin"
            room = self.cache_mb * 2**20 - self._cached_bytes
            self._cache[key] = cached(images, room, file, num_workers=self.num_workers)
            self._cached_bytes += _bytes_in_memory(self._cache[key])
        return self._cache[key] or images

    def _eval_loader(
        self, images: ImageDataset | CachedImages | TaskImages, *, in_memory: bool, persistent: bool
    ) -> DataLoader[Any]:
        world_size, rank = self._placement()
        if not len(images):
            raise ValueError(f"expected images to evaluate in stream {self.stream.name}, got none")
        num_workers = 0 if in_memory else self.num_workers
        return DataLoader(
            images,
            batch_size=even_steps_batch_size(len(images), self.eval_batch_size, world_size),
            sampler=ShardSampler(images, num_replicas=world_size, rank=rank),
            generator=self._generator(),
            num_workers=num_workers,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=self._on_cuda(),
        )

    def _generator(self) -> torch.Generator:
        # Without its own generator, a loader draws its workers' seed from the global generator at every epoch.
        return torch.Generator().manual_seed(derived_seed(self.seed, "workers", self._task))

    def _placement(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _bytes_in_memory(images: CachedImages | None) -> int:
    return 0 if images is None or images.on_disk else images.images.nbytes
