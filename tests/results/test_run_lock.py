import gc

import pytest
from support.locks import end, other_process

from clmerge.results.run_folder import RunFolder
from clmerge.results.run_lock import hold_lock


def test_one_process_writes_a_run_and_the_others_are_told_who(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    path = run.path
    del run
    gc.collect()
    process = other_process(path)
    (path / ".manifest.json.0123.tmp").write_text("of the one that writes")
    for start in (RunFolder.open, RunFolder.create):
        message = f"expected a folder that no other process writes, got .*, which process {process.pid} on .* has been"
        with pytest.raises(BlockingIOError, match=message):
            start(path)
    assert (path / ".manifest.json.0123.tmp").exists(), "nothing of the other process was touched"
    assert RunFolder.open(path, writes=False).manifest.trained == 0, "reading is free"
    end(process)
    assert not (path / ".lock").exists()
    RunFolder.open(path)


def test_a_killed_process_holds_nothing_even_if_a_forked_child_lives_on(tmp_path):
    process = other_process(tmp_path, "fork")
    process.stdout.readline()
    process.kill()
    process.wait()
    holder = type("Holder", (), {})()
    hold_lock(tmp_path, holder)
    assert (tmp_path / ".lock").exists()
    del holder
    gc.collect()
    assert not (tmp_path / ".lock").exists()
    end(process)


def test_a_process_may_open_its_run_twice(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    again = RunFolder.open(run.path)
    del run
    gc.collect()
    assert (again.path / ".lock").exists()
    path = again.path
    del again
    gc.collect()
    assert not (path / ".lock").exists()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def unknown(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unknown)
    RunFolder.create(tmp_path / "run")
    assert "knows no locks: let one process at a time write there" in capsys.readouterr().err


def test_a_folder_that_was_closed_may_move_while_its_object_is_still_there(tmp_path):
    held = RunFolder.create(tmp_path / "work")
    (tmp_path / "work").rename(tmp_path / "moved")
    with pytest.raises(BlockingIOError, match="expected a folder that no other process writes"):
        RunFolder.open(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "work")
    held.close()
    (tmp_path / "work").rename(tmp_path / "moved")
    assert not (tmp_path / "moved" / ".lock").exists()
    RunFolder.open(tmp_path / "moved").close()
    assert held.path == tmp_path / "work"
