import pytest
import torch

from clmerge.weights import BankVector, CheckedVector, TaskVectorBank, fingerprint, load_metadata


def vector(value, size=2):
    return {"w": torch.full((size,), float(value)), "b": torch.tensor(float(value))}


def test_vectors_come_back_in_task_order(tmp_path):
    bank = TaskVectorBank(tmp_path / "bank")
    assert len(bank) == 0
    assert list(bank) == []
    for task in (2, 0, 1):
        bank.append(task, vector(task), name=f"task {task}", base="abc")
    (tmp_path / "bank" / ".task_003.safetensors.0f.tmp").write_bytes(b"left by a killed process")
    assert len(bank) == 3
    assert bank.tasks == [0, 1, 2]
    assert [tau["b"].item() for tau in bank] == [0.0, 1.0, 2.0]
    assert torch.equal(bank[2]["w"], torch.tensor([2.0, 2.0]))
    assert bank.metadata(1) == {"task": "1", "name": "task 1", "base": "abc", "sha256": fingerprint(vector(1))}
    assert bank.base == "abc"


def test_files_have_the_promised_names(tmp_path):
    bank = TaskVectorBank(tmp_path)
    bank.append(7, vector(1))
    bank.append(1000, vector(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "task_007.safetensors",
        "task_1000.safetensors",
    ]
    assert load_metadata(tmp_path / "task_007.safetensors")["task"] == "7"
    assert bank.base is None


def test_iteration_is_lazy(tmp_path):
    bank = TaskVectorBank(tmp_path)
    bank.append(0, vector(1))
    bank.append(1, vector(2))
    vectors = iter(bank)
    next(vectors)
    bank.path(1).unlink()
    with pytest.raises(IndexError, match="tasks"):
        next(vectors)


def test_another_base_is_refused(tmp_path):
    bank = TaskVectorBank(tmp_path)
    bank.append(0, vector(1))
    bank.append(1, vector(1), base="a" * 64)
    with pytest.raises(ValueError, match=r"base model aaaaaaaaaaaa\.\.\. as in .*task_001"):
        bank.append(2, vector(1), base="b" * 64)
    assert bank.tasks == [0, 1]


def test_another_layout_is_refused(tmp_path):
    bank = TaskVectorBank(tmp_path)
    bank.append(0, vector(1))
    with pytest.raises(ValueError, match="one shape for 'w'"):
        bank.append(1, vector(1, size=3))
    with pytest.raises(ValueError, match="'b' only in"):
        bank.append(1, {"w": torch.zeros(2)})
    assert len(bank) == 1


def test_a_stored_task_is_replaced_only_on_request(tmp_path):
    bank = TaskVectorBank(tmp_path)
    bank.append(0, vector(1), base="a" * 64)
    with pytest.raises(ValueError, match="overwrite=True"):
        bank.append(0, vector(2))
    bank.append(0, vector(2, size=5), base="b" * 64, overwrite=True)
    assert bank[0]["b"].item() == 2.0
    assert bank.base == "b" * 64


def test_tasks_that_do_not_exist(tmp_path):
    bank = TaskVectorBank(tmp_path)
    with pytest.raises(IndexError, match="got 0"):
        bank[0]
    with pytest.raises(ValueError, match="0 or more, got -1"):
        bank.append(-1, vector(1))


def test_a_reference_reads_what_was_stored_and_nothing_else(tmp_path):
    bank = TaskVectorBank(tmp_path)
    reference = BankVector(bank, 3, fingerprint(vector(1)))
    with pytest.raises(FileNotFoundError, match="task vector of task 3"):
        reference["w"]
    bank.append(3, CheckedVector(vector(1)))
    assert sorted(reference) == ["b", "w"]
    assert len(reference) == 2
    assert torch.equal(reference["w"], torch.ones(2))
    assert "other" not in reference
    bank.append(3, vector(2), overwrite=True)
    with pytest.raises(ValueError, match="as it was merged"):
        reference["w"]


def test_a_vector_that_was_changed_is_noticed_when_it_is_read(tmp_path):
    bank = TaskVectorBank(tmp_path)
    bank.append(0, {"w": torch.ones(3)})
    assert bank[0]["w"].sum() == 3
    whole = bank.path(0).read_bytes()
    bank.path(0).write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    for reader in (bank, TaskVectorBank(tmp_path)):
        with pytest.raises(ValueError, match=r"as its header says, got another: the file was damaged or changed"):
            reader[0]
