from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.references import Batch, Case, dropped, max_magnitude, model_stock, norm, ties, total, trimmed_by_tensor

from clmerge.merging import (
    EMR,
    PAINT,
    TALL,
    TIES,
    ByTask,
    ClipNorm,
    MagMax,
    ModelStock,
    Pipeline,
    Quantise,
    RandomDrop,
    Scale,
    TrimTensor,
)


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


def trim_tensor_first(density: float, reduce: Batch) -> Batch:
    return lambda vectors, tasks: reduce([trimmed_by_tensor(vector, density) for vector in vectors], tasks)


def clipped(max_norm: float, reduce: Batch) -> Batch:
    def batch(vectors, tasks):
        merged = reduce(vectors, tasks)
        factor = min(1.0, max_norm / norm(merged)) if norm(merged) else 1.0
        return {name: factor * entries for name, entries in merged.items()}

    return batch


CASES = {
    "ByTask": Case(
        lambda: Pipeline(TIES(1.0), sparsifier=ByTask([TrimTensor(1 / (2 + task)) for task in range(16)])),
        by_task(lambda task: 1 / (2 + task), ties(1.0, "model", "mean", 1.0)),
    ),
    "Pipeline": Case(Pipeline, total(0.3)),
    "Pipeline trim, MagMax, scale": Case(
        lambda: Pipeline(MagMax(), sparsifier=TrimTensor(0.4), finisher=Scale(3.0)),
        trim_tensor_first(0.4, max_magnitude(1.5)),
    ),
    "Pipeline one bit, TALL": Case(lambda: Pipeline(TALL(), sparsifier=Quantise(1)), one_bit(total(0.3))),
    "Pipeline one bit, MagMax": Case(lambda: Pipeline(MagMax(), sparsifier=Quantise(1)), one_bit(max_magnitude(0.5))),
    "Pipeline drop, Model Stock": Case(
        lambda: Pipeline(ModelStock(), sparsifier=RandomDrop(0.5)),
        dropped(0.5, "probability", 0, model_stock(1.0)),
    ),
    "Pipeline MagMax, clip": Case(
        lambda: Pipeline(MagMax(), finisher=ClipNorm(0.8)),
        clipped(0.8, max_magnitude(0.5)),
        homogeneous=False,
    ),
}


def test_the_reducer_that_was_handed_over_is_left_alone():
    reducer = MagMax(scale=1.0)
    reducer.update({"w": torch.tensor([9.0])})
    pipeline = Pipeline(reducer)
    pipeline.update({"w": torch.tensor([1.0])})
    assert pipeline.compute()["w"].item() == 1.0
    assert reducer.compute()["w"].item() == 9.0
    assert reducer.num_tasks == 1


def test_the_metric_sees_the_finished_vector():
    seen = []
    pipeline = Pipeline(PAINT((0.0, 1.0)), sparsifier=TrimTensor(0.5), finisher=Scale(10.0))
    pipeline.update({"w": torch.tensor([1.0, 2.0])}, score=lambda vector: seen.append(vector["w"].tolist()) or 0.0)
    assert seen == [[0.0, 0.0], [0.0, 20.0]]


def test_state_of_the_reducer_travels_with_the_pipeline():
    first = Pipeline(MagMax(), finisher=Scale(2.0))
    first.update({"w": torch.tensor([1.0])}, base="abc")
    second = Pipeline(MagMax(), finisher=Scale(2.0)).to("cpu")
    second.load_state_dict(first.state_dict())
    assert second.compute()["w"].item() == 1.0
    assert (second.num_tasks, second.base) == (1, "abc")
    with pytest.raises(ValueError, match="settings"):
        Pipeline(MagMax()).load_state_dict(first.state_dict())


def test_label_names_the_parts():
    pipeline = Pipeline(MagMax(), sparsifier=TrimTensor(0.5), finisher=Scale(2.0))
    assert pipeline.label == ("pipeline_reducer-magmax_sparsifier-trim_tensor_density0.5_finisher-scale_scale2.0")


def test_a_task_view_is_finished_like_the_whole():
    vectors = [{"w": torch.tensor([1.0, -2.0, 3.0])}, {"w": torch.tensor([-1.0, -1.0, 5.0])}]
    plain, scaled = EMR(), Pipeline(EMR(), finisher=Scale(2.0))
    for vector in vectors:
        plain.update(vector)
        scaled.update(vector)
    assert torch.equal(scaled.task_view(0)["w"], 2 * plain.task_view(0)["w"])
    with pytest.raises(TypeError, match="mask per task"):
        Pipeline().task_view(0)
