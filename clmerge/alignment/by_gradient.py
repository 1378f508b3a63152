"""Aligners that learn the permutation by gradient descent: through Sinkhorn's matrices, or straight through it."""

from collections.abc import Callable

import torch
from torch import Tensor

from clmerge.alignment.descent import Descent
from clmerge.alignment.matching import Aligner, Correlations, covered
from clmerge.alignment.pairs import assignment
from clmerge.alignment.reparametrization import Reparametrization, UnitMap, blockwise
from clmerge.alignment.spec import PermutationSpec
from clmerge.weights import State


class SinkhornMatching(Aligner):
    """Match units by descending the distance of weights over doubly stochastic matrices (Pena et al., 2212.12042).

    Matrices of the groups without heads are learned together (the gradient goes through Sinkhorn's iterations) and
    rounded by assignment; heads are then matched as ``WeightMatching`` does. Of ``n^2`` numbers per group and step, so
    for groups of hundreds of units.

    Args:
        steps: Steps of Adam.
        learning_rate: Of Adam.
        temperature: Of Sinkhorn's matrices.
        iterations: Normalisations of rows and columns.
        seed: Seed of the start.
    """

    def __init__(
        self,
        steps: int = 200,
        *,
        learning_rate: float = 0.1,
        temperature: float = 1.0,
        iterations: int = 20,
        seed: int = 0,
    ) -> None:
        if min(steps, iterations) < 1 or temperature <= 0:
            raise ValueError("expected steps and iterations of 1 or more and a temperature above 0")
        self.steps = steps
        self.learning_rate = learning_rate
        self.temperature = temperature
        self.iterations = iterations
        self.seed = seed

    def match(
        self, reference: State, other: State, spec: PermutationSpec, *, correlations: Correlations | None = None
    ) -> Reparametrization:
        """Return the map that carries ``other`` into the units of ``reference``; correlations are not used."""
        reference, other = covered(reference, spec, "the reference"), covered(other, spec, "the other network")
        generator = torch.Generator().manual_seed(self.seed)
        plain = [key for key, group in spec.groups.items() if not group.heads]
        logits = {key: _start(spec.groups[key].size, generator) for key in plain}
        names = [name for name in spec.moved_names if any(key in logits for key, _ in spec.axes_of(name))]
        optimizer = torch.optim.Adam(list(logits.values()), lr=self.learning_rate)
        for _ in range(self.steps):
            optimizer.zero_grad()
            soft = {key: self._matrix(found) for key, found in logits.items()}
            loss = torch.zeros((), dtype=torch.float64)
            for name in names:
                moved = other[name].double()
                for key, axis in spec.axes_of(name):
                    if key in soft:
                        moved = blockwise(moved, axis.axis, soft[key][None], axis.spread)
                loss = loss + (moved - reference[name].double()).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            maps = {key: UnitMap(assignment(self._matrix(found))) for key, found in logits.items()}
        descent = Descent(reference, other, spec, start=Reparametrization(spec, maps))
        return descent.run(max_sweeps=100, generator=generator, only=[k for k in spec.groups if k not in maps])

    def _matrix(self, logits: Tensor) -> Tensor:
        scaled = logits / self.temperature
        for _ in range(self.iterations):
            scaled = scaled - scaled.logsumexp(1, keepdim=True)
            scaled = scaled - scaled.logsumexp(0, keepdim=True)
        return scaled.exp()


class StraightThroughMatching(Aligner):
    """Match units so that the network midway has a small loss (Git Re-Basin's straight-through estimator, 2209.04836).

    Latent weights start at the reference; the other network is matched to them at every step, and the gradient of the
    loss at the midpoint of reference and matched network is applied to the latent weights as if matching were the
    identity. The map with the smallest loss is returned.

    Args:
        loss: Returns the loss of weights by name, on data of its choice; differentiable.
        steps: Steps of SGD with momentum 0.9.
        learning_rate: Of SGD.
        seed: Seed of the matching.
    """

    def __init__(
        self, loss: Callable[[State], Tensor], *, steps: int = 100, learning_rate: float = 0.01, seed: int = 0
    ) -> None:
        if steps < 1:
            raise ValueError(f"expected steps of 1 or more, got {steps}")
        self.loss = loss
        self.steps = steps
        self.learning_rate = learning_rate
        self.seed = seed

    def match(
        self, reference: State, other: State, spec: PermutationSpec, *, correlations: Correlations | None = None
    ) -> Reparametrization:
        """Return the map that carries ``other`` into the units of ``reference``; correlations are not used."""
        ours, theirs = covered(reference, spec, "the reference"), covered(other, spec, "the other network")
        rest = {name: tensor for name, tensor in reference.items() if name not in ours}
        latent = {name: tensor.clone().requires_grad_() for name, tensor in ours.items() if tensor.is_floating_point()}
        optimizer = torch.optim.SGD(list(latent.values()), lr=self.learning_rate, momentum=0.9)
        best, best_loss = Reparametrization(spec, {}), float("inf")
        found = best
        for _ in range(self.steps):
            fixed = {name: tensor.detach() for name, tensor in latent.items()}
            descent = Descent(fixed, theirs, spec, start=found)
            found = descent.run(max_sweeps=100, generator=torch.Generator().manual_seed(self.seed))
            moved = found.apply(theirs)
            through = {name: moved[name] + (latent[name] - fixed[name]) for name in latent}
            loss = self.loss({**rest, **{name: (ours[name] + through[name]) / 2 for name in latent}})
            if float(loss.detach()) < best_loss:
                best, best_loss = found, float(loss.detach())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return best


def _start(size: int, generator: torch.Generator) -> Tensor:
    noise = 0.1 * torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (torch.eye(size, dtype=torch.float64) + noise).requires_grad_()
