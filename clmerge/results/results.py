"""The results of a run: the accuracy matrices of all models, their figures, and ``results.json``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clmerge.results.contract import SCHEMA, SETTINGS, Setting, validate
from clmerge.results.metrics.continual import Array, Row
from clmerge.results.metrics.matrix import AccuracyMatrix, Figures, check_row

EXPERT = "expert"
ZERO_SHOT = "zero_shot"
TASK_ORACLE = "task_oracle"
ENSEMBLE = "ensemble"
JOINT = "joint"
BASE = "base"  # theta_0 in diagnostics
HEAD = "head"  # file name of the head's weights, beside the models' files
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
    "needs_task",
    "validate",
]


def is_reference(model: str) -> bool:
    """Return whether a model is a reference that mergers are compared with, such as ``expert``, not a merger.

    Example:
        >>> is_reference("expert"), is_reference("expert@seed1"), is_reference("ties@seed1")
        (True, True, False)
    """
    return model.partition("@")[0] in REFERENCES


def needs_task(agnostic: Sequence[Sequence[float | None]], aware: Sequence[Sequence[float | None]]) -> bool:
    """Return whether a model has task-aware accuracies alone, because it serves every task with a view of its own.

    Args:
        agnostic: Its task-agnostic matrix R, None or NaN where undefined.
        aware: Its task-aware one.
    """
    undefined, known = (np.isnan(np.array(matrix, dtype=float)) for matrix in (agnostic, aware))
    return bool(undefined.all() and not known.all())


class Results:
    """Collect accuracies after every task and turn them into the ``results.json`` document.

    A model is a merger's label, ``expert`` (the un-merged model after each task) or ``zero_shot`` (the model
    before the first task). The zero-shot model never changes, so its row is given once and repeated for every
    finished task; it is also the baseline of forward transfer. The expert is the reference of normalised accuracy
    and merge gap.

    Args:
        tasks: Names of all tasks of the stream, in order.
        classes: Class names of each task, one sequence per task.
        samples: Number of test samples of each task, for sample-weighted averages. Can be given later
            (:meth:`set_samples`).
        evaluation: Default reading of the logits, by which models are ranked.

    Attributes:
        bytes: Bytes that a method keeps from task to task beside the mergers' accumulators, by name.
        options: Options that were changed when the run was resumed, per task as on the command line; empty if none.

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
    ) -> None:
        if evaluation not in SETTINGS:
            raise ValueError(f"expected evaluation to be one of {list(SETTINGS)}, got {evaluation!r}")
        self.evaluation: Setting = evaluation
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
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.options: list[list[str]] = []
        self._rows: dict[str, dict[Setting, AccuracyMatrix]] = {}
        self._zero_shot: dict[Setting, list[float]] | None = None
        if samples is not None:
            self.set_samples(samples)

    @property
    def num_tasks(self) -> int:
        """Number of tasks of the stream."""
        return len(self.tasks)

    @property
    def num_finished(self) -> int:
        """Number of finished tasks: rows of the longest matrix."""
        return max((len(matrices[SETTINGS[0]]) for matrices in self._rows.values()), default=0)

    @property
    def mergers(self) -> list[str]:
        """Names of the models that are mergers, in the order in which they were added."""
        return [name for name in self._rows if not is_reference(name)]

    @property
    def models(self) -> list[str]:
        """Names of all models: mergers first, then the references."""
        references = [name for name in self._rows if is_reference(name)]
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

    def add_row(self, model: str, task_agnostic: Row, task_aware: Row) -> None:
        """Add the accuracies of one model after one more finished task.

        Args:
            model: A merger's label, or ``expert``.
            task_agnostic: Accuracy in [0, 1] on every task, all classes competing, ``(num_tasks,)``; NaN or
                None where it is not defined.
            task_aware: The same with only the task's own classes competing.

        Raises:
            ValueError: If the model is ``zero_shot``, a row is malformed, or every task has its row already.
        """
        if model == ZERO_SHOT:
            raise ValueError("expected a merger or 'expert', got 'zero_shot'; give its one row to set_zero_shot")
        rows = [check_row(row, self.num_tasks) for row in (task_agnostic, task_aware)]
        matrices = self._rows.setdefault(model, {setting: AccuracyMatrix(self.num_tasks) for setting in SETTINGS})
        for setting, row in zip(SETTINGS, rows, strict=True):
            matrices[setting].add_row(row)

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
        return self._matrix(model, setting).values

    def needs_task(self, model: str) -> bool:
        """Return whether a model has task-aware accuracies alone.

        Args:
            model: One of :attr:`models`.
        """
        return needs_task(*(self.matrix(model, setting).tolist() for setting in SETTINGS))

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
        matrix = self._matrix(model, setting)
        run = model.removeprefix(model.partition("@")[0])
        expert = self._rows[EXPERT + run][setting] if EXPERT + run in self._rows else None
        zero_shot = self._matrix(ZERO_SHOT + run, setting).values if ZERO_SHOT + run in self.models else None
        return matrix.summary(
            baseline=None if zero_shot is None or not len(zero_shot) else zero_shot[0],
            expert=expert if expert is not None and len(expert) == len(matrix) else None,
            samples=self.samples,
        )

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
        """Return the results as they were after an earlier task, without the seconds.

        Args:
            num_finished: Number of finished tasks wanted.

        Returns:
            A copy with the first rows of every matrix.

        Raises:
            ValueError: If fewer tasks are finished.
        """
        if not 0 <= num_finished <= self.num_finished:
            raise ValueError(f"expected at most {self.num_finished} finished tasks, got {num_finished}")
        earlier = Results(self.tasks, classes=self.classes, samples=self.samples, evaluation=self.evaluation)
        if self._zero_shot is not None:
            earlier.set_zero_shot(*(self._zero_shot[setting] for setting in SETTINGS))
        for model, matrices in self._rows.items():
            values = (matrices[setting].values[:num_finished] for setting in SETTINGS)
            for rows in zip(*values, strict=True):
                earlier.add_row(model, *rows)
        return earlier

    def to_dict(self) -> dict[str, Any]:
        """Return the ``results.json`` document: JSON types, full precision, null where undefined.

        Raises:
            RuntimeError: If a model lacks the row of a task that another model has.
        """
        for name, matrices in self._rows.items():
            num_rows = len(matrices[SETTINGS[0]])
            if num_rows != self.num_finished:
                raise RuntimeError(
                    f"expected every model to have {self.num_finished} rows, got {num_rows} for {name!r}; "
                    "add the rows of all models before writing the results of a task"
                )
        models = {
            model: {setting: _to_json(self.figures(model, setting)) for setting in SETTINGS} for model in self.models
        }
        return {
            "schema": SCHEMA,
            "evaluation": self.evaluation,
            "tasks": list(self.tasks),
            "classes": [list(names) for names in self.classes],
            "samples": None if self.samples is None else list(self.samples),
            "baseline": None if self._zero_shot is None else _to_json(self._zero_shot),
            "models": models,
            "seconds": dict(self.seconds),
            "bytes": dict(self.bytes),
            **({"options": [list(options) for options in self.options]} if self.options else {}),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Results":
        """Rebuild the object that a document was made from, so that a resumed run can add to it.

        Args:
            document: The result of :meth:`to_dict`, or the same read back from JSON.

        Returns:
            Results whose ``to_dict()`` equals the document.

        Raises:
            ValueError: If the document breaks the contract.
        """
        validate(document)
        results = cls(
            document["tasks"],
            classes=document["classes"],
            samples=document.get("samples"),
            evaluation=document.get("evaluation", SETTINGS[0]),
        )
        baseline = document.get("baseline")
        if baseline is not None:
            results.set_zero_shot(*(baseline[setting] for setting in SETTINGS))
        for model, settings in document["models"].items():
            if model != ZERO_SHOT:
                for rows in zip(*(settings[setting]["R"] for setting in SETTINGS), strict=True):
                    results.add_row(model, *rows)
        for key, value in document["seconds"].items():
            results.add_seconds(key, value)
        results.bytes = dict(document.get("bytes", {}))
        results.options = [list(options) for options in document.get("options", [])]
        return results

    def _matrix(self, model: str, setting: Setting) -> AccuracyMatrix:
        if model == ZERO_SHOT and self._zero_shot is not None:
            matrix = AccuracyMatrix(self.num_tasks)
            for _ in range(self.num_finished):
                matrix.add_row(self._zero_shot[setting])
            return matrix
        if model not in self._rows:
            raise ValueError(f"expected one of the models {self.models}, got {model!r}")
        return self._rows[model][setting]


def _to_json(value: Any) -> Any:
    """Replace NaN, at any depth, by None."""
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    return None if math.isnan(value) else value
