"""Any Avalanche classification benchmark as a stream."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from clmerge.streams.decoding import as_rgb
from clmerge.streams.layout import split_plan
from clmerge.streams.plan import Split, SplitPlan, StreamPlan, Task
from clmerge.streams.sources import LabelledImages
from clmerge.streams.splits import stratified_cut
from clmerge.streams.stream import Stream, safe_name, task_names, unique_names

if TYPE_CHECKING:
    from PIL.Image import Image


class AvalancheImages(LabelledImages):
    """Images of an Avalanche data set.

    Args:
        dataset: an Avalanche classification data set, already switched to its training or evaluation
            transforms.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.targets = [int(target) for target in dataset.targets]

    @override
    def image(self, index: int) -> Image:
        return as_pil(self.dataset[index][0])


def as_pil(image: Any) -> Image:
    """Return a PIL image, or a tensor that is a plain image, in mode RGB.

    Args:
        image: a PIL image, or a tensor ``(channels, height, width)`` of one or three channels, uint8 or
            floating in ``[0, 1]``; Avalanche's MNIST has tensors even without transforms.

    Raises:
        ValueError: if ``image`` is neither.
    """
    import PIL.Image
    import torch
    from torchvision.transforms.functional import to_pil_image

    form = type(image).__name__
    if isinstance(image, torch.Tensor):
        low, high = float(image.min()), float(image.max())
        form = f"Tensor {image.dtype} {tuple(image.shape)} in [{low:.2f}, {high:.2f}]"
        plain = image.dtype == torch.uint8 or (image.is_floating_point() and 0 <= low <= high <= 1)
        if plain and image.ndim == 3 and image.shape[0] in (1, 3):
            image = to_pil_image(image)
    if not isinstance(image, PIL.Image.Image):
        raise ValueError(
            f"expected images from the Avalanche benchmark (PIL, or tensors in [0, 1]), got {form}: build "
            "it with train_transform=None and eval_transform=None, the backbone brings its own transforms"
        )
    return as_rgb(image)


class FromAvalanche(Stream):
    """Any Avalanche classification benchmark, for use from Python.

    The benchmark's own transforms run before the backbone's and must still return images: its "train" group
    for training images, its "eval" group for validation and test images. A stream named "valid" or "val" is the
    validation split; without one, the split is cut from the training images. The class ids are the benchmark's.

    Args:
        benchmark: an Avalanche benchmark with a train and a test stream of equal length.
        class_names: class names by class id (default: the ids as text).
        templates: prompt templates, ``{}`` stands for the class name (default: none, for heads that need no
            text).
        name: short name of the stream, used in file names.
        seed: seed of the validation cut.
        val_fraction: share of each class's training images held out if there is no validation stream; 0 for none.

    Raises:
        ValueError: if the streams differ in length or a class id has no name (when the data is first read).

    Example:
        >>> from clmerge.streams.avalanche_index import IndexDataset, avalanche_benchmarks
        >>> benchmarks = avalanche_benchmarks()
        >>> digits = IndexDataset([0, 1, 2, 3, 0, 1, 2, 3])
        >>> benchmark = benchmarks.nc_benchmark(
        ...     digits, digits, n_experiences=2, task_labels=False, fixed_class_order=[0, 1, 2, 3]
        ... )
        >>> [task.name for task in FromAvalanche(benchmark, val_fraction=0.0).tasks]
        ['0-1', '2-3']
    """

    kind = "avalanche"

    def __init__(
        self,
        benchmark: Any,
        *,
        class_names: list[str] | None = None,
        templates: list[str] | None = None,
        name: str = "avalanche",
        seed: int = 0,
        val_fraction: float = 0.1,
    ) -> None:
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"expected val_fraction in [0, 1), got {val_fraction}")
        self.benchmark = benchmark
        self._class_names = class_names
        self._templates = templates
        self._name = safe_name(name)
        self.seed = seed
        self.val_fraction = val_fraction

    @property
    @override
    def name(self) -> str:
        return self._name

    @override
    def templates_for(self, class_id: int) -> tuple[str, ...]:
        return super().templates_for(class_id) if self._templates is None else tuple(self._templates)

    @cached_property
    def _experiences(self) -> list[tuple[Any, Any, Any]]:
        """The train, validation (or None) and test experience of every task."""
        streams = self.benchmark.streams
        train, test = list(streams["train"]), list(streams["test"])
        validation = next((list(streams[name]) for name in ("valid", "val") if name in streams), [None] * len(train))
        if not len(train) == len(test) == len(validation):
            raise ValueError(
                f"expected streams of equal length, got {len(train)} train, {len(validation)} validation and "
                f"{len(test)} test experiences"
            )
        return list(zip(train, validation, test, strict=True))

    @override
    def _build(self) -> StreamPlan:
        splits: list[dict[Split, SplitPlan]] = []
        classes: list[tuple[int, ...]] = []
        for train, validation, test in self._experiences:
            # New-style benchmarks serve the test stream with training transforms until eval() is called.
            learned = AvalancheImages(train.dataset.train())
            held_out = AvalancheImages((train if validation is None else validation).dataset.eval())
            tested = AvalancheImages(test.dataset.eval())
            if validation is None:
                kept, held = stratified_cut(learned.targets, self.val_fraction, seed=self.seed)
            else:
                kept, held = list(range(len(learned))), list(range(len(held_out)))
            splits.append(
                {
                    "train": _as_is(learned, kept),
                    "val": _as_is(held_out, held),
                    "test": _as_is(tested, list(range(len(tested)))),
                }
            )
            classes.append(tuple(sorted(set(learned.targets))))
        top = max(target for task in splits for plan in task.values() for target in plan.targets)
        class_names = self._class_names or [str(class_id) for class_id in range(top + 1)]
        if len(class_names) <= top:
            raise ValueError(f"expected {top + 1} class names or more, got {len(class_names)}")
        of_task = [tuple(class_names[class_id] for class_id in task) for task in classes]
        tasks = [Task(index, name, classes[index], of_task[index]) for index, name in enumerate(task_names(of_task))]
        return StreamPlan(
            tuple(tasks),
            tuple(splits),
            tuple(unique_names(class_names)),
            tuple((name,) for name in class_names),
            (None,) * len(class_names),
        )


def _as_is(images: LabelledImages, indices: list[int]) -> SplitPlan:
    return split_plan(images, indices, {target: target for target in set(images.targets)})
