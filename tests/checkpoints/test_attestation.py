import hashlib
import json
from datetime import UTC, datetime

import pytest
from safetensors.torch import save_file

from clmerge.checkpoints.attestation import attest, merge_statement, place, without_paths
from clmerge.checkpoints.groups import Group
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.merging import TIES, WeightAverage

COMMIT = "0123456789abcdef" * 2 + "01234567"


def digest(path):
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def parsed(document):
    """The statement as the library of in-toto reads it, with the predicate as SLSA's schema reads it."""
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement, statement_pb2

    read = json_format.Parse(json.dumps(document), statement_pb2.Statement())
    statement.Statement.copy_from_pb(read).validate()
    return read, json_format.ParseDict(document["predicate"], provenance_pb2.Provenance())


@pytest.fixture
def merged(tmp_path, base, models):
    elsewhere = tmp_path / "models--org--name" / "snapshots" / COMMIT
    elsewhere.mkdir(parents=True)
    files = [tmp_path / "in" / "a.safetensors", elsewhere / "model.safetensors"]
    files[0].parent.mkdir()
    for file, model in zip(files, models, strict=False):
        save_file(model, file)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "merged.safetensors"
    job = CheckpointMerge(base, models=files, merger=TIES(0.5), groups=[Group(["logit*"], WeightAverage())])
    job.run(out)
    return out, base, files


def test_the_statement_is_one_of_in_toto_and_slsa(merged):
    out, base, files = merged
    document = merge_statement(
        out,
        started=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        finished=datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC),
    )
    read, provenance = parsed(document)
    assert (read.type, read.predicate_type) == ("https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1")
    (subject,) = read.subject
    assert (subject.name, dict(subject.digest)) == ("merged.safetensors", digest(out))
    found = provenance.build_definition
    assert found.build_type == "urn:clmerge:merge:v1"
    assert [dict(one.digest) for one in found.resolved_dependencies] == [digest(file) for file in (base, *files)]
    assert [one.uri for one in found.resolved_dependencies] == [
        "",
        "",
        f"pkg:huggingface/org/name@{COMMIT}#model.safetensors",
    ]
    recipe = document["predicate"]["buildDefinition"]["externalParameters"]
    assert recipe["merger"]["class_path"] == "TIES"
    assert recipe["groups"][0]["match"] == ["logit*"]
    assert recipe["base"] == {"name": "base.safetensors"}
    assert [model["name"] for model in recipe["models"]] == ["a.safetensors", "model.safetensors"]
    assert provenance.run_details.builder.version["torch"]
    assert provenance.run_details.metadata.started_on.ToJsonString() == "2026-01-02T03:04:05Z"


def test_no_path_of_the_machine_is_in_it(merged, tmp_path):
    text = json.dumps(merge_statement(merged[0]))
    assert str(tmp_path) not in text
    assert str(tmp_path.parent.name) not in text


def test_inputs_below_its_folder_are_told_by_relative_path(tmp_path):
    assert place(tmp_path / "in" / "a.safetensors", tmp_path) == {"name": "in/a.safetensors", "uri": "in/a.safetensors"}
    assert place(tmp_path / "in" / "a.safetensors", tmp_path / "out") == {"name": "a.safetensors"}
    assert without_paths(["8 images of task 1 of /home/me/runs/digits", "/a/b", "a/b", 1, {"k": "/x/y.pt"}]) == [
        "8 images of task 1 of digits",
        "b",
        "a/b",
        1,
        {"k": "y.pt"},
    ]


def test_every_shard_is_a_subject(tmp_path, base, models):
    save_file(models[0], tmp_path / "a.safetensors")
    out = tmp_path / "folder"
    CheckpointMerge(base, models=[tmp_path / "a.safetensors"], merger=TIES()).run(out, shard_bytes=200)
    file = attest(out)
    assert file == tmp_path / "folder.intoto.json"
    document = json.loads(file.read_text())
    parsed(document)
    named = {subject["name"]: subject["digest"] for subject in document["subject"]}
    assert named == {f"folder/{path.name}": digest(path) for path in out.iterdir()}
    assert document["predicate"]["buildDefinition"]["resolvedDependencies"][0]["uri"] == "base.safetensors"


def test_a_merge_without_hashes_is_not_attested(tmp_path, base, models):
    save_file(models[0], tmp_path / "a.safetensors")
    CheckpointMerge(base, models=[tmp_path / "a.safetensors"], merger=TIES()).run(
        tmp_path / "out.safetensors", hashes=False
    )
    with pytest.raises(ValueError, match="expected a ledger with SHA-256 to attest"):
        attest(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors.intoto.json").exists()
