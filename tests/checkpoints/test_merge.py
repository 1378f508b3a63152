import json
import weakref
from functools import partial

import pytest
import torch
from checkpoints.test_formats import KINDS, saved
from safetensors.torch import load_file, save_file

from clmerge.checkpoints.ledger import KEY, configured_from
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.verify import verify
from clmerge.checkpoints.writer import SafetensorsWriter
from clmerge.merging import (
    DARE,
    PAINT,
    TIES,
    Ethos,
    FedNova,
    Fisher,
    GroupScale,
    MagMax,
    Pipeline,
    Scale,
    TrimModel,
    TrimTensor,
    WeightedAverage,
)
from clmerge.merging.vectors import packs
from clmerge.weights import TaskVectorBank, apply_task_vector, fingerprint, load_metadata, task_vector


def in_memory(merger, theta, models):
    for task, model in enumerate(models):
        merger.update(task_vector(model, theta), task=task)
    return apply_task_vector(theta, merger.compute())


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_kind_gives_the_bits_of_merging_in_memory(kind, base, theta, models, tmp_path):
    paths = []
    for index, model in enumerate(models):
        (tmp_path / str(index)).mkdir()
        paths.append(saved(kind, model, tmp_path / str(index)))
    out = tmp_path / "out.safetensors"
    CheckpointMerge(base, models=paths, merger=TIES(0.4)).run(out)
    assert_same_bits(load_file(out), in_memory(TIES(0.4), theta, models))
    assert verify(out)[0] == []


def written(states, folder):
    paths = [folder / f"model_{index}.safetensors" for index in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    return paths


def test_task_vectors_are_taken_as_they_are(base, theta, models, tmp_path):
    bank = TaskVectorBank(tmp_path / "bank")
    for task, model in enumerate(models):
        bank.append(task, task_vector(model, theta), base=fingerprint(theta))
    CheckpointMerge(base, models=[bank.folder], merger=MagMax()).run(tmp_path / "out.safetensors")
    assert_same_bits(load_file(tmp_path / "out.safetensors"), in_memory(MagMax(), theta, models))


def test_task_vectors_of_another_base_are_refused(base, theta, models, tmp_path):
    TaskVectorBank(tmp_path / "bank").append(0, task_vector(models[0], theta), base="f" * 64)
    job = CheckpointMerge(base, models=[tmp_path / "bank"], merger=MagMax())
    with pytest.raises(ValueError, match="of base model ffffffffffff"):
        job.run(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay_the_bases(dtype, theta, models, tmp_path):
    theta = {name: tensor.to(dtype) for name, tensor in theta.items()}
    models = [{name: tensor.to(dtype) for name, tensor in model.items()} for model in models]
    save_file(theta, tmp_path / "base.safetensors")
    job = CheckpointMerge(tmp_path / "base.safetensors", models=written(models, tmp_path), merger=TIES(0.5))
    job.run(tmp_path / "out.safetensors")
    assert_same_bits(load_file(tmp_path / "out.safetensors"), in_memory(TIES(0.5), theta, models))


def test_what_does_not_match_is_copied_from_the_base(theta, models, tmp_path):
    theta |= {"ids": torch.arange(4), "bn.running_mean": torch.ones(2), "head": torch.ones(3, 2), "only": torch.ones(1)}
    models = [model | {"ids": torch.arange(4) + 1, "bn.running_mean": torch.zeros(2)} for model in models]
    models = [model | {"head": torch.zeros(3 + index, 2)} for index, model in enumerate(models)]
    models[1]["novel"] = torch.ones(1)
    save_file(theta, tmp_path / "base.safetensors")
    paths = written(models, tmp_path)
    job = CheckpointMerge(tmp_path / "base.safetensors", models=paths, merger=MagMax())
    table = job.describe()
    for line in ("integer, bool or complex: ids", "running statistics: bn.running_mean", "missing in a model: only"):
        assert line in table
    assert "another shape in a model: head ((3, 2) in the base, (4, 2) in" in table
    assert f"not in the base, of {paths[1]}: novel" in table
    job.run(tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name in ("ids", "bn.running_mean", "head", "only"):
        assert torch.equal(merged[name], theta[name])
    assert "novel" not in merged
    with pytest.raises(ValueError, match=r"(?s)--strict.*head.*only|--strict.*only.*head"):
        CheckpointMerge(tmp_path / "base.safetensors", models=paths, merger=MagMax(), strict=True)


def test_patterns_choose(base, theta, models, tmp_path):
    paths = written(models, tmp_path)
    job = CheckpointMerge(base, models=paths, merger=MagMax(), include=["net.*"], exclude=["*.bias"], strict=True)
    assert job.policy.merged == ["net.0.weight", "net.1.weight"]
    with pytest.raises(ValueError, match=r"got 'nte\.0\.weight'; the nearest is 'net\.0\.weight'"):
        CheckpointMerge(base, models=paths, merger=MagMax(), include=["nte.0.weight"])


def test_models_of_another_architecture_are_named(base, models, tmp_path):
    paths = written([{"conv": torch.ones(2)}], tmp_path)
    with pytest.raises(ValueError, match=r"got .*model_0\.safetensors, of which 0 of 1 fit: it has 'conv', and "):
        CheckpointMerge(base, models=paths, merger=MagMax())


def test_nan_is_refused_with_the_file_and_leaves_nothing(base, models, tmp_path):
    models[1]["net.0.bias"][3] = float("nan")
    paths = written(models, tmp_path)
    with pytest.raises(ValueError, match=r"finite values in .*model_1\.safetensors, got NaN or Inf in 'net\.0\.bias'"):
        CheckpointMerge(base, models=paths, merger=MagMax()).run(tmp_path / "out.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {base.name, *(path.name for path in paths)}


def test_an_input_is_never_overwritten(base, models, tmp_path):
    paths = written(models, tmp_path)
    before = paths[0].read_bytes()
    with pytest.raises(ValueError, match="an output beside the inputs"):
        CheckpointMerge(base, models=paths, merger=MagMax()).run(paths[0])
    assert paths[0].read_bytes() == before


@pytest.fixture
def merged(base, models, tmp_path):
    out = tmp_path / "out.safetensors"
    CheckpointMerge(base, models=written(models, tmp_path), merger=TIES(0.4)).run(out)
    return out


def test_the_ledger_says_how(merged, base):
    ledger = json.loads(load_metadata(merged)[KEY])
    assert ledger["merger"] == {"class_path": "TIES", "init_args": TIES(0.4).settings()}
    assert ledger["base"] == str(base)
    assert len(ledger["files"]) == 4
    assert all(len(set(file["sha256"])) > 4 for file in ledger["files"])
    assert ledger["versions"].keys() == {"clmerge", "python", "safetensors", "torch"}


def test_two_merges_write_the_same_file(merged, base, models, tmp_path):
    paths = [tmp_path / f"model_{index}.safetensors" for index in range(3)]
    CheckpointMerge(base, models=paths, merger=TIES(0.4)).run(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == merged.read_bytes()


def test_a_changed_byte_of_the_result_is_found(merged):
    content = bytearray(merged.read_bytes())
    content[-1] ^= 1
    merged.write_bytes(content)
    found, _ = verify(merged)
    assert len(found) == 2
    assert "have changed since the merge" in found[0]
    assert "differs from what the merge gives" in found[1]


def test_a_changed_byte_of_an_input_is_found(merged, tmp_path):
    content = bytearray((tmp_path / "model_1.safetensors").read_bytes())
    content[-4] ^= 1
    (tmp_path / "model_1.safetensors").write_bytes(content)
    found, _ = verify(merged)
    assert found[0].endswith("model_1.safetensors has changed since the merge")


def test_without_hashes_the_ledger_says_so_and_the_replay_still_finds_changes(base, models, tmp_path):
    out = tmp_path / "out.safetensors"
    CheckpointMerge(base, models=written(models, tmp_path), merger=MagMax()).run(out, hashes=False)
    found, ledger = verify(out)
    assert found == []
    assert ledger.result_sha256 is None
    assert [file.sha256 for file in ledger.files] == [None] * 4
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    assert len(verify(out)[0]) == 1


def test_a_file_without_a_ledger_is_refused(base):
    with pytest.raises(ValueError, match="got no ledger"):
        verify(base)


@pytest.mark.parametrize(
    "merger",
    [
        MagMax(0.7),
        DARE(0.5, reducer=TIES(0.5, trim="tensor")),
        Pipeline(MagMax(), sparsifier=TrimTensor(0.3), finisher=Scale(2.0)),
    ],
    ids=lambda merger: merger.label,
)
def test_a_ledger_rebuilds_composed_rules(merger):
    plain = {"class_path": type(merger).__name__, "init_args": merger.settings()}
    assert repr(configured_from(json.loads(json.dumps(plain)))) == repr(merger)


def test_a_ledger_names_classes_of_mergers_only():
    with pytest.raises(ValueError, match="got 'Path'"):
        configured_from({"class_path": "Path", "init_args": {}})
    with pytest.raises(ValueError, match="expected a merger"):
        configured_from({"class_path": "TrimModel", "init_args": TrimModel().settings()})


@pytest.mark.parametrize("merger", [MagMax(), TIES(0.4), TIES(0.4, trim="tensor")])
def test_a_merged_parameter_is_not_held_while_the_next_is_merged(merger, base, models, tmp_path, monkeypatch):
    merged, put = [], SafetensorsWriter.put

    def watched(self, names, flat):
        merged.append(weakref.ref(flat))
        put(self, names, flat)

    def on_bytes(count):
        assert [one() for one in merged if one() is not None] == []

    monkeypatch.setattr(SafetensorsWriter, "put", watched)
    for place in ("clmerge.merging.out_of_core.packs", "clmerge.checkpoints.merge.packs"):
        monkeypatch.setattr(place, partial(packs, size=0))  # each by itself
    job = CheckpointMerge(base, models=written(models, tmp_path), merger=merger)
    job.run(tmp_path / "out.safetensors", on_bytes=on_bytes)
    assert len(merged) > 1


@pytest.fixture
def counted(theta, models, tmp_path):
    """A bank whose headers say how many samples and steps every task had."""
    bank = TaskVectorBank(tmp_path / "counted")
    for task, model in enumerate(models):
        counts = {"samples": 100 * (task + 1), "steps": 7 + task}
        bank.append(task, task_vector(model, theta), base=fingerprint(theta), counts=counts)
    return bank


@pytest.mark.parametrize(
    "build", [FedNova, WeightedAverage, lambda: Ethos(0.2), lambda: Ethos(0.2, exclude=["net.1.weight"])]
)
def test_what_the_base_and_a_bank_know_is_used(build, base, theta, counted, tmp_path):
    """FedNova needs steps and samples, Ethos the base's weights, for single parameters or for all at once."""
    out = tmp_path / "out.safetensors"
    CheckpointMerge(base, models=[counted.folder], merger=build()).run(out)
    merger = build()
    for task in counted.tasks:
        counts = {name: float(counted.metadata(task)[name]) for name in ("samples", "steps")}
        merger.update(counted[task], task=task, statistics={**counts, "weights": theta})
    assert_same_bits(load_file(out), apply_task_vector(theta, merger.compute()))
    assert verify(out)[0] == []


@pytest.mark.parametrize(
    ("merger", "message"),
    [
        (FedNova(), r"number of samples of every task for FedNova.*got none in .*model_0.*name a run folder"),
        (Fisher(), r"also needs fisher: .*`clmerge compare RUN --mergers Fisher`"),
        (PAINT(), r"also needs score: .*--mergers PAINT`"),
    ],
)
def test_what_is_not_known_is_refused_with_the_way_to_get_it(merger, message, base, models, tmp_path):
    with pytest.raises(ValueError, match=message):
        CheckpointMerge(base, models=written(models, tmp_path), merger=merger)


def test_settings_that_do_not_fit_the_models_are_refused_before_anything_is_read(base, models, tmp_path):
    with pytest.raises(ValueError, match="each of the 3 tasks in weights of TIES, got 2"):
        CheckpointMerge(base, models=written(models, tmp_path), merger=TIES(weights=[1.0, 1.0]))
    with pytest.raises(ValueError, match=r"no\.such"):
        CheckpointMerge(base, models=written(models, tmp_path), merger=Pipeline(finisher=GroupScale({"no.such": 1.0})))
