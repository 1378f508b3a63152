"""Soups of the final models of several runs: their accuracies, and how the models differ."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clmerge.figures.numbers import percent
from clmerge.names import shown
from clmerge.report.runs import number
from clmerge.report.study import Study
from clmerge.results.results import Setting

_KINDS = {
    "uniform": "average of all",
    "greedy": "average of those that validation images choose",
    "ensemble": "mean of the logits of all",
}


@dataclass(frozen=True)
class Soup:
    """The soups of one merger's final models.

    Attributes:
        name: The merger.
        members: Names of the runs.
        rows: For every model: what it is, its validation and its test accuracy, the runs in it.
        spread: Mean and standard deviation of the members' test accuracy.
        terms: How the members differ, in sentences.
    """

    name: str
    members: Sequence[str]
    rows: Sequence[tuple[str, str, str, str]]
    spread: str
    terms: Sequence[str]

    def lines(self) -> Iterator[str]:
        """Return the soups as lines of a terminal."""
        yield f"{self.name}: soups of {len(self.members)} runs ({', '.join(self.members)})"
        for what, score, accuracy, runs in self.rows:
            yield f"  {accuracy} %  {what}{f', {score} % on validation images' * (score != '-')} ({runs})"
        yield f"  {self.spread}"
        for term in self.terms:
            yield f"  {term}"


def soups_of(study: Study, setting: Setting) -> list[Soup]:
    """Return the soups that a comparison made of the study's runs."""
    return [_soup(study, soup, setting) for run in study.runs for soup in run.results.soups]


def _soup(study: Study, soup: Mapping[str, Any], setting: Setting) -> Soup:
    by_name = {run.results.name: run for run in study.runs}
    runs = [by_name[name] for name in soup["runs"] if name in by_name]
    lasts = [run.figures(soup["model"], setting)["last"] for run in runs if soup["model"] in run.models]
    scores, best = soup["scores"], int(soup["best"])
    single = percent(lasts[best]) if len(lasts) == len(scores) else "-"
    rows = [("best run on validation images", percent(scores[best]), single, shown(soup["runs"][best]))]
    for kind, found in soup["soups"].items():
        known = [value for value in map(number, found[setting]) if value == value]
        members = [shown(soup["runs"][index]) for index in found["members"]]
        told = "all" if len(members) == len(scores) else ", ".join(members)
        score = "-" if found["score"] is None else percent(found["score"])
        rows.append((_KINDS.get(kind, kind), score, percent(statistics.fmean(known)) if known else "-", told))
    spread = (
        f"the runs by themselves: {percent(statistics.fmean(lasts))} +- {percent(statistics.stdev(lasts))} %"
        if len(lasts) > 1
        else "the runs by themselves are not in this comparison"
    )
    return Soup(
        shown(soup["model"]),
        [shown(name) for name in soup["runs"]],
        rows,
        spread,
        list(_told(soup["terms"], len(scores))),
    )


def _told(terms: Mapping[str, Any], size: int) -> Iterator[str]:
    """Say how members differ, on validation images."""
    t = {name: number(value) for name, value in terms.items()}
    ratio = (
        "" if terms["ratio_error"] is None else f", {t['ratio_error']:.2f} images wrong in one per image wrong in both"
    )
    yield (
        f"on {terms['images']} validation images two members differ in {percent(t['disagreement'])} % of the answers"
        f"{ratio}"
    )
    yield (
        f"squared error {t['member_error']:.4f} of a member, {t['ensemble_error']:.4f} of the ensemble = bias "
        f"{t['bias']:.4f} + variance {t['variance']:.4f} / {size} + covariance {t['covariance']:.4f} * {size - 1} "
        f"/ {size}"
    )
    yield (
        f"squared error {t['soup_error']:.4f} of the average of all, {t['gap']:.4f} from the ensemble; locality "
        f"{t['locality']:.3g}, the largest distance of a member from the average"
    )
