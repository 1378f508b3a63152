import copy
import math

import pytest
import torch

from clmerge.merging import WeightAverage
from clmerge.training.trajectory import EMA, Accepting, Horizons, Latest, LossValley, Mean

RULES = {
    "Mean": lambda: Mean(start=0.0),
    "EMA": lambda: EMA(0.7),
    "EMA_warmup": lambda: EMA(0.9, warmup=True),
    "Latest": lambda: Latest(3),
    "LossValley": lambda: LossValley(2, 3),
    "Accepting": Accepting,
    "Horizons": lambda: Horizons([0.5, 0.9]),
}


def points(number, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in (("w", (3, 4)), ("b", (5,)))
        }
        for _ in range(number)
    ]


def fed(rule, given, scores=None):
    for position, point in enumerate(given):
        rule.collect(point)
        if rule.monitor is not None:
            rule.judge(1.0 if scores is None else scores[position])
    return rule.compute()


def mean(given):
    return {name: torch.stack([point[name].double() for point in given]).mean(0) for name in given[0]}


def close(first, second, tolerance=1e-12):
    assert first.keys() == second.keys()
    return all((first[name].double() - second[name].double()).abs().max() < tolerance for name in first)


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_constant_trajectory_is_returned_bit_for_bit(name, dtype):
    [point] = points(1, dtype=dtype)
    average = fed(RULES[name](), [point] * 11)
    assert average.keys() == point.keys()
    assert all(torch.equal(average[key], point[key].to(average[key].dtype)) for key in point)
    assert all(tensor.dtype == torch.promote_types(dtype, torch.float32) for tensor in average.values())


@pytest.mark.parametrize("name", RULES)
def test_what_was_collected_is_never_an_alias_of_live_weights(name):
    live = points(1)[0]
    rule = RULES[name]()
    average = copy.deepcopy(fed(rule, [live] * 4))
    for tensor in live.values():
        tensor.add_(1.0)
    assert same(rule.compute(), average)


def test_the_mean_is_that_of_weight_average_over_the_same_vectors():
    given = points(6)
    merger = WeightAverage()
    for point in given:
        merger.update({name: tensor.float() for name, tensor in point.items()})
    average = fed(Mean(start=0.0), given)
    assert close(average, mean(given))
    assert close(average, merger.compute(), 1e-6)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_ema_in_closed_form(n):
    b, given = 0.7, points(7)[:n]
    expected = {
        name: b ** (n - 1) * given[0][name] + (1 - b) * sum(b ** (n - i) * given[i - 1][name] for i in range(2, n + 1))
        for name in given[0]
    }
    assert close(fed(EMA(b), given), expected)


def test_ema_with_warm_up_counts_collections():
    given = points(4)
    expected = given[0]
    for n, point in enumerate(given[1:], 1):
        b = min(0.9, (1 + n) / (10 + n))
        expected = {name: b * expected[name] + (1 - b) * point[name] for name in point}
    assert close(fed(EMA(0.9, warmup=True), given), expected)
    assert same(fed(EMA(0.0), given), given[-1])


def test_latest_is_the_mean_of_the_last_k():
    given = points(6)
    for n in range(1, 7):
        assert close(fed(Latest(3), given[:n]), mean(given[max(0, n - 3) : n]))
    assert same(fed(Latest(1), given), given[-1])


def test_low_precision_weights_do_not_stall_the_average():
    rule = EMA(0.999)
    rule.collect({"w": torch.ones(3, dtype=torch.bfloat16)})
    for _ in range(2000):
        rule.collect({"w": torch.full((3,), 2.0, dtype=torch.bfloat16)})
    assert rule.compute()["w"][0] == pytest.approx(2 - 0.999**2000, abs=1e-4)


def valley(losses, n_converge, n_tolerance, tolerance):
    """Return the segments that SWAD averages, by the paper's definition on the whole list of losses."""
    for begin in range(len(losses) - n_converge + 1):
        window = losses[begin : begin + n_converge]
        if window[0] == min(window) and math.isfinite(sum(window)):
            break
    else:
        return [len(losses) - 1]
    threshold = sum(window) / n_converge * (1 + tolerance)
    chosen = []
    for segment in range(begin, len(losses)):
        if min(losses[segment : segment + n_tolerance]) > threshold:
            break
        chosen.append(segment)
    return chosen


@pytest.mark.parametrize("windows", [(3, 6), (3, 2), (1, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("steps", [1, 3])
def test_loss_valley_against_the_definition(windows, seed, steps):
    generator = torch.Generator().manual_seed(seed)
    n = 14
    shape = (torch.linspace(-2, 2, n) + 0.3 * seed - 0.5).square() + 0.5 * torch.rand(n, generator=generator) + 0.1
    losses = shape.tolist()
    given = points(n * steps, seed=seed)
    rule = LossValley(*windows, tolerance=0.3)
    for segment in range(n):
        for point in given[segment * steps : (segment + 1) * steps]:
            rule.collect(point)
        rule.judge(losses[segment])
        chosen = valley(losses[: segment + 1], *windows, 0.3)
        expected = mean([mean(given[one * steps : (one + 1) * steps]) for one in chosen])
        assert close(rule.compute(), expected), (segment, chosen)
        assert len(rule.tensors()) <= max(windows) + 2


def test_a_loss_that_is_no_number_neither_begins_nor_ends_a_valley_by_itself():
    given = points(6)
    losses = [3.0, math.nan, 1.0, 1.1, math.nan, 1.2]
    chosen = valley([loss if math.isfinite(loss) else math.inf for loss in losses], 2, 2, 0.3)
    assert chosen == [2, 3, 4, 5]
    assert close(fed(LossValley(2, 2), given, losses), mean(given[2:]))


def test_a_rejected_epoch_leaves_the_mean_as_it_was():
    given = points(5)
    rule = Accepting()
    scores = [0.5, 0.4, 0.5, math.nan, 0.7]
    before = None
    for point, score in zip(given, scores, strict=True):
        rule.collect(point)
        trial = copy.deepcopy(rule.candidate())
        rule.judge(score)
        if score in (0.5, 0.7):
            assert same(rule.compute(), trial)
        else:
            assert same(rule.compute(), before)
        before = copy.deepcopy(rule.compute())
    assert rule.accepted == 3
    assert close(before, mean([given[0], given[2], given[4]]))
    falling = Accepting(mode="min")
    fed(falling, given, [0.5, 0.6, 0.4, 0.4, 0.9])
    assert close(falling.compute(), mean([given[0], given[2], given[3]]))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_rule_that_goes_on_from_its_state_ends_with_the_same_bits(name, stop):
    given = points(9)
    scores = [3.0, 2.0, 1.0, 1.1, 1.2, 1.1, 4.0, 5.0, 6.0]
    whole = fed(RULES[name](), given, scores)
    first, second = RULES[name](), RULES[name]()
    fed(first, given[:stop], scores[:stop])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert same(fed(second, given[stop:], scores[stop:]), whole)
    assert second.count == 9
    second.reset()
    assert (second.count, second.nbytes, second.compute()) == (0, 0, {})


@pytest.mark.parametrize("name", ["Mean", "EMA", "Latest"])
def test_averages_are_linear_in_the_weights(name):
    given, base = points(5), points(1, seed=7)[0]
    moved = [{key: point[key] - base[key] for key in base} for point in given]
    average, vector = fed(RULES[name](), given), fed(RULES[name](), moved)
    assert close({key: average[key] - base[key] for key in base}, vector)


def test_the_variance_of_the_mean_falls_with_the_number_of_points():
    # Independent points of variance 1: the variance of a mean of n is 1/n; 4000 entries, 5 standard deviations.
    entries, n = 4000, 16
    generator = torch.Generator().manual_seed(0)
    rule = Mean(start=0.0)
    for _ in range(n):
        rule.collect({"w": torch.randn(entries, generator=generator, dtype=torch.float64)})
    variance = float(rule.compute()["w"].square().mean())
    assert abs(variance * n - 1) < 5 * math.sqrt(2 / entries)


def test_sizes():
    [point] = points(1, dtype=torch.bfloat16)
    entries = sum(tensor.numel() for tensor in point.values())
    sizes = {}
    for name, make in RULES.items():
        rule = make()
        fed(rule, [point] * 20)
        sizes[name] = rule.nbytes / entries / 4
    assert sizes == {"Mean": 1, "EMA": 1, "EMA_warmup": 1, "Latest": 3, "LossValley": 3, "Accepting": 1, "Horizons": 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mean(start=1.5), "start"),
        (lambda: Mean(every=0), "every"),
        (lambda: Mean(every="batch"), "every"),
        (lambda: EMA(1.0), "decay"),
        (lambda: Latest(0), "k of 1"),
        (lambda: LossValley(0), "n_converge"),
        (lambda: Accepting(mode="most"), "mode"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_without_a_monitor_are_not_judged():
    with pytest.raises(TypeError, match="judged by a validation"):
        Mean().judge(1.0)


def test_repr_names_all_settings():
    assert repr(EMA(0.5)) == (
        "EMA(decay=0.5, warmup=False, start=0.0, every=1, buffers='recompute', validates='training')"
    )
    assert repr(Accepting()) == "Accepting(monitor='val/accuracy', mode='max', start=0.0, buffers='recompute')"


def test_horizons_are_moving_averages_of_which_the_best_stays():
    given = points(9)
    rule = Horizons([0.0, 0.8, 0.95], warmup=False)
    fed(rule, given)
    choices = rule.choices()
    for decay in (0.0, 0.8, 0.95):
        assert same(choices[str(decay)], fed(EMA(decay), given))
    assert same(choices["0.0"], given[-1])
    rule.choose({"0.0": 0.5, "0.8": 0.75, "0.95": 0.75})  # the first of equals
    assert same(rule.compute(), choices["0.8"])
    assert rule.nbytes == 3 * sum(tensor.nbytes for tensor in given[0].values())
    rule.reset()
    assert rule.choices() == {}
    for decays in ([], [0.9, 0.9]):
        with pytest.raises(ValueError, match="different decays, one or more"):
            Horizons(decays)
    with pytest.raises(ValueError, match="decay from 0 to below 1"):
        Horizons([1.0])
