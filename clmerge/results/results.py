"""The results of a run: the accuracy matrices of all models, their figures, and its record in ``results.json``."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from clmerge.names import task_label
from clmerge.results.confusion import Confusion, Confusions
from clmerge.results.contract import (
    DATA_FREE,
    SCHEMA,
    SETTINGS,
    Kind,
    Setting,
    class_names,
    validate,
    validate_run,
)
from clmerge.results.measured import Measured
from clmerge.results.metrics.continual import Array, Row
from clmerge.results.metrics.matrix import AccuracyMatrix, Figures, check_row
from clmerge.results.model_record import ModelRecord, to_json

EXPERT = "expert"
ZERO_SHOT = "zero_shot"
TASK_ORACLE = "task_oracle"
ENSEMBLE = "ensemble"
JOINT = "joint"
BASE = "base"  # theta_0 in diagnostics
ROUTING = "routing_accuracy"  # a probe of routed models, and its row beside the accuracies
HEAD = "head"  # file name of the head's weights, beside the models' files
ADAPTERS = "adapters"  # the same of adapters that a calibration puts behind the model's features
REFERENCES = (EXPERT, ZERO_SHOT, TASK_ORACLE, ENSEMBLE, JOINT)

__all__ = [
    "BASE",
    "HEAD",
    "REFERENCES",
    "SCHEMA",
    "SETTINGS",
    "Results",
    "Setting",
    "is_reference",
    "to_document",
    "validate",
]


def is_reference(model: str) -> bool:
    """Return whether a model is a reference that mergers are compared with, such as ``expert``, not a merger.

    Example:
        >>> is_reference("expert"), is_reference("ties")
        (True, False)
    """
    return model in REFERENCES


def to_document(runs: "Sequence[Results]") -> dict[str, Any]:
    """Return the ``results.json`` document of one or several runs: JSON types, full precision, null where undefined.

    Args:
        runs: Their results, with different names.
    """
    return {"schema": SCHEMA, "runs": [run.to_dict() for run in runs]}


class Results:
    """Collect the accuracies of a run's models after every task, and turn them into its record in ``results.json``.

    A model is a merger's label, ``expert`` (the un-merged model after each task) or ``zero_shot`` (the model
    before the first task). The zero-shot model never changes, so its row is given once and repeated for every
    finished task; it is also the baseline of forward transfer. The expert is the reference of normalised accuracy,
    merge gap and gap to the experts.

    Args:
        tasks: Names of all tasks of the stream, in order.
        classes: Class names of each task, one sequence per task.
        samples: Number of test samples of each task, for sample-weighted averages. Can be given later
            (:meth:`set_samples`).
        evaluation: Default reading of the logits, by which models are ranked.
        name: Name of the run.
        seed: Its seed.

    Attributes:
        path: The run folder, if the results are stored elsewhere.
        group: Name that a comparison gave to the runs that differ from it only in seeds; None if unknown.
        split: The images that accuracies are of: ``test``, ``val`` or ``all``.
        seconds: Seconds by activity.
        bytes: Bytes that a method keeps from task to task beside the mergers' accumulators, by name.
        options: Options that were changed when the run was resumed, per task as on the command line; empty if none.
        searches: Searches of settings, each with the ``model`` that has the chosen values (docs/compare.md).
        orders: Accuracies of the same experts merged in other orders: ``seed`` and ``models``; None if not computed.
        diagnostics: The document of ``clmerge.evaluation.diagnostics``; None if not computed.
        soups: Averages of the final models of several runs (docs/results.md), in the first one's record; empty if none.

    Raises:
        ValueError: If there is no task, a name occurs twice, or a length differs from the number of tasks.

    Example:
        >>> results = Results(["zero and one", "two and three"], classes=[["0", "1"], ["2", "3"]])
        >>> results.set_zero_shot([0.5, 0.25], [0.75, 0.5])
        >>> results.add_row("magmax", [1.0, 0.25], [1.0, 0.5])
        >>> results.add_row("magmax", [0.75, 0.75], [1.0, 1.0])
        >>> figures = results.to_dict()["models"]["magmax"]["task_agnostic"]
        >>> figures["average_accuracy"], figures["forgetting"], figures["forward_transfer"]
        ([1.0, 0.75], 0.25, 0.0)
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        classes: Sequence[Sequence[str]],
        samples: Sequence[int] | None = None,
        evaluation: Setting = "task_agnostic",
        name: str = "",
        seed: int | None = None,
    ) -> None:
        if evaluation not in SETTINGS:
            raise ValueError(f"expected evaluation to be one of {list(SETTINGS)}, got {evaluation!r}")
        self.evaluation: Setting = evaluation
        self.name, self.seed = name, seed
        self.tasks = [str(name) for name in tasks]
        self.classes = [[str(name) for name in names] for names in classes]
        if not self.tasks:
            raise ValueError("expected at least one task, got none")
        twice = {name for name in self.tasks if self.tasks.count(name) > 1}
        if twice:
            raise ValueError(f"expected every task to have its own name, got {sorted(twice)} more than once")
        if len(self.classes) != self.num_tasks:
            raise ValueError(f"expected class names for {self.num_tasks} tasks, got {len(self.classes)} lists")
        self.samples: list[int] | None = None
        self.split = "test"
        self.path: str | None = None
        self.group: str | None = None
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.options: list[list[str]] = []
        self.searches: list[dict[str, Any]] = []
        self.orders: dict[str, Any] | None = None
        self.diagnostics: dict[str, Any] | None = None
        self.soups: list[dict[str, Any]] = []
        self._models: dict[str, ModelRecord] = {}
        self._zero_shot: dict[Setting, list[float]] | None = None
        self._confusions: dict[str, Confusions] = {}
        self._zero_shot_probes: dict[str, Mapping[str, Any]] = {}
        if samples is not None:
            self.set_samples(samples)

    @property
    def num_tasks(self) -> int:
        """Number of tasks of the stream."""
        return len(self.tasks)

    def task_labels(self, *, numbered: bool = True) -> list[str]:
        """Return the names of the tasks for readers; :attr:`tasks` identifies them.

        Args:
            numbered: Whether names that are shortened begin with the number of the task.
        """
        pairs = zip(self.tasks, self.classes, strict=True)
        return [task_label(index, *pair, numbered=numbered) for index, pair in enumerate(pairs)]

    @property
    def class_names(self) -> list[str]:
        """The different names of all classes, in the order in which they arrive."""
        return class_names(self.classes)

    @property
    def num_finished(self) -> int:
        """Number of finished tasks: rows of the longest matrix."""
        return max(map(len, self._models.values()), default=0)

    @property
    def mergers(self) -> list[str]:
        """Names of the models that are mergers, in the order in which they were added."""
        return [name for name, model in self._models.items() if len(model) and not is_reference(name)]

    @property
    def models(self) -> list[str]:
        """Names of all models: mergers first, then the references."""
        references = [name for name, model in self._models.items() if len(model) and is_reference(name)]
        return self.mergers + references + [ZERO_SHOT] * (self._zero_shot is not None)

    def set_samples(self, samples: Sequence[int]) -> None:
        """Set the number of test samples of each task.

        Args:
            samples: Counts, ``(num_tasks,)``.

        Raises:
            ValueError: If there is not one non-negative count per task.
        """
        if len(samples) != self.num_tasks or any(count < 0 for count in samples):
            raise ValueError(f"expected {self.num_tasks} non-negative sample counts, got {list(samples)}")
        self.samples = [int(count) for count in samples]

    def set_zero_shot(self, task_agnostic: Row, task_aware: Row) -> None:
        """Set the accuracies of the model before the first task.

        Args:
            task_agnostic: Accuracy in [0, 1] on every task, all classes competing, ``(num_tasks,)``.
            task_aware: The same with only the task's own classes competing.

        Raises:
            ValueError: If a row has the wrong length or values outside [0, 1].
        """
        rows: tuple[tuple[Setting, Row], ...] = (("task_agnostic", task_agnostic), ("task_aware", task_aware))
        self._zero_shot = {setting: check_row(row, self.num_tasks).tolist() for setting, row in rows}

    def describe(
        self, model: str, *, kind: Kind = "merged", rule: Mapping[str, Any] | None = None, data: str = DATA_FREE
    ) -> None:
        """Describe a model, before or after its rows are added.

        Args:
            model: A merger's label, or a reference other than ``zero_shot``.
            kind: How it answers: ``merged``, ``per_task``, ``calibrated``, ``routed``, ``ensemble`` or ``unmerged``.
            rule: Its merge rule with settings; None if it is not merged.
            data: The images that it was adapted to.
        """
        record = self._models.setdefault(model, ModelRecord.blank(self.num_tasks))
        record.kind, record.rule, record.data = kind, rule, data

    def add_row(
        self,
        model: str,
        task_agnostic: Row,
        task_aware: Row,
        *,
        bytes_kept: int | None = None,
        merge_seconds: float | None = None,
    ) -> None:
        """Add the accuracies of one model after one more finished task.

        Args:
            model: A merger's label, or a reference other than ``zero_shot``.
            task_agnostic: Accuracy in [0, 1] on every task, all classes competing, ``(num_tasks,)``; NaN or
                None where it is not defined.
            task_aware: The same with only the task's own classes competing.
            bytes_kept: Bytes that the model keeps beside the base model; None if unknown.
            merge_seconds: Seconds that the merge took; None if unknown.

        Raises:
            ValueError: If the model is ``zero_shot``, a row is malformed, or every task has its row already.
        """
        if model == ZERO_SHOT:
            raise ValueError("expected a merger or 'expert', got 'zero_shot'; give its one row to set_zero_shot")
        rows = [check_row(row, self.num_tasks) for row in (task_agnostic, task_aware)]
        record = self._models.get(model)
        if record is None:
            record = ModelRecord.blank(self.num_tasks)
            record.kind = "unmerged" if is_reference(model) else "merged"
            self._models[model] = record
        record.add_row(rows, bytes_kept=bytes_kept, merge_seconds=merge_seconds)

    def add_skipped(self, sizes: Mapping[str, int]) -> None:
        """Add a row without numbers to every model, for a finished task after which nothing is evaluated.

        Args:
            sizes: Bytes that each model keeps.
        """
        unknown = [math.nan] * self.num_tasks
        for name, size in sizes.items():
            self.add_row(name, unknown, unknown, bytes_kept=size)

    def set_confusion(self, model: str, confusions: Confusions) -> None:
        """Set the answers of a model after the last task, by class.

        Args:
            model: One of :attr:`models`.
            confusions: The answers by reading of the logits, over :attr:`class_names`.

        Raises:
            ValueError: If the number of classes differs.
        """
        for found in confusions.values():
            if len(found.images) != len(self.class_names):
                raise ValueError(
                    f"expected answers for {len(self.class_names)} classes, got {len(found.images)} for {model!r}"
                )
        self._confusions[model] = dict(confusions)

    def take_confusion(self, model: str, other: "Results") -> None:
        """Set the answers of a model to those of other results of the same run, if these have any."""
        if model in other._confusions:
            self.set_confusion(model, other._confusions[model])

    def confusion(self, model: str, setting: Setting | None = None) -> Confusion | None:
        """Return the answers of a model after the last task, by class; None if none were counted.

        Args:
            model: One of :attr:`models`.
            setting: Which reading of the logits; default :attr:`evaluation`.

        Raises:
            ValueError: If there is no such model.
        """
        self.model(model)
        found = self._confusions.get(model, {}).get(setting or self.evaluation)
        return found if found is not None and any(found.images) else None

    def add_routing(self, model: str, accuracies: Row) -> None:
        """Set the routing accuracy of a model after the latest task, as the probe ``routing_accuracy``.

        Args:
            model: A routed model, whose row was added.
            accuracies: Share of each task's images that are routed to it, ``(num_tasks,)``; NaN or None if undefined.
        """
        row = check_row(accuracies, self.num_tasks).tolist()
        probe: dict[str, Any] = {"per_task": row}
        self._models[model].probes[ROUTING] = probe | ({} if self.samples is None else {"n": list(self.samples)})

    def add_probe(
        self, model: str, name: str, found: Measured, *, curve: Sequence[float] | None = None, **about: Any
    ) -> None:
        """Set what a probe found about a model after the latest task, and add its value to the probe's curve.

        Args:
            model: One of :attr:`models`, whose row was added.
            name: Name of the probe.
            found: The finding.
            curve: Its values after all tasks, instead.
            about: What readers need to know of the probe: ``better``, ``share``, ``probe``.

        Raises:
            ValueError: If there is no such model.
        """
        record = self.model(model)
        document = found.to_dict() | {key: value for key, value in about.items() if value is not None}
        if curve is not None:
            document["curve"] = [*[math.nan] * (len(record) - len(curve)), *curve]
        elif model != ZERO_SHOT:
            before = list(record.probes.get(name, {}).get("curve", ()))
            missing = len(record) - 1 - len(before)
            document["curve"] = [*before, *[math.nan] * missing, found.value]
        record.probes[name] = document

    def add_seconds(self, key: str, value: float) -> None:
        """Add to the seconds spent on an activity.

        Args:
            key: Name of the activity, for example ``"train"``.
            value: Seconds, added to the key's total.

        Raises:
            ValueError: If the value is negative or not finite.
        """
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"expected a finite, non-negative number of seconds for {key!r}, got {value}")
        self.seconds[key] = self.seconds.get(key, 0.0) + float(value)

    def model(self, model: str) -> ModelRecord:
        """Return the record of a model.

        Args:
            model: One of :attr:`models`.

        Raises:
            ValueError: If there is no such model.
        """
        if model == ZERO_SHOT and self._zero_shot is not None:
            record = ModelRecord.blank(self.num_tasks)
            record.kind = "unmerged"
            record.probes = self._zero_shot_probes
            for _ in range(self.num_finished):
                record.add_row([self._zero_shot[setting] for setting in SETTINGS], bytes_kept=0)
            return record
        if model not in self.models:
            raise ValueError(f"expected one of the models {self.models}, got {model!r}")
        return self._models[model]

    def matrix(self, model: str, setting: Setting = "task_agnostic") -> Array:
        """Return the accuracy matrix R of a model.

        Args:
            model: One of :attr:`models`.
            setting: Which reading of the logits.

        Returns:
            A copy, ``(rows, num_tasks)``, float64, NaN where undefined.

        Raises:
            ValueError: If there is no such model.
        """
        return self.model(model).matrices[setting].values

    def figures(self, model: str, setting: Setting = "task_agnostic") -> Figures:
        """Return every figure of one model (see :meth:`clmerge.results.metrics.AccuracyMatrix.summary`).

        Args:
            model: One of :attr:`models`.
            setting: Which reading of the logits.

        Returns:
            Figures by name, NaN where undefined.

        Raises:
            ValueError: If there is no such model.
        """
        matrix = self.model(model).matrices[setting]
        expert: AccuracyMatrix | None = None
        if EXPERT in self._models and len(self._models[EXPERT]) == len(matrix):
            expert = self._models[EXPERT].matrices[setting]
        baseline = None if self._zero_shot is None or not len(matrix) else self._zero_shot[setting]
        return matrix.summary(baseline=baseline, expert=expert, samples=self.samples)

    def best_merger(self, setting: Setting | None = None) -> str | None:
        """Return the merger with the highest average accuracy after the latest task; the first of equals.

        Args:
            setting: Which reading of the logits; default :attr:`evaluation`.

        Returns:
            Its name, None if no merger has a defined average accuracy.
        """
        scores: dict[str, float] = {}
        for name in self.mergers:
            averages = self.figures(name, setting or self.evaluation)["average_accuracy"]
            if averages and not math.isnan(averages[-1]):
                scores[name] = averages[-1]
        return max(scores, key=scores.__getitem__) if scores else None

    def until(self, num_finished: int) -> "Results":
        """Return the results as they were after an earlier task, without what describes the end of the run.

        Args:
            num_finished: Number of finished tasks wanted.

        Returns:
            A copy with the first rows of every matrix, and without searches, orders and diagnostics.

        Raises:
            ValueError: If fewer tasks are finished.
        """
        if not 0 <= num_finished <= self.num_finished:
            raise ValueError(f"expected at most {self.num_finished} finished tasks, got {num_finished}")
        earlier = copy.copy(self)
        earlier._models = {name: model.until(num_finished) for name, model in self._models.items()}
        earlier._zero_shot_probes = dict(self._zero_shot_probes)
        if num_finished < self.num_finished:
            earlier._confusions = {}
        earlier.searches, earlier.orders, earlier.diagnostics, earlier.soups = [], None, None, []
        return earlier

    def joined(self, other: "Results") -> "Results":
        """Return the results with the models of another look at the same run; if both have a model, this one's."""
        merged = copy.copy(self)
        merged._models = {**other._models, **self._models}
        merged._confusions = {**other._confusions, **self._confusions}
        if merged._zero_shot is None:
            merged._zero_shot, merged._zero_shot_probes = other._zero_shot, other._zero_shot_probes
        merged.seconds = {**other.seconds, **self.seconds}
        merged.searches = self.searches + [search for search in other.searches if search not in self.searches]
        orders = [one.orders["models"] for one in (other, self) if one.orders]
        merged.orders = {"models": {name: part for part in orders for name, part in part.items()}} if orders else None
        merged.group = other.group if self.group is None else self.group
        merged.diagnostics = self.diagnostics or other.diagnostics
        merged.soups = self.soups + [soup for soup in other.soups if soup not in self.soups]
        return merged

    def renamed(self, names: Mapping[str, str]) -> "Results":
        """Return the results with some models renamed wherever they occur."""
        if not names:
            return self

        def by_model(found: Mapping[str, Any]) -> dict[str, Any]:
            return {names.get(model, model): value for model, value in found.items()}

        found = copy.copy(self)
        found._models = by_model(self._models)
        found._confusions = by_model(self._confusions)
        found.searches = [{**each, "model": names.get(each["model"], each["model"])} for each in self.searches]
        found.soups = [{**each, "model": names.get(each["model"], each["model"])} for each in self.soups]
        if self.orders:
            found.orders = {**self.orders, "models": by_model(self.orders["models"])}
        if self.diagnostics and (measured := self.diagnostics.get("models")):
            ends = ("from", "to")
            segments = [
                {**each, **{end: names.get(each[end], each[end]) for end in ends}} for each in measured["segments"]
            ]
            measured = {**measured, "models": by_model(measured["models"]), "segments": segments}
            found.diagnostics = {**self.diagnostics, "models": measured}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the run's record in ``results.json``: JSON types, full precision, null where undefined.

        Raises:
            RuntimeError: If a model lacks the row of a task that another model has.
        """
        for name in self.models:
            if (num_rows := len(self.model(name))) != self.num_finished:
                raise RuntimeError(
                    f"expected every model to have {self.num_finished} rows, got {num_rows} for {name!r}; "
                    "add the rows of all models before writing the results of a task"
                )
        return {
            "name": self.name,
            "path": self.path,
            "group": self.group,
            "seed": self.seed,
            "evaluation": self.evaluation,
            "tasks": list(self.tasks),
            "classes": [list(names) for names in self.classes],
            "samples": None if self.samples is None else list(self.samples),
            **({} if self.split == "test" else {"split": self.split}),
            "baseline": None if self._zero_shot is None else to_json(self._zero_shot),
            "models": {model: self._model_to_dict(model) for model in self.models},
            "searches": to_json(self.searches),
            "orders": to_json(self.orders),
            "diagnostics": to_json(self.diagnostics),
            "seconds": dict(self.seconds),
            "bytes": dict(self.bytes),
            **({"options": [list(options) for options in self.options]} if self.options else {}),
            **({"soups": to_json(self.soups)} if self.soups else {}),
        }

    def _model_to_dict(self, model: str) -> dict[str, Any]:
        found = self.model(model).to_dict({setting: self.figures(model, setting) for setting in SETTINGS})
        if model in self._confusions:
            found["confusion"] = {setting: one.to_dict() for setting, one in self._confusions[model].items()}
        return found

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Results":
        """Rebuild the object that a record was made from, so that a resumed run can add to it.

        Args:
            document: The result of :meth:`to_dict`, or the same read back from JSON.

        Returns:
            Results whose ``to_dict()`` equals the document.

        Raises:
            ValueError: If the record breaks the contract.
        """
        validate_run(document)
        results = cls(
            document["tasks"],
            classes=document["classes"],
            samples=document.get("samples"),
            evaluation=document.get("evaluation", SETTINGS[0]),
            name=document["name"],
            seed=document.get("seed"),
        )
        baseline = document.get("baseline")
        if baseline is not None:
            results.set_zero_shot(*(baseline[setting] for setting in SETTINGS))
        results._models = {
            model: ModelRecord.from_dict(found, results.num_tasks)
            for model, found in document["models"].items()
            if model != ZERO_SHOT
        }
        if ZERO_SHOT in document["models"]:
            results._zero_shot_probes = dict(document["models"][ZERO_SHOT].get("probes") or {})
        for model, found in document["models"].items():
            if answers := found.get("confusion"):
                results._confusions[model] = {s: Confusion.from_dict(answers[s]) for s in SETTINGS if s in answers}
        for key, value in document["seconds"].items():
            results.add_seconds(key, value)
        results.split = document.get("split", "test")
        results.path, results.group = document.get("path"), document.get("group")
        results.bytes = dict(document.get("bytes", {}))
        results.options = [list(options) for options in document.get("options", [])]
        results.searches = list(document.get("searches") or [])
        results.orders, results.diagnostics = document.get("orders"), document.get("diagnostics")
        results.soups = list(document.get("soups", []))
        return results
