import numpy as np
import pytest
import torch

from clmerge.evaluation.diversity import ensemble_terms, locality


def predictions(number=4, images=60, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(images, classes, generator=generator, dtype=torch.float64)
    logits = [common + torch.randn(images, classes, generator=generator, dtype=torch.float64) for _ in range(number)]
    labels = torch.randint(classes, (images,), generator=generator)
    return [one.softmax(1) for one in logits], torch.stack(logits).mean(0).softmax(1), labels


def test_terms_are_those_of_a_slow_transcription():
    members, soup, labels = predictions()
    found = ensemble_terms(members, soup, labels)
    errors = np.stack([one.numpy() for one in members]) - np.eye(5)[labels.numpy()]  # member, image, class
    number, images, _ = errors.shape
    bias = errors.mean(axis=1)
    variance = covariance = 0.0
    for m in range(number):
        for n in range(number):
            value = sum((errors[m, x] - bias[m]) @ (errors[n, x] - bias[n]) for x in range(images)) / images
            variance += value / number * (m == n)
            covariance += value / (number * (number - 1)) * (m != n)
    assert found["bias"] == pytest.approx((bias.mean(axis=0) ** 2).sum(), rel=1e-12)
    assert found["variance"] == pytest.approx(variance, rel=1e-12)
    assert found["covariance"] == pytest.approx(covariance, rel=1e-12)
    mean = errors.mean(axis=0)
    assert found["ensemble_error"] == pytest.approx((mean**2).sum(axis=1).mean(), rel=1e-12)
    assert found["member_error"] == pytest.approx((errors**2).sum(axis=2).mean(), rel=1e-12)
    gap = soup.numpy() - np.stack([one.numpy() for one in members]).mean(axis=0)
    assert found["gap"] == pytest.approx((gap**2).sum(axis=1).mean(), rel=1e-12)
    answers = [one.argmax(1).tolist() for one in members]
    differing = single = shared = 0
    for m in range(number):
        for n in range(m):
            for a, b, truth in zip(answers[m], answers[n], labels.tolist(), strict=True):
                differing += a != b
                single += (a == truth) != (b == truth)
                shared += a != truth and b != truth
    assert found["disagreement"] == pytest.approx(differing / 6 / images)
    assert found["ratio_error"] == pytest.approx(single / shared)


@pytest.mark.parametrize("number", [2, 3, 7])
def test_both_decompositions_hold_exactly(number):
    members, soup, labels = predictions(number, seed=number)
    found = ensemble_terms(members, soup, labels)
    parts = found["bias"] + found["variance"] / number + (1 - 1 / number) * found["covariance"]
    assert found["ensemble_error"] == pytest.approx(parts, rel=1e-12)
    assert found["ensemble_error"] == pytest.approx(found["member_error"] - found["ambiguity"], rel=1e-12)


def test_equal_members_neither_differ_nor_gain():
    [one, *_], _, labels = predictions()
    found = ensemble_terms([one, one, one], one, labels)
    assert found["disagreement"] == 0
    assert found["ambiguity"] == pytest.approx(0, abs=1e-20)
    assert found["gap"] == pytest.approx(0, abs=1e-20)
    assert found["ratio_error"] == 0
    assert found["covariance"] == pytest.approx(found["variance"])
    perfect = torch.eye(5, dtype=torch.float64)[labels]
    assert ensemble_terms([perfect, perfect], perfect, labels)["ratio_error"] is None


def test_what_is_no_set_of_members_is_refused():
    members, soup, labels = predictions()
    with pytest.raises(ValueError, match="two members or more"):
        ensemble_terms(members[:1], soup, labels)
    with pytest.raises(ValueError, match="a label of every image"):
        ensemble_terms(members, soup, labels[:-1])


def test_locality_is_the_largest_distance_from_the_average():
    generator = torch.Generator().manual_seed(0)
    vectors = [{"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)} for _ in "abc"]
    flat = np.stack([torch.cat([one["a"].flatten(), one["b"]]).double().numpy() for one in vectors])
    expected = np.linalg.norm(flat - flat.mean(axis=0), axis=1).max()
    assert locality(vectors) == pytest.approx(expected, rel=1e-12)
    assert locality([vectors[0], vectors[0]]) == 0
