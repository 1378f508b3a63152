"""The contract of the key ``compare`` that ``clmerge compare`` adds to ``results.json`` (docs/compare.md)."""

from collections.abc import Mapping
from typing import Any

from clmerge.results.diagnostics_contract import validate_diagnostics
from clmerge.results.results import SETTINGS
from clmerge.shapes import (
    Check,
    amount,
    anything,
    count,
    keyed,
    listed,
    maybe,
    number,
    record,
    share,
    text,
)


def validate_comparison(document: Mapping[str, Any]) -> None:
    """Check the key ``compare`` of a document that :func:`clmerge.results.results.validate` accepts.

    Args:
        document: The parsed file.

    Raises:
        ValueError: If something is missing, misshapen, or not finite; the message names the place.
    """
    _contract(len(document["tasks"]))(document["compare"], "compare")


def _contract(num_tasks: int) -> Check:
    own = ("worst_task", "gap_to_experts", "normalised_accuracy")
    figures = record(dict.fromkeys(own, listed(maybe(number), at_most=num_tasks, filled=True)))
    order = record({"average_accuracy": listed(maybe(share), filled=True)})
    run = record(
        {
            "name": text,
            "path": text,
            "group": text,
            "tasks": listed(text, num_tasks),
            "seed": maybe(count),
        }
    )
    return record(
        {
            "runs": listed(run, filled=True),
            "settings": keyed(record({"merger": text}, {"init_args": maybe(keyed(anything))})),
            "searches": listed(_search),
        },
        {
            "bytes_kept": maybe(keyed(listed(count, at_most=num_tasks))),
            "merge_seconds": maybe(keyed(listed(amount, at_most=num_tasks))),
            "figures": maybe(keyed(record(dict.fromkeys(SETTINGS, figures)))),
            "orders": maybe(record({"models": keyed(record(dict.fromkeys(SETTINGS, order)))})),
            "diagnostics": maybe(validate_diagnostics),
        },
    )


def _search(value: Any, where: str) -> None:
    by_task = listed(maybe(number))
    point = record({"values": keyed(_setting), "score": maybe(number)})
    record(
        {
            "model": text,
            "run": text,
            "method": text,
            "parameters": keyed(anything),
            "points": listed(point, filled=True),
            "chosen": keyed(_setting),
            "score": maybe(number),
        },
        {"rule": maybe(record({"chosen": by_task, "used": by_task}))},
    )(value, where)
    given = {f"{where}.points[{index}].values": point["values"] for index, point in enumerate(value["points"])}
    for at, values in {**given, f"{where}.chosen": value["chosen"]}.items():
        record(dict.fromkeys(value["parameters"], anything))(values, at)


def _setting(value: Any, where: str) -> None:
    """Accept any value of a parameter, except numbers that a chart cannot show."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        number(value, where)
