import huggingface_hub.constants
import pytest

from clmerge.models import OpenClip
from clmerge.models.hub import cached_revision

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """What huggingface_hub leaves behind when it has downloaded a model."""
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    (refs / "odd").write_text("../../etc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_the_commit_is_that_of_the_cache(cache, tmp_path):
    assert cached_revision("org/name") == COMMIT
    assert cached_revision("org/name/", str(tmp_path)) == COMMIT
    assert cached_revision("org/name@main") == COMMIT
    assert cached_revision(f"org/name@{COMMIT[::-1]}") == COMMIT[::-1]


@pytest.mark.parametrize("repository", ["org/other", "org/name@v1", "org/name@odd"])
def test_what_is_not_known_is_empty(cache, repository):
    assert cached_revision(repository) == ""


def test_a_backbone_knows_its_repository_and_commit(cache):
    backbone = OpenClip("nano")
    assert (backbone.hub, backbone.revision) == ("", "")
    backbone._note_hub("org/name/")
    assert (backbone.hub, backbone.revision) == ("org/name", COMMIT)
    other = OpenClip("nano")
    other._note_hub("timm/")  # of timm, for a model without a repository
    assert other.hub == ""
