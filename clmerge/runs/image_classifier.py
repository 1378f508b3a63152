"""A model of a finished run that classifies images; the data that it was trained on are not needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clmerge.deploy.predictors import Merged, PerTask, Predictor
from clmerge.deploy.routing.routed import Routed
from clmerge.models.templates import GENERIC
from clmerge.names import did_you_mean
from clmerge.results.model_facts import ModelFacts
from clmerge.results.results import EXPERT, ZERO_SHOT
from clmerge.runs.exported import FinalModel
from clmerge.runs.final_predictors import FinalPredictors
from clmerge.runs.foreign_stream import columns_of
from clmerge.training.module import ContinualClassifier
from clmerge.weights import load_metadata
from clmerge.weights.swap import assign, named_tensors


@dataclass(frozen=True)
class RunClasses:
    """The classes of a run.

    Attributes:
        names: Names by the index of their logit.
        tasks: Name of every task, and the indices of its classes.
        templates: Prompt templates for further classes.
    """

    names: list[str]
    tasks: list[tuple[str, list[int]]]
    templates: list[str]

    @classmethod
    def of_facts(cls, facts: ModelFacts) -> "RunClasses":
        """Return what a model file says."""
        templates = facts.templates_of(0) if len(facts.templates) == 1 else list(GENERIC)
        return cls(facts.classes, [(task["name"], list(task["classes"])) for task in facts.tasks], templates)


def facts_of(models: FinalPredictors, name: str = EXPERT) -> ModelFacts | None:
    """Return what the model files of a run say of a model; None if an older version of clmerge wrote them.

    Args:
        models: The models of the run.
        name: The model; one without a file of its own (``expert``, ``zero_shot``) is not merged.
    """
    for file in sorted((models.path / "model").glob("*.safetensors")):
        if (found := ModelFacts.from_metadata(load_metadata(file), str(file))) is None:
            continue
        if found.model == name:
            return found
        if name in (EXPERT, ZERO_SHOT):
            return replace(found, model=name, rule=None, calibration="")
    return None


class ImageClassifier:
    """Classify batches of images by one model of a run.

    Args:
        models: The models of the run.
        module: The classifier of its configuration.
        known: The classes of the run.
        name: The model, or a merger by its class.
        task: A task by name or by number from 1, whose classes are chosen from; needed by models with a view per task.
        classes: Names of the classes to choose from; default all, or those of the task. A text head may get new ones.
        device: Device to compute on.

    Attributes:
        classes: Names of the classes, in the order of the probabilities.
        new_classes: Those of them that the run, or the task, does not have: a text head knows them by name alone.
        name: Name of the model.
        transform: PIL image to tensor.

    Raises:
        ValueError: If the run has no such model, task or class, or the model needs a task.
    """

    def __init__(
        self,
        models: FinalPredictors,
        module: ContinualClassifier,
        known: RunClasses,
        name: str,
        *,
        task: str | None = None,
        classes: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        self.name = models.resolve(name)
        self._module = module
        self._predictor: Predictor = models.predictor(self.name, module)
        self._task = chosen_task(known, task, self._predictor, self.name)
        own = range(len(known.names)) if self._task is None else known.tasks[self._task][1]
        self.classes = list(classes) or [known.names[index] for index in own]
        there = {known.names[index].casefold() for index in own}
        self.new_classes = [each for each in self.classes if each.casefold() not in there]
        if module.head.open_vocabulary and self.new_classes:
            models.build_head(module, [[t.replace("{}", each) for t in known.templates] for each in self.classes])
            self._columns = list(range(len(self.classes)))
        else:
            found = [known.names[index] for index in own]
            self._columns = [list(own)[place] for place in columns_of(found, self.classes, str(models.path))]
        self.transform = module.backbone.eval_transform
        self._device = device or torch.device("cpu")
        module.to(self._device).eval()
        self._prepared = False

    def _prepare(self) -> None:
        if not self._prepared:
            self._predictor.prepare(lambda make: {key: value.to(self._device) for key, value in make().items()})
            self._prepared = True

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probability of every class for a batch of transformed images, ``(B, len(classes))``.

        Args:
            images: ``(B, 3, H, W)``.
        """
        self._prepare()
        batch = images.to(self._device)
        tasks = torch.full((len(batch),), self._task or 0, device=self._device)
        scores = self._predictor.scores(_Pass(self._module, batch), tasks)
        return scores[:, self._columns].softmax(dim=1).cpu()


class _Pass:
    """Runs the module on one batch with any weights."""

    def __init__(self, module: nn.Module, images: Tensor) -> None:
        self._module, self.images = module, images

    def __call__(self, state: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(self._module, dict(state), (self.images,))
        return found.float()


def final_model(
    models: FinalPredictors, module: ContinualClassifier, known: RunClasses, facts: ModelFacts, task: str | None
) -> FinalModel:
    """Return a model with its weights in the module.

    Args:
        models: The models of the run.
        module: The classifier of its configuration.
        known: The classes of the run.
        facts: What the model is.
        task: A task by name or by number from 1, for a model with weights per task.

    Raises:
        ValueError: If there is no such task, or the model needs none and one is given.
    """
    predictor = models.predictor(facts.model, module)
    index = chosen_task(known, task, predictor, facts.model)
    if isinstance(predictor, Routed):
        predictor.prepare(lambda make: make())
        return FinalModel(module.eval(), facts, list(range(len(known.names))), predictor.model)
    if isinstance(predictor, PerTask):
        assert index is not None
        state, classes = predictor.view(index), known.tasks[index][1]
    elif task is not None and isinstance(predictor, Merged):
        raise ValueError(f"expected no --task for {facts.model}, which has one set of weights, got {task}")
    elif not isinstance(predictor, Merged):
        raise ValueError(
            f"expected a model that is weights of the backbone, to write it down, got {facts.model}, which has "
            "adapters behind it; `clmerge evaluate` and `clmerge predict` run it"
        )
    else:
        state, classes = predictor.state, list(range(len(known.names)))
    assign(named_tensors(module, state, origin=facts.model), state)
    return FinalModel(module.eval(), facts, classes)


def chosen_task(known: RunClasses, wanted: str | None, predictor: Predictor, model: str) -> int | None:
    """Return the index of a task by name or by number from 1; None if none is wanted.

    Args:
        known: The classes of the run.
        wanted: The task.
        predictor: The predictor of the model.
        model: Name of the model, for messages.

    Raises:
        ValueError: If there is no such task, or none is wanted and the model needs one.
    """
    names = [name for name, _ in known.tasks]
    if wanted is None:
        if predictor.needs_task:
            raise ValueError(
                f"expected --task for {model}, which must be told the task of every image, got none; there are "
                f"{', '.join(names)}"
            )
        return None
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return int(wanted) - 1
    near = did_you_mean(wanted, names)
    raise ValueError(f"expected the name or number of one of the tasks {', '.join(names)}, got {wanted!r}{near}")
