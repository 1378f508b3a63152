import json

import pytest
import torch
from safetensors.torch import save_file

from clmerge.checkpoints import open_checkpoint, open_models
from clmerge.checkpoints.names import align_names
from clmerge.weights import TaskVectorBank, checksum, fingerprint, task_vector


def saved(kind, state, folder):
    """Write a model in one of the formats and return the path that names it."""
    path = folder / kind
    path.mkdir()
    if kind == "safetensors":
        save_file(state, path / "weights.safetensors")
        return path / "weights.safetensors"
    if kind == "hugging face":
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return path
    if kind == "sharded":
        names = list(state)
        shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
        for file, inside in shards.items():
            save_file({name: state[name] for name in inside}, path / file)
        weights = {name: file for file, inside in shards.items() for name in inside}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
        return path
    if kind == "pt":
        torch.save(state, path / "weights.pt")
        return path / "weights.pt"
    if kind == "old pt":
        torch.save(state, path / "weights.pth", _use_new_zipfile_serialization=False)
        return path / "weights.pth"
    if kind == "nested":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path / "open_clip.pt")
        return path / "open_clip.pt"
    if kind == "lightning":
        inside = {f"backbone.{name}": tensor for name, tensor in state.items()}
        checkpoint = {"pytorch-lightning_version": "2.6.6", "state_dict": inside, "loops": {}, "epoch": 1}
        torch.save(checkpoint, path / "last.ckpt")
        return path / "last.ckpt"
    raise AssertionError(kind)


KINDS = ["safetensors", "hugging face", "sharded", "pt", "old pt", "nested", "lightning"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_tensors(kind, theta, base, tmp_path):
    checkpoint = open_checkpoint(saved(kind, theta, tmp_path))
    align_names(checkpoint, open_checkpoint(base), "the base")
    assert checkpoint.keys() == theta.keys()
    for name, tensor in theta.items():
        assert checkpoint.entries[name].shape == tuple(tensor.shape)
        assert checkpoint.entries[name].dtype == tensor.dtype
        assert torch.equal(checkpoint[name], tensor)


def test_a_bank_and_a_run_folder_stand_for_all_their_tasks(tmp_path, theta, models):
    run = tmp_path / "run"
    bank = TaskVectorBank(run / "bank")
    for task, model in enumerate(models):
        bank.append(task, task_vector(model, theta), name=f"task {task}", base=fingerprint(theta))
    (run / "manifest.json").write_text("{}")
    for path in (run, run / "bank"):
        opened = open_models([path])
        assert [one.task for one in opened] == ["task 0", "task 1", "task 2"]
        assert all(one.is_task_vector and one.base == fingerprint(theta) for one in opened)
        assert torch.equal(opened[2]["net.0.bias"], bank[2]["net.0.bias"])


def test_a_run_without_a_bank_names_its_models(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"without one; name its merged models .*NAME\.safetensors"):
        open_models([tmp_path])


def test_a_missing_file_names_the_nearest(tmp_path, base):
    with pytest.raises(FileNotFoundError, match=r"the nearest there is .*base\.safetensors"):
        open_checkpoint(tmp_path / "bse.safetensors")


def test_objects_are_never_unpickled(tmp_path):
    torch.save({"w": torch.zeros(1), "hook": pytest.raises}, tmp_path / "bad.pt")
    assert open_checkpoint(tmp_path / "bad.pt").ignored == ["_pytest.raises.raises"]


def test_damaged_files_are_named(tmp_path, base):
    half = tmp_path / "half.safetensors"
    half.write_bytes(base.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"whole safetensors file, got .*half\.safetensors"):
        open_checkpoint(half)
    (tmp_path / "junk.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"torch\.save wrote, got .*junk\.pt"):
        open_checkpoint(tmp_path / "junk.pt")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"got no .*gone\.safetensors'; copy all shards"):
        open_checkpoint(tmp_path / "model.safetensors.index.json")


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"expected a state dict in .*with epoch"):
        open_checkpoint(tmp_path / "empty.pt")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"got .*notes\.txt"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_file_without_tensors_is_told_what_it_has(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    other = r"an object of torch\.optim\.sgd\.SGD"
    optimizer = torch.optim.SGD(net.parameters())
    numbers = "save tensors in place of the arrays, as torch.from_numpy gives them"
    for content, message in (
        (optimizer, f"got {other}; save the state_dict"),
        ({"model": optimizer}, rf"got dict with model \({other}\); save the state_dict"),
        (arrays, rf"got dict with 0\.bias \(a NumPy array\), 0\.weight \(a NumPy array\); {numbers}"),
        ({"state_dict": arrays}, rf"got dict with state_dict \(dict\); {numbers}"),
        ({}, "got dict; save the state_dict"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / "a.pt")


def test_a_folder_with_several_checkpoints_wants_a_name(tmp_path, theta):
    for name in ("a", "b"):
        save_file(theta, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"got a\.safetensors, b\.safetensors in"):
        open_checkpoint(tmp_path)


def test_a_vector_of_a_run_that_was_changed_is_named(tmp_path, theta, models):
    bank = TaskVectorBank(tmp_path / "bank")
    for task in (0, 1):
        bank.append(task, task_vector(models[task], theta))
    files = {f"bank/{bank.path(task).name}": checksum(bank.path(task)) for task in (0, 1)}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {**files, "state/gone.pt": "0"}}))
    assert len(open_models([tmp_path])) == 2
    whole = bank.path(1).read_bytes()
    bank.path(1).write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    for path in (tmp_path, bank.folder, bank.path(1)):
        with pytest.raises(ValueError, match=rf"expected {bank.path(1)} as the run has committed it"):
            open_models([path])
    assert len(open_models([bank.path(0)])) == 1
    bank.path(1).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected .*bank/task_001\.safetensors, as the run"):
        open_models([tmp_path])
