"""What was measured of merge rules on the project's own streams: the leads behind docs/which_merger.md."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clmerge.figures.numbers import points
from clmerge.report.study import Entry, Study
from clmerge.results.results import Setting

FILE = Path(__file__).with_name("evidence.json")
SHOWN = 3


@dataclass(frozen=True)
class Lead:
    """A rule that was ahead of another, both with settings chosen on validation images.

    Ahead means: the 99 % interval of the paired difference over seeds, averaged over the streams, lies above zero, and
    the 95 % interval of no stream below it.

    Attributes:
        ahead: Class of the rule that was ahead.
        of: Class of the other rule.
        mean: Difference of accuracies, averaged over the streams.
    """

    ahead: str
    of: str
    mean: float


@cache
def known() -> dict[str, Any]:
    """Return what was measured; ``scripts/science/pages.py`` writes the file."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def leads(setting: Setting) -> tuple[Lead, ...]:
    """Return the leads in one reading."""
    return tuple(Lead(**one) for one in known()["leads"].get(setting, []))


def not_compared(study: Study, best: Entry, setting: Setting) -> Iterable[str]:
    """Name the rules that a study lacks and that were ahead of its best one where they were measured."""
    if best.rule is None:
        return
    here = {type(entry.rule.merger).__name__ for entry in study.mergers if entry.rule is not None}
    rule = type(best.rule.merger).__name__
    better = [one for one in leads(setting) if one.of == rule and one.ahead not in here]
    if better:
        better.sort(key=lambda one: -one.mean)
        named = ", ".join(f"{one.ahead} (by {points(one.mean)} points)" for one in better[:SHOWN])
        streams = "; ".join(known()["streams"])
        yield f"Not compared here, but ahead of {rule} where docs/which_merger.md measured them ({streams}): {named}."
