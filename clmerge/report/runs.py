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
from clmerge.report.rules import Rule, configured_rules, rule_of
from clmerge.results.comparison_contract import validate_comparison
from clmerge.results.results import SETTINGS, ZERO_SHOT, Results, Setting, validate
from clmerge.results.run_manifest import check_config
from clmerge.weights import TaskVectorBank
from clmerge.weights.checksums import verify_part
from clmerge.weights.factored import TensorFile

MANIFEST, RESULTS, CONFIG = "manifest.json", "results.json", "config.yaml"


@dataclass(frozen=True)
class Run:
    """One training run, with all models that were merged from it and evaluated.

    Attributes:
        path: Its run folder, even if only a comparison of it was given; the folder may no longer exist.
        files: Files that were read.
        tasks: Names of the tasks of the stream.
        samples: Test images of every task; None if not recorded.
        models: Figures by model and setting, as in ``results.json``; None where undefined.
        seconds: Seconds by activity.
        config: Its ``config.yaml``; empty if missing.
        is_finished: Whether the run is complete.
        rules: Known merge rules by model.
        compared: Further results of ``clmerge compare``, by kind and model: ``bytes_kept``, ``merge_seconds``,
            ``figures`` and ``orders``.
        searches: Its searches.
        group: Name that ``clmerge compare`` gave to the runs that differ from it only in seeds; None if unknown.
        seed: Its seed.
        diagnostics: Document of ``clmerge.evaluation.diagnostics`` about it; None if there is none.
        is_comparison: Whether it was read from a folder of ``clmerge compare``.
        tuned: Models whose settings a search chose.
        evaluation: Its default reading of the logits.
    """

    path: Path
    files: tuple[Path, ...]
    tasks: tuple[str, ...]
    samples: tuple[int, ...] | None
    models: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    is_finished: bool = True
    rules: Mapping[str, Rule] = field(default_factory=dict)
    compared: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    searches: tuple[Mapping[str, Any], ...] = ()
    group: str | None = None
    seed: int | None = None
    diagnostics: Mapping[str, Any] | None = None
    is_comparison: bool = False
    tuned: frozenset[str] = frozenset()
    evaluation: Setting = "task_agnostic"

    @property
    def name(self) -> str:
        """Name of the folder, safe to display."""
        return shown(self.path.name)

    @property
    def num_finished(self) -> int:
        """Number of tasks after which all models were evaluated."""
        return max((len(settings[SETTINGS[0]]["R"]) for settings in self.models.values()), default=0)

    @property
    def bank(self) -> TaskVectorBank:
        """The task vectors that the run kept."""
        return TaskVectorBank(self.path / "bank")

    def section(self, name: str) -> Mapping[str, Any]:
        """Return one part of the configuration; empty if there is none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def shapes(self) -> Shapes | None:
        """Shapes of the merged parameters by name, None if no task vector was kept."""
        if not self.bank.tasks:
            return None
        with TensorFile(self.bank.path(self.bank.tasks[0])) as file:
            return {name: tuple(file.shape(name)) for name in file.names()}

    @property
    def num_parameters(self) -> int | None:
        """Number of entries of one task vector, None if none was kept."""
        return None if self.shapes is None else num_entries(self.shapes)

    def numbers(self, model: str, setting: Setting) -> Mapping[str, Any]:
        """Return the figures of one model."""
        found: Mapping[str, Any] = self.models[model][setting]
        return found

    def until(self, num_finished: int) -> "Run":
        """Return the run as it was after an earlier task."""
        if num_finished == self.num_finished:
            return self
        zero_shot = self.models.get(ZERO_SHOT)
        document = {
            "schema": 1,
            "tasks": list(self.tasks),
            "classes": [[] for _ in self.tasks],
            "samples": None if self.samples is None else list(self.samples),
            "baseline": zero_shot and {setting: zero_shot[setting]["R"][0] for setting in SETTINGS},
            "models": self.models,
            "seconds": {},
        }
        earlier = Results.from_dict(document).until(num_finished).to_dict()
        # Further results of a comparison describe the end of the run, and are left out.
        return replace(self, models=earlier["models"], compared={}, searches=(), diagnostics=None)

    def joined(self, other: "Run") -> "Run":
        """Return the run with the models of another folder about it; if both have a model, this one's is kept."""
        kinds = {kind: {**other.compared.get(kind, {}), **found} for kind, found in self.compared.items()}
        return replace(
            self,
            files=tuple(dict.fromkeys(self.files + other.files)),
            models={**other.models, **self.models},
            seconds={**other.seconds, **self.seconds},
            rules={**other.rules, **self.rules},
            compared={**other.compared, **kinds},
            searches=self.searches + tuple(search for search in other.searches if search not in self.searches),
            group=other.group if self.group is None else self.group,
            diagnostics=self.diagnostics or other.diagnostics,
            tuned=self.tuned | other.tuned,
        )

    def renamed(self, names: Mapping[str, str]) -> "Run":
        """Return the run with some models renamed in all of its fields."""
        if not names:
            return self

        def by_model(found: Mapping[str, Any]) -> dict[str, Any]:
            return {names.get(model, model): value for model, value in found.items()}

        diagnostics = self.diagnostics
        if diagnostics and (measured := diagnostics.get("models")):
            ends = ("from", "to")
            segments = [{**s, **{end: names.get(s[end], s[end]) for end in ends}} for s in measured["segments"]]
            measured = {**measured, "models": by_model(measured["models"]), "segments": segments}
            diagnostics = {**diagnostics, "models": measured}
        return replace(
            self,
            models=by_model(self.models),
            rules=by_model(self.rules),
            compared={kind: by_model(found) for kind, found in self.compared.items()},
            searches=tuple(
                {**search, "model": names.get(search["model"], search["model"])} for search in self.searches
            ),
            diagnostics=diagnostics,
            tuned=frozenset(names.get(model, model) for model in self.tuned),
        )


def read_runs(folder: str | Path) -> list[Run]:
    """Read a folder that ``clmerge fit`` or ``clmerge compare`` wrote.

    Args:
        folder: The folder; an unfinished run is accepted once a task has been evaluated.

    Returns:
        One run, or all runs that were compared.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no results.
        ValueError: If a file is damaged or was written by another version, or no task is finished.
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
    compared = document.get("compare") is not None
    try:
        validate(document)
        if compared:
            validate_comparison(document)
    except ValueError as error:
        raise ValueError(f"expected the results of a run in {file}, got something else: {error}{advice}") from error
    runs = _compared(file, document) if compared else [_fitted(file, document)]
    if not all(run.num_finished for run in runs):
        raise ValueError(f"expected a run with at least one finished task, got {path}, which has none yet")
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
    if manifest.get("finished") and manifest.get("results", document) != document:
        raise ValueError(
            f"expected the results in {file} that the run has committed, got others: they were changed; clmerge fit "
            f"--resume {path} writes them anew"
        )
    config = _read_yaml(path / CONFIG)
    run = Run(
        path,
        (file, path / CONFIG),
        tuple(document["tasks"]),
        _samples(document),
        document["models"],
        document["seconds"],
        config,
        rules=configured_rules(config),
        seed=_seed(config),
        evaluation=document.get("evaluation", SETTINGS[0]),
    )
    return replace(run, is_finished=run.num_finished == len(run.tasks) and bool(manifest.get("finished", True)))


def _compared(file: Path, document: Mapping[str, Any]) -> list[Run]:
    """Split a comparison into its runs, each with its own models under their plain names."""
    compare = document["compare"]
    runs = []
    for entry in compare["runs"]:
        # In a comparison of several runs, models are named NAME@RUN.
        suffix = f"@{entry['name']}" if len(compare["runs"]) > 1 else ""
        own = {model: model.removesuffix(suffix) for model in document["models"] if model.endswith(suffix)}
        settings = compare["settings"]
        path = Path(entry["path"]).resolve()
        config = _read_yaml(path / CONFIG)
        kinds = {kind: compare.get(kind) or {} for kind in ("bytes_kept", "merge_seconds", "figures")}
        kinds["orders"] = (compare.get("orders") or {}).get("models", {})
        searches = tuple(
            {**search, "model": search["model"].removesuffix(suffix)}
            for search in compare["searches"]
            if search["run"] == entry["name"]
        )
        searched = frozenset(search["model"] for search in searches)
        run = Run(
            path,
            (file, path / CONFIG),
            tuple(entry["tasks"]),
            _samples(document),
            {name: document["models"][model] for model, name in own.items()},
            document["seconds"],
            config,
            rules={own[m]: rule for m in own if m in settings and (rule := rule_of(settings[m])) is not None},
            compared={kind: {own[m]: found[m] for m in own if m in found} for kind, found in kinds.items()},
            searches=searches,
            group=entry["group"],
            seed=entry["seed"],
            is_comparison=True,
            tuned=frozenset(own[m] for m in own if m in settings and settings[m].get("search") is not None) | searched,
            evaluation=document.get("evaluation", SETTINGS[0]),
        )
        diagnosed = compare.get("diagnostics") or {}
        runs.append(
            replace(
                run,
                is_finished=run.num_finished == len(run.tasks),
                diagnostics=diagnosed if diagnosed.get("run") == entry["name"] else None,
            )
        )
    return runs


def _seed(config: Mapping[str, Any]) -> int | None:
    seed = config.get("seed")
    return seed if isinstance(seed, int) else None


def _samples(document: Mapping[str, Any]) -> tuple[int, ...] | None:
    return None if document.get("samples") is None else tuple(document["samples"])


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
