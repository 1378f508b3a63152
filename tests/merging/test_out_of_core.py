import pytest
import torch
from support.merger_cases import CASES
from support.references import statistics_of

from clmerge.merging import (
    DARE,
    PAINT,
    TIES,
    MagMax,
    Pipeline,
    Scale,
    TaskArithmetic,
    TrimModel,
    WeightAverage,
    out_of_core,
)
from clmerge.merging.out_of_core import merge_out_of_core, working_memory
from clmerge.merging.scope import Tally
from clmerge.merging.sparsify.sparsifier import keep_from

SHAPES = {"b.weight": (40, 50), "a.weight": (7, 3), "bias": (5,), "scalar": (), "large": (160, 160)}


class Held:
    """Task vectors in memory that are read through one buffer, as those on disk are."""

    def __init__(self, vectors, tasks=None):
        self.vectors = vectors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in vectors[0].items()}
        self.tasks = range(len(vectors)) if tasks is None else tasks
        self.buffers = {}

    def dtype(self, task, name):
        return self.vectors[task][name].dtype

    def kind(self, name):
        return self.vectors[0][name].dtype

    def read(self, task, pack, piece=None):
        tau = torch.cat([self.vectors[task][name].reshape(-1) for name in pack.names])
        tau = tau if piece is None else tau[piece]
        if tau.dtype not in self.buffers:
            self.buffers[tau.dtype] = torch.empty(160 * 160 + 2048, dtype=tau.dtype)
        return self.buffers[tau.dtype][: tau.numel()].copy_(tau)

    def statistics(self, position, names):
        return statistics_of(self.tasks[position], {name: self.shapes[name] for name in names})

    def sample(self, task, pack, step):
        return torch.cat([self.vectors[task][name].reshape(-1) for name in pack.names])[::step]


def merged_by(merger, vectors):
    packs = merge_out_of_core(merger, vectors)
    return {name: tensor for pack, flat in packs for name, tensor in pack.parts(flat).items()}


@pytest.fixture(autouse=True, params=[1000, 1 << 19])
def piece_size(request, monkeypatch):
    monkeypatch.setattr(out_of_core, "_PIECE", request.param)


def normal(num_tasks, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [{n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()} for _ in range(num_tasks)]


def eighths(num_tasks, seed):
    """Few different values: many ties, and sums that are exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randint(-3, 4, s, generator=generator) / 8 for n, s in SHAPES.items()} for _ in range(num_tasks)]


def assert_same_bits(merger, vectors):
    whole = type(merger)(**{key: getattr(merger, key) for key in merger.settings()})
    shapes = {name: tuple(tensor.shape) for name, tensor in vectors[0].items()}
    for task, vector in enumerate(vectors):
        whole.update(vector, task=task, statistics=statistics_of(task, shapes if whole.requires else {}))
    found = merged_by(merger, Held(vectors))
    expected = whole.compute()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    assert merger.num_tasks == 0  # the rule itself was not used


def can_be_merged_from_disk(merger):
    measured = merger.requires_score or merger.requires_gradient
    return not measured and not merger.requires - {"weights", "samples", "steps"}


@pytest.mark.parametrize("label", [label for label, case in CASES.items() if can_be_merged_from_disk(case.build())])
def test_every_rule_gives_the_bits_of_memory(label):
    assert_same_bits(CASES[label].build(), normal(4))


@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
@pytest.mark.parametrize("trim", ["model", "tensor"])
@pytest.mark.parametrize("seed", range(4))
def test_ties_with_equal_entries_and_zero_sums(trim, merge, seed):
    vectors = eighths(2 + seed, seed)
    assert_same_bits(TIES(0.3, trim=trim, merge=merge), vectors)
    assert_same_bits(TIES(0.3, trim=trim, merge=merge), [{n: -t for n, t in vector.items()} for vector in vectors])


@pytest.mark.parametrize("last", [1.0, 0.0, -1.0])
def test_the_largest_magnitude_without_a_prevailing_sign(last):
    others = [{"first": sign * torch.tensor([2.0, -3.0]), "last": torch.full((9,), last)} for sign in (1, -1)]
    assert_same_bits(TIES(1.0, merge="max"), others)
    merged = merged_by(TIES(1.0, merge="max"), Held(others))
    assert merged["first"].tolist() == [last * 2.0, last * 3.0]


@pytest.mark.parametrize("last", [1.0, -1.0])
def test_a_wrong_guess_of_the_prevailing_sign_is_put_right(last):
    """Only the last parameter has a prevailing sign, when the first one's zero sums are decided already."""
    vectors = [{"first": sign * torch.tensor([2.0, -3.0]), "last": torch.full((9,), last)} for sign in (1, -1)]
    assert_same_bits(TIES(1.0, scale=1.0), vectors)
    merged = merged_by(TIES(1.0), Held(vectors))
    assert merged["first"].sign().tolist() == [last, last]


def test_float64_and_density_one():
    assert_same_bits(TIES(0.2), normal(3, torch.float64))
    assert_same_bits(TIES(1.0), normal(2))


def test_a_model_wide_trim_before_another_rule():
    assert_same_bits(Pipeline(MagMax(), sparsifier=TrimModel(0.2), finisher=Scale(2.0)), normal(3))
    assert_same_bits(DARE(0.5, reducer=TIES(0.2)), normal(3))


def test_a_rule_that_only_declares_what_it_needs_is_streamed():
    """No rule's class is known to the walker: one with a threshold and one that counts votes, from here."""

    class _AboveMedian(TaskArithmetic):
        """The sum of the entries above the median magnitude of their task vectors."""

        scope = "thresholds"

        def threshold_rank(self, total):
            return total // 2

        def with_thresholds(self, thresholds):
            known = _AboveMedian()
            known.known, known.scope = thresholds, "entry"
            return known

        def _plan(self, vector, step):
            return self.known[step.task]

        def _fold_block(self, slots, tau, step, plan):
            slots["sum"].add_(keep_from(tau, plan))

    vectors = eighths(3, 5)
    expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for vector in vectors:
        entries = torch.cat([tensor.reshape(-1) for tensor in vector.values()]).abs()
        threshold = entries.sort(descending=True).values[len(entries) // 2 - 1]
        for name, tensor in vector.items():
            expected[name] += torch.where(tensor.abs() >= threshold, tensor, 0.0)
    found = merged_by(_AboveMedian(scale=1.0), Held(vectors))
    assert all(torch.allclose(found[name].view(shape), 0.3 * expected[name]) for name, shape in SHAPES.items())

    class _Majority(TaskArithmetic):
        """1 where the tasks cancel out, times the sign of most sums of the model."""

        def tally(self):
            [slots] = self._slots.values()
            return Tally(int(slots["sum"].sign().sum()), is_open=bool((slots["sum"] == 0).any()))

        def decide(self, votes):
            return 1 if votes > 0 else -1

        def compute_decided(self, decision):
            return {name: slots["sum"].eq(0).float() * decision for name, slots in self._slots.items()}

    for last in (1.0, -1.0):
        others = [{"a": sign * torch.ones(100, 60), "b": torch.full((100, 90), last)} for sign in (1, -1)]
        assert merged_by(_Majority(), Held(others))["a"].unique().tolist() == [last]


def test_memory_does_not_grow_with_the_tasks_but_with_the_scope():
    sizes = {str(number): (300, 300) for number in range(50)}
    assert working_memory(TIES(), sizes, 2) == working_memory(TIES(), sizes, 100)
    assert working_memory(DARE(reducer=TIES()), sizes, 2) > 25 * working_memory(TIES(), sizes, 2)


def test_a_rule_that_needs_more_than_vectors_is_refused():
    with pytest.raises(ValueError, match="score"):
        next(merge_out_of_core(PAINT(), Held(normal(2))))


def test_an_overflow_is_refused():
    vectors = [{"w": torch.full((3,), 3e38)}] * 2
    with pytest.raises(RuntimeError, match="overflow in 'w'"):
        merged_by(TIES(1.0, merge="sum"), Held(vectors))


@pytest.mark.parametrize("label", [label for label, case in CASES.items() if can_be_merged_from_disk(case.build())])
def test_many_small_parameters_are_merged_together_with_the_bits_of_each(label):
    """Of sizes at which vector instructions leave some entries over, other ones in a pack than in the parameter."""
    generator = torch.Generator().manual_seed(1)
    shapes = {f"{size}.weight": (size % 5 + 1, size) for size in range(14)} | {
        f"{size}.bias": (size,) for size in (1, 9)
    }
    vectors = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3)]
    for vector in vectors:
        vector["1.weight"], vector["9.weight"] = vector["1.weight"].double(), vector["9.weight"].double()
    assert_same_bits(CASES[label].build(), vectors)


def test_many_small_parameters_are_read_together():
    reads = []

    class Counted(Held):
        def read(self, task, pack, piece=None):
            reads.append(pack.names)
            return super().read(task, pack, piece)

    vectors = [{str(number): torch.randn(3, 2) for number in range(300)} for _ in range(2)]
    for merger in (TaskArithmetic(), TIES(trim="tensor"), TIES()):
        merged_by(merger, Counted(vectors))
    assert len(reads) < 60


@pytest.mark.parametrize("merger", [MagMax(), TIES(1.0, merge="sum"), TIES(trim="tensor", merge="sum"), DARE(0.1)])
@pytest.mark.parametrize("bad", [3e38, float("nan")])
def test_what_is_wrong_with_one_of_many_parameters_has_its_name(merger, bad):
    vectors = [{"a": torch.ones(5), "b": torch.full((3,), bad), "c": torch.ones(2)} for _ in range(5)]
    if bad == 3e38 and isinstance(merger, MagMax):
        merger = WeightAverage(scale=5.0)
    with pytest.raises((ValueError, RuntimeError), match="'b'"):
        merged_by(merger, Held(vectors))
