import pytest
import torch

from clmerge.merging import MaTS, RegMean, TaskArithmetic
from clmerge.merging.mats import conjugate_gradients


def tasks(num_tasks=3):
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([9.0, 3.0, 1.0, 0.3, 0.0])  # the last input is always 0
    for _ in range(num_tasks):
        inputs = (torch.randn(20, 5, generator=generator) * scales).double()
        yield torch.randn(4, 5, generator=generator).double(), inputs.t() @ inputs


def merged(merger):
    for tau, gram in tasks():
        merger.update({"w": tau}, statistics={"gram": {"w": gram}})
    return merger.compute()["w"]


def test_many_steps_end_at_regmean_where_there_are_inputs_and_at_the_start_elsewhere():
    start = 0.3 * sum(tau for tau, _ in tasks())
    result = merged(MaTS(start=0.3))
    torch.testing.assert_close(result[:, :4], merged(RegMean(1.0, ridge=1e-14))[:, :4], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result[:, 4], start[:, 4])


def test_every_step_comes_nearer_to_the_tasks():
    def distance(weights):
        return sum(((weights - tau) @ gram * (weights - tau)).sum() for tau, gram in tasks())

    losses = [float(distance(merged(MaTS(steps)))) for steps in (1, 2, 3, 4)]
    mean = sum(tau for tau, _ in tasks()) / 3
    assert float(distance(mean)) > losses[0] > losses[1] > losses[2] > losses[3]


def test_the_first_step_is_steepest_descent_with_exact_line_search():
    start, (tau, gram) = torch.zeros(4, 5).double(), next(tasks())
    step = conjugate_gradients(start, gram, tau @ gram, steps=1)
    gradient = step @ gram - tau @ gram
    torch.testing.assert_close((gradient * (tau @ gram)).sum(), torch.tensor(0.0).double(), atol=1e-6, rtol=0)


def test_parameters_without_gram_matrix_stay_at_the_start():
    merger, arithmetic = MaTS(start=0.3), TaskArithmetic(0.3)
    for tau, _ in tasks():
        merger.update({"bias": tau[0]}, statistics={"gram": {}})
        arithmetic.update({"bias": tau[0]})
    torch.testing.assert_close(merger.compute(), arithmetic.compute())


def test_no_step_is_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        MaTS(0)
