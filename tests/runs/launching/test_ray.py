"""A launcher on Ray connects once for several rounds of jobs; Ray itself is run by tests/cli."""

from types import SimpleNamespace

import pytest

from clmerge.runs.launching import Job, RayLauncher


class Fake:
    """Ray, as far as the launcher calls it; a job's exit code is its name."""

    exceptions = SimpleNamespace(RayError=ConnectionError)

    def __init__(self):
        self.calls = []

    def init(self, **options):
        self.calls.append("init")

    def shutdown(self):
        self.calls.append("shutdown")

    def remote(self, **options):
        return lambda function: SimpleNamespace(remote=lambda job, retries: job.name)

    def wait(self, references, num_returns):
        return references[:num_returns], references[num_returns:]

    def get(self, reference):
        if reference == "lost":
            raise ConnectionError("no machine is left")
        return reference

    def cancel(self, reference, force):
        self.calls.append(f"cancel {reference}")


@pytest.fixture
def ray(monkeypatch):
    fake = Fake()
    monkeypatch.setattr("clmerge.runs.launching.ray._imported", lambda: fake)
    return fake


def jobs(*names):
    return [Job(name, (), log="", commit="", folder="") for name in names]


def test_rounds_in_a_session_share_one_ray(ray):
    launcher = RayLauncher()
    with launcher.session():
        assert [code for _, code in launcher.run(jobs("0", "1"))] == [0, 1]
        assert [code for _, code in launcher.run(jobs("2"))] == [2]
        assert ray.calls == ["init"]
    assert ray.calls == ["init", "shutdown"]


def test_a_run_alone_starts_a_ray_and_ends_it_whatever_happens(ray):
    launcher = RayLauncher()
    assert len([*launcher.run(jobs("0"))]) == 1
    with pytest.raises(RuntimeError, match="expected Ray to run lost, got no machine is left"):
        [*launcher.run(jobs("lost", "5"))]
    assert ray.calls == ["init", "shutdown", "init", "cancel 5", "shutdown"]
    leaving = launcher.run(jobs("0", "6"))
    next(leaving)
    leaving.close()
    assert ray.calls[5:] == ["init", "cancel 6", "shutdown"]
