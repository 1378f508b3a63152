"""What the batch references of several rules share: the vectors, the statistics, the parts, and the case itself.

The references see all task vectors at once, in float64, and share no code with clmerge.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from clmerge.merging import Merger

Vector = dict[str, np.ndarray]
Batch = Callable[[list[Vector], list[int]], Vector]
PREFERENCES = [0.3, 0.1, 0.05, 0.05, 0.1, 0.02, 0.08, 0.1, 0.1, 0.1]  # by task index


@dataclass(frozen=True)
class Case:
    """A configured rule and what it must compute for the vectors and the indices of their tasks."""

    build: Callable[[], Merger]
    batch: Batch
    homogeneous: bool = True  # scaling all vectors scales the result
    generic: bool = False  # defined by single singular vectors, which matrices of a few small integers do not have
    condition: float = 1.0  # by how much the rule amplifies rounding; tolerances grow with it


def score(vector):
    """A held-out metric, as coarse as an accuracy: how near all entries are to 0.25."""
    entries = [np.asarray(tensor, dtype=np.float64).ravel() for tensor in vector.values()]
    return -round(float(np.mean(np.abs(np.concatenate(entries) - 0.25))), 3)


def gradients(objective, tasks, *, seed, expert):
    """The gradient of half the squared distance of all entries from 0.25."""

    def gradient(vector):
        slopes = {name: tensor - 0.25 for name, tensor in vector.items()}
        return sum(float(slope.square().sum()) / 2 for slope in slopes.values()), slopes

    return gradient


def weights_of(shapes):
    """The base model: made up, but every parameter a function of its shape alone."""
    return {name: np.asarray(np.random.default_rng(7).normal(size=shape)) for name, shape in shapes.items()}


def statistics_of(task: int, shapes: dict[str, tuple[int, ...]]) -> dict:
    """What a run would measure on a task beside its vector: made up, but a function of the task alone.

    Every statistic that any rule requires is here; a reference asks for the same ones. ``fisher`` is positive and of
    the parameters' shapes, ``gram`` is positive definite of the matrices' input size.
    """
    generator, numbers = np.random.default_rng(1000 + task), np.random.default_rng(2000 + task)
    fisher = {name: torch.from_numpy(np.asarray(generator.uniform(0.1, 2.0, shape))) for name, shape in shapes.items()}
    inputs = {
        name: generator.normal(size=(3 * shape[1] + 1, shape[1])) for name, shape in shapes.items() if len(shape) == 2
    }
    return {
        "fisher": fisher,
        "adam": fisher,
        "mask_fisher": fisher,
        "gram": {name: torch.from_numpy(x.T @ x) for name, x in inputs.items()},
        "weights": {name: torch.from_numpy(entries) for name, entries in weights_of(shapes).items()},
        "samples": float(numbers.integers(10, 1000)),
        "steps": float(numbers.integers(10, 100)),
        "loss": float(numbers.uniform(0.1, 2.0)),
    }


def statistic(name: str, task: int) -> float:
    return statistics_of(task, {})[name]


def stacked(vectors: list[Vector], name: str) -> np.ndarray:
    return np.stack([vector[name] for vector in vectors])


def each(function: Callable[[np.ndarray], np.ndarray]) -> Batch:
    """A rule that looks at one parameter at a time: all its values, shape (num_tasks, ...)."""
    return lambda vectors, tasks: {name: function(stacked(vectors, name)) for name in vectors[0]}


def total(scale: float) -> Batch:
    return each(lambda taus: scale * taus.sum(axis=0))


def average(scale: float) -> Batch:
    return each(lambda taus: scale * taus.mean(axis=0))


def weighted(weigh: Callable[[list[Vector], list[int]], np.ndarray], scale: float = 1.0) -> Batch:
    """A mean with one weight per task."""

    def batch(vectors, tasks):
        weights = np.asarray(weigh(vectors, tasks), dtype=np.float64)
        weights = scale * weights / weights.sum() if weights.any() else weights
        return {name: np.tensordot(weights, stacked(vectors, name), axes=1) for name in vectors[0]}

    return batch


def norm(vector: Vector) -> float:
    return float(np.linalg.norm(np.concatenate([entries.ravel() for entries in vector.values()])))


def shapes_of(vectors: list[Vector]) -> dict[str, tuple[int, ...]]:
    return {name: entries.shape for name, entries in vectors[0].items()}


def fishers(vectors: list[Vector], tasks: list[int]) -> list[Vector]:
    found = [statistics_of(task, shapes_of(vectors))["fisher"] for task in tasks]
    return [{name: tensor.numpy() for name, tensor in fisher.items()} for fisher in found]


def trimmed_by_model(vector: Vector, density: float) -> Vector:
    flat = np.sort(np.abs(np.concatenate([entries.ravel() for entries in vector.values()])))
    num_dropped = flat.size - int(density * flat.size)
    threshold = flat[num_dropped - 1] if num_dropped else 0.0
    return {name: np.where(np.abs(entries) >= threshold, entries, 0) for name, entries in vector.items()}


def trimmed_by_tensor(vector: Vector, density: float) -> Vector:
    trimmed = {}
    for name, entries in vector.items():
        kept = np.zeros(entries.size)
        largest = np.argsort(-np.abs(entries.ravel()), kind="stable")[: max(1, int(density * entries.size))]
        kept[largest] = entries.ravel()[largest]
        trimmed[name] = kept.reshape(entries.shape)
    return trimmed


def ties(density: float, trim: str, merge: str, scale: float, weights: list[float] | None = None) -> Batch:
    def batch(vectors, tasks):
        trimming = trimmed_by_model if trim == "model" else trimmed_by_tensor
        vectors = [trimming(vector, density) for vector in vectors]
        shares = np.array([1.0 if weights is None else weights[task] for task in tasks])
        vectors = [{name: w * tau for name, tau in vector.items()} for w, vector in zip(shares, vectors, strict=True)]
        signs = {name: np.sign(stacked(vectors, name).sum(axis=0)) for name in vectors[0]}
        undecided = 1.0 if trim == "tensor" else np.sign(sum(sign.sum() for sign in signs.values()))
        merged = {}
        for name, sign in signs.items():
            sign = np.where(sign == 0, undecided, sign)
            taus = stacked(vectors, name)
            agrees = np.where(sign > 0, taus > 0, taus < 0)
            kept = np.where(agrees, taus, 0)
            if merge == "max":
                merged[name] = np.abs(kept).max(axis=0) * sign
            else:
                merged[name] = kept.sum(axis=0)
            if merge == "mean":
                total = np.tensordot(shares, agrees, 1)
                merged[name] = merged[name] / np.where(total == 0, 1, total)
        return {name: scale * entries for name, entries in merged.items()}

    return batch


def max_magnitude(scale: float) -> Batch:
    def rule(taus):
        largest = np.abs(taus).max(axis=0)
        return scale * np.where(np.max(taus, axis=0) == largest, largest, -largest)  # +x before -x

    return each(rule)


def uniform(purpose: str, seed: int, task: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    digest = hashlib.sha256(f"{purpose}/{seed}/{task}/{name}".encode()).hexdigest()
    generator = torch.Generator().manual_seed(int(digest[:16], 16))
    return torch.rand(shape, generator=generator).numpy()


def dropped(drop_rate: float, rescale: str, seed: int, reduce: Batch) -> Batch:
    def batch(vectors, tasks):
        sparse = []
        for vector, task in zip(vectors, tasks, strict=True):
            kept = {
                name: np.where(uniform("drop", seed, task, name, entries.shape) >= drop_rate, entries, 0)
                for name, entries in vector.items()
            }
            if rescale == "probability":
                kept = {name: entries / (1 - drop_rate) for name, entries in kept.items()}
            if rescale == "l1":
                norms = {name: np.abs(entries).sum() for name, entries in kept.items()}
                kept = {
                    name: entries * (np.abs(vector[name]).sum() / norms[name] if norms[name] else 1)
                    for name, entries in kept.items()
                }
            sparse.append(kept)
        return reduce(sparse, tasks)

    return batch


def model_stock(scale: float) -> Batch:
    def rule(taus):
        moved = [tau for tau in taus if np.linalg.norm(tau)]
        count = len(moved)
        if not count:
            return np.zeros(taus.shape[1:])
        cosines = [
            (moved[i] * moved[j]).sum() / (np.linalg.norm(moved[i]) * np.linalg.norm(moved[j]))
            for i in range(count)
            for j in range(i)
        ]
        cosine = np.clip(np.mean(cosines), 0, 1) if cosines else 1.0
        return scale * count * cosine / (1 + (count - 1) * cosine) * np.mean(moved, axis=0)

    return each(rule)
