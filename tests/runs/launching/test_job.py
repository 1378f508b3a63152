import sys
import time
from pathlib import Path

import pytest

from clmerge.runs.launching import Job, LocalLauncher
from clmerge.runs.launching.job import was_killed

COUNTING = """
import os, signal, sys, time
from pathlib import Path
folder, kills, code = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
starts = folder / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
print("start", len(starts.read_text()), os.environ.get("SLURM_PROCID"), os.environ["MARK"], flush=True)
if len(starts.read_text()) <= kills:
    os.kill(os.getpid(), signal.SIGKILL)
if code < 0:
    time.sleep(60)
if code:
    sys.exit(code)
(folder / "done.tmp").write_text("")
(folder / "done.tmp").rename(folder / "done")
"""


@pytest.fixture
def make(tmp_path):
    def make(name, *, kills=0, code=0):
        folder = tmp_path / name
        folder.mkdir()
        command = (sys.executable, "-c", COUNTING, str(folder), str(kills), str(code))
        log, commit = str(tmp_path / f"{name}.log"), str(folder / "done")
        return Job(name, command, log=log, commit=commit, folder=str(tmp_path), variables=(("MARK", "m"),))

    return make


def starts(job):
    return len(Path(job.commit).with_name("starts").read_text())


def test_a_killed_job_is_started_again_and_one_that_fails_is_not(make, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    jobs = [make("good"), make("killed", kills=2), make("wrong", code=3), make("hopeless", kills=9)]
    codes = {job.name: code for job, code in LocalLauncher(jobs=2, retries=2).run(jobs)}
    assert codes == {"good": 0, "killed": 0, "wrong": 3, "hopeless": -9}
    assert [starts(job) for job in jobs] == [1, 3, 1, 3]
    assert [job.done for job in jobs] == [True, True, False, False]
    told = jobs[2].failure(3)
    assert told.startswith("expected wrong to be done by a job, got exit code 3; its output is in ")
    assert told.endswith("start 1 None m")  # without the place in SLURM's step
    assert "got signal 9" in jobs[3].failure(-9)


def test_what_is_done_is_not_done_again(make):
    job = make("done")
    assert [*LocalLauncher(jobs=1).run([job])] == [(job, 0)]
    assert [*LocalLauncher(jobs=1).run([job])] == [(job, 0)]
    assert starts(job) == 1


def test_leaving_ends_the_jobs_that_run(make):
    jobs = [make("quick"), make("endless", code=-1), make("waiting", code=-1)]
    begun = time.monotonic()
    for job, _ in LocalLauncher(jobs=2).run(jobs):
        assert job is jobs[0]
        break
    assert time.monotonic() - begun < 30


def test_each_of_several_gpus_gets_its_jobs(make, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    seen = []
    monkeypatch.setattr(
        "clmerge.runs.launching.local.Processes.repeat",
        lambda self, job, retries, variables: seen.append(variables["CUDA_VISIBLE_DEVICES"]) or time.sleep(0.3) or 0,
    )
    assert len([*LocalLauncher(jobs=2).run([make("a"), make("b")])]) == 2
    assert sorted(seen) == ["4", "7"]


@pytest.mark.parametrize("settings", [{"jobs": 0}, {"retries": -1}])
def test_impossible_numbers_are_refused(settings):
    with pytest.raises(ValueError, match="expected 1 job or more"):
        LocalLauncher(**settings)


@pytest.mark.parametrize(("code", "killed"), [(-9, True), (143, True), (1, False), (0, False), (2, False)])
def test_a_shell_and_a_subprocess_name_signals_differently(code, killed):
    assert was_killed(code) is killed
