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


def polar(matrix):
    if not matrix.size:
        return matrix
    u, _, vh = svd(matrix)
    return u @ vh


def tsvm(scale):
    def rule(taus):
        share = min(taus.shape[1:]) // len(taus)
        triplets = [svd(tau) for tau in taus]
        u = np.hstack([u[:, :share] for u, _, _ in triplets])
        s = np.concatenate([s[:share] for _, s, _ in triplets])
        vh = np.vstack([vh[:share] for _, _, vh in triplets])
        return scale * polar(u) @ np.diag(s) @ polar(vh)

    return by_kind(rule, mean(scale))


def length(vector):
    return np.sqrt(sum((entries**2).sum() for entries in vector.values()))


def projected(merged, tau, alpha, zero_diagonal):
    u, s, vh = np.linalg.svd(merged, full_matrices=True)
    coordinates = u.T @ tau @ vh.T
    rank = int(np.argmax(np.cumsum(s) / s.sum() > alpha)) if alpha < 1 else 0
    coordinates[:rank, :rank] = 0
    if zero_diagonal:
        np.fill_diagonal(coordinates[: len(s), : len(s)], 0)
    return u @ coordinates @ vh


def opcm(alpha, zero_diagonal, scale):
    def batch(vectors, tasks):
        merged, shrinkage, lengths = vectors[0], 1.0, [length(vectors[0])]
        for vector in vectors[1:]:
            lengths.append(length(vector))
            grown = {}
            for name, tau in vector.items():
                added = tau
                if tau.ndim == 2 and tau.size:
                    added = projected(merged[name], tau, alpha, zero_diagonal)
                grown[name] = shrinkage * merged[name] + added
            shrinkage = length(grown) / np.mean(lengths)
            merged = {name: entries / shrinkage for name, entries in grown.items()}
        return {name: scale * entries for name, entries in merged.items()}

    return batch


def iso_cts(common, scale):
    def rule(taus):
        total = taus.sum(axis=0)
        size, num_tasks = min(total.shape), len(taus)
        share = min(round((size - int(size * common)) / num_tasks), size // num_tasks)
        num_common = size - share * num_tasks
        u, s, vh = svd(total)
        basis = u[:, :num_common]
        lefts, values, rights = [basis], [s[:num_common]], [vh[:num_common]]
        for tau in taus:
            u_t, s_t, vh_t = svd(tau - basis @ basis.T @ tau, largest=np.linalg.norm(tau))
            lefts.append(u_t[:, :share])
            values.append(s_t[:share])
            rights.append(vh_t[:share])
        return scale * np.concatenate(values).sum() / size * polar(np.hstack(lefts)) @ polar(np.vstack(rights))

    return by_kind(rule, mean(scale))


def knots(reduce, scale):
    """``reduce`` is TIES in batch form; it sees the coordinates of all matrices."""

    def batch(vectors, tasks):
        bases, coordinates = {}, [{} for _ in vectors]
        merged = by_kind(lambda taus: None, mean(scale))(vectors, tasks)
        for name in [name for name, entries in merged.items() if entries is None]:
            bases[name], s, vh = svd(np.hstack([vector[name] for vector in vectors]))
            for own, part in zip(coordinates, np.hsplit(s[:, None] * vh, len(vectors)), strict=True):
                own[name] = part
        reduced = reduce(coordinates, tasks) if bases else {}
        return merged | {name: scale * bases[name] @ part for name, part in reduced.items()}

    return batch


def unit(row, zero=0.0):
    size = np.linalg.norm(row)
    return row / size if size > zero else np.zeros_like(row)


def deficiency(expert, row, shared):
    direction = unit(expert)
    if shared == "both":
        nothing = not expert.any() or not row.any()
        direction = np.zeros_like(row) if nothing else unit(direction + unit(row), zero=1e-6)
    return row - (row @ direction) * direction


def ext_sub(strength, shared):
    def batch(vectors, tasks):
        merged = {}
        for name, expert in vectors[0].items():
            merged[name] = expert.copy()
            for vector in vectors[1:] if expert.size else []:
                rows = len(expert) if expert.ndim > 1 else 1
                pairs = zip(np.split(expert.ravel(), rows), np.split(vector[name].ravel(), rows), strict=True)
                found = np.concatenate([deficiency(own, other, shared) for own, other in pairs])
                merged[name] -= strength * found.reshape(expert.shape)
        return merged

    return batch


def weights_of(shapes):
    """The base model: made up, but every parameter a function of its shape alone."""
    return {name: np.asarray(np.random.default_rng(7).normal(size=shape)) for name, shape in shapes.items()}


def ethos(threshold, strength):
    def rule(taus):
        merged = np.zeros(taus.shape[1:])
        u, _, vh = svd(weights_of({"w": merged.shape})["w"])
        for tau in taus:
            coordinates = u.T @ tau @ vh.T
            coordinates[np.abs(coordinates) >= threshold * np.abs(coordinates).max()] = 0  # what is left is general
            merged -= strength * (tau - u @ coordinates @ vh)
        return merged

    return by_kind(rule, lambda taus: np.zeros(taus.shape[1:]))


def dop(num_steps, lr, alpha, beta, energy):
    """Full projectors and their exact gradients, where the rule has factors."""

    def projectors(matrix):
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        used = np.where(np.cumsum(s) < energy * s.sum(), s**2, 0)
        return u @ np.diag(used) @ u.T, vh.T @ np.diag(used) @ vh

    def optimised(models):
        spaces = [projectors(model) for model in models]
        x, weight = np.mean(models, axis=0), alpha
        first, second = np.zeros_like(x), np.zeros_like(x)
        for step in range(1, num_steps + 1):
            gaps = [x - model for model in models]
            grads = [2 * (p @ gap + gap @ q) for gap, (p, q) in zip(gaps, spaces, strict=True)]
            losses = [(gap * grad).sum() / 2 for gap, grad in zip(gaps, grads, strict=True)]
            g, h = (grad / loss if loss > 0 else grad for grad, loss in zip(grads, losses, strict=True))
            inner = (g * h).sum()
            if inner >= (g * g).sum():
                best = 0.999
            elif inner >= (h * h).sum():
                best = 0.001
            else:
                best = ((h - g) * h).sum() / ((g - h) ** 2).sum()
            weight = beta * weight + (1 - beta) * best
            grad = weight * grads[0] + (1 - weight) * grads[1]
            first = 0.9 * first + 0.1 * grad
            second = 0.999 * second + 0.001 * grad**2
            x = x - lr * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        return x

    def batch(vectors, tasks):
        merged = vectors[0]
        for vector in vectors[1:]:
            pairs = {name: [merged[name], tau] for name, tau in vector.items()}
            merged = {
                name: optimised(pair) if pair[0].ndim == 2 and pair[0].size else (pair[0] + pair[1]) / 2
                for name, pair in pairs.items()
            }
        return merged

    return batch
