"""Task vectors, parameter selection, safetensors files, and the on-disk bank of task vectors."""

from clmerge.weights.bank import BankVector, TaskVectorBank
from clmerge.weights.io import (
    atomic_path,
    load_metadata,
    load_tensors,
    save_tensors,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from clmerge.weights.selection import select_parameters
from clmerge.weights.task_vector import (
    CheckedVector,
    LazyVector,
    State,
    TaskVector,
    apply_task_vector,
    fingerprint,
    task_vector,
)

__all__ = [
    "BankVector",
    "CheckedVector",
    "LazyVector",
    "State",
    "TaskVector",
    "TaskVectorBank",
    "apply_task_vector",
    "atomic_path",
    "fingerprint",
    "load_metadata",
    "load_tensors",
    "save_tensors",
    "select_parameters",
    "task_vector",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_text_atomic",
]
