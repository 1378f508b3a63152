"""MINGLE: every task trains its own row of the gates and leaves what earlier tasks read alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from clmerge.deploy.routing.experts import Experts, Targets, experts_of, put_mixtures
from clmerge.deploy.routing.gate_training import descend, objective_loss, on
from clmerge.deploy.routing.mixture import Gates
from clmerge.deploy.routing.routed_model import RoutedModel
from clmerge.deploy.routing.routers import LinearGate, Router, mean_token
from clmerge.deploy.routing.routing import Deployment, Frame, Routing, TaskEnd
from clmerge.merging.objectives import Distillation, Outputs
from clmerge.weights.task_vector import State

Rows = dict[str, Tensor]  # by layer

_EMA = 0.99  # of how much of the gradients lies along a direction, as in the released code


class Mingle(Routing):
    """Per image and layer, linear gates of which every task trains its own row, once (MINGLE, arXiv 2505.11883).

    The expert of a task is what is left of its vector outside of the leading subspace of the experts before, truncated.
    Its row of the gates is trained, for a few steps on few of its training images, to give the logits of the task's
    full expert; the rows of earlier tasks are frozen, and steps leave out, the more the less they matter, the
    directions that earlier tasks' inputs span. No image is kept: only those directions, ``directions`` per layer and
    task.

    What differs from the released code, which adapts on test images of one task at a time: images are those of the
    task's own training; gates are per image, while it averages them over a batch, which tells the task; the step of
    Adam is projected, not the gradient before it, whose projection Adam undoes; and a row begins with a gate of 1 for
    every image. Rows are trained with theta_0 in all that is not mixed. The order of the tasks matters.

    Args:
        rank: Singular triplets per layer and task; 64 in the paper.
        targets: As for ``Routing``.
        per_class: Training images per class that a row is trained on; 5 in the paper.
        steps: Optimizer steps; 50 in the paper.
        lr: Learning rate of Adam; 1e-4 in the paper.
        batch_size: Images per step.
        directions: Directions kept per layer and task; 3 in the paper.
        relaxation: How much of a step is allowed along directions that the gradients use much; 0 allows nothing.

    Raises:
        ValueError: For a number out of range.
    """

    name = "mingle"
    source: ClassVar[str] = "2505.11883"
    summary: ClassVar[str] = "per image and layer, linear gates of which every task trains its own row"

    def __init__(
        self,
        *,
        rank: int | None = 64,
        targets: Targets = "mlp",
        per_class: int = 5,
        steps: int = 50,
        lr: float = 1e-4,
        batch_size: int = 16,
        directions: int = 3,
        relaxation: float = 1.0,
    ) -> None:
        super().__init__(rank=rank, targets=targets)
        if min(per_class, batch_size) < 1 or min(steps, directions) < 0 or not lr > 0 or relaxation < 0:
            raise ValueError(
                f"expected per_class and batch_size of 1 or more, steps, directions and relaxation of 0 or more and lr "
                f"above 0, got {per_class}, {batch_size}, {steps}, {directions}, {relaxation} and {lr}"
            )
        self.per_class = per_class
        self.steps = steps
        self.lr = lr
        self.batch_size = batch_size
        self.directions = directions
        self.relaxation = relaxation
        self.weights: dict[int, Rows] = {}
        self.biases: dict[int, Rows] = {}
        self.read: dict[int, Rows] = {}

    @property
    @override
    def data(self) -> str:
        return "current"

    @override
    def collect(self, end: TaskEnd) -> None:
        layers, earlier = self.layers(end.frame), list(self.experts)
        tau = {**end.tau}
        for layer in layers:
            if earlier:
                tau[f"{layer}.weight"] = outside(end.tau[f"{layer}.weight"], self._sum(layer))
        self.experts[end.task] = experts_of(tau, layers, self.rank)
        widths = {layer: end.frame.base[f"{layer}.weight"].shape[1] for layer in layers}
        self.weights[end.task] = {layer: torch.zeros(width) for layer, width in widths.items()}
        self.biases[end.task] = {layer: torch.ones(()) for layer in layers}
        tasks = [*earlier, end.task]
        model = self._model(tasks, end.frame, end.frame.model(end.frame.base))
        images, labels = self._few(end)
        with on(model, end.frame.device):
            self._train(model, end, images, labels)
            self.read[end.task] = self._directions(model, images.to(end.frame.device), earlier)
        for layer, mixture in model.layers.items():
            gate: Any = mixture.gates.router
            self.weights[end.task][layer] = gate.layer.weight.detach()[-1].clone()
            self.biases[end.task][layer] = gate.layer.bias.detach()[-1].clone()

    @override
    def build(self, deployment: Deployment) -> RoutedModel:
        return self._model(deployment.tasks, deployment.frame, deployment.frame.model(deployment.merged))

    @override
    def router(self, deployment: Deployment) -> Router | None:
        return None

    def _model(self, tasks: Sequence[int], frame: Frame, backbone: nn.Module) -> RoutedModel:
        experts = [self.experts[task] for task in tasks]
        put_mixtures(backbone, frame.base, experts, self._gates(tasks, experts[0]))
        return RoutedModel(backbone, frame.head, tasks=tasks)

    def _gates(self, tasks: Sequence[int], layers: Experts) -> dict[str, Gates]:
        found = {}
        for layer in layers:
            rows = torch.stack([self.weights[task][layer] for task in tasks])
            gate = LinearGate(len(tasks), rows.shape[1])
            gate.layer.weight.data.copy_(rows)
            gate.layer.bias.data.copy_(torch.stack([self.biases[task][layer] for task in tasks]))
            found[layer] = Gates(gate, layer)
        return found

    def _sum(self, layer: str) -> Tensor:
        """Return the sum of the experts so far in a layer, ``(out, in)``."""
        return torch.stack([one[layer].b.mT @ one[layer].a for one in self.experts.values()]).sum(dim=0)

    def _few(self, end: TaskEnd) -> tuple[Tensor, Tensor]:
        """Return the first images of every class among those of the task, with their labels."""
        batches = list(end.images())
        images, labels = torch.cat([each for each, _ in batches]), torch.cat([each for _, each in batches])
        chosen = torch.cat([(labels == label).nonzero()[: self.per_class, 0] for label in torch.unique(labels)])
        return images[chosen], labels[chosen]

    def _train(self, model: RoutedModel, end: TaskEnd, images: Tensor, labels: Tensor) -> None:
        expert = self._expert(end, images)
        generator = torch.Generator().manual_seed(end.seed)
        objective = Distillation(temperature=2.0)
        gates: list[LinearGate] = [gate for gate in model.layer_routers if isinstance(gate, LinearGate)]
        names = list(model.layers)
        before = (
            [gate.layer.weight.detach().clone() for gate in gates],
            [gate.layer.bias.detach().clone() for gate in gates],
        )
        bases = [self._basis(layer, end.frame.device) for layer in names]
        used = [torch.zeros(basis.shape[1], device=basis.device) for basis in bases]

        def loss(step: int) -> Tensor:
            chosen = torch.randperm(len(images), generator=generator)[: self.batch_size]
            given = Outputs(expert[chosen].to(end.frame.device), torch.empty(0))
            return objective_loss(model, objective, images[chosen], None, end.classes, end.classes, given)

        def after() -> None:
            with torch.no_grad():
                for number, (gate, basis) in enumerate(zip(gates, bases, strict=True)):
                    weight, bias = gate.layer.weight, gate.layer.bias
                    grad = weight.grad
                    assert grad is not None
                    along = (grad[-1] @ basis).abs() / grad[-1].norm().clamp(min=1e-12)
                    used[number].mul_(_EMA).add_((1 - _EMA) * along)
                    step = weight[-1] - before[0][number][-1]
                    kept = without(step, basis, torch.exp(-self.relaxation * used[number]))
                    weight.copy_(before[0][number])  # the rows of earlier tasks are frozen
                    weight[-1] += kept
                    latest = bias[-1].clone()
                    bias.copy_(before[1][number])
                    bias[-1] = latest
                    before[0][number].copy_(weight)
                    before[1][number].copy_(bias)

        parameters = [one for gate in gates for one in gate.parameters()]
        descend(loss, parameters, steps=self.steps, lr=self.lr, after=after)

    @torch.no_grad()
    def _expert(self, end: TaskEnd, images: Tensor) -> Tensor:
        """Return the logits of the task's full expert, on the CPU."""
        state: State = {name: base + end.tau[name] for name, base in end.frame.base.items()}
        expert = end.frame.model(state).to(end.frame.device)
        head = end.frame.head.to(end.frame.device)
        found = [head(expert(part.to(end.frame.device))).cpu() for part in torch.split(images, self.batch_size)]
        return torch.cat(found)

    def _basis(self, layer: str, device: torch.device) -> Tensor:
        """Return an orthonormal basis of what earlier tasks read in a layer, ``(width, K)``."""
        kept = [rows[layer] for rows in self.read.values()]
        width = next(iter(self.experts.values()))[layer].a.shape[1]
        return torch.cat(kept, dim=1).to(device) if kept else torch.zeros(width, 0, device=device)

    @torch.no_grad()
    def _directions(self, model: RoutedModel, images: Tensor, earlier: Sequence[int]) -> Rows:
        """Return the leading directions of what the gates read of a task, orthogonal to those of earlier tasks."""
        inputs: dict[str, list[Tensor]] = {layer: [] for layer in model.layers}
        handles = [
            mixture.register_forward_pre_hook(lambda _, given, layer=layer: inputs[layer].append(mean_token(given[0])))
            for layer, mixture in model.layers.items()
        ]
        for part in torch.split(images, self.batch_size):
            model(part)
        for handle in handles:
            handle.remove()
        found = {}
        for layer, parts in inputs.items():
            x = torch.cat(parts).double().cpu()
            leading = torch.linalg.svd(x, full_matrices=False)[2][: self.directions].T
            basis = self._basis(layer, torch.device("cpu")).double()
            rest = leading - basis @ (basis.T @ leading)
            q, r = torch.linalg.qr(rest)
            found[layer] = q[:, r.diagonal().abs() > 1e-6].float()
        return found

    @override
    def nbytes(self, frame: Frame, classes: Sequence[Sequence[int]]) -> int:
        widths = [frame.base[f"{layer}.weight"].shape[1] for layer in self.layers(frame)]
        rows = sum(width + 1 + width * self.directions for width in widths)
        return super().nbytes(frame, classes) + 4 * rows * len(classes)

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {"weights": self.weights, "biases": self.biases, "read": self.read}
        return super().state_dict() | {
            name: {task: dict(one) for task, one in rows.items()} for name, rows in kept.items()
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.weights, self.biases, self.read = (
            {int(task): dict(one) for task, one in state[name].items()} for name in ("weights", "biases", "read")
        )


def outside(tau: Tensor, merged: Tensor) -> Tensor:
    """Return what is left of a matrix outside of the leading subspace of another.

    With ``merged = U S V'`` and ``k = exp(entropy(S / sum(S)))``, rounded down, the first k rows and columns of
    ``U' tau V`` at once are set to zero.

    Args:
        tau: ``(out, in)``.
        merged: ``(out, in)``, for example the sum of the experts before.

    Example:
        >>> merged = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))  # exp(entropy) = 3.12
        >>> outside(torch.ones(4, 4), merged)
        tensor([[0., 0., 0., 1.],
                [0., 0., 0., 1.],
                [0., 0., 0., 1.],
                [1., 1., 1., 1.]])
    """
    u, values, vh = torch.linalg.svd(merged.double(), full_matrices=False)
    k = effective_rank(values)
    left, right = u[:, :k], vh[:k]
    wide = tau.double().cpu()
    found: Tensor = wide - left @ (left.T @ wide @ right.T) @ right
    return found.to(tau)


def effective_rank(values: Tensor) -> int:
    """Return the exponential of the entropy of singular values, rounded down; 0 if all are zero.

    Example:
        >>> effective_rank(torch.tensor([4.0, 2.0, 1.0, 1.0]))
        3
    """
    if not (total := float(values.sum())) > 0:
        return 0
    shares = values.double() / total
    return int(math.exp(float(-(shares * shares.clamp(min=1e-300).log()).sum())) + 1e-9)


def without(vector: Tensor, basis: Tensor, strength: Tensor) -> Tensor:
    """Return a vector less its parts along orthonormal directions, each times a strength.

    Args:
        vector: ``(width,)``.
        basis: ``(width, K)``.
        strength: ``(K,)``; 1 removes a direction.
    """
    removed: Tensor = basis @ (strength * (basis.T @ vector))
    found: Tensor = vector - removed
    return found
