"""The manifest of a run: the record of what is committed, validated when it is read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import clmerge
from clmerge.files import parse_json
from clmerge.results.contract import DATA_FREE, SETTINGS, validate_run
from clmerge.results.contract import SCHEMA as RESULTS_SCHEMA
from clmerge.results.results import Results
from clmerge.shapes import anything, count, flag, keyed, listed, maybe, record, text
from clmerge.weights.checksums import MANIFEST

SCHEMA = 1
_SAME = "same"


@dataclass
class Manifest:
    """The committed state of a run.

    Attributes:
        trained: Tasks whose training and merge are committed.
        evaluated: Tasks whose evaluation is committed; ``trained`` or one less.
        state: Folder of the committed state, relative to the run folder, or None before the first task.
        step: Optimizer steps taken so far, over all tasks.
        epochs: Epochs trained so far, over all tasks.
        task_step: ``step`` when the current task began.
        task_epochs: ``epochs`` when the current task began.
        branch: Committed fits of the current task, if tasks are trained in branches.
        wandb_id: Identity of the run in W&B, kept when the run is resumed.
        results: The results so far, as the record of ``results.json``; rows of skipped tasks may be missing at the end.
        skipped: Bytes that every model keeps after each of the latest tasks, whose undefined rows ``results`` lacks: so
            a stream that is evaluated now and then does not write its accuracies after every task.
        finished: Whether the run is complete.
        config: The text of ``config.yaml``; empty for a run that was started from Python.
        options: Options that were changed when the run was resumed: ``task``, the first task trained with them, and
            ``options``, as on the command line.
        settings: Settings that must not change when the run is resumed: the seed, the mergers, the policies.
        stream: Identity of the stream: counts and hashes of the tasks' images.
        data: Images that the task vectors were made with beside the training of their tasks, as ``data`` of models.
        files: Checksums of the committed files by path, relative to the run folder.
    """

    trained: int = 0
    evaluated: int = 0
    state: str | None = None
    step: int = 0
    epochs: int = 0
    task_step: int = 0
    task_epochs: int = 0
    branch: int = 0
    wandb_id: str | None = None
    results: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, int]] = field(default_factory=list)
    finished: bool = False
    schema: int = SCHEMA
    clmerge: str = clmerge.__version__
    config: str = ""
    options: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    data: str = DATA_FREE
    files: dict[str, str] = field(default_factory=dict)

    def record(self, results: Results) -> None:
        """Take results with a row for every evaluated or skipped task."""
        self.results, self.skipped = results.to_dict(), []

    def options_in_force(self) -> list[str]:
        """Return the options that override ``config.yaml`` for the latest task."""
        return [option for entry in self.options for option in entry["options"]]

    def options_by_task(self, num_tasks: int) -> list[list[str]]:
        """Return the options that override ``config.yaml``, for every task.

        Example:
            >>> Manifest(options=[{"task": 1, "options": ["--trainer.max_epochs=3"]}]).options_by_task(2)
            [[], ['--trainer.max_epochs=3']]
        """
        return [
            [option for entry in self.options if entry["task"] <= task for option in entry["options"]]
            for task in range(num_tasks)
        ]


def read_manifest(file: Path) -> Manifest:
    """Read a manifest.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, contradicts itself, or was written by another version.
    """
    if not file.is_file():
        raise FileNotFoundError(f"expected a run folder with a {MANIFEST}, got {file.parent}")
    try:
        found = parse_json(file.read_bytes(), "something else")
    except ValueError as error:
        raise ValueError(f"expected a manifest in JSON, got {file}, which is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise ValueError(
            f"expected manifest schema {SCHEMA} in {file}, got {schema!r}; "
            "resume with the version of clmerge that wrote it"
        )
    if isinstance(found.get("results"), dict) and "schema" in found["results"]:
        raise ValueError(
            f"expected results with schema {RESULTS_SCHEMA} in {file}, got {found['results']['schema']!r}: an older "
            f"version of clmerge wrote them; convert them with python scripts/convert_results.py {file.parent}"
        )
    if unknown := sorted(set(found) - {f.name for f in fields(Manifest)}):
        raise ValueError(
            f"expected a manifest of clmerge {clmerge.__version__}, got unknown entries {unknown} in {file}; "
            f"resume with the version that wrote it ({found.get('clmerge', 'not recorded')})"
        )
    fill_rows(found.get("results"))
    if wrong := _contradiction(found):
        raise ValueError(f"expected {wrong} in {file}, which was changed by another hand than clmerge's; put it back")
    manifest = Manifest(**found)
    if manifest.skipped:
        results = Results.from_dict(manifest.results)
        for sizes in manifest.skipped:
            results.add_skipped(sizes)
        manifest.record(results)
    return manifest


class ManifestText:
    """Write manifests as JSON, large parts of a long stream once: a part that is the same object is the same text."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, str]] = {}

    def of(self, manifest: Manifest) -> str:
        """Return the text of a manifest.

        Args:
            manifest: The manifest; its ``stream``, and ``models``, ``tasks`` and ``classes`` of its results, are never
                changed in place.

        Raises:
            ValueError: If it holds a NaN.

        Example:
            >>> ManifestText().of(Manifest(trained=2))[:15]
            '{"trained": 2, '
        """
        results = [self._item(f"results.{name}", name, value) for name, value in manifest.results.items()]
        items = [self._item(name, name, value) for name, value in vars(manifest).items() if name != "results"]
        return "{" + ", ".join([f'"results": {{{", ".join(results)}}}'] * bool(results) + items) + "}\n"

    def _item(self, place: str, name: str, value: object) -> str:
        if (write := _LARGE.get(place)) is None:
            return f"{_json(name)}: {_json(value)}"
        known, text = self._known.get(place, (None, ""))
        if value is not known or not text:
            text = f"{_json(name)}: {write(value)}"
            self._known[place] = value, text
        return text


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def models_text(models: Mapping[str, Any]) -> str:
    """Return the models of a run's results as JSON for the manifest, with most rows of a long stream shortened.

    A row without a number is ``null``, one that equals the row before it, as those of the base model do, ``"same"``.

    Raises:
        ValueError: If there is a NaN.

    Example:
        >>> models_text({"expert": {"task_aware": {"R": [[None, None], [0.5, 1.0], [0.5, 1.0]]}}})
        '{"expert": {"task_aware": {"R": [null, [0.5, 1.0], "same"]}}}'
    """

    def shortened(figures: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if figures is None:
            return None
        rows = [None if all(value is None for value in row) else row for row in figures["R"]]
        same = [row is not None and row == before for row, before in zip(rows, [None, *rows], strict=False)]
        return {**figures, "R": [_SAME if is_same else row for row, is_same in zip(rows, same, strict=True)]}

    short = {
        name: {**found, **{setting: shortened(found[setting]) for setting in SETTINGS if setting in found}}
        for name, found in models.items()
    }
    return _json(short)


def fill_rows(results: Any) -> None:
    """Put the rows back that ``models_text`` shortens, in place; what has another form is left to the contract.

    Args:
        results: The results of a manifest, parsed.

    Example:
        >>> figures = {"R": [None, [0.5, 1.0], "same"]}
        >>> fill_rows({"tasks": ["a", "b"], "models": {"expert": {"task_aware": figures}}})
        >>> figures["R"]
        [[None, None], [0.5, 1.0], [0.5, 1.0]]
    """
    models = results.get("models") if isinstance(results, dict) else None
    readings = [
        found.get(setting)
        for found in (models.values() if isinstance(models, dict) else ())
        for setting in SETTINGS
        if isinstance(found, dict)
    ]
    for figures in readings:
        if isinstance(figures, dict) and isinstance(figures.get("R"), list) and isinstance(results.get("tasks"), list):
            rows: list[Any] = []
            for row in figures["R"]:
                as_before = row == _SAME and rows
                rows.append(rows[-1] if as_before else [None] * len(results["tasks"]) if row is None else row)
            figures["R"] = rows


def check_config(file: Path, expected: str) -> None:
    """Check that a run's configuration is the one it began with.

    Args:
        file: ``config.yaml``.
        expected: The text in the manifest.

    Raises:
        ValueError: If it was edited; the message shows the first line that differs.
    """
    try:
        found = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected the configuration of the run in {file}, which is damaged: {error}") from error
    if found != expected:
        before, after = first_difference(expected, found)
        raise ValueError(
            f"expected {file} as the run began with it, got {after!r} where it had {before!r}: one run has one "
            "configuration. Remove the file to get the old one back; "
            "what may change from a task on is an option, for example --resume RUN --trainer.max_epochs=3"
        )


def first_difference(expected: str, found: str) -> tuple[str, str]:
    """Return the first line that differs between two texts, as it is in each of them.

    Example:
        >>> first_difference("seed: 0", "seed: 1")
        ('seed: 0', 'seed: 1')
    """
    pairs = zip([*expected.splitlines(), ""], [*found.splitlines(), ""], strict=False)
    before, after = next(((a, b) for a, b in pairs if a != b), ("", ""))
    return before.strip() or "nothing", after.strip() or "nothing"


def _contradiction(found: Mapping[str, Any]) -> str | None:
    """Return the first contradiction in a manifest, as the end of a message; None if there is none."""
    try:
        _CONTRACT(found, "")
    except ValueError as error:
        return str(error).removeprefix("expected ")
    if results := found.get("results"):
        try:
            validate_run(results, "results")
        except ValueError as error:
            return f"results, got others ({error})"
    trained, evaluated = found.get("trained", 0), found.get("evaluated", 0)
    if evaluated not in (trained, trained - 1):
        return f"as many trained as evaluated tasks, or one more, got {trained} and {evaluated}"
    state = f"state/task_{trained - 1:03d}" if trained else None
    if found.get("state") != state:
        return f"the state {state!r} after {trained} tasks, got {found.get('state')!r}"
    return None


_LARGE: dict[str, Callable[[Any], str]] = {
    "stream": _json,
    "results.tasks": _json,
    "results.classes": _json,
    "results.models": models_text,
}
_TASK = record(
    {"name": text, **dict.fromkeys(("train", "val", "test"), count), "labels": text, "images": text}
    | {"sizes": record(dict.fromkeys(("train", "val", "test"), text))}
)
_CONTRACT = record(
    {},
    {
        **dict.fromkeys(("trained", "evaluated", "step", "epochs", "task_step", "task_epochs", "branch"), count),
        "state": maybe(text),
        "wandb_id": maybe(text),
        "results": keyed(anything),
        "skipped": listed(keyed(count)),
        "finished": flag,
        "clmerge": text,
        "data": text,
        "config": text,
        "options": listed(record({"task": count, "options": listed(text)})),
        "settings": keyed(anything),
        "stream": record({}, {"tasks": listed(_TASK)}),
        "files": keyed(text),
    },
)
