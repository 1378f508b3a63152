"""Load a run of ``clmerge fit`` in Python: its results, task vectors and models, read from disk."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clmerge.deploy.predictors import Merged, PerTask, Predictor
from clmerge.deploy.routing.routed_model import is_routed, load_routed
from clmerge.deploy.routing.routing import predictor_of
from clmerge.merging.stored import relocated
from clmerge.report.rules import rule_of
from clmerge.results.metrics.continual import Array
from clmerge.results.model_facts import ModelFacts
from clmerge.results.results import ADAPTERS, SETTINGS, Results, Setting
from clmerge.results.run_folder import RunFolder
from clmerge.runs.final_predictors import PREFIX
from clmerge.weights import TaskVectorBank, apply_task_vector, load_metadata, load_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = ("forgetting_curves", "average_accuracy", "final_accuracy")


def load_run(path: str | Path) -> "LoadedRun":
    """Open a run folder to read it.

    Args:
        path: The folder of a run of ``clmerge fit``, finished or not. Nothing in it is changed.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If the run is damaged, or no task was evaluated yet.
    """
    return LoadedRun(RunFolder.open(path, writes=False))


class LoadedRun:
    """Results, task vectors and models of a run.

    Args:
        folder: The run folder.

    Attributes:
        path: The run folder.
        results: The accuracy matrices of all models, and their figures.
        task_vectors: One task vector per task, read from disk on access: ``run.task_vectors[0]``.

    Raises:
        ValueError: If nothing was evaluated yet.
    """

    def __init__(self, folder: RunFolder) -> None:
        if not folder.manifest.results:
            raise ValueError(f"expected a run that has evaluated a task, got {folder.path}, which has not begun to")
        self.path = folder.path
        self.results = Results.from_dict(folder.manifest.results)
        self.task_vectors = TaskVectorBank(folder.bank)
        self._folder = folder

    @property
    def models(self) -> list[str]:
        """Names of all models: mergers, then ``expert``, ``zero_shot`` and other references."""
        return self.results.models

    def matrix(self, model: str, setting: Setting | None = None) -> Array:
        """Return R of a model, ``(finished tasks, tasks)``: accuracy in [0, 1] after task i on task j.

        Args:
            model: One of ``models``.
            setting: ``"task_agnostic"`` or ``"task_aware"``; default the run's own.

        Returns:
            A copy, float64, NaN where undefined.
        """
        return self.results.matrix(model, setting or self.results.evaluation)

    def accuracies(self) -> list[dict[str, Any]]:
        """Return every accuracy as a record, ready for ``pandas.DataFrame``.

        Keys: ``model``, ``setting``, ``after`` and ``on`` (names of tasks), ``accuracy``.
        """
        tasks = self.results.tasks
        return [
            {"model": model, "setting": setting, "after": tasks[i], "on": tasks[j], "accuracy": float(value)}
            for model in self.models
            for setting in SETTINGS
            for i, row in enumerate(self.results.matrix(model, setting))
            for j, value in enumerate(row)
        ]

    def figures(self) -> list[dict[str, Any]]:
        """Return the figures of every model (docs/metrics.md) as one record each, ready for ``pandas.DataFrame``.

        Keys: ``model``, ``setting``, and the name of every scalar figure; fractions, NaN if undefined.
        """
        found = []
        for model in self.models:
            for setting in SETTINGS:
                figures: dict[str, Any] = dict(self.results.figures(model, setting))
                numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
                found.append({"model": model, "setting": setting, **numbers})
        return found

    def base(self) -> dict[str, Tensor]:
        """Return theta_0, by parameter name: the weights that task vectors and merged vectors are added to."""
        return self._folder.load_weights()[1]

    def state_dict(self, merger: str) -> dict[str, Tensor]:
        """Return the final weights of a merged model, which load strictly into the backbone's own architecture.

        Args:
            merger: One of the mergers of the run.

        Raises:
            ValueError: If the run has no such merger, or is not finished.
        """
        file = self._file(merger)
        if is_routed(load_metadata(file)):
            raise ValueError(
                f"expected a model with one set of weights, got {merger}, whose weights differ from image to image; "
                f"clmerge.deploy.routing.load_routed({str(file)!r}) loads it"
            )
        return load_tensors(file)

    def _file(self, merger: str) -> Path:
        file = self._folder.model(merger)
        if not file.is_file():
            raise ValueError(
                f"expected one of the mergers {self.results.mergers} of a finished run, got {merger!r} in {self.path}"
            )
        return file

    def facts(self, name: str) -> ModelFacts | None:
        """Return what the file of a merged model says about itself; None if an older version of clmerge wrote it.

        Args:
            name: A merger of the run, or ``MERGER+CALIBRATION``.

        Raises:
            ValueError: If the run has no such model, or is not finished.
        """
        file = self._file(name)
        return ModelFacts.from_metadata(load_metadata(file), str(file))

    def predictor(self, name: str) -> Predictor:
        """Return a merged model as a predictor of the backbone's own architecture, by its own names; no data is read.

        ``Merged`` holds ``state_dict(name)``; a rule with a view per task gives a ``PerTask``, which needs the task of
        every image; a routed model has a module of its own, from images to logits.

        Args:
            name: A merger of the run, ``MERGER+CALIBRATION`` or ``MERGER+ROUTING``.

        Raises:
            ValueError: If the run has no such merger or is not finished, or this version of clmerge lacks its rule.
        """
        if is_routed(load_metadata(self._file(name))):
            facts = self.facts(name)
            assert facts is not None
            return predictor_of(load_routed(self._file(name)), facts.routing)
        whole = self.state_dict(name)
        if self._folder.model(f"{name}-{ADAPTERS}").is_file():
            raise ValueError(
                f"expected a model that is weights of the backbone alone, got {name!r}, which has adapters behind it; "
                "`clmerge evaluate` and `clmerge predict` run it"
            )
        found = self.results.model(name).rule
        rule = None if found is None else rule_of(found)
        if found is not None and rule is None:
            raise ValueError(
                f"expected a merger that this version of clmerge has, got {found['merger']}; import its module first"
            )
        if rule is None or not rule.merger.task_views:
            return Merged(whole)
        merger, state = rule.merger, self._folder.load_state()[1]
        merger.load_state_dict(relocated(state["mergers"][name], "", self.task_vectors.folder.resolve()))
        base: dict[str, Tensor] = state["base"]

        def view(task: int) -> dict[str, Tensor]:
            moved = apply_task_vector(base, merger.task_view(task))
            return {**whole, **{key.removeprefix(PREFIX): tensor for key, tensor in moved.items()}}

        return PerTask(view, merger.tasks)

    def plot(self, name: str, setting: Setting | None = None) -> "Figure":
        """Draw one of the run's pictures as a Matplotlib figure, to show or to change.

        Args:
            name: ``"forgetting_curves"``, ``"average_accuracy"``, ``"final_accuracy"``, or a model for its matrix.
            setting: ``"task_agnostic"`` or ``"task_aware"``; default the run's own.

        Raises:
            ValueError: If there is no picture of that name.
        """
        import clmerge.figures as plots

        if name in PLOTS:
            draw: Callable[..., Figure] = getattr(plots, f"plot_{name}")
            return draw(self.results, setting=setting)
        if name not in self.models:
            raise ValueError(f"expected one of {[*PLOTS, *self.models]}, got {name!r}")
        return plots.plot_matrix(self.results, name, setting=setting)
