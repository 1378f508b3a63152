"""WEMoE and PWE-MoE: the MLPs of a merged model weighed by trained gates, per image or by a preference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from clmerge.deploy.routing.experts import Experts, Targets, experts_of
from clmerge.deploy.routing.gate_training import descend, gates_by_block, objective_loss, on
from clmerge.deploy.routing.mixture import Gates
from clmerge.deploy.routing.routed_model import RoutedModel
from clmerge.deploy.routing.routers import MLPGate, PreferenceGate, Router
from clmerge.deploy.routing.routing import Deployment, Frame, Routing, TaskEnd
from clmerge.merging.objectives import CrossEntropy, Entropy, Heads
from clmerge.seeds import seeded_generator


class _TrainedGates(Routing):
    """Gates of every block that are trained on adaptation images, from the same start after every task.

    Attributes:
        objective: What they minimise, summed over the tasks.
    """

    adapts: ClassVar[bool] = True
    objective: ClassVar[type[Entropy | CrossEntropy]]

    def __init__(
        self, *, rank: int | None, targets: Targets, init: float, steps: int, lr: float, heads: Heads, seed: int
    ) -> None:
        super().__init__(rank=rank, targets=targets)
        if steps < 0 or not lr > 0:
            raise ValueError(f"expected steps of 0 or more and lr above 0, got steps={steps}, lr={lr}")
        self.init = init
        self.steps = steps
        self.lr = lr
        self.heads: Heads = heads
        self.seed = seed

    @override
    def router(self, deployment: Deployment) -> Router | None:
        return None

    def _weights(self, model: RoutedModel, generator: torch.Generator) -> Sequence[float]:
        """Prepare a step, and return the weights of the tasks in its loss."""
        return [1.0] * len(model.tasks)

    @override
    def learn(self, model: RoutedModel, deployment: Deployment) -> None:
        rounds = deployment.batches()
        objective = self.objective(heads=self.heads)
        place = {task: column for column, task in enumerate(deployment.tasks)}
        seen = [label for own in deployment.classes for label in own]
        generator = seeded_generator(seed=self.seed, task=len(place), name="preferences", purpose=self.name)

        def loss(step: int) -> Tensor:
            weights, terms = self._weights(model, generator), []
            for batch in next(rounds):
                column = place[batch.task]
                labels = batch.labels if self.reads_labels else None
                term = objective_loss(model, objective, batch.images, labels, deployment.classes[column], seen)
                terms.append(weights[column] * term)
            return torch.stack(terms).sum()

        with on(model, deployment.frame.device):
            descend(loss, list(model.layer_routers.parameters()), steps=self.steps, lr=self.lr)

    def _start(self, gate: nn.Module, name: str) -> None:
        """Draw small weights, and set the biases of the last layer: all gates begin near ``init``."""
        generator = seeded_generator(seed=self.seed, task=0, name=name, purpose=self.name)
        layers = [part for part in gate.modules() if isinstance(part, nn.Linear)]
        for layer in layers:
            layer.weight.data.copy_(0.01 * torch.randn(layer.weight.shape, generator=generator))
            layer.bias.data.fill_(self.init if layer is layers[-1] else 0.0)


class WEMoE(_TrainedGates):
    """Per image and block, gates of the MLPs' task vectors, trained on adaptation images (WEMoE, arXiv 2402.00433).

    A gate reads what its MLP reads: a hidden layer, then the mean over tokens, without softmax. Gates begin at
    ``init`` for every image, where the model is task arithmetic in its MLPs, and are trained by Adam to lower the
    entropy of the predictions on the run's adaptation images. The released code adapts on the test images and averages
    gates over batches of one task while it adapts; here they are per image throughout, and trained anew after every
    task.

    E-WEMoE is ``density: 0.1`` (the largest tenth of every task vector's entries) with ``shared_gate: true`` (one gate
    for all blocks). Kept: all task vectors of the MLPs, as factors of full rank unless ``rank`` is given.

    Args:
        rank: Singular triplets per layer and task; all in the paper.
        targets: As for ``Routing``.
        density: Share of the entries of each task matrix that are kept, by magnitude.
        shared_gate: Whether one gate serves all blocks.
        init: Where all gates begin; 0.3 in the paper.
        steps: Optimizer steps after every task, each with a batch of every task; 1000 in the paper.
        lr: Learning rate; 1e-4 in the paper, for its 1000 steps.
        heads: Which classes compete in the entropy: those of the image's ``task``, as in the paper, or all ``seen``.
        seed: Seed of the initial gates.

    Raises:
        ValueError: For a number out of range.
    """

    name = "wemoe"
    source: ClassVar[str] = "2402.00433"
    summary: ClassVar[str] = "per image and block, trained gates of the MLPs' task vectors"
    objective: ClassVar[type[Entropy | CrossEntropy]] = Entropy

    def __init__(
        self,
        *,
        rank: int | None = None,
        targets: Targets = "mlp",
        density: float = 1.0,
        shared_gate: bool = False,
        init: float = 0.3,
        steps: int = 200,
        lr: float = 1e-3,
        heads: Heads = "task",
        seed: int = 0,
    ) -> None:
        super().__init__(rank=rank, targets=targets, init=init, steps=steps, lr=lr, heads=heads, seed=seed)
        if not 0 < density <= 1:
            raise ValueError(f"expected a density above 0 and at most 1, got {density}")
        self.density = density
        self.shared_gate = shared_gate

    @override
    def collect(self, end: TaskEnd) -> None:
        layers = self.layers(end.frame)
        self.experts[end.task] = experts_of(end.tau, layers, self.rank, density=self.density)

    @override
    def gates(self, experts: Sequence[Experts], deployment: Deployment) -> dict[str, Gates]:
        made: list[MLPGate] = []

        def router(width: int) -> MLPGate:
            if made and self.shared_gate:
                if made[0].width != width:
                    raise ValueError(
                        f"expected blocks of one width for shared_gate, got {made[0].width} and {width}; set it to "
                        "false"
                    )
                return made[0]
            made.append(MLPGate(len(experts), width))
            self._start(made[-1], str(len(made)))
            return made[-1]

        return gates_by_block(experts[0], router)

    @override
    def nbytes(self, frame: Frame, classes: Sequence[Sequence[int]]) -> int:
        widths = [frame.base[f"{layer}.weight"].shape[1] for layer in _leaders(self.layers(frame))]
        gates = sum(4 * (width * width + width + (width + 1) * len(classes)) for width in widths[: self._count(widths)])
        return super().nbytes(frame, classes) + gates

    def _count(self, widths: Sequence[int]) -> int:
        return 1 if self.shared_gate else len(widths)


class PWEMoE(_TrainedGates):
    """Gates that depend on a preference among the tasks, not on the image (PWE-MoE, arXiv 2406.09770).

    Per block, a small network maps a preference, positive shares of the tasks, to the coefficients of their vectors. It
    is trained by Adam on labelled adaptation images: at every step a preference is drawn uniformly, and the
    cross-entropies of the tasks are added with its shares (linear scalarisation). Then the given preference stays.
    It is a tool to look at trade-offs between tasks, not one for continual learning: it needs images of all tasks.

    Args:
        rank: Singular triplets per layer and task; all in the paper.
        targets: As for ``Routing``.
        preference: One positive share for every task; those of the tasks so far are scaled to sum 1. Default: equal.
        init: Where all coefficients begin; 0.3 in the paper.
        steps: Optimizer steps after every task; 2000 in the paper.
        lr: Learning rate.
        heads: Which classes compete: those of the image's ``task``, as in the paper, or all ``seen``.
        seed: Seed of the initial gates and of the preferences.

    Raises:
        ValueError: For a number out of range.
    """

    name = "pwe_moe"
    source: ClassVar[str] = "2406.09770"
    summary: ClassVar[str] = "per block, coefficients of the task vectors by a preference among the tasks"
    reads_labels: ClassVar[bool] = True
    objective: ClassVar[type[Entropy | CrossEntropy]] = CrossEntropy
    per_task: ClassVar[tuple[str, ...]] = ("preference",)

    def __init__(
        self,
        *,
        rank: int | None = None,
        targets: Targets = "mlp",
        preference: list[float] | None = None,
        init: float = 0.3,
        steps: int = 200,
        lr: float = 1e-2,
        heads: Heads = "task",
        seed: int = 0,
    ) -> None:
        super().__init__(rank=rank, targets=targets, init=init, steps=steps, lr=lr, heads=heads, seed=seed)
        if preference is not None and not (preference and all(share > 0 for share in preference)):
            raise ValueError(f"expected positive shares of the tasks as preference, got {preference}")
        self.preference = preference

    @override
    def gates(self, experts: Sequence[Experts], deployment: Deployment) -> dict[str, Gates]:
        made: list[PreferenceGate] = []

        def router(width: int) -> PreferenceGate:
            made.append(PreferenceGate(len(experts)))
            self._start(made[-1], str(len(made)))
            return made[-1]

        return gates_by_block(experts[0], router)

    @override
    def _weights(self, model: RoutedModel, generator: torch.Generator) -> Sequence[float]:
        drawn = -torch.rand(len(model.tasks), generator=generator).clamp(min=1e-12).log()
        drawn = drawn / drawn.sum()  # uniform on the simplex
        prefer(model, drawn)
        return drawn.tolist()

    @override
    def learn(self, model: RoutedModel, deployment: Deployment) -> None:
        super().learn(model, deployment)
        shares = self.preference or [1.0] * (1 + max(deployment.tasks))
        wanted = torch.tensor([shares[task] for task in deployment.tasks])
        prefer(model, wanted / wanted.sum())

    @override
    def nbytes(self, frame: Frame, classes: Sequence[Sequence[int]]) -> int:
        number = len(classes)
        gate = 4 * (2 * number * number + 2 * number + 2 * number * number + number + number)
        return super().nbytes(frame, classes) + gate * len(_leaders(self.layers(frame)))


def prefer(model: RoutedModel, preference: Tensor) -> None:
    """Set the preference of a model with preference gates, in place.

    Args:
        model: The model.
        preference: Shares of the tasks, ``(T,)``, of sum 1.
    """
    for gate in model.layer_routers:
        if isinstance(gate, PreferenceGate):
            gate.preference.copy_(preference)


def _leaders(layers: Sequence[str]) -> list[str]:
    """Return the first mixed layer of every block."""
    found: dict[str, str] = {}
    for layer in layers:
        found.setdefault(layer.rpartition(".")[0], layer)
    return list(found.values())
