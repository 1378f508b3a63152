import json
from functools import partial
from itertools import combinations

import pytest
import torch
from support.bent import CLASSES
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from clmerge.evaluation.diagnostics import diagnose_models, diagnose_vectors, document
from clmerge.evaluation.diagnostics.models import combine
from clmerge.weights import TaskVectorBank, apply_task_vector


@pytest.fixture(scope="module")
def vectors(base):
    generator = torch.Generator().manual_seed(1)
    return [{n: 0.3 * torch.randn(w.shape, generator=generator) for n, w in base.items()} for _ in CLASSES]


@pytest.fixture(scope="module")
def merged(vectors):
    return {
        "sum": combine(*((1.0, vector) for vector in vectors)),
        "mean": combine(*((1 / 3, vector) for vector in vectors)),
    }


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(20, 3, 4, 4, generator=generator),
            torch.tensor(classes)[torch.randint(2, (20,), generator=generator)],
        )
        for classes in CLASSES
    ]


@pytest.fixture(scope="module")
def loaders(data):
    return [DataLoader(TensorDataset(*pair, torch.zeros(20)), batch_size=6) for pair in data]


@pytest.fixture(params=["task_agnostic", "task_aware"])
def found(request, module, base, vectors, merged, loaders):
    return diagnose_models(
        module,
        partial(apply_task_vector, base),
        vectors,
        merged,
        loaders,
        task_classes=CLASSES,
        setting=request.param,
        scale=0.5,
        num_images=15,
    )


@pytest.fixture
def behave(module, base, data, found):
    """An independent statement: loss, error, predictions and features of theta_0 + tau on the images of a task."""

    def run(tau, task):
        images, labels = data[task][0][:15], data[task][1][:15]
        state = {name: base[name] + tau[name] for name in base}
        with torch.no_grad():
            logits = functional_call(module, state, (images,))
            prefix = "backbone."
            features = functional_call(
                module.backbone, {n.removeprefix(prefix): w for n, w in state.items()}, (images,)
            )
        if found["setting"] == "task_aware":
            others = [c for c in range(6) if c not in CLASSES[task]]
            logits[:, others] = -torch.inf
        loss = float(functional.cross_entropy(logits, labels))
        predictions = logits.argmax(1)
        return loss, float((predictions != labels).double().mean()), predictions, features

    return run


def test_models_on_every_task(found, behave, vectors, merged, base):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["images"] == [15, 15, 15]
    assert list(found["models"]) == ["base", "expert", "sum", "mean"]
    for task in range(3):
        expert = behave(vectors[task], task)
        zero = {name: torch.zeros_like(w) for name, w in base.items()}
        for name, tau in {"base": zero, "expert": vectors[task], **merged}.items():
            loss, error, predictions, features = behave(tau, task)
            entry = {figure: values[task] for figure, values in found["models"][name].items() if figure != "sharpness"}
            assert entry == {
                "loss": pytest.approx(loss, rel=1e-5),
                "error": pytest.approx(error),
                "disagreement": pytest.approx(float((predictions != expert[2]).double().mean())),
                "representation_bias": pytest.approx(float((features - expert[3]).abs().mean()), rel=1e-5),
            }
        assert found["models"]["expert"]["disagreement"][task] == 0.0
        assert found["models"]["expert"]["representation_bias"][task] == 0.0
    assert any(found["models"]["sum"]["disagreement"])


def test_segments(found, behave, vectors, merged, base):
    zero = {name: torch.zeros_like(w) for name, w in base.items()}
    wanted = {("base", "expert", (t,)): (zero, vectors[t]) for t in range(3)}
    wanted |= {("expert", name, (t,)): (vectors[t], tau) for t in range(3) for name, tau in merged.items()}
    wanted |= {("expert", "expert", (s, t)): (vectors[s], vectors[t]) for s, t in combinations(range(3), 2)}
    segments = {(entry["from"], entry["to"], tuple(entry["tasks"])): entry for entry in found["segments"]}
    assert len(segments) == len(found["segments"])
    assert segments.keys() == wanted.keys()
    assert found["positions"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for key, (start, end) in wanted.items():
        entry = segments[key]
        for index, figure in enumerate(("loss", "error")):
            curve = []
            for share in found["positions"]:
                tau = {name: (1 - share) * start[name] + share * end[name] for name in base}
                curve.append(sum(behave(tau, task)[index] for task in key[2]) / len(key[2]))
            assert entry[figure] == pytest.approx(curve, rel=1e-5)
            line = [(1 - a) * curve[0] + a * curve[-1] for a in found["positions"]]
            expected = max(value - height for value, height in zip(curve, line, strict=True))
            assert entry[f"{figure}_barrier"] == pytest.approx(expected, abs=1e-6)
            assert entry[f"{figure}_barrier"] >= 0
    assert any(entry["loss_barrier"] > 0 for entry in found["segments"])


def test_disentanglement(found, behave, vectors):
    assert found["disentanglement"]["scale"] == 0.5
    xi = found["disentanglement"]["xi"]
    for s, t in combinations(range(3), 2):
        joint = {name: 0.5 * vectors[s][name] + 0.5 * vectors[t][name] for name in vectors[s]}
        errors = []
        for task in (s, t):
            alone = {name: 0.5 * tau for name, tau in vectors[task].items()}
            errors.append(float((behave(joint, task)[2] != behave(alone, task)[2]).double().mean()))
        assert xi[s][t] == xi[t][s] == pytest.approx(sum(errors) / 2)
    assert [xi[t][t] for t in range(3)] == [0.0] * 3
    assert max(max(row) for row in xi) > 0


def test_knowledge_is_shared_or_of_one_expert_alone(found, behave, vectors, merged, data):
    counts = {"shared": [0, 0], "unshared": [0, 0]}
    for task, (_, labels) in enumerate(data):

        def right(tau, task=task, labels=labels[:15]):
            return behave(tau, task)[2] == labels

        own = right(vectors[task])
        others = torch.stack([right(tau) for other, tau in enumerate(vectors) if other != task]).any(dim=0)
        for kind, known in (("shared", own & others), ("unshared", own & ~others)):
            counts[kind][0] += int(known.sum())
            counts[kind][1] += int((right(merged["mean"]) & known).sum())
    assert all(n for n, _ in counts.values())
    for kind, (n, kept) in counts.items():
        assert found["knowledge"][kind]["n"] == n
        assert found["knowledge"][kind]["remembered"]["mean"] == pytest.approx(kept / n)
        assert found["knowledge"][kind]["remembered"].keys() == {"base", "sum", "mean"}


def test_vectors_that_touch_nothing_of_each_other_are_disentangled(module, base, loaders):
    """Equal models on a segment have no barrier, and a zero vector disturbs nobody."""
    zero = {name: torch.zeros_like(w) for name, w in base.items()}
    other = {name: torch.ones_like(w) for name, w in base.items()}
    found = diagnose_models(
        module, partial(apply_task_vector, base), [zero, zero], {"same": zero}, loaders[:2], task_classes=CLASSES[:2]
    )
    assert found["disentanglement"]["xi"] == [[0.0, 0.0], [0.0, 0.0]]
    assert all(entry["loss_barrier"] == pytest.approx(0, abs=1e-12) for entry in found["segments"])
    found = diagnose_models(
        module, partial(apply_task_vector, base), [zero, other], {}, loaders[:2], task_classes=CLASSES[:2]
    )
    assert 0 < found["disentanglement"]["xi"][0][1] <= 0.5  # the zero vector's task only


def test_the_number_of_passes_is_as_documented(module, base, vectors, merged, loaders):
    passes = []

    def weights(tau):
        passes.append(1)
        return apply_task_vector(base, tau)

    diagnose_models(module, weights, vectors, merged, loaders, task_classes=CLASSES, num_points=4)
    tasks, mergers, inner = 3, 2, 2
    assert len(passes) == tasks * (2 + inner + mergers * (1 + inner) + (tasks - 1) * (2 + inner) + (2 + mergers))


def test_a_bank_will_do(tmp_path, module, base, vectors, loaders):
    bank = TaskVectorBank(tmp_path)
    for task, vector in enumerate(vectors):
        bank.append(task, vector)
    told = []
    weights = partial(apply_task_vector, base)
    arguments = {"task_classes": CLASSES, "num_images": 5, "num_points": 3}
    models = diagnose_models(module, weights, bank, {}, loaders, **arguments, progress=told.append)
    assert models == diagnose_models(module, weights, vectors, {}, loaders, **arguments)
    assert told == [f"diagnosing on task {task} of 3" for task in (1, 2, 3)]
    found = document(["a", "b", "c"], vectors=diagnose_vectors(bank), models=models)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    with pytest.raises(ValueError, match="diagnostics of 2 tasks, got vectors of 3"):
        document(["a", "b"], vectors=found["vectors"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_points": 2}, "num_points=2"),
        ({"num_images": 0}, "num_images=0"),
        ({"setting": "both"}, "setting='both'"),
        ({"task_classes": CLASSES[:2]}, "3 task vectors, got 3 loaders and classes of 2"),
    ],
)
def test_errors(module, base, vectors, loaders, changed, message):
    arguments = {"task_classes": CLASSES, **changed}
    with pytest.raises(ValueError, match=message):
        diagnose_models(module, partial(apply_task_vector, base), vectors, {}, loaders, **arguments)
