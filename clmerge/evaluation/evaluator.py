"""One pass over images with several predictors: accuracies, answers by class, and what probes see."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from clmerge.deploy.predictors import Predictor
from clmerge.distributed import joined_over_processes, sum_over_processes
from clmerge.evaluation.probes.probe import NO_TASK, TEST, ImageProbe, Seen, View
from clmerge.models import Classifier
from clmerge.models.pixels import normalisation
from clmerge.results.confusion import Confusion, Confusions, ModelRow
from clmerge.results.contract import SETTINGS, Setting
from clmerge.results.metrics import TaskAccuracy
from clmerge.results.metrics.confusion import ConfusionCounts
from clmerge.weights.exchange import Exchange

Rows = dict[str, ModelRow]
Looks = dict[str, dict[str, Seen]]
"""What was seen of one part's images, by predictor and by probe."""


class _Pass:
    """Runs the module on one batch with any weights."""

    def __init__(self, module: nn.Module, exchange: Exchange, images: Tensor) -> None:
        self.images = images
        self._module, self._exchange = module, exchange

    def __call__(self, state: Mapping[str, Tensor]) -> Tensor:
        self._exchange.put(state)
        logits: Tensor = self._module(self.images)
        return logits.float()


class Evaluator(LightningModule):
    """Score predictors; images are decoded and moved to the device once, and shared parts are computed once.

    Args:
        module: The classifier.
        predictors: Predictors by name. Their weights have the module's parameter and buffer names, without the
            ``_orig_mod.`` of ``torch.compile``; the module's own are used for missing names.
        task_classes: Global class ids of every task.
        num_classes: Number of classes ``C`` of the stream.
        confusion: Whether answers are counted by class, too.
        probes: Probes that look at the images.
        part: Name of the images among the parts of the probes. Accuracies are of the test images' part alone.
        reading: Whether all classes compete in what probes see.
    """

    def __init__(
        self,
        module: Classifier,
        predictors: Mapping[str, Predictor],
        task_classes: Sequence[Sequence[int]],
        num_classes: int,
        *,
        confusion: bool = False,
        probes: Sequence[ImageProbe] = (),
        part: str = TEST,
        reading: Setting = "task_agnostic",
    ) -> None:
        super().__init__()
        self.probes, self.part, self.reading = tuple(probes), part, reading
        for probe in self.probes:
            probe.meet(module)
        self._looks: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
        self._seen: Looks = {}
        allowed = torch.zeros(len(task_classes) + 1, num_classes, dtype=torch.bool)
        for task, classes in enumerate(task_classes):
            allowed[task, list(classes)] = True
        allowed[NO_TASK] = True
        self._allowed = allowed
        self._normalise = normalisation(getattr(module.backbone, "eval_transform", None))
        self.module = module
        self.predictors = dict(predictors)
        self.task_classes = task_classes
        self._exchange: Exchange | None = None
        self._rows: Rows = {}
        self._routed: dict[str, Tensor] = {}
        self._accuracies = {name: TaskAccuracy(len(task_classes), num_classes, task_classes) for name in predictors}
        self._order = list(dict.fromkeys(class_id for classes in task_classes for class_id in classes))
        counted = self.predictors if confusion else {}
        self._answers = {name: ConfusionCounts(num_classes, task_classes) for name in counted}
        # A ModuleDict refuses names with dots, and mergers are named after settings such as density0.1.
        self.metrics = nn.ModuleList([*self._accuracies.values(), *self._answers.values()])

    @override
    def on_test_start(self) -> None:
        # Here, because the Trainer has moved the module to its device by now.
        names = {
            key for name, predictor in self.predictors.items() for key in predictor.prepare(partial(self._place, name))
        }
        self._exchange = Exchange(self.module, names, share=len(self.predictors) > 1).__enter__()

    def _place(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if self._exchange is not None:
            self._exchange.put({})
        state = _own_names(self.module, make(), name)
        return {key: value.to(self.device) for key, value in state.items()}

    @override
    def on_test_end(self) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the module's own weights, also after an exception."""
        if self._exchange is not None:
            self._exchange.__exit__()
            self._exchange = None

    @override
    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        images, labels, tasks = batch
        exchange = self._exchange
        assert exchange is not None
        exchange.next_input()

        compute = _Pass(self.module, exchange, images)
        for name, predictor in self.predictors.items():
            scores = predictor.scores(compute, tasks)
            if self.probes:
                self._look(name, scores, (images, labels, tasks), exchange)
            if self.part != TEST:
                continue
            self._accuracies[name].update(scores, labels, tasks)
            if name in self._answers:
                known = torch.tensor([predictor.knows(task) for task in tasks.tolist()], device=tasks.device)
                self._answers[name].update(scores[known], labels[known], tasks[known])
            if predictor.choices is not None:
                self._count(name, *predictor.choices, tasks)

    def _look(self, name: str, scores: Tensor, batch: tuple[Tensor, Tensor, Tensor], exchange: Exchange) -> None:
        """Show the probes the images of tasks that the predictor knows."""
        images, labels, tasks = batch
        predictor = self.predictors[name]
        own = predictor.needs_task or self.reading == "task_aware"
        competing = self._allowed.to(tasks.device)[tasks if own else torch.full_like(tasks, NO_TASK)]

        def score(others: Tensor) -> Tensor:
            exchange.next_input()
            found = predictor.scores(_Pass(self.module, exchange, others), tasks)
            return found.masked_fill(~competing, -torch.inf)

        mean, deviation = (each.to(images.device) for each in self._normalise)
        view = View(
            self.part, images, labels, tasks, scores.masked_fill(~competing, -torch.inf), score, (mean, deviation)
        )
        known = torch.tensor([predictor.knows(task) for task in tasks.tolist()], dtype=torch.bool)
        for probe in self.probes:
            rows = probe.look(view).detach().double().cpu()
            self._looks.setdefault((name, probe.name), []).append((rows[known], tasks.cpu()[known]))

    def _count(self, name: str, chosen_from: Sequence[int], shares: Tensor, tasks: Tensor) -> None:
        """Add up, by task of the images, the share of the choices that are right, and the images."""
        known = torch.zeros(len(shares), len(self.task_classes), dtype=torch.float64)
        known[:, list(chosen_from)] = shares.double().cpu()
        own = tasks.cpu()
        right = known.gather(1, own.unsqueeze(1))[:, 0]
        counts = self._routed.setdefault(name, torch.zeros(2, len(self.task_classes), dtype=torch.float64))
        counts.index_add_(1, own, torch.stack([right, torch.ones_like(right)]))

    @override
    def on_test_epoch_end(self) -> None:
        # Counts of several processes are added here, while they are on a device with collectives.
        for name in self.predictors:
            for probe in self.probes:
                looks = self._looks.pop((name, probe.name), [(torch.zeros(0, 1), torch.zeros(0, dtype=torch.long))])
                rows, tasks = (joined_over_processes(torch.cat(parts)) for parts in zip(*looks, strict=True))
                self._seen.setdefault(name, {})[probe.name] = Seen(rows, tasks)
        if self.part != TEST:
            return
        for name, accuracy in self._accuracies.items():
            predictor, result = self.predictors[name], accuracy.compute()
            aware, agnostic = (result[kind].reshape(-1).tolist() for kind in ("task_aware", "task_agnostic"))
            aware = [value if predictor.knows(task) else math.nan for task, value in enumerate(aware)]
            agnostic = [math.nan] * len(agnostic) if predictor.needs_task else agnostic
            self._rows[name] = {"task_agnostic": agnostic, "task_aware": aware}
            if name in self._answers:
                self._rows[name]["confusion"] = self._confusions(name)
            if predictor.choices is not None:
                right, total = sum_over_processes(self._routed[name])
                known = {*predictor.choices[0]}
                shares = torch.where(total > 0, right / total, torch.nan).tolist()
                self._rows[name]["routing_accuracy"] = [s if t in known else math.nan for t, s in enumerate(shares)]

    def _confusions(self, name: str) -> Confusions:
        counts = self._answers[name].compute().cpu().numpy()
        found = {setting: Confusion.of_counts(counts[index], self._order) for index, setting in enumerate(SETTINGS)}
        if self.predictors[name].needs_task:
            del found["task_agnostic"]
        return found

    def seen(self) -> Looks:
        """Return what every probe saw of every predictor's answers, by their names."""
        return self._seen

    def rows(self) -> Rows:
        """Return the row of every predictor by its name.

        A predictor that chooses among tasks has ``routing_accuracy``, too.

        Raises:
            RuntimeError: If ``trainer.test`` has not run.
        """
        if not self._rows and self.predictors:
            raise RuntimeError("expected an Evaluator that has run, got a new one; call trainer.test first")
        return self._rows


def _own_names(module: nn.Module, state: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """Rename the tensors of ``state`` to the names that ``functional_call`` needs; it would ignore any other."""
    own = {
        name.replace("_orig_mod.", ""): (name, tensor.shape)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    for name, tensor in state.items():
        if name not in own or own[name][1] != tensor.shape:
            got = f"shape {tuple(own[name][1])}" if name in own else "none of that name"
            raise RuntimeError(
                f"expected {name!r} of shape {tuple(tensor.shape)} in {type(module).__name__}, as model "
                f"{model!r} has it, got {got}; use the architecture its weights were made with"
            )
    return {own[name][0]: tensor for name, tensor in state.items()}
