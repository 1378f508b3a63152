"""Combine several runs into one study: group repetitions by seed, and collect every model's figures over them."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clmerge.names import shown
from clmerge.report.groups import group_labels
from clmerge.report.looks import join_looks
from clmerge.report.rules import Rule
from clmerge.report.runs import Run, number
from clmerge.results.confusion import Confusion, summed
from clmerge.results.results import EXPERT, SETTINGS, ZERO_SHOT, Setting

# Models that are not merged (bounds and baselines), with descriptions.
REFERENCES = {
    EXPERT: "The model as it was fine-tuned, without merging, after each task.",
    "task_oracle": "Every image goes to the expert of its own task: a bound that keeps all experts and knows the task.",
    "ensemble": "Mean of the probabilities of the experts so far: keeps all of them.",
    "joint": "One model trained on all classes together.",
    ZERO_SHOT: "The model before the first task.",
}


@dataclass(frozen=True)
class Spread:
    """The values of one figure over runs.

    Attributes:
        values: One number per run, NaN where undefined.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean; for a single run, its exact number."""
        return self.values[0] if len(self.values) == 1 else statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation, NaN for fewer than two runs."""
        known = len(self.values) > 1 and not any(map(math.isnan, self.values))
        return statistics.stdev(self.values) if known else math.nan

    @property
    def is_defined(self) -> bool:
        """Whether every run has a number."""
        return bool(self.values) and not math.isnan(self.mean)


UNDEFINED = Spread((math.nan,))


@dataclass(frozen=True)
class Entry:
    """A model over the runs that have it: one row of a table, one line of a chart.

    Attributes:
        name: Unique name on the page.
        model: Name in ``results.json``.
        runs: The runs that have the model.
        rule: Its merge rule with settings; None for references and unknown rules.
        look: Index of its colour; None for references.
    """

    name: str
    model: str
    runs: tuple[Run, ...]
    rule: Rule | None = None
    look: int | None = None

    @property
    def is_merger(self) -> bool:
        """Whether it is a merger, not a reference."""
        return self.look is not None

    def figure(self, key: str, setting: Setting) -> Spread:
        """Return one figure of ``results.json``; for a list with one number per row, its last number."""
        return Spread(tuple(_last_number(figures[key]) for figures in self._figures(setting)))

    def series(self, key: str, setting: Setting) -> list[Spread]:
        """Return a figure that is a list of numbers, one per row or task."""
        return _spreads([figures[key] for figures in self._figures(setting)])

    @property
    def needs_task(self) -> bool:
        """Whether it must be told the task of every image, and so has task-aware accuracies alone."""
        return all(run.results.model(self.model).needs_task for run in self.runs)

    @property
    def data(self) -> str:
        """The images that it was adapted to; ``none`` if it used no images."""
        return " or ".join(dict.fromkeys(run.results.model(self.model).data for run in self.runs))

    def matrix(self, setting: Setting) -> list[list[Spread]]:
        """Return the accuracy matrix R, rows by columns."""
        if setting not in self._matrices:
            matrices = [figures["R"] for figures in self._figures(setting)]
            self._matrices[setting] = [_spreads(rows) for rows in zip(*matrices, strict=True)]
        return self._matrices[setting]

    def last_row(self, setting: Setting) -> list[Spread]:
        """Return the accuracy on every task after the last one."""
        return _spreads([figures["R"][-1] for figures in self._figures(setting)])

    @cached_property
    def _matrices(self) -> dict[Setting, list[list[Spread]]]:
        return {}

    def bytes_kept(self) -> list[Spread]:
        """Return the bytes kept beside the base model after every task; empty if unknown."""
        return _known([run.results.model(self.model).bytes_kept for run in self.runs])

    def merge_seconds(self) -> list[Spread]:
        """Return the seconds a merge takes after every task; empty if unknown."""
        return _known([run.results.model(self.model).merge_seconds for run in self.runs])

    def confusion(self, setting: Setting) -> Confusion | None:
        """Return the answers by class, those of all runs together; None if a run lacks them or has other classes."""
        found = [run.results.confusion(self.model, setting) for run in self.runs]
        known = [confusion for confusion in found if confusion is not None]
        same = len({tuple(run.results.class_names) for run in self.runs}) == 1
        return summed(known) if known and same and len(known) == len(found) else None

    def _figures(self, setting: Setting) -> list[Mapping[str, Any]]:
        return [run.figures(self.model, setting) for run in self.runs]


@dataclass(frozen=True)
class Study:
    """The data of a report.

    Attributes:
        runs: The runs, cut after the same task.
        entries: Mergers first, then references.
        tasks: Names of the tasks for readers; numbers if the runs' names differ.
        numbered: The same, for places that have the number of the task beside them.
        notes: Notes that the reader should see first.
        evaluation: The reading of the logits that is shown first.
    """

    runs: tuple[Run, ...]
    entries: tuple[Entry, ...]
    tasks: tuple[str, ...]
    numbered: tuple[str, ...]
    notes: tuple[str, ...]
    evaluation: Setting = SETTINGS[0]

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Both readings of the logits, that of the study first."""
        return (self.evaluation, *(setting for setting in SETTINGS if setting != self.evaluation))

    @property
    def num_finished(self) -> int:
        """Number of tasks after which every model of every run was evaluated."""
        return self.runs[0].num_finished

    @property
    def mergers(self) -> list[Entry]:
        """The entries that are mergers."""
        return [entry for entry in self.entries if entry.is_merger]

    @property
    def samples(self) -> list[int] | None:
        """Number of test images of every task, if all runs agree."""
        samples = self.runs[0].results.samples
        return samples if all(run.results.samples == samples for run in self.runs) else None

    @property
    def images(self) -> str:
        """What the images are called that the accuracies are of, if all runs agree."""
        splits = {run.results.split for run in self.runs}
        words = {"test": "test images", "val": "validation images", "all": "images (training images among them)"}
        return words[splits.pop()] if len(splits) == 1 else "images"

    @property
    def diagnosed(self) -> Run | None:
        """The first run that has diagnostics."""
        return next((run for run in self.runs if run.results.diagnostics), None)

    def ranking(self, setting: Setting) -> list[Entry]:
        """Return the mergers by average accuracy after the last task, best first; undefined ones left out."""
        scores = {entry.name: entry.figure("average_accuracy", setting) for entry in self.mergers}
        known = [entry for entry in self.mergers if scores[entry.name].is_defined]
        return sorted(known, key=lambda entry: -scores[entry.name].mean)

    def reference(self, entry: Entry, model: str) -> Entry | None:
        """Return a reference of the same runs as an entry: ``expert`` or ``zero_shot``."""
        wanted = set(map(id, entry.runs))
        for other in self.entries:
            if other.model == model and wanted <= set(map(id, other.runs)):
                return Entry(other.name, model, entry.runs)
        return None


def make_study(runs: Sequence[Run]) -> Study:
    """Combine runs into a study.

    Args:
        runs: One or more. Folders about the same run are joined; runs whose configurations differ only in seed, name
            and mergers count as repetitions.

    Raises:
        ValueError: If there is no run, or their numbers of tasks differ.
    """
    if not runs:
        raise ValueError("expected at least one run, got none")
    lengths = {str(run.path): run.results.num_tasks for run in runs}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"expected runs over the same stream, got different numbers of tasks: {lengths}; make one report for each"
        )
    common = min(run.num_finished for run in runs)
    notes = [*_unfinished(runs, common)]
    cut = tuple(join_looks([run.until(common) for run in runs]))
    groups = _groups(cut)
    tasks, beside, note = _task_names(cut)
    if len({run.results.evaluation for run in runs}) > 1:
        notes.append(f"the runs go by different accuracies; {runs[0].results.evaluation} is shown first")
    return Study(
        cut, tuple(_entries(groups)), tuple(tasks), tuple(beside), tuple(notes + note), runs[0].results.evaluation
    )


def _entries(groups: Mapping[str, Sequence[Run]]) -> Iterable[Entry]:
    mergers: list[Entry] = []
    references: list[Entry] = []
    taken: set[str] = set()
    for group, runs in groups.items():
        rules = {model: rule for run in runs for model, rule in run.rules.items()}
        for model in dict.fromkeys(model for run in runs for model in run.models):
            having = tuple(run for run in runs if model in run.models)
            name = shown(model) + (f" ({shown(group)})" if group else "")
            while name in taken:  # different names can look the same when shown
                name += "'"
            taken.add(name)
            if model in REFERENCES:
                references.append(Entry(name, model, having))
            else:
                mergers.append(Entry(name, model, having, rules.get(model), len(mergers)))
    return mergers + sorted(references, key=lambda entry: list(REFERENCES).index(entry.model))


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group repetitions by their configurations, or as the comparison did whose runs' folders are gone."""
    if not all(run.config for run in runs) and all(run.results.group is not None for run in runs):
        labels = [run.results.group or "" for run in runs]
    else:
        labels = group_labels([run.config for run in runs], [run.name for run in runs])
    return {
        label: [run for run, own in zip(runs, labels, strict=True) if own == label] for label in dict.fromkeys(labels)
    }


def _unfinished(runs: Sequence[Run], common: int) -> Iterable[str]:
    for run in runs:
        if not run.is_finished:
            yield f"{run.name} is not finished: {run.num_finished} of {run.results.num_tasks} tasks were evaluated."
    if any(run.num_finished != common for run in runs):
        yield f"So that all can be compared, everything below is after task {common}."


def _task_names(runs: Sequence[Run]) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the tasks, those for places that have their numbers, and notes on them."""
    first = runs[0].results
    if all(run.results.tasks == first.tasks for run in runs):
        return first.task_labels(), first.task_labels(numbered=False), []
    numbers = [f"task {index + 1}" for index in range(first.num_tasks)]
    note = "The runs have different tasks, or call them differently: tasks are numbered below."
    return numbers, numbers, [note]


def _last_number(value: Any) -> float:
    last = value[-1] if isinstance(value, list) and value else math.nan if isinstance(value, list) else value
    return float(last)


def _known(lists: Sequence[Sequence[float | None]]) -> list[Spread]:
    spreads = _spreads(lists)
    return spreads if any(spread.is_defined for spread in spreads) else []


def _spreads(lists: Sequence[Sequence[float | None]]) -> list[Spread]:
    """Turn one list per run into one spread per position; positions that a run lacks are left out."""
    # Most numbers of a long stream are undefined, where it is evaluated now and then: all of them are one object.
    spreads = (Spread(tuple(map(number, column))) for column in zip(*lists, strict=False))
    return [UNDEFINED if len(spread.values) == 1 and math.isnan(spread.values[0]) else spread for spread in spreads]


__all__ = ["EXPERT", "UNDEFINED", "ZERO_SHOT", "Entry", "Spread", "Study", "make_study"]
