import pytest
import torch

from clmerge.merging import EMR, PAINT, MagMax, Pipeline, Scale, TrimTensor


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
