import json

import pytest
import torch
from checkpoints.test_merge import assert_same_bits, in_memory, written
from safetensors.torch import load_file

from clmerge.checkpoints import Entry, open_checkpoint
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.output import existing, parse_size, split
from clmerge.checkpoints.verify import verify
from clmerge.merging import TIES, MagMax

INDEX = "model.safetensors.index.json"


@pytest.fixture
def paths(models, tmp_path):
    return written(models, tmp_path)


@pytest.fixture
def sharded(base, paths, tmp_path):
    CheckpointMerge(base, models=paths, merger=TIES(0.4)).run(tmp_path / "out", shard_bytes=200)
    return tmp_path / "out"


def test_shards_are_laid_out_as_hugging_face_does(sharded, theta, models):
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(file.name for file in sharded.iterdir()) == [*shards, INDEX]
    index = json.loads((sharded / INDEX).read_text())
    first, second = (load_file(sharded / shard) for shard in shards)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in theta.values())
    assert index["weight_map"] == dict.fromkeys(first, shards[0]) | dict.fromkeys(second, shards[1])
    assert_same_bits(first | second, in_memory(TIES(0.4), theta, models))
    opened = open_checkpoint(sharded)
    assert_same_bits({name: opened[name] for name in opened}, in_memory(TIES(0.4), theta, models))


@pytest.mark.parametrize("named", ["", INDEX])
def test_the_ledger_is_in_the_index(named, sharded):
    found, ledger = verify(sharded / named)
    assert found == []
    assert ledger.result_sha256 is None
    assert len(ledger.shards) == 2
    assert all(len(set(digest)) > 4 for digest in ledger.shards.values())


def test_a_changed_or_missing_shard_is_found(sharded):
    shard = sharded / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    found, _ = verify(sharded)
    assert found[0] == f"the shard {shard} has changed since the merge"
    assert len(found) == 2
    shard.unlink()
    with pytest.raises(ValueError, match="copy all shards"):
        verify(sharded)


def test_what_fits_into_one_file_is_one_file(base, paths, tmp_path, theta, models):
    CheckpointMerge(base, models=paths, merger=MagMax()).run(tmp_path / "out", shard_bytes=10**6)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), in_memory(MagMax(), theta, models))
    found, ledger = verify(tmp_path / "out")
    assert found == []
    assert ledger.result_sha256 is not None


@pytest.mark.parametrize(("before", "after"), [(200, 10**6), (10**6, 200), (100, 200)])
def test_an_earlier_merge_is_replaced_and_other_files_stay(before, after, base, paths, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    CheckpointMerge(base, models=paths, merger=TIES(0.4)).run(out, shard_bytes=before)
    (out / "config.json").write_text("{}")
    assert existing(out, "shards") is not None
    for folder in (out, fresh):
        CheckpointMerge(base, models=paths, merger=MagMax()).run(folder, shard_bytes=after)
    assert existing(fresh, "shards") is not None
    assert {file.name: file.read_bytes() for file in fresh.iterdir()} == {
        file.name: file.read_bytes() for file in out.iterdir() if file.name != "config.json"
    }
    assert (out / "config.json").exists()
    assert verify(out)[0] == []


def test_a_failed_merge_leaves_nothing_and_an_earlier_one_as_it_was(base, theta, models, sharded, tmp_path):
    before = {file.name: file.read_bytes() for file in sharded.iterdir()}
    models[1]["net.0.bias"][3] = float("nan")
    paths = written(models, tmp_path)
    for out in (sharded, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"net\.0\.bias"):
            CheckpointMerge(base, models=paths, merger=MagMax()).run(out, shard_bytes=200)
    assert {file.name: file.read_bytes() for file in sharded.iterdir()} == before
    assert sorted(tmp_path.iterdir()) == sorted([base, *paths, sharded])


def test_without_hashes(base, paths, tmp_path):
    CheckpointMerge(base, models=paths, merger=MagMax()).run(tmp_path / "out", shard_bytes=200, hashes=False)
    found, ledger = verify(tmp_path / "out")
    assert found == []
    assert set(ledger.shards.values()) == {None}


@pytest.mark.parametrize(
    ("out", "shard_bytes", "message"),
    [
        ("merged", None, "pass --shard-size to write a folder"),
        ("merged.safetensors", 200, "leave --shard-size and --lora-rank out to write one file"),
        (".", 200, "expected an output beside the inputs"),
        ("base.safetensors", None, "expected an output beside the inputs"),
    ],
)
def test_outputs_that_cannot_be(out, shard_bytes, message, base, paths, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        CheckpointMerge(base, models=paths, merger=MagMax()).run(tmp_path / out, shard_bytes=shard_bytes)
    assert sorted(tmp_path.iterdir()) == before


def test_files_are_filled_in_order():
    entries = {name: Entry((numel,), torch.float32) for name, numel in (("a", 2), ("b", 9), ("c", 1), ("d", 1))}
    numbers = {name: int(file[6:11]) for name, file in split(entries, 12).items()}
    assert numbers == {"a": 1, "b": 2, "c": 3, "d": 3}


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="expected a size such as 5GB"):
        parse_size(text)
