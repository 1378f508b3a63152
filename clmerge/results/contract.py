"""The contract of ``results.json``: its keys and their values."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from clmerge.shapes import (
    Check,
    amount,
    anything,
    count,
    keyed,
    listed,
    maybe,
    number,
    one_of,
    place,
    record,
    refuse,
    same_length,
    share,
    text,
)

Setting: TypeAlias = Literal["task_agnostic", "task_aware"]

SCHEMA = 1
SETTINGS: tuple[Setting, ...] = ("task_agnostic", "task_aware")


def validate(document: Any) -> None:
    """Check a ``results.json`` document against the contract.

    Args:
        document: The parsed file.

    Raises:
        ValueError: If something is missing, misshapen, or not finite; the message names the place.
    """
    schema = document.get("schema") if isinstance(document, Mapping) else None
    if type(schema) is not int or schema != SCHEMA:
        raise ValueError(
            f"expected results with schema {SCHEMA}, got {schema!r}; they were written by another version of clmerge"
        )
    record(dict.fromkeys(("tasks", "classes", "models", "seconds"), anything))(document, "")
    listed(text, filled=True)(document["tasks"], "tasks")
    tasks = document["tasks"]
    if twice := [name for name in tasks if tasks.count(name) > 1]:
        refuse("tasks", "different names", twice)
    _contract(len(tasks))(document, "")
    matrices = {
        f"{place('models', model)}.{setting}.R": settings[setting]["R"]
        for model, settings in document["models"].items()
        for setting in SETTINGS
    }
    same_length(matrices, "finished task")


def _contract(num_tasks: int) -> Check:
    row = listed(maybe(share), num_tasks)
    return record(
        {
            "classes": listed(listed(text), num_tasks),
            "models": keyed(record({setting: _figures(num_tasks) for setting in SETTINGS})),
            "seconds": keyed(amount),
        },
        {
            "evaluation": one_of(SETTINGS),
            "samples": maybe(listed(count, num_tasks)),
            "baseline": maybe(record({setting: row for setting in SETTINGS})),
            "bytes": keyed(count),
            "options": listed(listed(text)),
        },
    )


def _figures(num_tasks: int) -> Check:
    figure = maybe(number)
    required = {
        "R": listed(listed(maybe(share), num_tasks), at_most=num_tasks),
        "average_accuracy": listed(figure),
        "average_incremental_accuracy": figure,
        "average_incremental_accuracy_by_samples": figure,
        "forgetting": figure,
        "forgetting_per_task": listed(figure, num_tasks),
        "backward_transfer": figure,
        "forward_transfer": figure,
        "learning_accuracy": figure,
        "transfer": figure,
        "average": figure,
        "last": figure,
        "normalised_accuracy": figure,
        "merge_gap": listed(figure),
    }

    def checked(value: Any, where: str) -> None:
        record(required)(value, where)
        same_length({f"{where}.{key}": value[key] for key in ("R", "average_accuracy", "merge_gap")}, "finished task")

    return checked
