"""The arguments of a learner, and the checks of them before anything is trained or written."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import override

from clmerge.callbacks import MergeCallback
from clmerge.deploy.calibration import CalibratedModels, Calibration
from clmerge.deploy.naming import check_names, check_settings
from clmerge.deploy.routing import Routing
from clmerge.deploy.routing.routed_models import RoutedModels
from clmerge.evaluation.probes import Probe, check_probes
from clmerge.merging import Merger, Statistics, WeightAverage
from clmerge.runs.branching import taking_part, uploads_of
from clmerge.runs.session import Session
from clmerge.statistics.provided import PROVIDED
from clmerge.streams import AdaptationData, Stream, StreamDataModule
from clmerge.streams.splits import derived_seed
from clmerge.training.module import ContinualClassifier
from clmerge.training.regularized_tasks import RegularizedTasks
from clmerge.training.trajectory import TrajectoryRule
from clmerge.weights.buffers import Buffers
from clmerge.weights.parametrization import merged_parameters, running_statistics
from clmerge.weights.task_vector import TaskVector

if TYPE_CHECKING:
    from torchvision.transforms import v2


class LearnerParts(Session):
    """The model, stream, mergers and policies of a learner.

    Args:
        stream: The tasks.
        module: The classifier to train.
        mergers: Mergers to update after every task, as for ``MergeCallback``; unused if the backbone is frozen.
        data: The data module; batch sizes and workers.
        start_policy: Initial weights of every task: ``base`` (the pretrained weights), ``previous`` (the un-merged
            weights of the task before) or ``merged`` (a merged model, see ``start_from``).
        epochs: Epochs of every task, where they differ; default the Trainer's ``max_epochs`` for all.
        deploy: Merger whose model is the result, or ``expert`` for the un-merged one; default the first merger.
        start_from: Merger whose model is the start under ``merged``, for instance a moving average (``wise_ft``);
            default the deployed one.
        trajectory: Average of the weights along every fit, which replaces its last weights: the expert of a task, and
            where the next one starts under ``previous``; default none.
        branches: Branches of every task: models with one start, each trained on its own part of the task's images,
            that are merged into the task's model (Branch-and-Merge, arXiv 2407.08699).
        rounds: How often a task branches and merges; every round starts from the merge of the one before (ColD
            Fusion, arXiv 2212.01378).
        branch_merger: Merges the branches, as differences from their start; default ``WeightAverage``.
        branch_images: Whether the task's images are ``split`` among its branches, or every branch has ``all`` of them,
            in an order and with augmentation of its own.
        branch_reference: What branches are measured from when they are merged: the ``start`` of their round, or the
            ``base`` (Model Stock in rounds, arXiv 2403.19522).
        branch_starts: Where the branches of a task's first round start: all where the task does (``task``), or each at
            the vector of an earlier task, the latest first (``experts``; Model Ratatouille, arXiv 2212.10445).
        branch_fraction: Share of the branches that train in each round, drawn anew for every round: the clients that
            take part in a round of a federation.
        branch_settings: Optimizer settings of every branch, such as ``lr`` and ``weight_decay``, one mapping each
            (DiWA, arXiv 2205.09739); default the same for all.
        branch_augmentations: torchvision's v2 transforms of every branch's training images, one list each, in place of
            ``data.augmentation``; default the same for all.
        buffers: Running statistics of merged models: of the ``latest`` task, of the ``base``, their ``mean``, or
            ``re-estimated`` for each of them on the task's training images.
        accumulators: Device of base and accumulators: ``cpu``, or ``model`` for the parameters' device.
        keep_task_vectors: Whether every task vector is kept in the run folder, for merging again later. Needs four
            bytes per trained parameter and task on disk; mergers that need them all then keep no copies in memory.
        statistics_images: Training images per task for measuring Fisher information, Gram matrices and losses, if a
            merger requires them, and running statistics, if they are re-estimated.
        evaluation: Accuracy used by tables, the star, mergers that need a score and searches: ``task_agnostic``
            (all classes compete) or ``task_aware`` (only those of the image's task do); default that of the stream.
        evaluate_every: Number of tasks after which all models are evaluated; after the last task they always are. Rows
            of other tasks are undefined, and so are the figures that need them.
        evaluate_on: Tasks whose test images are used: ``all`` of the stream, or those ``seen`` so far, which halves the
            time; forward transfer is then undefined.
        calibrations: Calibrations of merged models after every task; each adds models such as ``magmax+tuned``.
        adaptation: Images that mergers and routings learn on after every task; default the validation images,
            unlabelled.
        routings: Routed models around every merged model after every task; each adds models such as ``magmax+smile``.
        probes: Numbers beside the accuracies, measured of every model, such as the success rate of an attack.
        seed: Seed of initialisation, order of samples, augmentation and dropout, each fixed per task.

    Attributes:
        branch_steps: Optimizer steps of all branches of the task that is merged, None without branches.

    Raises:
        ValueError: If settings do not fit the stream, the model or each other; see ``_check``.
    """

    def __init__(
        self,
        stream: Stream,
        module: ContinualClassifier,
        mergers: Merger | Sequence[Merger] | Mapping[str, Merger],
        data: StreamDataModule,
        *,
        start_policy: Literal["base", "previous", "merged"] = "previous",
        epochs: list[int] | None = None,
        deploy: str | None = None,
        start_from: str | None = None,
        trajectory: TrajectoryRule | None = None,
        branches: int = 1,
        rounds: int = 1,
        branch_merger: Merger | None = None,
        branch_images: Literal["split", "all"] = "split",
        branch_reference: Literal["start", "base"] = "start",
        branch_starts: Literal["task", "experts"] = "task",
        branch_fraction: float = 1.0,
        branch_settings: list[dict[str, float]] | None = None,
        branch_augmentations: list[list[v2.Transform]] | None = None,
        buffers: Buffers = "latest",
        accumulators: Literal["cpu", "model"] = "cpu",
        keep_task_vectors: bool = True,
        statistics_images: int = 256,
        evaluation: Literal["task_agnostic", "task_aware"] | None = None,
        evaluate_every: int = 1,
        evaluate_on: Literal["all", "seen"] = "all",
        calibrations: list[Calibration] | None = None,
        adaptation: AdaptationData | None = None,
        routings: list[Routing] | None = None,
        probes: list[Probe] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            stream,
            module,
            data,
            seed=seed,
            evaluation=evaluation,
            statistics_images=statistics_images,
            adaptation=adaptation,
        )
        self.prompts = stream.class_prompts if module.head.open_vocabulary else []  # missing templates are an error
        self.epochs = epochs
        self.trajectory = trajectory
        self.branches, self.rounds = branches, rounds
        self.branch_merger = branch_merger or WeightAverage()
        self.branch_images, self.branch_reference = branch_images, branch_reference
        self.branch_starts, self.branch_settings = branch_starts, branch_settings
        self.branch_augmentations = branch_augmentations
        self.branch_fraction = branch_fraction
        self.branch_steps: int | None = None
        self.evaluate_every, self.evaluate_on = evaluate_every, evaluate_on
        self.probes = list(probes or ())
        self.keep_task_vectors = keep_task_vectors
        self.merge = MergeCallback(
            mergers,
            start_policy=start_policy,
            deploy=deploy,
            start_from=start_from,
            include=module.trained_names,
            buffers=buffers,
            device=accumulators,
            score=lambda module: self.score(range(self.merge.num_tasks + 1)),
            losses=self.losses,
            statistics=self._statistics,
            images=lambda module: self.images(self.data.task),
            seed=seed,
            save_state=False,  # the run folder keeps the accumulators; every epoch's checkpoint need not hold them
        )
        self.calibrated = CalibratedModels(calibrations or [], module, data, stream, seed=seed)
        self.routed = RoutedModels(
            routings or [],
            module,
            data,
            stream,
            adaptation=self.adaptation,
            num_images=statistics_images,
            vector=self._stored_vector,
            seed=seed,
        )
        self.regularized = RegularizedTasks(module, data, num_images=statistics_images, seed=seed)
        # With a frozen backbone nothing is merged: only the head is trained, if at all, and evaluated.
        self.mergers = self.merge.mergers if module.trained_names else {}
        self._check()

    def _check(self) -> None:
        """Refuse settings that do not fit the stream, the model or each other.

        Raises:
            ValueError: If a merger needs a score and the stream has no validation images, the adaptation data does not
                serve it, or its settings do not fit the parameters or the number of tasks; if ``epochs`` does not have
                one number per task; if the branches are impossible; or if images are replayed with a loss that leaves
                their classes out.
        """
        self._check_training()
        check_probes(self.probes, self.stream)
        check_names(self.merge.mergers, [*self.calibrated.calibrations, *self.routed.routings])
        if not self.mergers:
            return
        again = [name for name, one in self.routed.routings.items() if one.needs_bank]
        if again and not self.keep_task_vectors:
            raise ValueError(
                f"expected task vectors to be kept for routing {again[0]!r}, which reads all of them after every task, "
                "got keep_task_vectors=false; set it to true"
            )
        needy = [name for name, merger in self.mergers.items() if merger.requires_score]
        if needy and not self.has_validation:
            raise ValueError(
                f"expected validation images for merger {needy[0]!r}, got a stream that holds none out; "
                "set stream.val_fraction above 0"
            )
        self.check_learning(self.mergers)
        merged = merged_parameters(self.module, self.module.trained_names)
        check_settings(self.mergers, merged, len(self.tasks))
        self.routed.check(merged)
        if self.branches > 1:
            check_settings({"branch_merger": self.branch_merger}, merged, self.branches * self.rounds)

    def _check_training(self) -> None:
        if self.data.replay and self.module.loss_classes == "current":
            raise ValueError(
                f"expected loss_classes 'seen' or 'all' with data.replay={self.data.replay}, got 'current', which "
                "leaves out the classes of earlier tasks"
            )
        self._check_labels()
        if self.epochs is not None and len(self.epochs) != len(self.tasks):
            raise ValueError(f"expected epochs for each of the {len(self.tasks)} tasks, got {len(self.epochs)} numbers")
        judged = self.trajectory is not None and (self.trajectory.monitor or self.trajectory.requires_score)
        if judged and not self.has_validation:
            raise ValueError(
                f"expected validation images for {self.trajectory}, got a stream that holds none out; set "
                "stream.val_fraction above 0"
            )
        if self.evaluate_every < 1:
            raise ValueError(f"expected learner.evaluate_every of 1 or more, got {self.evaluate_every}")
        branches, rounds = self.branches, self.rounds
        if branches < 1 or rounds < 1 or (rounds > 1 and branches == 1):
            raise ValueError(
                f"expected 1 branch or more and 1 round or more, of several branches each, got {branches} branches and "
                f"{rounds} rounds"
            )
        if not 0 < self.branch_fraction <= 1:
            raise ValueError(f"expected branch_fraction above 0 and up to 1, got {self.branch_fraction}")
        lost = (self.branch_merger.requires & {"adam", "weights"}) | (self.merge.required_statistics & {"adam"})
        if branches > 1 and lost:
            raise ValueError(
                "expected mergers for branches that need task vectors, scores, or statistics of the branches' images, "
                f"got one that needs {sorted(lost)}"
            )
        if branches > 1 and self.branch_merger.requires_score and not self.has_validation:
            raise ValueError(
                f"expected validation images for branch_merger {self.branch_merger.name!r}, got a stream that holds "
                "none out; set stream.val_fraction above 0"
            )
        for name in ("branch_settings", "branch_augmentations"):
            given = getattr(self, name)
            if given is not None and len(given) != branches:
                raise ValueError(f"expected {name} for each of the {branches} branches, got {len(given)}")
        if self.branch_starts == "experts" and branches > 1 and not self.keep_task_vectors:
            raise ValueError(
                "expected keep_task_vectors=true with branch_starts='experts', which reads them, got false"
            )

    def _check_labels(self) -> None:
        """Refuse labels that a transform gave to images, if their class is none of those that compete in the loss."""
        choice, known = self.module.loss_classes, set[int]()
        for task in self.tasks if choice != "all" else ():
            known = {*task.classes, *(known if choice == "seen" else ())}
            if strange := sorted({*self.stream.dataset(task.index, "train").targets} - known):
                raise ValueError(
                    f"expected labels of task {task.index} ({task.name}) among the classes that compete in its loss, "
                    f"got {self.stream.class_names[strange[0]]!r}, which loss_classes={choice!r} leaves out: set "
                    "model.loss_classes=all, or give the transform a class of the task"
                )

    @property
    @override
    def uploads(self) -> int:
        return uploads_of(self.branches, self.rounds, self.branch_fraction)

    def participants(self, task: int, round_index: int) -> list[int]:
        """Return the indices of the branches that train in a round of a task, ascending."""
        number = taking_part(self.branches, self.branch_fraction)
        if number == self.branches:
            return list(range(number))
        draw = random.Random(derived_seed(self.seed, "participants", task, round_index))
        return sorted(draw.sample(range(self.branches), number))

    @property
    def learning(self) -> dict[str, bool]:
        """What learns on adaptation data -> whether it reads labels."""
        mergers = {name: one.reads_labels for name, one in self.mergers.items() if one.requires_gradient}
        return mergers | {f"+{name}": one.reads_labels for name, one in self.routed.routings.items() if one.adapts}

    def is_evaluated(self, task: int) -> bool:
        """Return whether the models are evaluated after a task."""
        return (task + 1) % self.evaluate_every == 0 or task + 1 == len(self.tasks)

    def evaluated_tasks(self, task: int) -> range:
        """Return the indices of the tasks on whose images the models are evaluated after a task."""
        return range(task + 1 if self.evaluate_on == "seen" else len(self.tasks))

    def settings(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed, in JSON types."""
        merge = self.merge
        return {
            "seed": self.seed,
            "mergers": {name: repr(merger) for name, merger in self.mergers.items()},
            "start_policy": merge.start_policy,
            "start_from": merge.start_from,
            "deploy": merge.deploy,
            "buffers": merge.buffers,
            "trajectory": repr(self.trajectory),
            "branches": self.branches,
            "rounds": self.rounds,
            "branch_merger": repr(self.branch_merger),
            "branch_images": self.branch_images,
            "branch_reference": self.branch_reference,
            "branch_starts": self.branch_starts,
            "branch_settings": self.branch_settings,
            "branch_augmentations": repr(self.branch_augmentations),
            "branch_fraction": self.branch_fraction,
            "dirichlet": self.data.dirichlet,
            "routings": [repr(one) for one in self.routed.routings.values()],
            "calibrations": [repr(one) for one in self.calibrated.calibrations.values()],
            "epochs": self.epochs,
            "keep_task_vectors": self.keep_task_vectors,
            "statistics_images": self.statistics_images,
            "adaptation": repr(self.adaptation),
            "evaluation": self.evaluation,
            "evaluate_every": self.evaluate_every,
            "evaluate_on": self.evaluate_on,
            "probes": [repr(one) for one in self.probes],
            "replay": self.data.replay,
        }

    def merged(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights of every merged model, by the module's own names; rules with a view per task have none."""
        merge = self.merge
        return {
            name: merge.state_with(merge.merged_vector(name), self.module, merger=name)
            for name, merger in self.mergers.items()
            if not merger.task_views
        }

    def expert(self) -> dict[str, Tensor]:
        """Return the weights of the task's un-merged model by the module's own names: theta_0 + tau.

        ``compare`` takes them from the bank with the same bits.
        """
        return self.merge.weights_with(self.merge.task_vector(self.module), self.module)

    def unmerged(self) -> dict[str, Tensor]:
        """Return the tensors that are trained but never merged: a trained head, and running statistics."""
        learned = not self.module.head.open_vocabulary
        head = {f"head.{name}": tensor for name, tensor in self.module.head.state_dict().items()} if learned else {}
        return {**head, **running_statistics(self.module, counts=True)}

    def _stored_vector(self, task: int) -> TaskVector:
        assert self.merge.bank is not None, "_check refuses routings that need it without one"
        return self.merge.bank[task]

    def _statistics(self, module: LightningModule) -> Statistics:
        """Measure the statistics that mergers require of the task that was just trained."""
        steps = module.trainer.global_step if self.branch_steps is None else self.branch_steps
        needed = self.merge.required_statistics - PROVIDED
        return self.measure(needed, self.data.task, base=self.merge.base, num_steps=steps)
