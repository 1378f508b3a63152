"""Probes of watermarks and fingerprints."""

import math

import pytest
import torch

from clmerge.evaluation.probes import FingerprintHits, Occasion, Seen, WatermarkBits
from clmerge.evaluation.probes.significance import binomial_tail, false_positive_rate
from clmerge.streams import ClassIncremental, SklearnDigits
from clmerge.streams.transforms import Fingerprinted
from clmerge.weights.secrets import Secret

OCCASION = Occasion(["a", "b"], [[0, 1], [2, 3]], 4, num_seen=2)


@pytest.mark.parametrize(("hits", "n", "share"), [(26, 32, 0.5), (51, 64, 0.5), (6, 10, 0.1), (0, 5, 0.3), (5, 5, 0.3)])
def test_the_tail_is_the_sum_of_exact_terms(hits, n, share):
    exact = sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(hits, n + 1))
    assert binomial_tail(hits, n, share) == pytest.approx(exact, rel=1e-10)


def test_published_thresholds():
    """Bits needed at a false positive rate of 1e-3: 26 of 32, 45 of 64, 82 of 128; hits of 10 at 0.1: 6."""
    for n, share, least in ((32, 0.5, 26), (64, 0.5, 45), (128, 0.5, 82), (10, 0.1, 6)):
        assert binomial_tail(least, n, share) <= 1e-3 < binomial_tail(least - 1, n, share)
    assert binomial_tail(1, 3, 0.0) == 0.0
    assert binomial_tail(1, 3, 1.0) == 1.0
    assert false_positive_rate([26, 16, 16, 16], 32, 0.5, 1e-3) == 0.25


def test_a_watermark_is_found_by_its_key_and_no_other():
    secret = Secret("mine", 32)
    matrix = torch.stack([secret.read(unit) for unit in torch.eye(600)], dim=1)
    tau = torch.linalg.lstsq(matrix, (2.0 * secret.message - 1).unsqueeze(1)).solution[:, 0].view(20, 30)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(20, 30, generator=generator), "other": torch.randn(5, generator=generator)}
    weights = {"w": base["w"] + tau, "other": base["other"]}
    found = WatermarkBits("mine", "w", bits=32).measure(weights, base, OCCASION)
    assert (found.value, found.n) == (1.0, 32)
    assert found.values["p_value"] == pytest.approx(2.0**-32)
    assert found.values["false_positive_rate"] <= 0.05
    stranger = WatermarkBits("yours", "w", bits=32).measure(weights, base, OCCASION)
    assert stranger.values["p_value"] > 1e-3
    nothing = WatermarkBits("mine", "w", bits=32).measure(base, base, OCCASION)
    assert math.isnan(nothing.value)


def test_random_keys_find_random_bits():
    """400 keys at level 0.05 in weights without a mark: the exact rate is the largest tail of 64 bits below it."""
    generator = torch.Generator().manual_seed(1)
    weights = {"w": torch.randn(300, generator=generator)}
    probe = WatermarkBits("mine", "w", of="weights", random_keys=400, level=0.05)
    rate = max(binomial_tail(k, 64, 0.5) for k in range(65) if binomial_tail(k, 64, 0.5) <= 0.05)
    found = probe.measure(weights, weights, OCCASION).values["false_positive_rate"]
    assert abs(found - rate) < 4 * math.sqrt(rate * (1 - rate) / 400)


def test_fingerprint_hits_are_counted_with_their_p_value():
    probe = FingerprintHits("mine", n=4, random_keys=2, labels="all", level=0.3)
    tasks = torch.zeros(4, dtype=torch.long)
    secret = Seen(torch.tensor([[1.0], [1.0], [1.0], [0.0]]).double(), tasks)
    random = Seen(torch.tensor([[0.0]] * 4 + [[1.0]] * 2 + [[0.0]] * 2).double(), torch.zeros(8, dtype=torch.long))
    found = probe.summary({"secret": secret, "random": random}, OCCASION)
    assert found.value == 0.75
    assert found.per_task[0] == 0.75
    assert math.isnan(found.per_task[1])
    assert found.n == [4, 0]
    assert found.values["p_value"] == pytest.approx(4 * 0.25**3 * 0.75 + 0.25**4)
    tail = 6 * 0.25**2 * 0.75**2 + 4 * 0.25**3 * 0.75 + 0.25**4
    assert found.values["false_positive_rate"] == (0.5 if tail <= 0.3 else 0.0)
    own = FingerprintHits("mine", n=4, random_keys=2, chance=0.5).summary(
        {"secret": secret, "random": random}, OCCASION
    )
    assert own.values["p_value"] == pytest.approx(5 / 16)


def test_the_probe_asks_for_the_images_that_were_trained_on():
    stream = ClassIncremental(SklearnDigits()).turned_into([Fingerprinted("mine", task=1, n=5, repeat=2)])
    probe = FingerprintHits("mine", task=1, n=5)
    probe.check(stream)
    (plan,) = probe.parts(stream)["secret"].values()
    trained = stream.dataset(1, "train")
    last = len(trained) - 5
    for index in range(5):
        assert plan.images.image(index).tobytes() == trained.image(last + index).tobytes()
        assert plan.targets[index] == trained.targets[last + index]
    assert len(probe.parts(stream)["random"][1].indices) == 20 * 5
    with pytest.raises(ValueError, match="expected the task of FingerprintHits"):
        FingerprintHits("mine", task=9).check(stream)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WatermarkBits("mine", "w", random_keys=0),
        lambda: WatermarkBits("mine", "w", bits=0),
        lambda: FingerprintHits("mine", n=0),
        lambda: FingerprintHits("mine", chance=1.0),
    ],
)
def test_wrong_settings_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_the_key_is_not_told():
    for told in (WatermarkBits("my secret", "w"), FingerprintHits("my secret"), Fingerprinted("my secret")):
        assert "my secret" not in repr(told)
        assert "sha256:" in repr(told)
    assert "my secret" not in str(WatermarkBits("my secret", "w").described())
