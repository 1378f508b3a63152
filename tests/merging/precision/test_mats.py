import pytest
import torch
from support.matrix_references import regmean
from support.references import Case

from clmerge.merging import MaTS, RegMean, TaskArithmetic
from clmerge.merging.precision.mats import conjugate_gradients

CASES = {"MaTS": Case(MaTS, regmean(1.0, 0.0, 1.0))}


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
    step = conjugate_gradients(start, lambda weights: weights @ gram, tau @ gram, steps=1)
    gradient = step @ gram - tau @ gram
    torch.testing.assert_close((gradient * (tau @ gram)).sum(), torch.tensor(0.0).double(), atol=1e-6, rtol=0)


def test_parameters_without_gram_matrix_stay_at_the_start():
    merger, arithmetic = MaTS(start=0.3), TaskArithmetic(0.3)
    for tau, _ in tasks():
        merger.update({"bias": tau[0]}, statistics={"gram": {}})
        arithmetic.update({"bias": tau[0]})
    torch.testing.assert_close(merger.compute(), arithmetic.compute())


def test_no_step_is_refused():
    with pytest.raises(ValueError, match="steps from 1 to 100,000"):
        MaTS(0)


def factors(num_tasks=3):
    generator = torch.Generator().manual_seed(1)
    for tau, gram in tasks(num_tasks):
        gradients = torch.randn(9, 4, generator=generator).double()
        yield tau, gram, gradients.t() @ gradients / 9


def folded(merger, which=range(3)):
    for task, (tau, gram, outputs) in enumerate(factors()):
        if task in which:
            merger.update({"w": tau}, task=task, statistics={"gram": {"w": gram}, "output_gram": {"w": outputs}})
    return merger


def test_both_factors_minimise_the_distance_in_the_kronecker_metric():
    full = sum(torch.kron(outputs, gram) for _, gram, outputs in factors())
    moment = sum(torch.kron(outputs, gram) @ tau.flatten() for tau, gram, outputs in factors())
    start = sum(tau for tau, *_ in factors()) / 3
    wanted = start.flatten() + torch.linalg.pinv(full, rtol=1e-12) @ (moment - full @ start.flatten())
    merger = folded(MaTS(2000, outputs=True))
    torch.testing.assert_close(merger.compute()["w"].flatten(), wanted, rtol=1e-6, atol=1e-8)


def test_one_task_with_both_factors_is_left_as_it_is():
    tau = next(factors())[0]
    torch.testing.assert_close(folded(MaTS(outputs=True), [0]).compute()["w"], tau)


def test_equal_output_factors_are_those_of_the_inputs_alone():
    both, inputs = MaTS(5, outputs=True), MaTS(5)
    for tau, gram in tasks():
        statistics = {"gram": {"w": gram}, "output_gram": {"w": torch.eye(4).double()}}
        both.update({"w": tau}, statistics=statistics)
        inputs.update({"w": tau}, statistics=statistics)
    torch.testing.assert_close(both.compute()["w"], inputs.compute()["w"])


def test_factors_of_all_tasks_are_kept_joined_and_saved():
    merger = folded(MaTS(3, outputs=True), [0])
    merger.merge_state(folded(MaTS(3, outputs=True), [1, 2]))
    twin = MaTS(3, outputs=True)
    twin.load_state_dict(merger.state_dict())
    whole = folded(MaTS(3, outputs=True))
    torch.testing.assert_close(twin.compute(), whole.compute())
    assert whole.state_size({"w": (4, 5)}, 3) == 4 * 20 + 8 * (20 + 3 * (5 * 5 + 4 * 4))
    assert not whole.removable
    assert not whole.exact_online


def test_output_factors_are_asked_for_and_checked():
    tau, gram, outputs = next(factors())
    merger = MaTS(outputs=True)
    for given, message in (({}, "got none"), ({"w": outputs[:3, :3]}, r"got \(3, 3\)")):
        with pytest.raises(ValueError, match=message):
            merger.update({"w": tau}, statistics={"gram": {"w": gram}, "output_gram": given})
    assert merger.num_tasks == 0
