"""The contract of ``results.json``: a list of runs, each with the figures of its models; checked before it is read."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from clmerge.results.diagnostics_contract import validate_diagnostics
from clmerge.shapes import (
    Check,
    amount,
    anything,
    brief,
    count,
    flag,
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
Kind: TypeAlias = Literal["merged", "per_task", "calibrated", "routed", "ensemble", "unmerged"]

SCHEMA = 2
SETTINGS: tuple[Setting, ...] = ("task_agnostic", "task_aware")
KINDS: tuple[Kind, ...] = ("merged", "per_task", "calibrated", "routed", "ensemble", "unmerged")
DATA_FREE = "none"


def validate(document: Any) -> None:
    """Check a ``results.json`` document against the contract.

    Args:
        document: The parsed file.

    Raises:
        ValueError: If something is missing, misshapen, or not finite; the message names the place.
    """
    schema = document.get("schema") if isinstance(document, Mapping) else None
    if type(schema) is not int or schema != SCHEMA:
        how = "; python scripts/convert_results.py RUN converts the files of a run or comparison" if schema == 1 else ""
        raise ValueError(
            f"expected results with schema {SCHEMA}, got {brief(schema)}; they were written by another version of "
            f"clmerge{how}"
        )
    record({"runs": listed(validate_run, filled=True)})(document, "")
    names = [run["name"] for run in document["runs"]]
    if len(set(names)) < len(names):
        refuse("runs", "different names", names)


def validate_run(run: Any, where: str = "") -> None:
    """Check the record of one run.

    Args:
        run: The record.
        where: Its place in the document.

    Raises:
        ValueError: As for :func:`validate`.
    """
    record(dict.fromkeys(("tasks", "classes", "models", "seconds"), anything))(run, where)
    listed(text, filled=True)(run["tasks"], place(where, "tasks"))
    tasks = run["tasks"]
    if twice := [name for name in tasks if tasks.count(name) > 1]:
        refuse(place(where, "tasks"), "different names", twice)
    _run(len(tasks))(run, where)
    classes = len(class_names(run["classes"]))
    models = place(where, "models")
    lists: dict[str, list[Any]] = {}
    for model, found in run["models"].items():
        at = place(models, model)
        maybe(record({}, dict.fromkeys(SETTINGS, _confusion(classes))))(found.get("confusion"), place(at, "confusion"))
        lists |= {f"{at}.{setting}.R": found[setting]["R"] for setting in SETTINGS if found[setting] is not None}
        lists |= {f"{at}.{key}": found[key] for key in ("bytes_kept", "merge_seconds") if found.get(key) is not None}
    same_length(lists, "finished task")
    for index, search in enumerate(run.get("searches", ())):
        if search["model"] not in run["models"]:
            refuse(f"{place(where, 'searches')}[{index}].model", "one of the models", search["model"])


SPLITS = ("test", "val", "all")


def _run(num_tasks: int) -> Check:
    row = listed(maybe(share), num_tasks)
    order = record({"average_accuracy": listed(maybe(share), filled=True)})
    orders = record({"models": keyed(record(dict.fromkeys(SETTINGS, order)))})
    return record(
        {
            "name": text,
            "classes": listed(listed(text), num_tasks),
            "models": keyed(_model(num_tasks)),
            "seconds": keyed(amount),
        },
        {
            "seed": maybe(_whole),
            "path": maybe(text),
            "group": maybe(text),
            "evaluation": one_of(SETTINGS),
            "samples": maybe(listed(count, num_tasks)),
            "split": one_of(SPLITS),
            "baseline": maybe(record({setting: row for setting in SETTINGS})),
            "bytes": keyed(count),
            "options": listed(listed(text)),
            "searches": listed(_search),
            "orders": maybe(orders),
            "diagnostics": maybe(validate_diagnostics),
            "soups": listed(_soup(row)),
        },
    )


def _soup(row: Check) -> Check:
    kind = record({"members": listed(count, filled=True), "score": maybe(share), **dict.fromkeys(SETTINGS, row)})
    return record(
        {
            "model": text,
            "runs": listed(text, filled=True),
            "scores": listed(share, filled=True),
            "best": count,
            "soups": keyed(kind),
            "terms": keyed(maybe(number)),
        }
    )


def _model(num_tasks: int) -> Check:
    rule = record(
        {"merger": text, "init_args": maybe(keyed(anything))},
        {
            "requires": listed(text),
            "order_free": flag,
            "exact_online": flag,
            "search": maybe(count),
            "routing": anything,
            "calibration": record({"class_path": text, "init_args": keyed(anything), "sources": listed(text)}),
        },
    )
    probe = record(
        {},
        {
            "value": maybe(number),
            "curve": listed(maybe(number), at_most=num_tasks),
            "per_task": listed(maybe(number), num_tasks),
            "values": keyed(maybe(number)),
            "n": anything,
            "better": one_of(("higher", "lower")),
            "share": flag,
            "probe": text,
        },
    )
    figures = _figures(num_tasks)
    return record(
        {"kind": one_of(KINDS), "data": text, "task_agnostic": maybe(figures), "task_aware": figures},
        {
            "rule": maybe(rule),
            "probes": keyed(probe),
            "bytes_kept": maybe(listed(maybe(count), at_most=num_tasks)),
            "merge_seconds": maybe(listed(maybe(amount), at_most=num_tasks)),
        },
    )


def _figures(num_tasks: int) -> Check:
    figure = maybe(number)
    per_row = ("average_accuracy", "merge_gap", "worst_task", "gap_to_experts")
    required = {
        "R": listed(listed(maybe(share), num_tasks), at_most=num_tasks),
        **dict.fromkeys(per_row, listed(figure)),
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
    }

    def checked(value: Any, where: str) -> None:
        record(required)(value, where)
        same_length({f"{where}.{key}": value[key] for key in ("R", *per_row)}, "finished task")

    return checked


def class_names(classes: Sequence[Sequence[str]]) -> list[str]:
    """Return the different names of the classes of all tasks, in the order in which they arrive."""
    return list(dict.fromkeys(name for names in classes for name in names))


def _confusion(num_classes: int) -> Check:
    counts = listed(count, num_classes)

    def checked(value: Any, where: str) -> None:
        record({"images": counts, "right": counts, "wrong": maybe(listed(listed(maybe(count), 3)))})(value, where)
        if value["wrong"] is None:
            return
        total, seen = list(value["right"]), set()
        for index, (true, taken, size) in enumerate(value["wrong"]):
            if (
                true is None
                or not size
                or max(true, taken or 0) >= num_classes
                or true == taken
                or (true, taken) in seen
            ):
                refuse(
                    f"{where}.wrong[{index}]",
                    f"class, another of {num_classes} or null, and a number of images, once for each pair",
                    value["wrong"][index],
                )
            seen.add((true, taken))
            total[true] += size
        if total != value["images"]:
            refuse(f"{where}.images", f"the sums of right and wrong, {brief(total)}", value["images"])

    return checked


def _whole(value: Any, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        refuse(where, "a whole number", value)


def _search(value: Any, where: str) -> None:
    by_task = listed(maybe(number))
    point = record({"values": keyed(_setting), "score": maybe(number)})
    record(
        {
            "model": text,
            "method": text,
            "parameters": keyed(anything),
            "points": listed(point, filled=True),
            "chosen": keyed(_setting),
            "score": maybe(number),
        },
        {
            "rule": maybe(record({"chosen": by_task, "used": by_task})),
            "front": listed(count),
            "goal": record({"weights": listed(number), "at_least": keyed(number)}),
        },
    )(value, where)
    given = {f"{where}.points[{index}].values": point["values"] for index, point in enumerate(value["points"])}
    for at, values in {**given, f"{where}.chosen": value["chosen"]}.items():
        record(dict.fromkeys(value["parameters"], anything))(values, at)


def _setting(value: Any, where: str) -> None:
    """Accept any value of a parameter, except numbers that a chart cannot show."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        number(value, where)
