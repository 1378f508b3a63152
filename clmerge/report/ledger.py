"""Provenance of a report's numbers: folders, settings, versions, hashes."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clmerge.checkpoints.ledger import versions
from clmerge.figures.numbers import show
from clmerge.report.runs import Run
from clmerge.report.study import Entry, Study


@dataclass(frozen=True)
class Hashed:
    """A file with its size and the SHA-256 of its bytes."""

    name: str
    size: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """One run folder.

    Attributes:
        name: Name of the folder.
        facts: Facts about the run, by heading.
        files: Files that the report or the merges were made from.
        config: Its configuration as text; empty if it has none.
    """

    name: str
    facts: dict[str, str]
    files: list[Hashed]
    config: str


@dataclass(frozen=True)
class Merged:
    """Class and settings of one merger, or the reason why they are unknown, and the images that it was adapted to."""

    name: str
    rule: str
    settings: dict[str, str]
    data: str


def sources_of(study: Study) -> list[Source]:
    """Describe every run; reads and hashes its results, its configuration and its stored task vectors."""
    return [Source(run.name, dict(_facts(run)), list(_files(run)), _config_text(run)) for run in study.runs]


def merged_of(study: Study) -> list[Merged]:
    """Describe every merger."""
    return [_merged(entry) for entry in study.mergers]


def report_versions() -> dict[str, str]:
    """Return the versions of the packages that made the report."""
    return versions()


def _merged(entry: Entry) -> Merged:
    if entry.rule is None:
        return Merged(entry.name, "not a rule of this clmerge, or not in the configuration", {}, entry.data)
    rules = [run.rules[entry.model] for run in entry.runs if entry.model in run.rules]
    settings = [{key: json.dumps(value, default=str) for key, value in rule.settings.items()} for rule in rules]
    # Repetitions may have chosen other values.
    shown = {key: " or ".join(dict.fromkeys(each[key] for each in settings if key in each)) for key in settings[0]}
    return Merged(entry.name, type(entry.rule.merger).__name__, shown, entry.data)


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    if not run.path.is_dir():
        yield "Folder", f"{run.path}, which is not there: neither its configuration nor its task vectors can be shown"
    yield "Tasks", f"{run.num_finished} of {run.results.num_tasks}"
    if run.results.seed is not None:
        yield "Seed", str(run.results.seed)
    if stream := run.section("stream"):
        yield "Stream", _class(stream)
    if backbone := run.section("model").get("backbone"):
        arguments = backbone.get("init_args") if isinstance(backbone, dict) else None
        name = arguments.get("name") if isinstance(arguments, dict) else None
        yield "Backbone", _class(backbone) + (f" {name}" if name else "")
    if policy := run.section("learner").get("start_policy"):
        yield "Start policy", str(policy)
    if base := run.bank.base:
        yield "Base model", base
    if run.num_parameters is not None:
        yield "Merged parameters", f"{run.num_parameters:,}"
    for key, seconds in run.results.seconds.items():
        yield f"Time: {key}", show(seconds, "seconds")


def _files(run: Run) -> Iterable[Hashed]:
    bank = [run.bank.path(task) for task in run.bank.tasks]
    for file in (*run.files, *bank):
        if file.is_file():
            yield _hashed(file, run.path)


def _hashed(file: Path, folder: Path) -> Hashed:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name = file.relative_to(folder) if file.is_relative_to(folder) else file
    return Hashed(name.as_posix(), show(file.stat().st_size, "bytes"), digest)


def _config_text(run: Run) -> str:
    file = run.path / "config.yaml"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _class(value: Any) -> str:
    path = value.get("class_path", "") if isinstance(value, dict) else value
    return str(path).rpartition(".")[2]
