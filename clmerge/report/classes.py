"""Which classes are hard, and what they are taken for: the confusion matrices and tables of a report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clmerge.figures.charts import to_csv
from clmerge.figures.confusion import MOST_SHOWN, confusion_chart
from clmerge.figures.numbers import percent
from clmerge.names import shown
from clmerge.report.charts import Figure
from clmerge.report.runs import Run
from clmerge.report.study import EXPERT, Entry, Study
from clmerge.results.confusion import Confusion
from clmerge.results.results import Setting

MOST_LISTED = 10


@dataclass(frozen=True)
class ClassRow:
    """A class with its accuracy, or a pair of classes with its share of the images of the class."""

    name: str
    images: int
    share: str
    taken_for: str = ""


@dataclass(frozen=True)
class ClassTable:
    """The classes with the lowest accuracies of a model, and the pairs of classes that it confuses most often."""

    entry: Entry
    worst: Sequence[ClassRow]
    pairs: Sequence[ClassRow]


def confusion_figures(study: Study, setting: Setting) -> Iterable[Figure]:
    """Draw the confusion matrices of the best merger, the deployed models and the expert, if answers were counted."""
    found = {entry.name: answers for entry, answers in _shown(study, setting) if answers.wrong is not None}
    names = _names(study)
    if not found:
        return
    some = "" if len(names) <= MOST_SHOWN else f" Shown are the {MOST_SHOWN} classes that most wrong answers are about."
    yield Figure(
        "confusion",
        "Which classes are taken for which?",
        "After the last task, the share of each class's images (row) that the model takes for each class (column): the "
        f"outlined cells are right answers. Classes are in the order in which they were learned.{some}",
        confusion_chart(found, names),
    )


def class_tables(study: Study, setting: Setting) -> list[ClassTable]:
    """Return the tables of the models whose confusion matrices are shown."""
    names = _names(study)
    return [
        ClassTable(entry, _worst(answers, names), _pairs(answers, names)) for entry, answers in _shown(study, setting)
    ]


def classes_csv(study: Study, setting: Setting) -> str:
    """Return the accuracy of every model on every class as CSV."""
    rows = []
    for entry in study.entries:
        if (found := entry.confusion(setting)) is not None:
            names = map(shown, entry.runs[0].results.class_names)
            for name, images, right in zip(names, found.images, found.right, strict=True):
                rows.append([entry.name, name, str(images), str(right), repr(right / images) if images else ""])
    return to_csv(["model", "class", "images", "right", "accuracy"], rows)


def _shown(study: Study, setting: Setting) -> list[tuple[Entry, Confusion]]:
    """Return the best merger, the deployed models and the expert, as far as answers were counted by class."""
    if len({tuple(run.results.class_names) for run in study.runs}) > 1:
        return []
    wanted = [
        *study.ranking(setting)[:1],
        *(entry for entry in study.entries if any(_is_deployed(run, entry) for run in entry.runs)),
        *(entry for entry in study.entries if entry.model == EXPERT),
    ]
    chosen = {entry.name: entry for entry in wanted}.values()
    return [(entry, answers) for entry in chosen if (answers := entry.confusion(setting)) is not None]


def _is_deployed(run: Run, entry: Entry) -> bool:
    """Return whether an entry is the model that a run deploys: its first merger unless its configuration names one."""
    named = run.section("learner").get("deploy")
    if named is None:
        return run.results.mergers[:1] == [entry.model]
    return named == entry.model or (entry.rule is not None and named == type(entry.rule.merger).__name__)


def _names(study: Study) -> list[str]:
    return [shown(name) for name in study.runs[0].results.class_names]


def _worst(answers: Confusion, names: Sequence[str]) -> list[ClassRow]:
    accuracies = answers.accuracies
    return [ClassRow(names[i], answers.images[i], percent(accuracies[i])) for i in answers.worst(MOST_LISTED)]


def _pairs(answers: Confusion, names: Sequence[str]) -> list[ClassRow]:
    return [
        ClassRow(names[true], count, percent(count / answers.images[true]), names[taken])
        for true, taken, count in answers.pairs(MOST_LISTED)
    ]
