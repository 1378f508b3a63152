"""The spectral rules in batch form and float64. Any parameter of two dimensions is a matrix."""

import numpy as np

TINY = 1e-6  # singular values below this share of the largest are zero


def svd(matrix, largest=None):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    live = s > TINY * (s[0] if largest is None else largest)
    return u[:, live], s[live], vh[live]


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


def iso_c(scale):
    def rule(taus):
        total = taus.sum(axis=0)
        u, s, vh = svd(total)
        return scale * s.sum() / min(total.shape) * u @ vh

    return by_kind(rule, mean(scale))
