"""A table of a stream's images and classes, in which wrong folders are visible before training."""

from __future__ import annotations

from clmerge.streams.plan import Split
from clmerge.streams.stream import Stream

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_WIDTH = 100


def stream_lines(stream: Stream) -> list[str]:
    """Return a table of the images per task and split and of the classes, one line per task.

    Example:
        >>> from clmerge.streams import ClassIncremental, SklearnDigits
        >>> for line in stream_lines(ClassIncremental(SklearnDigits(), num_tasks=5)):
        ...     print(line)
        SklearnDigits-5: 10 classes in 5 tasks
        task  train  val  test  classes
           1    259   29    72  2: zero, one
           2    259   29    72  2: two, three
           3    262   29    72  2: four, five
           4    260   28    72  2: six, seven
           5    255   28    71  2: eight, nine
         all   1295  143   359
    """
    tasks = stream.tasks
    counts = [[len(stream.dataset(task.index, split)) for split in _SPLITS] for task in tasks]
    totals = [sum(column) for column in zip(*counts, strict=True)]
    widths = [max(len(split), len(str(total))) for split, total in zip(_SPLITS, totals, strict=True)]

    def row(first: object, cells: list[object], rest: str = "") -> str:
        numbers = "  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))
        line = f"{first!s:>4}  {numbers}  {rest}".rstrip()
        return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."

    lines = [f"{stream.name}: {len(stream.class_names)} classes in {len(tasks)} tasks"]
    lines.append(row("task", list(_SPLITS), "classes"))
    for task, numbers in zip(tasks, counts, strict=True):
        lines.append(row(task.index + 1, list(numbers), f"{len(task.classes)}: {', '.join(task.class_names)}"))
    lines.append(row("all", list(totals)))
    return lines
