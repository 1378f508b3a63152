import huggingface_hub
import pytest
from support.small_runs import text_run

from clmerge.cli import main
from clmerge.models import OpenClip
from clmerge.weights import load_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return text_run(tmp_path_factory.mktemp("text_run"))


class Hub:
    """Stands in for the hub: keeps what it is sent."""

    made = None

    def __init__(self, **about):
        Hub.made = self
        self.about, self.repos, self.files, self.error = about, [], {}, None

    def create_repo(self, repo, *, exist_ok):
        if type(self).fails is not None:
            raise type(self).fails
        self.repos.append((repo, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        self.message = commit_message
        return f"https://hub/{repo_id}/commit/1"

    fails: Exception | None = None


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "fails", None)
    monkeypatch.setattr(Hub, "made", None)


def test_a_dry_run_shows_card_and_files_and_sends_nothing(run, capsys):
    assert main(["push", str(run), "--repo", "me/digits", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("---\nlibrary_name: open_clip\n")
    assert 'create_model_and_transforms("hf-hub:me/digits")' in text
    assert " bytes  open_clip_model.safetensors" in text
    assert text.endswith("nothing was sent to me/digits\n")
    assert Hub.made is None


def test_the_files_are_sent_in_one_commit(run, tmp_path, capsys):
    assert main(["push", str(run), "--repo", "me/digits", "--model", "MagMax"]) == 0
    hub = Hub.made
    assert hub.repos == [("me/digits", True)]
    assert set(hub.files) == {
        "README.md",
        "bpe_simple_vocab.txt.gz",
        "clmerge.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }
    assert hub.message.startswith("Model of run, written by clmerge ")
    (tmp_path / "weights.safetensors").write_bytes(hub.files["open_clip_model.safetensors"])
    OpenClip("nano").model.load_state_dict(load_tensors(tmp_path / "weights.safetensors"))
    assert capsys.readouterr().out.endswith("pushed    https://hub/me/digits/commit/1\n")


def test_what_the_hub_refuses_is_said_in_one_sentence(run, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "fails", KeyError("401 Unauthorized"))
    assert main(["push", str(run), "--repo", "me/digits"]) == 1
    error = capsys.readouterr().err
    assert "expected the hub to take me/digits, got: '401 Unauthorized'; `hf auth login`" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--repo", "digits"], 1, "expected --repo USER/NAME"),
        (["--repo", "me/../x"], 1, "expected --repo USER/NAME"),
        (["--repo", "me/x", "--to", "timm"], 1, "expected a backbone of timm"),
        (["--repo", "me/x", "--dry-rnu"], 2, "did you mean --dry-run?"),
        ([], 2, "repo"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, code, message, run, capsys):
    try:
        found = main(["push", str(run), *arguments])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert (found, "Traceback" in error) == (code, False)
    assert message in error
    assert Hub.made is None
