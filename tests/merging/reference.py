"""Every rule once more, in batch form and float64, and the settings each is tested with.

The references see all task vectors at once and share no code with clmerge. To add a rule, add its reference
and one or more cases to ``CASES``.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from merging import spectral_reference as spectral

from clmerge import merging

Vector = dict[str, np.ndarray]
Batch = Callable[[list[Vector], list[int]], Vector]
WEIGHTS = [0.5, 2.0, 1.0, 0.0, 4.0, 1.0, 0.25, 3.0] * 4  # by task index


@dataclass(frozen=True)
class Case:
    """A configured rule and what it must compute for the vectors and the indices of their tasks."""

    build: Callable[[], merging.Merger]
    batch: Batch
    homogeneous: bool = True  # scaling all vectors scales the result
    generic: bool = False  # defined by single singular vectors, which matrices of a few small integers do not have
    condition: float = 1.0  # by how much the rule amplifies rounding; tolerances grow with it


def score(vector):
    """A held-out metric, as coarse as an accuracy: how near all entries are to 0.25."""
    entries = [np.asarray(tensor, dtype=np.float64).ravel() for tensor in vector.values()]
    return -round(float(np.mean(np.abs(np.concatenate(entries) - 0.25))), 3)


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
        "weights": {name: torch.from_numpy(entries) for name, entries in spectral.weights_of(shapes).items()},
        "samples": float(numbers.integers(10, 1000)),
        "steps": float(numbers.integers(10, 100)),
        "loss": float(numbers.uniform(0.1, 2.0)),
    }


def stacked(vectors: list[Vector], name: str) -> np.ndarray:
    return np.stack([vector[name] for vector in vectors])


def each(function: Callable[[np.ndarray], np.ndarray]) -> Batch:
    """A rule that looks at one parameter at a time: all its values, shape (num_tasks, ...)."""
    return lambda vectors, tasks: {name: function(stacked(vectors, name)) for name in vectors[0]}


def total(scale: float) -> Batch:
    return each(lambda taus: scale * taus.sum(axis=0))


def average(scale: float) -> Batch:
    return each(lambda taus: scale * taus.mean(axis=0))


def max_magnitude(scale: float) -> Batch:
    def rule(taus):
        largest = np.abs(taus).max(axis=0)
        return scale * np.where(np.max(taus, axis=0) == largest, largest, -largest)  # +x before -x

    return each(rule)


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


def by_task(density: Callable[[int], float], reduce: Batch) -> Batch:
    def batch(vectors, tasks):
        trimmed = [trimmed_by_tensor(vector, density(task)) for vector, task in zip(vectors, tasks, strict=True)]
        return reduce(trimmed, tasks)

    return batch


def one_bit(reduce: Batch) -> Batch:
    def batch(vectors, tasks):
        signs = [
            {
                name: np.where(entries > 0, 1.0, -1.0) * (np.abs(entries).mean() if entries.size else 0.0)
                for name, entries in vector.items()
            }
            for vector in vectors
        ]
        return reduce(signs, tasks)

    return batch


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


def greedy_soup(strict: bool) -> Batch:
    def mean(vectors):
        return {name: stacked(vectors, name).mean(axis=0) for name in vectors[0]}

    def batch(vectors, tasks):
        kept = vectors[:1]
        for vector in vectors[1:]:
            gain = score(mean([*kept, vector])) - score(mean(kept))
            if gain > 0 or (gain == 0 and not strict):
                kept = [*kept, vector]
        return mean(kept)

    return batch


def interpolated(shares: Callable[[list[Vector]], list[float]]) -> Batch:
    def batch(vectors, tasks):
        alphas = shares(vectors)
        merged = {name: np.zeros(entries.shape) for name, entries in vectors[0].items()}
        for index, vector in enumerate(vectors):
            weight = alphas[index] * np.prod([1 - alpha for alpha in alphas[index + 1 :]])
            merged = {name: merged[name] + weight * vector[name] for name in merged}
        return merged

    return batch


def best_shares(candidates: tuple[float, ...]) -> Callable[[list[Vector]], list[float]]:
    def shares(vectors):
        chosen = []
        for count in range(1, len(vectors) + 1):
            results = [
                score(interpolated(lambda _, alpha=alpha: [*chosen, alpha])(vectors[:count], []))
                for alpha in candidates
            ]
            chosen.append(candidates[int(np.argmax(results))])
        return chosen

    return shares


def random_mix(seed: int, scale: float) -> Batch:
    def batch(vectors, tasks):
        mixed = {}
        for name, entries in vectors[0].items():
            undecided = np.ones(entries.shape, dtype=bool)
            mixed[name] = np.zeros(entries.shape)
            for position in reversed(range(len(vectors))):  # the last task that replaced an entry owns it
                drawn = uniform("mix", seed, tasks[position], name, entries.shape)
                owned = undecided & (drawn < 1 / (position + 1))
                mixed[name] = np.where(owned, scale * vectors[position][name], mixed[name])
                undecided = undecided & ~owned
        return mixed

    return batch


def trim_tensor_first(density: float, reduce: Batch) -> Batch:
    return lambda vectors, tasks: reduce([trimmed_by_tensor(vector, density) for vector in vectors], tasks)


TENTHS = tuple(index / 10 for index in range(11))

CASES = {
    "WeightAverage": Case(merging.WeightAverage, average(1.0)),
    "WeightAverage scale": Case(lambda: merging.WeightAverage(scale=-2.0), average(-2.0)),
    "TaskArithmetic": Case(merging.TaskArithmetic, total(0.3)),
    "TaskArithmetic negation": Case(lambda: merging.TaskArithmetic(scale=-1.0), total(-1.0)),
    "MagMax": Case(merging.MagMax, max_magnitude(0.5)),
    "TIES": Case(merging.TIES, ties(0.2, "model", "mean", 1.0)),
    "TIES weighted": Case(
        lambda: merging.TIES(0.5, trim="tensor", weights=WEIGHTS),
        ties(0.5, "tensor", "mean", 1.0, WEIGHTS),
    ),
    "TIES weighted sum": Case(
        lambda: merging.TIES(0.5, merge="sum", scale=0.5, weights=WEIGHTS),
        ties(0.5, "model", "sum", 0.5, WEIGHTS),
    ),
    "ByTask": Case(
        lambda: merging.Pipeline(
            merging.TIES(1.0), sparsifier=merging.ByTask([merging.TrimTensor(1 / (2 + task)) for task in range(16)])
        ),
        by_task(lambda task: 1 / (2 + task), ties(1.0, "model", "mean", 1.0)),
    ),
    **{
        f"TIES {trim} {merge} {density}": Case(
            lambda trim=trim, merge=merge, density=density: merging.TIES(density, trim=trim, merge=merge, scale=0.5),
            ties(density, trim, merge, 0.5),
        )
        for trim in ("model", "tensor")
        for merge in ("mean", "sum", "max")
        for density in (0.3, 1.0)
    },
    "DARE": Case(merging.DARE, dropped(0.9, "probability", 0, total(0.3))),
    "DARE l1": Case(lambda: merging.DARE(0.5, rescale="l1", seed=7, scale=1.0), dropped(0.5, "l1", 7, total(1.0))),
    "DARE TIES": Case(
        lambda: merging.DARE(0.5, rescale="none", reducer=merging.TIES(0.5, trim="tensor")),
        dropped(0.5, "none", 0, ties(0.5, "tensor", "mean", 1.0)),
    ),
    "ModelStock": Case(merging.ModelStock, model_stock(1.0)),
    "GreedySoup": Case(merging.GreedySoup, greedy_soup(strict=False), homogeneous=False),
    "GreedySoup strict": Case(lambda: merging.GreedySoup(strict=True), greedy_soup(strict=True), homogeneous=False),
    "WiSEFT": Case(merging.WiSEFT, interpolated(lambda vectors: [0.5] * len(vectors))),
    "PAINT": Case(merging.PAINT, interpolated(best_shares(TENTHS)), homogeneous=False),
    "RandomMix": Case(merging.RandomMix, random_mix(0, 1.0)),
    "RandomMix seed": Case(lambda: merging.RandomMix(scale=0.5, seed=3), random_mix(3, 0.5)),
    "Pipeline": Case(merging.Pipeline, total(0.3)),
    "Pipeline trim, MagMax, scale": Case(
        lambda: merging.Pipeline(merging.MagMax(), sparsifier=merging.TrimTensor(0.4), finisher=merging.Scale(3.0)),
        trim_tensor_first(0.4, max_magnitude(1.5)),
    ),
    "Pipeline one bit, TALL": Case(
        lambda: merging.Pipeline(merging.TALL(), sparsifier=merging.Quantise(1)), one_bit(total(0.3))
    ),
    "Pipeline one bit, MagMax": Case(
        lambda: merging.Pipeline(merging.MagMax(), sparsifier=merging.Quantise(1)), one_bit(max_magnitude(0.5))
    ),
    "Pipeline drop, Model Stock": Case(
        lambda: merging.Pipeline(merging.ModelStock(), sparsifier=merging.RandomDrop(0.5)),
        dropped(0.5, "probability", 0, model_stock(1.0)),
    ),
}


def norm(vector: Vector) -> float:
    return float(np.linalg.norm(np.concatenate([entries.ravel() for entries in vector.values()])))


def statistic(name: str, task: int) -> float:
    return statistics_of(task, {})[name]


def weighted(weigh: Callable[[list[Vector], list[int]], np.ndarray], scale: float = 1.0) -> Batch:
    """A mean with one weight per task."""

    def batch(vectors, tasks):
        weights = np.asarray(weigh(vectors, tasks), dtype=np.float64)
        weights = scale * weights / weights.sum() if weights.any() else weights
        return {name: np.tensordot(weights, stacked(vectors, name), axes=1) for name in vectors[0]}

    return batch


def by_inverse_norm(vectors, tasks):
    return [1 / norm(vector) if norm(vector) else 0 for vector in vectors]


def by_loss(temperature: float):
    return lambda vectors, tasks: np.exp([-statistic("loss", task) / temperature for task in tasks])


def fednova(scale: float) -> Batch:
    def batch(vectors, tasks):
        samples = np.array([statistic("samples", task) for task in tasks])
        steps = np.array([statistic("steps", task) for task in tasks])
        shares = samples / samples.sum()
        weights = scale * (shares * steps).sum() * shares / steps
        return {name: np.tensordot(weights, stacked(vectors, name), axes=1) for name in vectors[0]}

    return batch


def fedatt(temperature: float, scale: float) -> Batch:
    def rule(taus):
        logits = np.linalg.norm(taus.reshape(len(taus), -1), axis=1) / temperature
        attention = np.exp(logits - logits.max())
        return scale * np.tensordot(attention / attention.sum(), taus, axes=1)

    return each(rule)


def slerp(t: float | None, scale: float) -> Batch:
    def rule(taus):
        merged = taus[0]
        for count, tau in enumerate(taus[1:], start=2):
            share = 1 / count if t is None else t
            norms = np.linalg.norm(merged) * np.linalg.norm(tau)
            cosine = (merged * tau).sum() / norms if norms else 1.0
            if abs(cosine) > 0.9995:
                merged = (1 - share) * merged + share * tau
            else:
                angle = np.arccos(cosine)
                merged = (np.sin((1 - share) * angle) * merged + np.sin(share * angle) * tau) / np.sin(angle)
        return scale * merged

    return each(rule)


def signed_sum(weights: list[float], scale: float) -> Batch:
    def batch(vectors, tasks):
        chosen = [scale * weights[task] for task in tasks]
        return {name: np.tensordot(chosen, stacked(vectors, name), axes=1) for name in vectors[0]}

    return batch


SIGNED_WEIGHTS = [1.0, 1.0, -1.0, 0.5, 0.0, 2.0, -0.25, 1.0, 1.0, -3.0]


def clipped(max_norm: float, reduce: Batch) -> Batch:
    def batch(vectors, tasks):
        merged = reduce(vectors, tasks)
        factor = min(1.0, max_norm / norm(merged)) if norm(merged) else 1.0
        return {name: factor * entries for name, entries in merged.items()}

    return batch


PREFERENCES = [0.3, 0.1, 0.05, 0.05, 0.1, 0.02, 0.08, 0.1, 0.1, 0.1]

CASES.update(
    {
        "WeightedAverage": Case(
            merging.WeightedAverage,
            weighted(lambda vectors, tasks: [statistic("samples", task) for task in tasks]),
        ),
        "WeightedAverage loss": Case(lambda: merging.WeightedAverage("loss"), weighted(by_loss(1.0))),
        "WeightedAverage loss, cold": Case(
            lambda: merging.WeightedAverage("loss", temperature=0.5, scale=0.5), weighted(by_loss(0.5), 0.5)
        ),
        "WeightedAverage inverse norm": Case(
            lambda: merging.WeightedAverage("inverse_norm"), weighted(by_inverse_norm)
        ),
        "WeightedAverage given": Case(
            lambda: merging.WeightedAverage("given", weights=PREFERENCES),
            weighted(lambda vectors, tasks: [PREFERENCES[task] for task in tasks]),
        ),
        "FedNova": Case(merging.FedNova, fednova(1.0)),
        "FedNova scale": Case(lambda: merging.FedNova(scale=0.5), fednova(0.5)),
        "Pipeline MagMax, clip": Case(
            lambda: merging.Pipeline(merging.MagMax(), finisher=merging.ClipNorm(0.8)),
            clipped(0.8, max_magnitude(0.5)),
            homogeneous=False,
        ),
        "TaskArithmetic weights": Case(
            lambda: merging.TaskArithmetic(scale=0.5, weights=SIGNED_WEIGHTS), signed_sum(SIGNED_WEIGHTS, 0.5)
        ),
        "MetaGPT": Case(merging.MetaGPT, weighted(lambda vectors, tasks: [norm(vector) ** 2 for vector in vectors])),
        "MetaGPT scale": Case(
            lambda: merging.MetaGPT(scale=-0.5),
            weighted(lambda vectors, tasks: [norm(vector) ** 2 for vector in vectors], -0.5),
        ),
        "FedAtt": Case(merging.FedAtt, fedatt(1.0, 1.0), homogeneous=False),
        "FedAtt nearest": Case(
            lambda: merging.FedAtt(temperature=-2.0, scale=0.7), fedatt(-2.0, 0.7), homogeneous=False
        ),
        "SLERP": Case(merging.SLERP, slerp(None, 1.0)),
        "SLERP t": Case(lambda: merging.SLERP(0.3, scale=2.0), slerp(0.3, 2.0)),
    }
)


def fishers(vectors: list[Vector], tasks: list[int]) -> list[Vector]:
    shapes = {name: entries.shape for name, entries in vectors[0].items()}
    return [{name: tensor.numpy() for name, tensor in statistics_of(task, shapes)["fisher"].items()} for task in tasks]


def fisher_average(scale: float, granularity: str = "entry", normalize: bool = False) -> Batch:
    def batch(vectors, tasks):
        weights = fishers(vectors, tasks)
        if granularity == "row":
            weights = [
                {name: np.ones(f.shape) * f.mean(axis=1, keepdims=True) if f.ndim > 1 else f for name, f in w.items()}
                for w in weights
            ]
        if normalize:
            norms = [np.linalg.norm(np.concatenate([f.ravel() for f in w.values()])) for w in weights]
            weights = [{name: f / norm for name, f in w.items()} for w, norm in zip(weights, norms, strict=True)]
        return {
            name: scale
            * np.sum([w[name] * v[name] for w, v in zip(weights, vectors, strict=True)], axis=0)
            / np.sum([w[name] for w in weights], axis=0)
            for name in vectors[0]
        }

    return batch


def ugm(scale: float, prior: float) -> Batch:
    def batch(vectors, tasks):
        weights = fishers(vectors, tasks)
        merged = {}
        for name in vectors[0]:
            hessian = prior + scale * np.sum([w[name] for w in weights], axis=0)
            merged[name] = sum(
                scale * (prior + w[name]) / hessian * v[name] for w, v in zip(weights, vectors, strict=True)
            )
        return merged

    return batch


def cofima(alpha: float, use_fisher: bool = True, clip: float = np.inf) -> Batch:
    def batch(vectors, tasks):
        weights = fishers(vectors, tasks)
        if not use_fisher:
            weights = [{name: np.ones(f.shape) for name, f in w.items()} for w in weights]
        merged = vectors[0]
        for position in range(1, len(vectors)):
            old, new = ({name: np.minimum(f, clip) for name, f in weights[position - d].items()} for d in (1, 0))
            merged = {
                name: ((1 - alpha) * old[name] * merged[name] + alpha * new[name] * vectors[position][name])
                / ((1 - alpha) * old[name] + alpha * new[name])
                for name in merged
            }
        return merged

    return batch


CASES.update(
    {
        "Fisher": Case(merging.Fisher, fisher_average(1.0)),
        "Fisher row, normalized": Case(
            lambda: merging.Fisher(granularity="row", normalize=True, scale=0.5), fisher_average(0.5, "row", True)
        ),
        "FisherMaskNodes": Case(merging.FisherMaskNodes, fisher_average(1.0)),
        "FisherMaskNodes scale": Case(lambda: merging.FisherMaskNodes(scale=0.5), fisher_average(0.5)),
        "UGM": Case(merging.UGM, ugm(1.0, 1e-6)),
        "UGM prior": Case(lambda: merging.UGM(scale=0.5, prior=1.0), ugm(0.5, 1.0)),
        "CoFiMA": Case(merging.CoFiMA, cofima(0.5)),
        "CoFiMA clip": Case(lambda: merging.CoFiMA(0.3, clip=1.0), cofima(0.3, clip=1.0)),
        "CoFiMA without Fisher": Case(lambda: merging.CoFiMA(0.4, use_fisher=False), cofima(0.4, use_fisher=False)),
    }
)

# The spectral rules
CASES.update(
    {
        "IsoC": Case(merging.IsoC, spectral.iso_c(1.0), condition=100),
        "IsoC scale": Case(lambda: merging.IsoC(scale=1.5), spectral.iso_c(1.5), condition=100),
        "TSVM": Case(merging.TSVM, spectral.tsvm(1.0), generic=True, condition=100),
        "TSVM scale": Case(lambda: merging.TSVM(scale=0.5), spectral.tsvm(0.5), generic=True, condition=100),
        "OPCM": Case(merging.OPCM, spectral.opcm(0.5, True, 1.0), generic=True, condition=100),
        "OPCM released": Case(
            lambda: merging.OPCM(0.8, zero_diagonal="released", scale=2.0),
            spectral.opcm(0.8, False, 2.0),
            generic=True,
            condition=100,
        ),
        "OPCM all": Case(lambda: merging.OPCM(1.0), spectral.opcm(1.0, True, 1.0), generic=True, condition=100),
        "IsoCTS": Case(merging.IsoCTS, spectral.iso_cts(0.8, 1.0), generic=True, condition=100),
        "IsoCTS half": Case(
            lambda: merging.IsoCTS(0.5, scale=1.5), spectral.iso_cts(0.5, 1.5), generic=True, condition=100
        ),
        "KnOTS": Case(merging.KnOTS, spectral.knots(ties(0.2, "model", "mean", 1.0), 1.0), generic=True, condition=100),
        "KnOTS tensor": Case(
            lambda: merging.KnOTS(0.5, trim="tensor", merge="sum", scale=0.6),
            spectral.knots(ties(0.5, "tensor", "sum", 1.0), 0.6),
            generic=True,
            condition=100,
        ),
        "ExtSub": Case(merging.ExtSub, spectral.ext_sub(1.0, "both")),
        "ExtSub expert": Case(lambda: merging.ExtSub(0.5, shared="expert"), spectral.ext_sub(0.5, "expert")),
        "Ethos": Case(merging.Ethos, spectral.ethos(0.03, 1.0)),
        "Ethos strict": Case(lambda: merging.Ethos(0.5, strength=0.5), spectral.ethos(0.5, 0.5)),
        "DOP": Case(
            lambda: merging.DOP(20),
            spectral.dop(20, 1e-4, 0.8, 0.999, 0.99999),
            homogeneous=False,
            generic=True,
            condition=100,
        ),
        "DOP adaptive": Case(
            lambda: merging.DOP(10, lr=1e-2, alpha=0.5, beta=0.5, energy=0.9),
            spectral.dop(10, 1e-2, 0.5, 0.5, 0.9),
            homogeneous=False,
            generic=True,
            condition=1000,
        ),
    }
)
# End of the spectral rules


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


def shapes_of(vectors: list[Vector]) -> dict[str, tuple[int, ...]]:
    return {name: entries.shape for name, entries in vectors[0].items()}


def interference(ridge: float, normalize: bool, towards: Callable) -> Callable:
    """The minimiser of the interference as one least-squares problem, without any Gram matrix."""

    def solve(name, taus, tasks):
        norms = [np.linalg.norm(tau) if normalize else 1.0 for tau in taus]
        if not np.any(taus):
            return np.zeros(taus[0].shape)
        rows = np.vstack([tau / (norm or 1) for tau, norm in zip(taus, norms, strict=True)])
        wanted = np.vstack([tau @ tau.T / (norm or 1) for tau, norm in zip(taus, norms, strict=True)])
        pull = np.sqrt(ridge * np.sum(rows**2) / rows.shape[1])
        rows = np.vstack([rows, pull * np.eye(rows.shape[1])])
        wanted = np.vstack([wanted, pull * towards(taus, axis=0).T])
        return np.linalg.lstsq(rows, wanted, rcond=None)[0].T

    return solve


def wudi_adam(steps: int, lr: float) -> Callable:
    def solve(name, taus, tasks):
        merged, first, second = np.sum(taus, axis=0), 0.0, 0.0
        grams = [tau.T @ tau / (np.linalg.norm(tau) ** 2 or 1) for tau in taus]
        for step in range(1, steps + 1):
            gradient = sum(2 * (merged - tau) @ gram for tau, gram in zip(taus, grams, strict=True))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            rms = np.sqrt(second / (1 - 0.999**step))
            merged = merged - lr * first / (1 - 0.9**step) / (rms + 1e-8)
        return merged

    return solve


CASES.update(
    {
        "RegMean": Case(merging.RegMean, regmean(0.9, 1e-8, 1.0)),
        "RegMean ridge": Case(lambda: merging.RegMean(1.0, ridge=0.1, scale=0.5), regmean(1.0, 0.1, 0.5)),
        "WUDI ridge": Case(
            lambda: merging.WUDI("ridge"), matrices_or_mean(interference(1e-8, normalize=True, towards=np.sum))
        ),
        "WUDI": Case(
            lambda: merging.WUDI(steps=4, lr=1e-3, scale=0.5),
            matrices_or_mean(wudi_adam(4, 1e-3), 0.5),
            homogeneous=False,
        ),
        "ACTMat": Case(merging.ACTMat, matrices_or_mean(interference(1e-8, normalize=False, towards=np.mean))),
    }
)


def middle_kept(beta: float, gamma: float, reduce: Batch) -> Batch:
    def sparse(entries):
        kept = np.zeros(entries.size)
        order = np.argsort(-np.abs(entries.ravel()), kind="stable")
        middle = order[int(gamma * entries.size) : entries.size - int(beta * entries.size)]
        kept[middle] = entries.ravel()[middle]
        return kept.reshape(entries.shape)

    return lambda vectors, tasks: reduce([{name: sparse(v[name]) for name in v} for v in vectors], tasks)


def dropped_by_rank(drop_rate: float, window: float, rescale: str, seed: int, reduce: Batch) -> Batch:
    def sparse(name, entries, task):
        rows = entries.reshape(len(entries), -1) if entries.ndim > 1 and entries.size else entries.reshape(1, -1)
        ranks = np.abs(rows).argsort(axis=1, kind="stable").argsort(axis=1)
        columns = rows.shape[1]
        position = ranks / (columns - 1) - 0.5 if columns > 1 else np.zeros(rows.shape)
        share = (1 - drop_rate + window * position).reshape(entries.shape)
        kept = np.where(uniform("della", seed, task, name, entries.shape) < share, entries, 0)
        if rescale == "probability":
            return kept / share
        rest = np.abs(kept).sum()
        return kept * (np.abs(entries).sum() / rest if rescale == "l1" and rest else 1)

    return lambda vectors, tasks: reduce(
        [{name: sparse(name, v[name], task) for name in v} for v, task in zip(vectors, tasks, strict=True)], tasks
    )


CASES.update(
    {
        "Breadcrumbs": Case(merging.Breadcrumbs, middle_kept(0.85, 0.007, total(0.3))),
        "Breadcrumbs tails": Case(
            lambda: merging.Breadcrumbs(0.3, 0.25, scale=-0.5), middle_kept(0.3, 0.25, total(-0.5))
        ),
        "DELLA": Case(merging.DELLA, dropped_by_rank(0.3, 0.14, "probability", 0, ties(1.0, "tensor", "mean", 1.1))),
        "DELLA l1, task arithmetic": Case(
            lambda: merging.DELLA(0.6, window=0.5, rescale="l1", seed=5, reducer=merging.TaskArithmetic(0.5)),
            dropped_by_rank(0.6, 0.5, "l1", 5, total(0.5)),
        ),
        "DELLA none, max": Case(
            lambda: merging.DELLA(0.5, rescale="none", reducer=merging.MagMax()),
            dropped_by_rank(0.5, 0.14, "none", 0, max_magnitude(0.5)),
        ),
    }
)


def emr_unified(undecided: str) -> Batch:
    def rule(taus):
        total = taus.sum(axis=0)
        sign = np.where(total == 0, -1 if undecided == "negative" else 0, np.sign(total))
        return sign * np.where(taus * sign > 0, np.abs(taus), 0).max(axis=0)

    return each(rule)


def emr_view(vectors: list[Vector], position: int, rescale: str = "l1", undecided: str = "zero") -> Vector:
    unified = emr_unified(undecided)(vectors, [])
    own = vectors[position]
    masked = {name: np.where(own[name] * unified[name] > 0, unified[name], 0) for name in own}

    def size(vector):
        sizes = [(np.abs(entries).sum(), max(entries.size, 1)) for entries in vector.values()]
        return sum(total / (count if rescale == "tensor_mean" else 1) for total, count in sizes)

    return {name: entries * size(own) / (size(masked) or 1) for name, entries in masked.items()}


CASES.update(
    {
        "EMR": Case(merging.EMR, emr_unified("zero")),
        "EMR negative": Case(
            lambda: merging.EMR(0.5, rescale="tensor_mean", undecided="negative"),
            lambda vectors, tasks: {
                name: 0.5 * entries for name, entries in emr_unified("negative")(vectors, tasks).items()
            },
        ),
    }
)


def tall_masks(vectors: list[Vector], thresholds: list[float]) -> list[dict[str, np.ndarray]]:
    sums = {name: stacked(vectors, name).sum(axis=0) for name in vectors[0]}
    return [
        {name: np.abs(vector[name]) >= threshold * np.abs(sums[name] - vector[name]) for name in vector}
        for vector, threshold in zip(vectors, thresholds, strict=True)
    ]


def consensus(k: int, threshold: float | list[float], scale: float) -> Batch:
    def batch(vectors, tasks):
        thresholds = [threshold[task] if isinstance(threshold, list) else threshold for task in tasks]
        masks = tall_masks(vectors, thresholds)
        return {
            name: scale
            * stacked(vectors, name).sum(axis=0)
            * (sum(mask[name].astype(int) for mask in masks) >= min(k, len(vectors)))
            for name in vectors[0]
        }

    return batch


CASES.update(
    {
        "TALL": Case(merging.TALL, total(0.3)),
        "TALL scale": Case(lambda: merging.TALL(PREFERENCES, scale=-1.0), total(-1.0)),
        "Consensus": Case(merging.Consensus, consensus(2, 0.4, 0.3)),
        "Consensus of three": Case(
            lambda: merging.Consensus(3, threshold=PREFERENCES, scale=1.0), consensus(3, PREFERENCES, 1.0)
        ),
    }
)


def became(vectors: list[Vector], tasks: list[int]) -> Vector:
    flat = [np.concatenate([entries.ravel() for entries in vector.values()]) for vector in vectors]
    weights = [np.concatenate([f.ravel() for f in w.values()]) for w in fishers(vectors, tasks)]
    merged = flat[0]
    for position in range(1, len(flat)):
        squares = (flat[position] - merged) ** 2
        new, old = squares @ weights[position], squares @ np.sum(weights[:position], axis=0)
        share = new / (new + old) if new + old else 0.0
        merged = (1 - share) * merged + share * flat[position]
    ends = np.cumsum([entries.size for entries in vectors[0].values()])[:-1]
    parts = zip(vectors[0].items(), np.split(merged, ends), strict=True)
    return {name: part.reshape(entries.shape) for (name, entries), part in parts}


CASES.update({"BECAME": Case(merging.BECAME, became)})


def pcb(density: float, clip: float, scale: float) -> Batch:
    def batch(vectors, tasks):
        flat = np.stack([np.concatenate([entries.ravel() for entries in vector.values()]) for vector in vectors])
        count, size = flat.shape
        signs, magnitudes = np.sign(flat), np.abs(flat)
        ranked = np.sort(magnitudes, axis=1)
        low, high = ranked[:, [int(size * clip)]], ranked[:, [max(int(size * (1 - clip) - 1), 0)]]
        magnitudes = np.clip(magnitudes, low, high)
        span = np.where(high > low, high - low, 1)
        norms = signs * np.where(high > low, (magnitudes - low) / span, 1)
        scores = np.exp(count * norms**2) * np.stack([np.tanh(own * norms).sum(axis=0) for own in norms])
        weights = []
        for score in scores:
            threshold = np.sort(score)[min(int(size * (1 - density)), size - 1)]
            top, rounding = score.max(), 1e-9 * np.abs(score).max()
            if top - threshold <= rounding:
                weights.append((score >= threshold - rounding) * float(top > 0))
            else:
                weight = np.clip(score - threshold, 0, None) / (top - threshold)
                weights.append(np.where(weight > 1e-9, weight, 0))
        weights = np.stack(weights)
        merged = scale * (weights * signs * magnitudes).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-12)
        ends = np.cumsum([entries.size for entries in vectors[0].values()])[:-1]
        pieces = np.split(merged, ends)
        return {name: piece.reshape(vectors[0][name].shape) for name, piece in zip(vectors[0], pieces, strict=True)}

    return batch


CASES.update(
    {
        "PCB": Case(merging.PCB, pcb(0.05, 0.01, 1.2)),
        "PCB dense": Case(lambda: merging.PCB(1.0, clip=0.0, scale=0.5), pcb(1.0, 0.0, 0.5)),
        "PCB half": Case(lambda: merging.PCB(0.5, clip=0.1, scale=-1.0), pcb(0.5, 0.1, -1.0)),
    }
)


CASES.update({"MaTS": Case(merging.MaTS, regmean(1.0, 0.0, 1.0))})


def tunable_max(preference: list[float] | None, scale: float, seed: int) -> Batch:
    def rule(name, taus, tasks):
        shares = np.ones(len(tasks)) if preference is None else np.array([preference[task] for task in tasks])
        quotas = (taus[0].size * (shares / sum(shares.tolist()))).astype(int)
        quotas[: taus[0].size - quotas.sum()] += 1  # fewer than there are tasks
        sizes = np.abs([tau.ravel() for tau in taus]) * (quotas > 0)[:, None]
        owner = sizes.argmax(axis=0)

        def too_many(task):
            won = np.flatnonzero(owner == task)
            drawn = uniform("tunable_magmax", seed, tasks[task], name, (taus[0].size,))[won]
            return won[np.argsort(drawn, kind="stable")][: max(0, len(won) - quotas[task])]

        for task in range(len(tasks) - 1, 0, -1):
            lost = too_many(task)
            owner[lost] = sizes[:task, lost].argmax(axis=0)
        free = too_many(0).tolist()
        counts = np.bincount(owner, minlength=len(tasks))
        for fits in (lambda entry, task: sizes[1:, entry].argmax() + 1 == task, lambda entry, task: True):
            for task in range(len(tasks) - 1, 0, -1):
                for entry in list(free) if counts[task] < quotas[task] else []:
                    if counts[task] < quotas[task] and fits(entry, task):
                        owner[entry] = task
                        counts[task] += 1
                        free.remove(entry)
        return scale * np.stack([tau.ravel() for tau in taus])[owner, np.arange(taus[0].size)].reshape(taus[0].shape)

    return lambda vectors, tasks: {name: rule(name, stacked(vectors, name), tasks) for name in vectors[0]}


CASES.update(
    {
        "TunableMagMax": Case(merging.TunableMagMax, tunable_max(None, 0.5, 0)),
        "TunableMagMax preference": Case(
            lambda: merging.TunableMagMax(PREFERENCES[::-1], scale=1.0, seed=4), tunable_max(PREFERENCES[::-1], 1.0, 4)
        ),
        "TunableMagMax first": Case(
            lambda: merging.TunableMagMax(PREFERENCES, scale=-1.0), tunable_max(PREFERENCES, -1.0, 0)
        ),
    }
)
