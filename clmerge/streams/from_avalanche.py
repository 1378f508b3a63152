"""Any Avalanche classification benchmark as a stream."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from clmerge.names import safe_name
from clmerge.streams.decoding import as_rgb
from clmerge.streams.layout import split_plan
from clmerge.streams.plan import Split, SplitPlan, StreamPlan, Task
from clmerge.streams.sources import LabelledImages
from clmerge.streams.splits import stratified_cut
from clmerge.streams.stream import Stream
from clmerge.streams.task_names import task_names, unique_names

if TYPE_CHECKING:
    from PIL.Image import Image


class AvalancheImages(LabelledImages):
    """Images of an Avalanche data set.

    Items may have any length: the first entry is the image, the second its class, the rest is not used.

    Args:
        dataset: an Avalanche data set, already switched to its training or evaluation transforms. If it has no
            ``targets``, every item is read once for its class.
        task_label: label of the experience's task, by which classes may be told apart.
    """

    def __init__(self, dataset: Any, *, task_label: int = 0) -> None:
        self.dataset = dataset
        self.task_label = task_label
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = (dataset[index][1] for index in range(len(dataset)))
        self.targets = [int(target) for target in targets]

    @override
    def image(self, index: int) -> Image:
        return as_pil(self.dataset[index][0])


class JoinedImages(LabelledImages):
    """Several sets of images as one.

    Args:
        parts: the sets.
    """

    def __init__(self, parts: Sequence[LabelledImages]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(part) for part in parts))
        self.targets = [target for part in parts for target in part.targets]

    @override
    def image(self, index: int) -> Image:
        part = bisect_right(self.ends, index)
        return self.parts[part].image(index - (self.ends[part - 1] if part else 0))


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

    Where the test stream has as many experiences as the train stream, they belong together. Where it has another
    number, as in new-instances and data-incremental benchmarks, every task is tested on all test images of its classes;
    tasks then share test images.

    Args:
        benchmark: an Avalanche benchmark with a train and a test stream.
        class_names: class names by class id (default: the ids as text).
        templates: prompt templates, ``{}`` stands for the class name (default: none, for heads that need no
            text).
        name: short name of the stream, used in file names.
        seed: seed of the validation cut.
        val_fraction: share of each class's training images held out if there is no validation stream; 0 for none.
        separate_classes: whether equal class ids of different task labels are different classes, as in multi-head
            benchmarks whose ids begin with 0 in every task. They are shown as ``TASK: NAME``.

    Raises:
        ValueError: if a task has no test images of its classes, or a class id has no name (when the data is first
            read).

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
        separate_classes: bool = False,
    ) -> None:
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"expected val_fraction in [0, 1), got {val_fraction}")
        self.benchmark = benchmark
        self._class_names = class_names
        self._templates = templates
        self._name = safe_name(name)
        self.seed = seed
        self.val_fraction = val_fraction
        self.separate_classes = separate_classes

    @property
    @override
    def name(self) -> str:
        return self._name

    @override
    def templates_for(self, class_id: int) -> tuple[str, ...]:
        return super().templates_for(class_id) if self._templates is None else tuple(self._templates)

    @override
    def _build(self) -> StreamPlan:
        streams = self.benchmark.streams
        official = next((streams[name] for name in ("valid", "val") if name in streams), None)
        # New-style benchmarks serve the test stream with training transforms until eval() is called.
        learned = [_opened(experience, training=True) for experience in streams["train"]]
        held_out = [_opened(experience) for experience in (streams["train"] if official is None else official)]
        tested = [_opened(experience) for experience in streams["test"]]
        class_names, prompt_names = self._number([*learned, *held_out, *tested])
        classes = [tuple(sorted(set(images.targets))) for images in learned]
        tests, vals = _of_tasks(tested, classes), _of_tasks(held_out, classes)
        splits: list[dict[Split, SplitPlan]] = []
        for task, images in enumerate(learned):
            if not tests[task].indices:
                raise ValueError(
                    f"expected test images for every experience of the train stream, got none of the classes of "
                    f"experience {task + 1}, {[class_names[class_id] for class_id in classes[task][:5]]}"
                )
            kept = list(range(len(images)))
            if official is None:
                kept, held = stratified_cut(images.targets, self.val_fraction, seed=self.seed)
                vals[task] = _as_is(held_out[task], held)
            splits.append({"train": _as_is(images, kept), "val": vals[task], "test": tests[task]})
        of_task = [tuple(class_names[class_id] for class_id in task_classes) for task_classes in classes]
        tasks = [Task(index, name, classes[index], of_task[index]) for index, name in enumerate(task_names(of_task))]
        return StreamPlan(
            tuple(tasks),
            tuple(splits),
            tuple(unique_names(class_names)),
            tuple((name,) for name in prompt_names),
            (None,) * len(class_names),
        )

    def _number(self, images: Sequence[AvalancheImages]) -> tuple[list[str], list[str]]:
        """Number the classes of all images, and return their names for display and for prompts."""
        top = max(target for some in images for target in some.targets)
        names = self._class_names or [str(class_id) for class_id in range(top + 1)]
        if len(names) <= top:
            raise ValueError(f"expected {top + 1} class names or more, got {len(names)}")
        if not self.separate_classes:
            return names, names
        pairs = sorted({(some.task_label, target) for some in images for target in some.targets})
        ids = {pair: class_id for class_id, pair in enumerate(pairs)}
        for some in images:
            some.targets = [ids[some.task_label, target] for target in some.targets]
        return [f"{label}: {names[target]}" for label, target in pairs], [names[target] for _, target in pairs]


def _opened(experience: Any, *, training: bool = False) -> AvalancheImages:
    """Return the images of an experience with the transforms of training or of evaluation."""
    dataset = experience.dataset.train() if training else experience.dataset.eval()
    # A stream without task labels has no such attribute.
    return AvalancheImages(dataset, task_label=int(next(iter(getattr(experience, "task_labels", [0])))))


def _of_tasks(images: Sequence[LabelledImages], classes: Sequence[tuple[int, ...]]) -> list[SplitPlan]:
    """Return one split of every task: of its own experience or, if their numbers differ, all images of its classes."""
    if len(images) == len(classes):
        return [_as_is(some, range(len(some))) for some in images]
    joined = JoinedImages(images)
    return [
        _as_is(joined, [index for index, target in enumerate(joined.targets) if target in known])
        for known in map(set, classes)
    ]


def _as_is(images: LabelledImages, indices: Sequence[int]) -> SplitPlan:
    return split_plan(images, indices, {target: target for target in set(images.targets)})
