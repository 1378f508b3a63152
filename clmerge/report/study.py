"""Combine several runs into one study: group repetitions by seed, and collect every model's figures over them."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clmerge.names import shown
from clmerge.report.looks import join_looks
from clmerge.report.rules import Rule
from clmerge.report.runs import Run, number
from clmerge.results.results import EXPERT, SETTINGS, ZERO_SHOT, Setting, needs_task

# Models that are not merged (bounds and baselines), with descriptions.
REFERENCES = {
    EXPERT: "The model as it was fine-tuned, without merging, after each task.",
    "task_oracle": "Every image goes to the expert of its own task: a bound that keeps all experts and knows the task.",
    "ensemble": "Mean of the probabilities of the experts so far: keeps all of them.",
    "joint": "One model trained on all classes together.",
    ZERO_SHOT: "The model before the first task.",
}
# Settings in which repetitions of a run may differ.
_FREE = {"name", "seed", "run_dir", "resume", "logging", "mergers"}


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
        return Spread(tuple(_last_number(run.numbers(self.model, setting)[key]) for run in self.runs))

    def series(self, key: str, setting: Setting) -> list[Spread]:
        """Return a figure that is a list of numbers, one per row or task."""
        return _spreads([run.numbers(self.model, setting)[key] for run in self.runs])

    @property
    def needs_task(self) -> bool:
        """Whether it must be told the task of every image, and so has task-aware accuracies alone."""
        return all(needs_task(*(run.numbers(self.model, setting)["R"] for setting in SETTINGS)) for run in self.runs)

    def matrix(self, setting: Setting) -> list[list[Spread]]:
        """Return the accuracy matrix R, rows by columns."""
        matrices = [run.numbers(self.model, setting)["R"] for run in self.runs]
        return [_spreads(rows) for rows in zip(*matrices, strict=True)]

    def worst_task(self, setting: Setting) -> Spread:
        """Return the lowest accuracy among the tasks seen so far, after the last one."""
        return Spread(tuple(_worst_task(run, self.model, setting) for run in self.runs))

    def gap_to_experts(self, setting: Setting) -> Spread:
        """Return the mean over tasks of the accuracy of the task's expert, just trained, minus the final accuracy."""
        return Spread(tuple(_gap_to_experts(run, self.model, setting) for run in self.runs))

    def bytes_kept(self) -> list[Spread]:
        """Return the bytes kept beside the base model after every task; empty if unknown."""
        return _spreads([self._bytes_of(run) for run in self.runs])

    def merge_seconds(self) -> list[Spread]:
        """Return the seconds a merge takes after every task; empty if unknown."""
        return _spreads([run.compared.get("merge_seconds", {}).get(self.model, []) for run in self.runs])

    def _bytes_of(self, run: Run) -> Sequence[float | None]:
        known: Sequence[float | None] = run.compared.get("bytes_kept", {}).get(self.model, [])
        if not known and self.rule is not None and run.shapes is not None:
            known = [self.rule.bytes_kept(run.shapes, t + 1) for t in range(run.num_finished)]
        return known


@dataclass(frozen=True)
class Study:
    """The data of a report.

    Attributes:
        runs: The runs, cut after the same task.
        entries: Mergers first, then references.
        tasks: Names of the tasks; numbers if the runs' names differ.
        notes: Notes that the reader should see first.
        evaluation: The reading of the logits that is shown first.
    """

    runs: tuple[Run, ...]
    entries: tuple[Entry, ...]
    tasks: tuple[str, ...]
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
        found = {run.samples for run in self.runs}
        samples = found.pop()
        return None if found or samples is None else list(samples)

    @property
    def diagnosed(self) -> Run | None:
        """The first run that has diagnostics."""
        return next((run for run in self.runs if run.diagnostics), None)

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
    lengths = {str(run.path): len(run.tasks) for run in runs}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"expected runs over the same stream, got different numbers of tasks: {lengths}; make one report for each"
        )
    common = min(run.num_finished for run in runs)
    notes = [*_unfinished(runs, common)]
    cut = tuple(join_looks([run.until(common) for run in runs]))
    groups = _groups(cut)
    tasks, note = _task_names(cut)
    if len({run.evaluation for run in runs}) > 1:
        notes.append(f"the runs go by different accuracies; {runs[0].evaluation} is shown first")
    return Study(cut, tuple(_entries(groups)), tuple(tasks), tuple(notes + note), runs[0].evaluation)


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
    """Group repetitions; name every group by the settings in which it differs from the others."""
    if not all(run.config for run in runs) and all(run.group is not None for run in runs):
        return {
            group: [run for run in runs if run.group == group] for group in dict.fromkeys(r.group or "" for r in runs)
        }
    nested = [_settled(run.config) for run in runs]
    groups: dict[str, list[int]] = {}
    for index, config in enumerate(nested):
        # Without a configuration it is unknown whether two runs are repetitions.
        key = json.dumps(config, default=str) if config else str(runs[index].path)
        groups.setdefault(key, []).append(index)
    if len(groups) == 1:
        return {"": list(runs)}
    settled = [_flat(config) for config in nested]
    first = [members[0] for members in groups.values()]
    differing = sorted(
        {key for i in first for key in settled[i] if any(settled[j].get(key) != settled[i][key] for j in first)}
    )
    found: dict[str, list[Run]] = {}
    for members in groups.values():
        config = settled[members[0]]
        parts = [f"{key[-1]}={config[key]}" for key in differing if key in config]
        label = ", ".join(parts) if parts and len(differing) <= 2 else runs[members[0]].name
        while label in found:
            label += "'"
        found[label] = [runs[index] for index in members]
    return found


def _settled(value: Any, depth: int = 0) -> Any:
    """Remove the settings in which repetitions may differ: the free settings at the top, and seeds everywhere."""
    if isinstance(value, Mapping):
        free = _FREE if depth == 0 else {"seed"}
        kept = {str(key): item for key, item in value.items() if key not in free}
        return {key: _settled(kept[key], depth + 1) for key in sorted(kept)}
    return [_settled(item, depth + 1) for item in value] if isinstance(value, list) else value


def _flat(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(item, (*path, key)).items()}
    return {path: value}


def _unfinished(runs: Sequence[Run], common: int) -> Iterable[str]:
    for run in runs:
        if not run.is_finished:
            yield f"{run.name} is not finished: {run.num_finished} of {len(run.tasks)} tasks were evaluated."
    if any(run.num_finished != common for run in runs):
        yield f"So that all can be compared, everything below is after task {common}."


def _task_names(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    names = list(runs[0].tasks)
    if all(list(run.tasks) == names for run in runs):
        return [shown(name) for name in names], []
    numbered = [f"task {index + 1}" for index in range(len(names))]
    return numbered, ["The runs have different tasks, or call them differently: tasks are numbered below."]


def _worst_task(run: Run, model: str, setting: Setting) -> float:
    if found := _compared(run, model, setting, "worst_task"):
        return _last_number(found)
    seen = run.numbers(model, setting)["R"][-1][: run.num_finished]
    return math.nan if None in seen else float(min(seen))


def _gap_to_experts(run: Run, model: str, setting: Setting) -> float:
    if found := _compared(run, model, setting, "gap_to_experts"):
        return _last_number(found)
    if EXPERT not in run.models or model == EXPERT:
        return math.nan
    experts = run.numbers(EXPERT, setting)["R"]
    last = run.numbers(model, setting)["R"][-1]
    gaps = [number(experts[task][task]) - number(last[task]) for task in range(run.num_finished)]
    return float(np.mean(gaps))


def _compared(run: Run, model: str, setting: Setting, key: str) -> Sequence[float | None]:
    found: Sequence[float | None] = run.compared.get("figures", {}).get(model, {}).get(setting, {}).get(key, [])
    return found


def _last_number(value: Any) -> float:
    if isinstance(value, list):
        return number(value[-1]) if value else math.nan
    return number(value)


def _spreads(lists: Sequence[Sequence[float | None]]) -> list[Spread]:
    """Turn one list per run into one spread per position; positions that a run lacks are left out."""
    return [Spread(tuple(map(number, values))) for values in zip(*lists, strict=False)]


__all__ = ["EXPERT", "UNDEFINED", "ZERO_SHOT", "Entry", "Spread", "Study", "make_study"]
