import json
import os
import pickle
import stat
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.tiny import ForeignModule, toy_loader

import clmerge
import clmerge.results.run_folder
from clmerge.results.checkpoint_files import AtomicCheckpointIO, damage
from clmerge.results.results import Results
from clmerge.results.run_folder import RunFolder
from clmerge.results.run_manifest import Manifest
from clmerge.weights import save_tensors

MODULE = {"a.weight": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "empty": torch.empty(0, 2)}
ACCUMULATORS = {
    "num_tasks": 1,
    "base_fingerprint": None,
    "mergers": {"ties_density0.1": {"sum": torch.tensor([0.1, float("-0")]).bfloat16(), "scale": 0.3}},
}


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "deep" / "run")


def manifest(run):
    return json.loads((run.path / "manifest.json").read_text())


def edit_manifest(run, **entries):
    (run.path / "manifest.json").write_text(json.dumps(manifest(run) | entries))


def files(folder):
    found = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock")
    return sorted(p.relative_to(folder).as_posix() for p in found)


def write_checkpoint(run, task):
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, run.checkpoint(task))
    return run.checkpoint(task)


def found_results(seconds):
    results = Results(["one", "two"], classes=[["a"], ["b"]])
    results.add_seconds("train", seconds)
    return results.to_dict()


# Start ----------------------------------------------------------------------------------------------------


def test_a_new_run_has_nothing_but_an_empty_manifest(run):
    assert files(run.path) == ["manifest.json"]
    assert RunFolder.open(run.path).manifest == Manifest()
    assert manifest(run)["schema"] == 1
    assert manifest(run)["clmerge"] == clmerge.__version__


def test_an_empty_folder_is_taken(tmp_path):
    assert RunFolder.create(tmp_path).path == tmp_path


def test_a_run_is_not_overwritten_and_can_be_continued(run):
    run.commit_state(0, MODULE, ACCUMULATORS)
    before = manifest(run)
    with pytest.raises(FileExistsError, match=f"--run_dir, or continue that run with --resume {run.path}"):
        RunFolder.create(run.path)
    assert manifest(run) == before


def test_other_files_are_not_mixed_with_a_run_and_are_no_run_to_continue(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match=f"got {path}, which exists.*--run_dir$"):
            RunFolder.create(path)
    assert files(tmp_path) == ["thesis.tex"]


def test_what_is_no_run_is_not_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"with a manifest.json, got {tmp_path}"):
        RunFolder.open(tmp_path)


def test_a_manifest_of_another_schema_is_refused(run):
    edit_manifest(run, schema=2)
    with pytest.raises(ValueError, match=r"expected manifest schema 1 in .*manifest\.json, got 2"):
        RunFolder.open(run.path)


def test_a_manifest_of_another_version_names_what_is_unknown_and_who_wrote_it(run):
    edit_manifest(run, clmerge="9.9", colour="red", zoom=1)
    with pytest.raises(ValueError, match=r"unknown entries \['colour', 'zoom'\] in .*\(9\.9\)"):
        RunFolder.open(run.path)


@pytest.mark.parametrize("text", ['{"trained": 1', "", "[]", "\x00\x01"])
def test_a_damaged_manifest_is_named(run, text):
    (run.path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        RunFolder.open(run.path)


def test_paths_are_inside_the_folder(run):
    paths = [run.config, run.results, run.bank, run.plots, run.logs, run.checkpoint(3), run.model("ties_density0.1")]
    assert [p.relative_to(run.path).as_posix() for p in paths] == [
        "config.yaml",
        "results.json",
        "bank",
        "plots",
        "logs",
        "checkpoints/task_003.ckpt",
        "model/ties_density0.1.safetensors",
    ]


# Commits --------------------------------------------------------------------------------------------------


def test_what_was_committed_is_found_again(run):
    found = found_results(1.5)
    run.manifest = Manifest(
        trained=2, evaluated=1, state="state/task_001", step=7, epochs=3, wandb_id="x", results=found
    )
    run.commit()
    assert RunFolder.open(run.path, writes=False).manifest == run.manifest
    assert json.loads(run.results.read_text()) == {"schema": 2, "runs": [found]}


def accuracies(rows, num_tasks=40):
    """Results of two models, of which some rows have no number."""
    results = Results([f"t{task}" for task in range(num_tasks)], classes=[[f"c{task}"] for task in range(num_tasks)])
    for row in rows:
        for model in ("magmax", "expert"):
            if row is None:
                results.add_skipped({model: 7})
            else:
                results.add_row(model, [row] * num_tasks, [None] * num_tasks, bytes_kept=7)
    return results


def test_rows_without_a_number_or_a_change_are_short_in_the_manifest_and_whole_elsewhere(run):
    results = accuracies([0.5, 0.5, None, None, 1.0, 1.0, 1.0])
    results.set_zero_shot([0.25] * 40, [0.5] * 40)
    run.manifest.record(results)
    run.commit()
    models = manifest(run)["results"]["models"]
    assert models["magmax"]["task_agnostic"]["R"][1:4] == ["same", None, None]
    assert models["zero_shot"]["task_aware"]["R"][1:] == ["same"] * 6
    assert json.loads(run.results.read_text())["runs"] == [results.to_dict()]
    assert RunFolder.open(run.path).manifest.results == results.to_dict()
    (run.path / "manifest.json").write_text(json.dumps(vars(run.manifest)))  # as it was before rows were shortened
    assert RunFolder.open(run.path).manifest.results == results.to_dict()


def test_skipped_tasks_are_committed_without_writing_the_accuracies(run):
    run.manifest.record(accuracies([0.5]))
    run.commit()
    sizes = [(run.path / "manifest.json").stat().st_size]
    written = run.results.read_text()
    for _ in range(2):
        run.manifest.skipped.append({"magmax": 7, "expert": 7})
        run.commit()
        sizes.append((run.path / "manifest.json").stat().st_size)
    assert max(after - before for before, after in pairwise(sizes)) < 40
    assert run.results.read_text() == written
    again = RunFolder.open(run.path)
    assert again.manifest.results == accuracies([0.5, None, None]).to_dict()
    assert again.manifest.skipped == []
    assert json.loads(again.results.read_text())["runs"] == [again.manifest.results]
    again.commit()
    assert RunFolder.open(run.path).manifest.results == again.manifest.results


def test_skipped_tasks_of_an_unknown_form_are_refused(run):
    edit_manifest(run, skipped=[{"magmax": -1}])
    with pytest.raises(ValueError, match="skipped"):
        RunFolder.open(run.path)


def test_the_version_that_began_a_run_stays_on_record(run):
    edit_manifest(run, clmerge="0.0.1")
    again = RunFolder.open(run.path)
    again.commit()
    assert manifest(run)["clmerge"] == "0.0.1"


def test_a_commit_that_fails_keeps_the_old_manifest(run, monkeypatch):
    run.manifest.results = found_results(1)
    run.commit()
    before = (run.path / "manifest.json").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    run.manifest.trained = 5
    run.manifest.results = found_results(2)
    with pytest.raises(OSError, match="the disk is gone"):
        run.commit()
    assert (run.path / "manifest.json").read_bytes() == before
    assert json.loads(run.results.read_text())["runs"] == [found_results(1)]
    assert RunFolder.open(run.path, writes=False).manifest.trained == 0


def test_a_manifest_that_is_no_json_keeps_the_old_one(run):
    run.manifest.results = {"accuracy": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        run.commit()
    assert RunFolder.open(run.path).manifest == Manifest()


def test_state_comes_back_bit_for_bit(run):
    run.commit_state(0, MODULE, ACCUMULATORS)
    module, accumulators = RunFolder.open(run.path).load_state()
    assert module.keys() == MODULE.keys()
    for name, value in MODULE.items():
        assert torch.equal(module[name], value)
        assert module[name].dtype == value.dtype
    found = accumulators["mergers"]["ties_density0.1"].pop("sum")
    expected = ACCUMULATORS["mergers"]["ties_density0.1"]["sum"]
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), "the sign of zero, too"
    assert accumulators == {
        "num_tasks": 1,
        "base_fingerprint": None,
        "mergers": {"ties_density0.1": {"scale": 0.3}},
    }
    assert run.manifest.trained == 1
    assert run.manifest.state == "state/task_000"


def test_a_state_that_somebody_pickled_is_not_loaded(run, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    run.commit_state(0, MODULE, ACCUMULATORS)
    file = run.path / "state" / "task_000" / "accumulators.pt"
    torch.save({"a": Bomb()}, file)
    with pytest.raises(ValueError, match=f"expected {file} as the run has committed it, got other content"):
        RunFolder.open(run.path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run.load_state()
    assert not (tmp_path / "exploded").exists()


def test_there_is_no_state_before_the_first_task(run):
    with pytest.raises(RuntimeError, match=f"expected a committed task in {run.path}, got none"):
        run.load_state()


def test_older_states_and_checkpoints_go_only_after_the_manifest_points_to_the_new_one(run, monkeypatch):
    run.commit_state(0, MODULE, ACCUMULATORS)
    write_checkpoint(run, 1)
    seen = []
    write = clmerge.results.run_folder.write_text_atomic

    def record(path, found):
        if path.name == "manifest.json":
            seen.append((files(run.path), json.loads(found)["state"]))
        write(path, found)

    run.manifest.evaluated = 1
    monkeypatch.setattr(clmerge.results.run_folder, "write_text_atomic", record)
    run.commit_state(1, MODULE, ACCUMULATORS)
    old = ["checkpoints/task_001.ckpt", "state/task_000/accumulators.pt", "state/task_000/module.safetensors"]
    new = ["state/task_001/accumulators.pt", "state/task_001/module.safetensors"]
    assert seen == [(sorted(["manifest.json", *old, *new]), "state/task_001")]
    assert files(run.path) == sorted(["manifest.json", *new])
    assert RunFolder.open(run.path).manifest.trained == 2


def test_a_state_is_flushed_before_the_manifest_points_to_it(run, monkeypatch):
    flushed, fsync = [], os.fsync

    def flush(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    run.commit_state(0, MODULE, ACCUMULATORS)
    state = run.path / "state" / "task_000"
    order = [state / "module.safetensors", state / "accumulators.pt", run.path / "manifest.json"]
    assert [number for number in flushed if number in {p.stat().st_ino for p in order}] == [
        p.stat().st_ino for p in order
    ]


@pytest.mark.parametrize("broken", ["save_tensors", "save_torch", "checksum", "write_text_atomic"])
def test_a_commit_of_state_that_fails_anywhere_leaves_the_old_state(run, monkeypatch, broken):
    run.commit_state(0, MODULE, ACCUMULATORS)
    write_checkpoint(run, 1)
    before = files(run.path)

    def fail(*args, **kwargs):
        raise OSError("killed")

    monkeypatch.setattr(f"clmerge.results.run_folder.{broken}", fail)
    with pytest.raises(OSError, match="killed"):
        run.commit_state(1, {"a.weight": torch.zeros(1)}, {})
    monkeypatch.undo()
    again = RunFolder.open(run.path)
    assert again.manifest.trained == 1
    assert torch.equal(again.load_state()[0]["a.weight"], MODULE["a.weight"])
    assert files(run.path) == before, "what the failed commit wrote is gone, the task's checkpoint is not"


# Tidying up -----------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_run_go_when_it_is_opened(run):
    run.commit_state(0, MODULE, ACCUMULATORS)
    kept = [write_checkpoint(run, 1), run.path / "checkpoints" / "best-epoch=3.ckpt"]
    kept[1].write_text("of the user's own callback")
    keep = files(run.path)
    write_checkpoint(run, 0)
    for folder in ("state/task_001", "bank", "plots/task_aware", "model", "unmerged"):
        (run.path / folder).mkdir(parents=True)
    for name in (
        "state/task_001/module.safetensors",
        "checkpoints/.task_001.ckpt.0123abcd.tmp",
        ".manifest.json.0123abcd.tmp",
        "bank/.task_001.safetensors.0123abcd.tmp",
        "bank/task_001.safetensors",
        "unmerged/task_001.safetensors",
        "model/.magmax.safetensors.0123abcd.tmp",
        "plots/.matrices.png.0123abcd.tmp",
        "plots/task_aware/.matrices.png.0123abcd.tmp",
        "unmerged/.task_001.safetensors.0123abcd.tmp",
    ):
        (run.path / name).write_text("half")
    (run.path / "checkpoints" / "task_000.ckpt.d").mkdir()  # sharded checkpoints are folders
    RunFolder.open(run.path, writes=False)
    assert len(files(run.path)) == len(keep) + 11
    RunFolder.open(run.path)
    assert files(run.path) == keep
    assert not (run.path / "checkpoints" / "task_000.ckpt.d").exists()
    assert not (run.path / "state" / "task_001").exists()


def test_a_finished_run_keeps_no_checkpoint(run):
    write_checkpoint(run, 0)
    run.manifest.finished = True
    run.commit()
    RunFolder.open(run.path)
    assert files(run.path) == ["manifest.json"]


# Doubts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        {"trained": "2"},
        {"trained": True},
        {"stream": {"tasks": 3}},
        {"stream": {"tasks": [{"name": 2}]}},
        {"results": {"name": "", "tasks": 3, "classes": [], "models": {}, "seconds": {}}},
        {"results": {"name": "", "tasks": ["a"], "classes": [[]], "models": {}, "seconds": {}, "options": 3}},
        {"trained": -1},
        {"trained": 2, "evaluated": 2},
        {"evaluated": 3},
        {"state": "../../nowhere"},
        {"state": None},
        {"results": {"name": ""}},
        {"results": []},
        {"files": {"a": 1}},
        {"options": [3]},
        {"finished": "yes"},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_and_nothing_is_removed(run, entries):
    run.commit_state(0, MODULE, ACCUMULATORS)
    write_checkpoint(run, 1)
    before = files(run.path)
    edit_manifest(run, **entries)
    with pytest.raises(ValueError, match=rf"expected .*({'|'.join(entries)}|state).* in .*manifest\.json, which was"):
        RunFolder.open(run.path)
    assert files(run.path) == before


@pytest.mark.parametrize(
    "name", ["state/task_000/module.safetensors", "state/task_000/accumulators.pt", "bank/task_000.safetensors"]
)
def test_a_file_that_was_changed_or_is_gone_is_named_before_anything_is_removed(run, name):
    save_tensors(run.bank / "task_000.safetensors", MODULE)
    run.commit_state(0, MODULE, ACCUMULATORS)
    write_checkpoint(run, 0)
    before = files(run.path)
    whole = (run.path / name).read_bytes()
    (run.path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    for writes in (True, False):
        with pytest.raises(ValueError, match=f"expected {run.path / name} as the run has committed it"):
            RunFolder.open(run.path, writes=writes)
    (run.path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"expected {run.path / name}, as the run has committed it"):
        RunFolder.open(run.path)
    (run.path / name).write_bytes(whole)
    assert files(run.path) == before
    RunFolder.open(run.path)
    assert files(run.path) != before, "the first task's checkpoint goes now"


def test_what_the_branches_left_behind_is_not_asked_for(run):
    run.commit_branch(0, 1, {"a": torch.ones(1)})
    run.commit_branch(0, 2, {"a": torch.ones(1)})
    assert list(run.manifest.files) == ["state/task_000_branch_002.pt"]
    run.commit_state(0, MODULE, ACCUMULATORS)
    run.commit_branch(1, 1, {"a": torch.ones(1)})
    RunFolder.open(run.path)
    assert sorted(run.manifest.files) == [
        "state/task_000/accumulators.pt",
        "state/task_000/module.safetensors",
        "state/task_001_branch_001.pt",
    ]


def test_a_configuration_that_was_edited_is_refused_and_one_that_is_gone_is_written_again(tmp_path):
    run = RunFolder.create(tmp_path / "run", config="seed: 0\nname: a\n")
    run.config.write_text("seed: 0\nname: b\n")
    with pytest.raises(ValueError, match=r"expected .*config\.yaml as the run began with it, got 'name: b'.*'name: a'"):
        RunFolder.open(run.path)
    run.config.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.yaml, which is damaged"):
        RunFolder.open(run.path)
    run.config.unlink()
    assert RunFolder.open(run.path).config.read_text() == "seed: 0\nname: a\n"


def test_other_options_begin_the_task_anew(run):
    run.manifest.step, run.manifest.epochs = 5, 2
    run.commit_state(0, MODULE, ACCUMULATORS)
    write_checkpoint(run, 1)
    run.manifest.step, run.manifest.epochs = 9, 4
    run.commit_branch(1, 1, {"a": torch.ones(1)})
    assert run.change_options(["--trainer.max_epochs=3"], begin_anew=True)
    again = RunFolder.open(run.path)
    assert (again.manifest.step, again.manifest.epochs, again.manifest.branch) == (5, 2, 0)
    assert files(run.path) == ["manifest.json", "state/task_000/accumulators.pt", "state/task_000/module.safetensors"]
    assert again.manifest.options_by_task(3) == [[], ["--trainer.max_epochs=3"], ["--trainer.max_epochs=3"]]
    write_checkpoint(run, 1)
    assert not again.change_options(["--logging.csv=false"], begin_anew=False)
    assert run.checkpoint(1).is_file()


# Starts that failed ---------------------------------------------------------------------------------------


def test_a_run_that_has_trained_nothing_gives_its_folder_to_the_next(tmp_path):
    failed = RunFolder.create(tmp_path / "run", config="seed: 0\n")
    failed.manifest.results = found_results(1)
    failed.commit()
    (failed.logs / "csv").mkdir(parents=True)
    run = RunFolder.create(tmp_path / "run", config="seed: 1\n")
    assert files(run.path) == ["config.yaml", "manifest.json"]
    assert run.config.read_text() == "seed: 1\n"
    write_checkpoint(run, 0)
    with pytest.raises(FileExistsError, match="continue that run with --resume"):
        RunFolder.create(tmp_path / "run")


def test_a_start_that_was_killed_at_once_gives_its_folder_to_the_next(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.0123.tmp").touch()
    assert files(RunFolder.create(tmp_path).path) == ["manifest.json"]


def test_a_start_that_failed_can_be_discarded_and_a_run_cannot(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.discard()
    assert not run.path.exists()
    run = RunFolder.create(tmp_path / "run")
    (run.path / "notes.txt").write_text("precious")
    run.discard()
    assert files(run.path) == ["notes.txt"]
    run = RunFolder.create(tmp_path / "other")
    run.commit_state(0, MODULE, ACCUMULATORS)
    before = files(run.path)
    run.discard()
    assert files(run.path) == before


def test_a_default_name_is_unique(tmp_path):
    names = [RunFolder.create(tmp_path / "run-1", unique=True).path.name for _ in range(3)]
    assert names == ["run-1", "run-1-2", "run-1-3"]


def test_a_damaged_checkpoint_is_told_of_and_passed_over(run, capsys):
    assert not run.has_whole(run.checkpoint(0))
    path = write_checkpoint(run, 0)
    assert run.has_whole(path)
    whole = path.read_bytes()
    for content in (b"", b"garbage" * 99, whole[: len(whole) // 2], whole.replace(b"epoch", b"epoxh")):
        path.write_bytes(content)
        assert not run.has_whole(path)
        assert not path.exists()
        assert f"{path} is damaged" in capsys.readouterr().err
    path.mkdir()
    assert not run.has_whole(path)
    assert not path.exists()


@pytest.mark.slow
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a.ckpt"
    whole = {"epoch": 1, "weights": torch.arange(3.0), "callbacks": {"a": None}}
    AtomicCheckpointIO().save_checkpoint(whole, path)
    data = path.read_bytes()
    noticed = 0
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        if damage(path) is not None:
            noticed += 1
            continue
        found = torch.load(path, weights_only=True)
        assert torch.equal(found.pop("weights"), whole["weights"]), position
        assert found == {"epoch": 1, "callbacks": {"a": None}}, position
    assert noticed > 300


def test_results_that_a_kill_left_behind_the_manifest_are_written_again(run):
    run.manifest.results = found_results(2)
    run.commit()
    run.results.write_text(json.dumps(found_results(1)))
    RunFolder.open(run.path)
    assert json.loads(run.results.read_text())["runs"] == [found_results(2)]


def test_processes_that_do_not_write_change_nothing(run, tmp_path):
    other = RunFolder.create(tmp_path / "none", writes=False)
    other.manifest.results = found_results(1)
    other.commit()
    other.commit_state(3, MODULE, ACCUMULATORS)
    assert not (tmp_path / "none").exists()
    assert (other.manifest.trained, other.manifest.state) == (4, "state/task_003")

    write_checkpoint(run, 5)
    reader = RunFolder.open(run.path, writes=False)
    reader.manifest.results = found_results(1)
    reader.commit_state(0, MODULE, ACCUMULATORS)
    assert files(run.path) == ["checkpoints/task_005.ckpt", "manifest.json"]
    assert manifest(run)["trained"] == 0


# Checkpoints of Lightning ---------------------------------------------------------------------------------


class DiesHalfWay:
    """Writes some bytes like torch.save, then fails."""

    def __call__(self, checkpoint, path):
        path.write(b"PK\x03\x04 half of it")
        raise OSError("no space left on device")


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    path, io = tmp_path / "new" / "a.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"epoch": 1, "w": torch.ones(2)}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", DiesHalfWay())
        with pytest.raises(OSError, match="no space left"):
            io.save_checkpoint({"epoch": 2}, path)
    found = io.load_checkpoint(path)
    assert (found["epoch"], found["w"].tolist()) == (1, [1.0, 1.0])
    assert files(tmp_path) == ["new/a.ckpt"]


def test_a_checkpoint_is_flushed_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        events.append("flush folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        fsync(descriptor)

    def rename(source, target):
        assert Path(source).parent == Path(target).parent, "renamed within one folder, hence one file system"
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "a.ckpt")
    assert events == ["flush file", "rename", "flush folder"]


def test_storage_options_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"no storage_options for AtomicCheckpointIO, got \{'a': 1\}"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={"a": 1})
    assert not list(tmp_path.iterdir())


def test_a_trainer_saves_and_resumes_through_it(tmp_path, monkeypatch):
    saved = []
    save = AtomicCheckpointIO.save_checkpoint

    def record(self, checkpoint, path, storage_options=None):
        saved.append(Path(path).name)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", record)

    def fit(epochs, **options):
        torch.manual_seed(0)
        model = ForeignModule()
        checkpoint = ModelCheckpoint(tmp_path, filename="last", save_top_k=1, enable_version_counter=False)
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            plugins=[AtomicCheckpointIO()],
            callbacks=[checkpoint],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, toy_loader(0), **options)
        return model.net[0].weight.detach()

    whole = fit(2)
    fit(1)
    assert torch.equal(fit(2, ckpt_path=tmp_path / "last.ckpt"), whole)
    assert saved == ["last.ckpt"] * 4
