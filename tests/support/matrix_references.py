"""What the batch references of several rules for matrices share. Any parameter of two dimensions is a matrix."""

from collections.abc import Callable

import numpy as np
from support.references import Batch, shapes_of, stacked, statistics_of

TINY = 1e-6  # singular values below this share of the largest are zero


def svd(matrix, largest=None):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    live = s > TINY * (s[0] if largest is None else largest)
    return u[:, live], s[live], vh[live]


def polar(matrix):
    if not matrix.size:
        return matrix
    u, _, vh = svd(matrix)
    return u @ vh


def by_kind(on_matrices, on_others):
    """A rule for matrices and one for the rest, both of all values of a parameter, shape (num_tasks, ...)."""

    def batch(vectors, tasks):
        merged = {}
        for name, first in vectors[0].items():
            taus = np.stack([vector[name] for vector in vectors])
            merged[name] = on_matrices(taus) if first.ndim == 2 and first.size else on_others(taus)
        return merged

    return batch


def mean(scale):
    return lambda taus: scale * taus.mean(axis=0)


def matrices_or_mean(solve: Callable[[str, list[np.ndarray], list[int]], np.ndarray], scale: float = 1.0) -> Batch:
    def batch(vectors, tasks):
        return {
            name: scale
            * (
                solve(name, [vector[name] for vector in vectors], tasks)
                if entries.ndim == 2 and entries.size
                else stacked(vectors, name).mean(axis=0)
            )
            for name, entries in vectors[0].items()
        }

    return batch


def regmean(reduce: float, ridge: float, scale: float) -> Batch:
    def batch(vectors, tasks):
        def solve(name, taus, tasks):
            grams = [statistics_of(task, shapes_of(vectors))["gram"][name].numpy() for task in tasks]
            grams = [np.where(np.eye(len(gram)) > 0, gram, reduce * gram) for gram in grams]
            pull = ridge * np.trace(sum(grams)) / len(grams[0]) * np.eye(len(grams[0]))
            moment = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True)) + np.mean(taus, axis=0) @ pull
            return np.linalg.solve(sum(grams) + pull, moment.T).T

        return matrices_or_mean(solve, scale)(vectors, tasks)

    return batch
