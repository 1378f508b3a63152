import json

import pytest
import torch

from clmerge.evaluation.diagnostics import diagnose_vectors
from clmerge.evaluation.diagnostics.vectors import layer_of
from clmerge.merging.matrices import Matrices
from clmerge.weights import TaskVectorBank

SHAPES = {
    "visual.conv1.weight": (4, 3, 2, 2),
    "visual.class_embedding": (4,),
    "visual.transformer.resblocks.2.attn.in_proj_weight": (12, 4),
    "visual.transformer.resblocks.2.attn.in_proj_bias": (12,),
    "visual.transformer.resblocks.10.mlp.c_fc.weight": (16, 4),
    "visual.ln_post.weight": (4,),
    "visual.ln_post.bias": (4,),
    "scalar": (),
}


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(3)]


@pytest.fixture
def bank(tmp_path, vectors):
    bank = TaskVectorBank(tmp_path / "bank")
    for task, vector in enumerate(vectors):
        bank.append(task, vector, name=["first", "", "third"][task])
    return bank


def flat(vector, names):
    return torch.cat([vector[name].double().reshape(-1) for name in names])


def test_whole_and_layers_against_flattened_vectors(bank, vectors):
    found = diagnose_vectors(bank)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["tasks"] == ["first", "task 2", "third"]
    groups = {"whole": list(SHAPES)}
    for name in SHAPES:
        groups.setdefault(layer_of(name), []).append(name)
    entries = {"whole": found["whole"]} | {entry["name"]: entry for entry in found["layers"]}
    assert entries.keys() == groups.keys()
    for layer, names in groups.items():
        rows = torch.stack([flat(vector, names) for vector in vectors])
        entry = entries[layer]
        assert entry["numel"] == rows.shape[1]
        assert entry["norm"] == pytest.approx(rows.norm(dim=1).tolist(), rel=1e-12)
        unit = rows / rows.norm(dim=1, keepdim=True)
        cosine = torch.tensor(entry["cosine"], dtype=torch.float64)
        torch.testing.assert_close(cosine, unit @ unit.T, rtol=1e-12, atol=1e-12)
        opposite = rows.sign().unsqueeze(0) * rows.sign().unsqueeze(1) < 0
        assert entry["sign_conflict"] == opposite.double().mean(dim=2).tolist()


def test_layers_and_matrices_come_in_order(bank):
    found = diagnose_vectors(bank)
    blocks = [entry["name"] for entry in found["layers"] if "resblocks" in entry["name"]]
    assert blocks == ["visual.transformer.resblocks.2", "visual.transformer.resblocks.10"]
    matrices = [entry["name"] for entry in found["matrices"]]
    assert [name.rsplit(".", 1)[-1] for name in matrices] == ["in_proj_weight", "weight"]
    assert "visual.ln_post" in [entry["name"] for entry in found["layers"]]  # weight and bias are one layer


def test_matrices_against_full_decompositions(bank, vectors):
    found = diagnose_vectors(bank, rank=2)
    assert found["rank"] == 2
    for entry in found["matrices"]:
        parts = [torch.linalg.svd(vector[entry["name"]].double(), full_matrices=False) for vector in vectors]
        assert entry["shape"] == list(SHAPES[entry["name"]])
        assert entry["layer"] == layer_of(entry["name"])
        for task, (_, s, _) in enumerate(parts):
            p = s / s.sum()
            assert entry["effective_rank"][task] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-6)
        for one, (u, _, vh) in enumerate(parts):
            for other, (u2, _, vh2) in enumerate(parts):
                left = (u[:, :2].T @ u2[:, :2]).square().sum() / 2
                right = (vh[:2] @ vh2[:2].T).square().sum() / 2
                assert entry["left_overlap"][one][other] == pytest.approx(float(left), abs=1e-6)
                assert entry["right_overlap"][one][other] == pytest.approx(float(right), abs=1e-6)


def test_fused_weights_can_be_three_matrices(bank):
    found = diagnose_vectors(bank, matrices=Matrices(include=["*in_proj_weight"], split_qkv=True))
    names = [entry["name"].rsplit(".", 1)[-1] for entry in found["matrices"]]
    assert names == ["in_proj_weight[0]", "in_proj_weight[1]", "in_proj_weight[2]"]
    assert all(entry["shape"] == [4, 4] for entry in found["matrices"])


def test_some_tasks_only(bank, vectors):
    found = diagnose_vectors(bank, [2, 0])
    assert found["tasks"] == ["third", "first"]
    whole = diagnose_vectors(bank)["whole"]
    assert found["whole"]["norm"] == [whole["norm"][2], whole["norm"][0]]
    assert found["whole"]["cosine"][0][1] == pytest.approx(whole["cosine"][0][2], rel=1e-14)


def test_a_parameter_that_did_not_move_has_no_figures(tmp_path):
    bank = TaskVectorBank(tmp_path)
    bank.append(0, {"a.weight": torch.zeros(2, 2), "b": torch.ones(3)})
    bank.append(1, {"a.weight": torch.ones(2, 2), "b": torch.ones(3)})
    found = diagnose_vectors(bank)
    layer = found["layers"][0]
    assert (layer["name"], layer["norm"][0], layer["cosine"][0][1]) == ("a", 0.0, None)
    (matrix,) = found["matrices"]
    assert matrix["effective_rank"] == [None, pytest.approx(1.0)]
    assert matrix["left_overlap"][0] == [None, None]
    assert found["whole"]["cosine"][0][1] == pytest.approx(3 / (3**0.5 * 7**0.5))


def test_errors(bank, tmp_path):
    with pytest.raises(ValueError, match="two task vectors or more to compare, got 1"):
        diagnose_vectors(bank, [0])
    with pytest.raises(ValueError, match="two task vectors or more to compare, got 0"):
        diagnose_vectors(TaskVectorBank(tmp_path / "none"))
    with pytest.raises(ValueError, match="rank of 1 or more, got 0"):
        diagnose_vectors(bank, rank=0)
    with pytest.raises(IndexError, match="one of the tasks"):
        diagnose_vectors(bank, [0, 7])


def test_task_vectors_are_never_all_in_memory(tmp_path, monkeypatch):
    """Whole tensors of one task are decomposed at a time, and pairs are summed in pieces."""
    from clmerge.evaluation.diagnostics import pairs, vectors

    bank = TaskVectorBank(tmp_path)
    for task in range(6):
        bank.append(task, {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(task))})
    monkeypatch.setattr(pairs, "_ENTRIES", 600)
    sizes = []
    stack = torch.stack

    def watched(tensors, *args, **kwargs):
        sizes.append(sum(tensor.numel() for tensor in tensors))
        return stack(tensors, *args, **kwargs)

    monkeypatch.setattr(pairs.torch, "stack", watched)
    assert vectors.diagnose_vectors(bank)["whole"]["numel"] == 64 * 64
    assert max(sizes) <= 600
    assert sum(sizes) == 6 * 64 * 64
