import pytest
import torch

from clmerge.merging import KnOTS, Pipeline, TaskArithmetic, TruncateRank
from clmerge.merging.spectral.adapters import (
    adapter_of,
    mean_of_factors,
    negate_adapter,
    sum_adapters,
    truncate_adapter,
)
from clmerge.weights.factored import Product

SHAPES = {"fc.weight": ((8, 6), ()), "attn.in_proj_weight": ((6, 6), (3,))}


def adapter(seed, rank=2, scale=1.5, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        name: Product(draw(*slices, rank, columns), draw(*slices, rows, rank), scale)
        for name, ((rows, columns), slices) in shapes.items()
    }


def dense(found):
    return {name: part.dense() for name, part in found.items()}


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerance)


def test_concatenation_is_task_arithmetic_at_the_sum_of_the_ranks():
    adapters = [adapter(0), adapter(1, rank=3, scale=0.5), adapter(2, rank=1)]
    merged = sum_adapters(adapters, [0.3, -2.0, 1.0])
    taus = [dense(one) for one in adapters]
    expected = {n: 0.3 * taus[0][n] - 2.0 * taus[1][n] + taus[2][n] for n in SHAPES}
    assert_close(dense(merged), expected)
    assert merged["fc.weight"].a.shape == (6, 6)
    assert merged["attn.in_proj_weight"].a.shape == (3, 6, 6)


def test_an_adapter_may_leave_weights_out_or_share_one_factor_between_slices():
    whole = {"attn.in_proj_weight": Product(torch.randn(2, 6).double(), torch.randn(18, 2).double(), 2.0)}
    merged = sum_adapters([adapter(0), whole])
    expected = dense(adapter(0))
    expected["attn.in_proj_weight"] = expected["attn.in_proj_weight"] + whole["attn.in_proj_weight"].dense()
    assert_close(dense(merged), expected)


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_truncation_is_the_best_approximation_of_that_rank(rank):
    total = sum_adapters([adapter(0), adapter(1)])
    found = truncate_adapter(total, rank)
    for name, part in found.items():
        pieces = part.dense().chunk(3) if "in_proj" in name else [part.dense()]
        whole = total[name].dense().chunk(3) if "in_proj" in name else [total[name].dense()]
        for piece, matrix in zip(pieces, whole, strict=True):
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
            torch.testing.assert_close(piece, best)
        assert part.a.shape[-2] <= rank
    again = adapter_of(dense(total), rank)
    assert_close(dense(again), dense(found))


def test_negation_flips_the_product():
    assert_close(dense(negate_adapter(adapter(0))), {name: -tensor for name, tensor in dense(adapter(0)).items()})


def test_the_mean_of_factors_is_not_that_of_the_changes():
    one, two = adapter(0), adapter(1)
    merged = mean_of_factors([one, two])["fc.weight"]
    a, b = (one["fc.weight"].a + two["fc.weight"].a) / 2, (one["fc.weight"].b + two["fc.weight"].b) / 2
    torch.testing.assert_close(merged.dense(), 1.5 * b @ a)
    exact = dense(sum_adapters([one, two], [0.5, 0.5]))["fc.weight"]
    assert (merged.dense() - exact).norm() > 0.3 * exact.norm()
    shared = {"w": Product(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    other = {"w": Product(torch.ones(1, 2), torch.zeros(2, 1), 1.0)}
    assert_close(dense(mean_of_factors([shared, other])), {"w": torch.full((2, 2), 0.5)})


def test_a_merger_at_constant_rank():
    taus = [{n: t.float() for n, t in dense(adapter(seed)).items()} for seed in range(3)]
    for rule in (TaskArithmetic(scale=1.0), KnOTS(density=0.5)):
        merger, full = Pipeline(rule, finisher=TruncateRank(2)), type(rule)(**rule.settings())
        for tau in taus:
            merger.update(tau)
            full.update(tau)
        assert_close(merger.compute(), dense(adapter_of(full.compute(), 2)))
    assert int(torch.linalg.matrix_rank(merger.compute()["fc.weight"], atol=1e-4)) == 2
    assert TruncateRank(1).finish({"bias": torch.ones(2)})["bias"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sum_adapters([]), "one coefficient for every adapter, got 0 for 0"),
        (lambda: sum_adapters([adapter(0)], [1.0, 2.0]), "got 2 for 1"),
        (
            lambda: sum_adapters([adapter(0), {"fc.weight": Product(torch.ones(1, 2), torch.ones(2, 1), 1.0)}]),
            r"one shape of 'fc\.weight' in all adapters, got \[\(2, 2\), \(8, 6\)\]",
        ),
        (lambda: mean_of_factors([adapter(0), adapter(1, rank=3)]), "in all 2 adapters, got 2 kinds in 2 of them"),
        (lambda: mean_of_factors([adapter(0), {}]), "got 1 kinds in 1 of them"),
        (lambda: truncate_adapter(adapter(0), 0), "rank of 1 or more, got 0"),
        (lambda: adapter_of({}, 0), "rank of 1 or more, got 0"),
        (lambda: TruncateRank(0), "rank of 1 or more, got 0"),
    ],
)
def test_what_makes_no_adapter_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
