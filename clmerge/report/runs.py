"""Read and check a folder of ``clmerge fit`` or ``clmerge compare``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from clmerge.bounded_yaml import read_yaml
from clmerge.files import parse_json
from clmerge.merging.checks import Shapes, num_entries
from clmerge.names import shown
from clmerge.report.rules import Rule, rule_of
from clmerge.results.metrics.matrix import Figures
from clmerge.results.results import Results, Setting, validate
from clmerge.results.run_manifest import check_config, fill_rows
from clmerge.weights import TaskVectorBank
from clmerge.weights.checksums import verify_part
from clmerge.weights.factored import TensorFile

MANIFEST, RESULTS, CONFIG = "manifest.json", "results.json", "config.yaml"


class NothingEvaluatedError(ValueError):
    """A run that has finished no task yet."""


@dataclass(frozen=True)
class Run:
    """One training run, with all models that were merged from it and evaluated.

    Attributes:
        path: Its run folder, even if only a comparison of it was given; the folder may no longer exist.
        results: The accuracies of its models, and what a comparison found about them.
        files: Files that were read.
        config: Its ``config.yaml``; empty if missing.
        is_finished: Whether the run is complete.
        is_comparison: Whether it was read from a folder of ``clmerge compare``.
    """

    path: Path
    results: Results
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    is_finished: bool = True
    is_comparison: bool = False

    @property
    def name(self) -> str:
        """Name of the folder, safe to display."""
        return shown(self.path.name)

    @property
    def models(self) -> list[str]:
        """Names of its models."""
        return self.results.models

    @property
    def num_finished(self) -> int:
        """Number of tasks after which all models were evaluated."""
        return self.results.num_finished

    @property
    def bank(self) -> TaskVectorBank:
        """The task vectors that the run kept."""
        return TaskVectorBank(self.path / "bank")

    def figures(self, model: str, setting: Setting) -> Figures:
        """Return every figure of a model, computed once: tables and charts ask for them hundreds of times."""
        if (model, setting) not in self._computed:
            self._computed[model, setting] = self.results.figures(model, setting)
        return self._computed[model, setting]

    @cached_property
    def _computed(self) -> dict[tuple[str, Setting], Figures]:
        return {}

    def section(self, name: str) -> Mapping[str, Any]:
        """Return one part of the configuration; empty if there is none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def rules(self) -> Mapping[str, Rule]:
        """Merge rules by model, as far as this version of clmerge has them."""
        records = {model: self.results.model(model).rule for model in self.models}
        found = {model: rule_of(record) for model, record in records.items() if record is not None}
        return {model: rule for model, rule in found.items() if rule is not None}

    @property
    def tuned(self) -> frozenset[str]:
        """Models whose settings a search chose."""
        records = {model: self.results.model(model).rule or {} for model in self.models}
        searched = {search["model"] for search in self.results.searches}
        return frozenset({model for model, rule in records.items() if rule.get("search") is not None} | searched)

    @cached_property
    def num_parameters(self) -> int | None:
        """Number of entries of one task vector, None if none was kept."""
        if not self.bank.tasks:
            return None
        with TensorFile(self.bank.path(self.bank.tasks[0])) as file:
            shapes: Shapes = {name: tuple(file.shape(name)) for name in file.names()}
        return num_entries(shapes)

    def until(self, num_finished: int) -> "Run":
        """Return the run as it was after an earlier task."""
        if num_finished == self.num_finished:
            return self
        return replace(self, results=self.results.until(num_finished))

    def joined(self, other: "Run") -> "Run":
        """Return the run with the models of another folder about it; if both have a model, this one's is kept."""
        files = tuple(dict.fromkeys(self.files + other.files))
        return replace(self, files=files, results=self.results.joined(other.results))

    def renamed(self, names: Mapping[str, str]) -> "Run":
        """Return the run with some models renamed wherever they occur."""
        return replace(self, results=self.results.renamed(names)) if names else self


def read_runs(folder: str | Path) -> list[Run]:
    """Read a folder that ``clmerge fit`` or ``clmerge compare`` wrote.

    Args:
        folder: The folder; an unfinished run is accepted once a task has been evaluated.

    Returns:
        One run, or all runs that were compared.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no results.
        ValueError: If a file is damaged or was written by another version; ``NothingEvaluatedError`` if no task is
            finished.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file: name the folder it is in" if path.exists() else "does not exist"
        raise FileNotFoundError(f"expected a run folder, got {path}, which {what}")
    started = (path / MANIFEST).is_file()
    file = path / RESULTS
    if not file.is_file():
        what = "has no results.json: name a folder that clmerge fit or clmerge compare wrote"
        if started:
            what = f"has not evaluated anything yet: wait for it, or continue it with clmerge fit --resume {path}"
        raise FileNotFoundError(f"expected a run folder, got {path}, which {what}")
    advice = f"; clmerge fit --resume {path} writes it anew" if started else "; run clmerge compare again"
    document = _read_json(file, advice)
    try:
        validate(document)
    except ValueError as error:
        raise ValueError(f"expected the results of a run in {file}, got something else: {error}{advice}") from error
    runs = [_compared(file, found) if found.get("path") else _fitted(file, found) for found in document["runs"]]
    if not all(run.num_finished for run in runs):
        raise NothingEvaluatedError(f"expected a run with at least one finished task, got {path}, which has none yet")
    return runs


def number(value: float | None) -> float:
    """Return a number of ``results.json``, NaN for null."""
    return math.nan if value is None else float(value)


def _fitted(file: Path, document: Mapping[str, Any]) -> Run:
    path = file.parent.resolve()
    manifest = _read_json(path / MANIFEST, "") if (path / MANIFEST).is_file() else {}
    verify_part(path, "")
    if isinstance(text := manifest.get("config"), str) and text and (path / CONFIG).is_file():
        check_config(path / CONFIG, text)
    fill_rows(manifest.get("results"))
    if manifest.get("finished") and manifest.get("results", document) != document:
        raise ValueError(
            f"expected the results in {file} that the run has committed, got others: they were changed; clmerge fit "
            f"--resume {path} writes them anew"
        )
    results = Results.from_dict(document)
    finished = results.num_finished == results.num_tasks and bool(manifest.get("finished", True))
    return Run(path, results, (file, path / CONFIG), _read_yaml(path / CONFIG), finished)


def _compared(file: Path, document: Mapping[str, Any]) -> Run:
    path = Path(document["path"]).resolve()
    results = Results.from_dict(document)
    finished = results.num_finished == results.num_tasks
    return Run(path, results, (file, path / CONFIG), _read_yaml(path / CONFIG), finished, is_comparison=True)


def _read_json(file: Path, advice: str) -> Mapping[str, Any]:
    try:
        found = parse_json(file.read_bytes(), "something else")
    except ValueError as error:
        raise ValueError(f"expected JSON in {file}, which is damaged: {error}{advice}") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object in {file}, got {type(found).__name__}{advice}")
    return found


def _read_yaml(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    found = read_yaml(file)
    return found if isinstance(found, dict) else {}
