"""Carry a run over to a new base model: transport its bank, fold it again, evaluate, and write a new run."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from typing_extensions import override

from clmerge.alignment import PermutationSpec, Swap, Transport, spec_of
from clmerge.deploy.predictors import Merged, Predictor
from clmerge.names import tell
from clmerge.results.contract import DATA_FREE
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.runs.few_shot import fine_tuned
from clmerge.runs.learner_parts import LearnerParts
from clmerge.runs.resume import describe_models
from clmerge.runs.task_training import TaskTraining
from clmerge.runs.trainers import Trainers
from clmerge.streams import StreamDataModule
from clmerge.streams.adaptation import AdaptationData
from clmerge.training.module import ContinualClassifier
from clmerge.weights import State, TaskVectorBank, load_tensors, save_tensors, write_json_atomic
from clmerge.weights.batch_norm import estimated_statistics
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import folded, own_names, running_statistics
from clmerge.weights.swap import assign, named_tensors, swapped

NEW_BASE, IDENTITY, TRANSPORTED, FEW_SHOT = "new base alone", "identity", "transported", "few-shot fine-tuning"
Row = dict[str, list[float]]


class OldRun:
    """What a rebase needs of the old run: its base model, its task vectors, its heads.

    Args:
        folder: The run folder, finished or not; nothing in it is changed.
        module: A new classifier of its configuration.

    Attributes:
        num_tasks: Tasks that are trained, whose vectors the bank must hold.
        base: theta_0 by dense name.
        bank: The task vectors.

    Raises:
        ValueError: If the run has no task, or has kept no task vectors.
    """

    def __init__(self, folder: RunFolder, module: ContinualClassifier) -> None:
        self.folder, self.module = folder, module
        self.num_tasks = folder.manifest.trained
        if not self.num_tasks:
            raise ValueError(f"expected a run with a trained task, got {folder.path}, which has none")
        weights, self.base = folder.load_weights()
        self.bank = TaskVectorBank(folder.bank)
        if not self.base or self.bank.tasks != list(range(self.num_tasks)):
            raise ValueError(
                f"expected the task vectors of all {self.num_tasks} trained tasks in {self.bank.folder}, got "
                f"{len(self.bank)}: only a run that kept them (learner.keep_task_vectors, the default) can be carried "
                "over"
            )
        own = own_names(module)
        backbone = {name: tensor for name, tensor in weights.items() if name.startswith("backbone.")}
        statistics = running_statistics(module)  # those of the old base, which training has changed
        targets = named_tensors(module, backbone, origin=str(folder.path))
        assign(targets, backbone)
        with torch.no_grad():
            for name, tensor in statistics.items():
                targets[own.get(name, name)].copy_(tensor)

    def head(self, task: int) -> dict[str, Tensor]:
        """Return the tensors of the head after a task, by the head's names; empty for a text head."""
        file = self.folder.unmerged(task)
        kept = load_tensors(file) if file.is_file() else {}
        return {name.removeprefix("head."): tensor for name, tensor in kept.items() if name.startswith("head.")}


class Encoder(nn.Module):
    """The features of a classifier, by the classifier's names."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @override
    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(images)
        return features


class Rebase:
    """Obtain the tasks of a run on a new base from those of an old one.

    Args:
        old: The old run.
        transport: Turns its task vectors into vectors of the new base.
        few_shot: Images per class that the baseline is fine-tuned on; 0 for none.

    Attributes:
        rows: Accuracies of the baselines, by name: each task's own model on the task.
        facts: What was done, in JSON types.
        looked: Images that the transport was shown, as the ``data`` of models names them.
    """

    def __init__(self, old: OldRun, transport: Transport, *, few_shot: int = 2) -> None:
        if few_shot < 0:
            raise ValueError(f"expected few_shot of 0 or more images per class, got {few_shot}")
        self.old, self.transport, self.few_shot = old, transport, few_shot
        self.rows: Row = {}
        self.facts: dict[str, Any] = {}
        self.looked: dict[str, None] = {}

    def training(self, learner: LearnerParts, run: RunFolder, trainers: Trainers) -> TaskTraining:
        """Return what stands in for the training of tasks, for ``Learner.fit``."""
        return TransportedTasks(learner, run, trainers, self)

    def prepare(self, learner: LearnerParts, run: RunFolder) -> None:
        """Prepare the transport, once the new base is known, and keep its map in the run folder.

        Args:
            learner: The learner on the new base.
            run: Its run folder.
        """
        old, new = self.old, learner.module
        with bases(old, new) as (source, target):
            swap = Swap(
                source,
                target,
                lambda: specification(old.module, source),
                tuple(old.base),
                lambda count: self._images(learner.data, count),
                lambda task, count: self._gradients(learner, task, count),
            )
            self.transport.prepare(swap)
        self.facts = {
            "source": str(old.folder.path),
            "bases": {"old": old.bank.base, "new": learner.merge.base_fingerprint},
            "transport": repr(self.transport),
            "chosen": repr(self.transport.chosen),
            "barriers": dict(self.transport.barriers),
            "data": self.transport.data,
            "why": self.transport.why,
            "seed": learner.seed,
        }
        if (found := self.transport.aligned) is not None:
            file = run.path / "rebase" / "alignment.safetensors"
            save_tensors(file, found.state_dict())
            self.facts["alignment"] = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "moved": found.moved()}

    def _images(self, data: StreamDataModule, count: int) -> Iterator[Tensor]:
        """Yield training images of all tasks, ``count`` in all, the same number of each."""
        tasks = range(self.old.num_tasks)
        classes = max(1, len({label for task in tasks for label in data.stream.tasks[task].classes}))
        per_class = -(-count // classes)
        self.looked |= {str(AdaptationData("buffer", per_class=per_class)): None}
        for images, _ in labelled(data, tasks, per_class):
            yield images

    def _gradients(self, learner: LearnerParts, task: int, count: int) -> Iterator[dict[str, Tensor]]:
        self.looked |= {str(AdaptationData("buffer", per_class=count, labels=True)): None}
        return gradients(learner, task, count)

    def save(self, run: RunFolder, oracle: list[float] | None) -> dict[str, Any]:
        """Write the table beside the run's results, and return it.

        Args:
            run: The new run's folder.
            oracle: Accuracies of models fine-tuned from the new base, if they are known.
        """
        rows: dict[str, Any] = {
            name: {"accuracies": row, "mean": sum(row) / len(row)} for name, row in self.rows.items()
        }
        if oracle is not None:
            best = sum(oracle) / len(oracle)
            rows["oracle"] = {"accuracies": oracle, "mean": best}
            start = rows[NEW_BASE]["mean"]
            for row in rows.values():
                row["transfer_ratio"] = (row["mean"] - start) / (best - start) if best != start else None
        document = {**self.facts, "rows": rows}
        write_json_atomic(run.path / "rebase" / "rebase.json", document)
        return document


class TransportedTasks(TaskTraining):
    """Obtain every task from the old run: its vector by the transport, its head by the same map, no training.

    Args:
        learner: The learner on the new base.
        run: The new run's folder.
        trainers: Builds Trainers, for evaluation.
        rebase: What to carry over and how.
    """

    def __init__(self, learner: LearnerParts, run: RunFolder, trainers: Trainers, rebase: Rebase) -> None:
        super().__init__(learner, run, trainers)
        self.rebase = rebase
        if needy := [name for name, merger in learner.mergers.items() if "adam" in merger.requires]:
            raise ValueError(
                f"expected mergers whose statistics can be measured again, got {needy[0]!r}, which requires the second "
                "moments of Adam: they are there at the end of training only; run `clmerge fit` on the new base instead"
            )

    @override
    def _obtain(self, results: Results, task: int) -> Trainer:
        """Transport a task, merge it, and compare it with the baselines."""
        learner, rebase = self.learner, self.rebase
        merge, module = learner.merge, learner.module
        device = self.trainers.device
        module.to(device)
        rebase.old.module.to(device)
        merge.take_base(module)
        if task == 0:
            rebase.prepare(learner, self.run)
        module.resume_tasks([t.classes for t in learner.tasks[: task + 1]])
        self._carry_head(task)
        learner.regularized.begin(device)
        old = rebase.old.bank[task]
        tau = rebase.transport.transport(old, task)
        self.run.manifest.data = "+".join(rebase.looked) or DATA_FREE
        describe_models(learner, results, vectors=self.run.manifest.data)
        self._set(merge.weights_with(tau, module))
        if running_statistics(module):
            statistics = estimated_statistics(module, learner.images(task))
            own = own_names(module)
            self._set({own[name]: tensor for name, tensor in statistics.items()})
        steps = int(rebase.old.bank.metadata(task).get("steps", 0))
        learner.branch_steps = steps
        trainer = self.trainers.for_evaluation(f"task {task + 1}: transported")
        merge.commit(tau, module, trainer, given={"weights": merge.base}, steps=steps, again=True)
        learner.branch_steps = None
        self.run.manifest.step += steps
        self._compare(task, old, tau)
        tell(f"task {task + 1}/{rebase.old.num_tasks} {learner.tasks[task].name}: transported")
        return trainer

    def _set(self, values: Mapping[str, Tensor]) -> None:
        module = self.learner.module
        assign(named_tensors(module, values, origin="the transported task"), values)

    def _carry_head(self, task: int) -> None:
        """Give a learned head the rows of the old run, whose features' axis follows the transport."""
        head, transport = self.learner.module.head, self.rebase.transport
        if head.open_vocabulary:
            return
        width = self.rebase.old.module.backbone.feature_dim
        kept = self.rebase.old.head(task)
        if not kept:
            raise ValueError(
                f"expected the learned head of task {task} in {self.rebase.old.folder.unmerged(task)}, got none: the "
                "old run has not kept it, and a head for the new base would have to be trained"
            )
        moved = {
            name: torch.cat([transport.features(tensor[:, :width]), tensor[:, width:]], dim=1)
            if tensor.is_floating_point() and tensor.ndim == 2
            else tensor
            for name, tensor in kept.items()
        }
        head.load_state_dict(moved)
        head.to(self.trainers.device)

    def _compare(self, task: int, old: State, tau: State) -> None:
        """Evaluate the task's own model and the baselines on the task's test images."""
        learner, rebase = self.learner, self.rebase
        module, merge = learner.module, learner.merge
        predictors: dict[str, Predictor] = {NEW_BASE: Merged(merge.weights_with({}, module))}
        if all(old[name].shape == merge.base[name].shape for name in old):
            predictors[IDENTITY] = Merged(merge.weights_with(old, module))
        predictors[TRANSPORTED] = Merged(merge.weights_with(tau, module))
        if rebase.few_shot:
            with swapped(module, merge.weights_with({}, module)):
                images = list(labelled(learner.data, [task], rebase.few_shot))
                predictors[FEW_SHOT] = Merged(fine_tuned(module, images, seed=learner.seed + task))
        trainer = self.trainers.for_evaluation(f"task {task + 1}: baselines")
        rows = learner.evaluate(trainer, predictors, task, on=[task])
        for name in predictors:
            rebase.rows.setdefault(name, []).append(rows[name][learner.evaluation][task])


@contextmanager
def bases(old: OldRun, new: ContinualClassifier) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Run a block with both encoders at their base weights, in ordinary layers whatever the mode of tuning.

    Args:
        old: The old run, whose module is set to its base.
        new: The new classifier, at its base.
    """
    with ExitStack() as stack:
        source = stack.enter_context(folded(Encoder(old.module.backbone)))
        target = stack.enter_context(folded(Encoder(new.backbone)))
        for network in (source, target):
            stack.enter_context(eval_mode(network))
        own = dict(source.named_parameters())
        with torch.no_grad():
            for name, tensor in old.base.items():
                own[name].copy_(tensor)
        yield source, target


def specification(module: ContinualClassifier, network: nn.Module) -> PermutationSpec:
    """Return the specification of an encoder; its features may change order if a learned head can follow.

    Args:
        module: The classifier.
        network: Its encoder with ordinary layers.
    """
    follows = not module.head.open_vocabulary and not module.backbone.encoder
    return spec_of(network, readers=[] if follows else None)


def labelled(data: StreamDataModule, tasks: Iterable[int], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training images with labels, ``count`` per class, drawn as a replay buffer draws them.

    Args:
        data: Provides the stream's images.
        tasks: The tasks.
        count: Images per class.
    """
    chosen = AdaptationData("buffer", per_class=count, labels=True).images(data, list(tasks))
    for images in chosen.values():
        for batch in DataLoader(images, batch_size=data.eval_batch_size):
            yield batch[0], batch[1]


def gradients(learner: LearnerParts, task: int, count: int) -> Iterator[dict[str, Tensor]]:
    """Yield the gradient of the loss at the new base, by dense name, for every one of a few images of a task.

    Args:
        learner: The learner on the new base.
        task: Index of the task.
        count: Images per class.
    """
    module, merge = learner.module, learner.merge
    device = next(module.parameters()).device
    with swapped(module, merge.weights_with({}, module)), folded(module) as network, eval_mode(network):
        own = dict(network.named_parameters())
        for images, labels in labelled(learner.data, [task], count):
            for place in range(len(labels)):
                image, label = images[place : place + 1], labels[place : place + 1]
                weights = {name: own[name].detach().requires_grad_() for name in merge.base}
                with torch.enable_grad():
                    loss = module.loss(functional_call(network, weights, (image.to(device),)), label.to(device))
                    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                yield {
                    name: torch.zeros_like(weights[name]) if gradient is None else gradient
                    for name, gradient in zip(weights, found, strict=True)
                }


def run_path(path: str | Path) -> Path:
    """Return where a rebase works until it is done: a folder of the same name, in a hidden one beside the new run."""
    path = Path(path).absolute()
    return path.parent / f".{path.name}.rebase" / path.name
