import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from clmerge.checkpoints import Entry
from clmerge.checkpoints.writer import data_start, new_safetensors, sha256_of

TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "half": torch.randn(3, 2).to(torch.bfloat16),
    "wide": torch.randn(5).double(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
}
ENTRIES = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_the_package_reads_what_is_written(tmp_path):
    path = tmp_path / "out.safetensors"
    with new_safetensors(path, ENTRIES, {"note": "000"}) as writer:
        writer.put(["scalar"], torch.tensor(9.0))  # a later value counts
        for name, tensor in reversed(TENSORS.items()):
            writer.put([name], tensor)
        digest = writer.data_sha256()
        writer.close({"note": "end"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "end"}
    assert digest == sha256_of(path, skip=data_start(path))
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_failure_leaves_nothing(tmp_path):
    def fail():
        with new_safetensors(tmp_path / "out.safetensors", ENTRIES, {}) as writer:
            writer.put(["scalar"], TENSORS["scalar"])
            writer.close({})

    with pytest.raises(RuntimeError, match="expected all tensors"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_other_shapes_and_dtypes_are_refused(tmp_path):
    with new_safetensors(tmp_path / "out.safetensors", {"w": Entry((2,), torch.float32)}, {}) as writer:
        for wrong in (torch.zeros(3), torch.zeros(2).double()):
            with pytest.raises(ValueError, match=r"expected 2 entries of torch.float32 for 'w', got"):
                writer.put(["w"], wrong)
        writer.put(["w"], torch.zeros(2))
        writer.close({})


def test_a_dtype_that_the_format_lacks_is_named(tmp_path):
    with (
        pytest.raises(ValueError, match=r"got torch.complex128 for 'w'"),
        new_safetensors(tmp_path / "out.safetensors", {"w": Entry((2,), torch.complex128)}, {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
