import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from support.keys import write_keys

from clmerge.cli import main


@pytest.fixture
def merged(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        save_file({"w": torch.randn(9, 7, generator=generator)}, tmp_path / f"{name}.safetensors")
    return merge(tmp_path, "--attestation")


def merge(folder, *more):
    words = ["--base", f"{folder}/base.safetensors", "--models", f"{folder}/a.safetensors", f"{folder}/b.safetensors"]
    out = folder / "merged.safetensors"
    assert main(["merge", *words, "--merger", "TIES", "--out", str(out), *more]) == 0
    return out


def flip(file, place=-1):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_merge_writes_the_attestation(merged, tmp_path, capsys):
    document = json.loads((tmp_path / "merged.safetensors.intoto.json").read_text())
    assert document["subject"][0]["name"] == "merged.safetensors"
    assert document["predicate"]["runDetails"]["metadata"].keys() == {"startedOn", "finishedOn"}
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "merged.safetensors.intoto.json").write_text("mine")
    words = ["merge", "--base", f"{tmp_path}/base.safetensors", "--models", f"{tmp_path}/a.safetensors"]
    words += ["--merger", "TIES", "--attestation", "--out", f"{tmp_path}/other/merged.safetensors"]
    assert main(words) == 1
    assert "expected a new file for --attestation" in capsys.readouterr().err
    assert not (tmp_path / "other" / "merged.safetensors").exists()
    assert main([*words, "--overwrite"]) == 0
    assert (tmp_path / "other" / "merged.safetensors.intoto.json").read_text() != "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verify", "x", "--attestation"], "expected --verify alone"),
        (["--verify", "x", "--signature", "y"], "expected --key with --signature"),
        (
            ["--base", "x", "--models", "y", "--merger", "TIES", "--dry-run", "--key", "k"],
            "with --verify, which checks",
        ),
        (
            ["--base", "x", "--models", "y", "--merger", "TIES", "--dry-run", "--attestation", "--no-hash"],
            "got --no-hash; leave it out",
        ),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["merge", *words])
    assert message in capsys.readouterr().err


def test_verify_checks_signature_and_replay(merged, tmp_path, capsys):
    pytest.importorskip("model_signing")
    private, public = write_keys(tmp_path / "keys")
    assert main(["sign", str(merged), "--key", str(private)]) == 0
    assert main(["merge", "--verify", str(merged), "--key", str(public)]) == 0
    printed = capsys.readouterr().out
    assert f"{merged} is what {merged}.sig signs with {public}" in printed
    assert "bit for bit" in printed
    assert main(["merge", "--verify", str(merged)]) == 0
    assert "merged.safetensors.sig was not checked: --key names" in capsys.readouterr().err
    assert main(["sign", str(merged), "--key", str(private)]) == 1
    assert "expected a new file, got" in capsys.readouterr().err
    _, stranger = write_keys(tmp_path / "stranger")
    assert main(["merge", "--verify", str(merged), "--key", str(stranger)]) == 1
    assert "is NOT what was signed" in capsys.readouterr().out
    for place in (-1, 20):  # a tensor, and the header, which a replay alone does not compare
        flip(merged, place)
        assert main(["merge", "--verify", str(merged), "--key", str(public)]) == 1
        printed = capsys.readouterr()
        assert f"{merged} is not what {merged}.sig signs" in printed.err
        assert "NOT what was signed" in printed.out
        flip(merged, place)
    assert main(["merge", "--verify", str(merged), "--key", str(public), "--signature", f"{tmp_path}/no.sig"]) == 1
    assert "expected the signature of" in capsys.readouterr().err


def test_a_signed_file_that_is_not_what_its_ledger_says_fails_the_replay(merged, tmp_path, capsys):
    pytest.importorskip("model_signing")
    private, public = write_keys(tmp_path)
    flip(merged)
    assert main(["sign", str(merged), "--key", str(private)]) == 0
    assert main(["merge", "--verify", str(merged), "--key", str(public)]) == 1
    assert "is NOT what its ledger says" in capsys.readouterr().out


def test_a_single_file_is_named_where_it_changed(tmp_path, capsys):
    pytest.importorskip("model_signing")
    private, public = write_keys(tmp_path)
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"weights")
    assert main(["sign", str(file), "--key", str(private)]) == 0
    flip(file)
    capsys.readouterr()
    assert main(["sign", str(file), "--check", str(public)]) == 1
    assert capsys.readouterr().err.endswith("changed: a.safetensors\n")


def test_a_folder_names_the_file_that_changed(tmp_path, capsys):
    pytest.importorskip("model_signing")
    private, public = write_keys(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(b"weights of " + name.encode())
    words = ["sign", str(folder), "--out", str(folder / "own.sig")]
    assert main([*words, "--key", str(private)]) == 0
    assert main([*words, "--check", str(public)]) == 0
    flip(folder / "b.safetensors")
    capsys.readouterr()
    assert main([*words, "--check", str(public)]) == 1
    told = capsys.readouterr().err
    assert told.endswith("changed: b.safetensors\n")
    flip(folder / "b.safetensors")
    (folder / "c.txt").write_text("more")
    assert main([*words, "--check", str(public)]) == 1
    assert capsys.readouterr().err.endswith("not signed: c.txt\n")
    (folder / "c.txt").unlink()
    (folder / "a.safetensors").unlink()
    assert main([*words, "--check", str(public)]) == 1
    assert capsys.readouterr().err.endswith("missing: a.safetensors\n")


def test_keys_that_are_none(merged, tmp_path, capsys):
    pytest.importorskip("model_signing")
    private, public = write_keys(tmp_path)
    for key, message in (
        (public, "expected a private key in PEM on P-256"),
        (tmp_path / "none.pem", "expected a key in PEM, got"),
        (merged, "expected a private key in PEM"),
    ):
        assert main(["sign", str(merged), "--key", str(key)]) == 1
        assert message in capsys.readouterr().err
    assert main(["sign", f"{tmp_path}/nothing", "--key", str(private)]) == 1
    assert "expected a file or folder, got" in capsys.readouterr().err
    assert main(["sign", str(merged), "--key", str(private)]) == 0
    assert main(["sign", str(merged), "--check", str(private)]) == 1
    assert "expected a public key in PEM" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(merged, tmp_path, monkeypatch, capsys):
    (tmp_path / "key.pem").write_text("")
    for name in [name for name in sys.modules if name.startswith("model_signing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert main(["sign", str(merged), "--key", f"{tmp_path}/key.pem"]) == 1
    assert "pip install 'clmerge[signing]'" in capsys.readouterr().err
    assert main(["merge", "--verify", str(merged), "--key", f"{tmp_path}/key.pem"]) == 1
    assert "pip install 'clmerge[signing]'" in capsys.readouterr().err
