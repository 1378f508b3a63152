"""Notices before training: settings and data that are allowed but rarely intended."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from clmerge.merging import Merger
from clmerge.models import Classifier
from clmerge.models.templates import GENERIC
from clmerge.results.run_folder import RunFolder
from clmerge.streams import AdaptationData, Stream, Task

_MOST_NAMES = 5


def notices(module: Classifier, stream: Stream) -> list[str]:
    """Return one line for each property of a run that the user may not expect.

    Args:
        module: The classifier before it is trained.
        stream: The tasks.

    Returns:
        Lines, empty if there are none.
    """
    return [
        *_weights(module),
        *_prompts(module, stream),
        *_same_names(stream),
        *_domains(stream),
        *_empty_classes(stream),
        *_alone(module, stream),
    ]


def view_lines(mergers: Mapping[str, Merger]) -> list[str]:
    """Return one line for each merger that is evaluated with other weights than those that it leaves in a file.

    Args:
        mergers: The run's mergers by name.
    """
    return [
        f"{name} is evaluated with a view for every task, task-aware; model/{name}.safetensors, start_from and deploy "
        "take its one model for inputs of unknown task"
        for name, merger in mergers.items()
        if merger.task_views
    ]


def adaptation_lines(learning: Mapping[str, bool], adaptation: AdaptationData) -> list[str]:
    """Return one line for each merger and routing that learns: the images that it looks at.

    Args:
        learning: Name -> whether it reads labels.
        adaptation: The adaptation data.
    """
    scored = ", the images that it is scored on: no other row compares with it" if adaptation.source == "test" else ""
    return [
        f"{name} learns on {adaptation.told(labels=reads_labels)}{scored}" for name, reads_labels in learning.items()
    ]


def add_place(error: Exception, run: RunFolder, tasks: Sequence[Task]) -> None:
    """Add a note to an error that ends a run: the task in which it was raised.

    Args:
        error: The error.
        run: The run folder.
        tasks: The tasks of the stream.
    """
    task = min(run.manifest.evaluated, len(tasks) - 1)
    error.add_note(f"in task {task + 1} of {len(tasks)}, {tasks[task].name}")


def _weights(module: Classifier) -> Iterator[str]:
    if how := module.backbone.starts_random:
        yield f"{type(module.backbone).__name__} starts from random weights, not from pretrained ones: {how}"


def _prompts(module: Classifier, stream: Stream) -> Iterator[str]:
    if module.head.open_vocabulary and (plain := stream.plain_sources):
        yield (
            f"the text head's prompts are {GENERIC[0]!r} with the names of the classes, since none are known for "
            f"{_listed([repr(name) for name in plain])}: set templates of the source to prompts of your own, or to "
            "'generic' to say so"
        )


def _same_names(stream: Stream) -> Iterator[str]:
    spelt = defaultdict(list)
    for name in stream.class_names:
        spelt[" ".join(name.casefold().replace("_", " ").replace("-", " ").split())].append(name)
    if several := [names for names in spelt.values() if len(names) > 1]:
        shown = _listed([" and ".join(map(repr, names)) for names in several])
        yield f"names that differ in writing only are different classes: {shown}"


def _domains(stream: Stream) -> Iterator[str]:
    if stream.kind != "domain-incremental":
        return
    tasks = stream.tasks
    seen = Counter(name for task in tasks for name in task.class_names)
    if partly := [name for name in stream.class_names if 0 < seen[name] < len(tasks)]:
        absent = [f"{n!r} (in {seen[n]} of {len(tasks)})" for n in partly]
        yield f"the domains have different classes: {_listed(absent)}"


def _empty_classes(stream: Stream) -> Iterator[str]:
    names = stream.class_names
    taught: set[int] = set()
    for task in stream.tasks:
        found = {split: set(stream.dataset(task.index, split).targets) for split in ("train", "test")}
        taught |= found["train"]
        for split, have in found.items():
            if empty := [names[c] for c in task.classes if c not in have]:
                yield f"task {task.name} has no {split} images of {_listed([repr(name) for name in empty])}"
    in_tasks = {c for task in stream.tasks for c in task.classes}
    if never := [repr(names[c]) for c in range(len(names)) if c not in taught and c not in in_tasks]:
        yield f"no task has training images of {_listed(never)}"


def _alone(module: Classifier, stream: Stream) -> Iterator[str]:
    alone = [task.name for task in stream.tasks if len(task.classes) == 1]
    if alone and module.loss_classes == "current":
        yield (
            f"tasks of one class learn nothing with loss_classes: current, whose loss is then 0: {_listed(alone)}; use "
            "--model.loss_classes=seen or all"
        )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
