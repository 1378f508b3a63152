"""Task vectors, parameter selection, safetensors files, and the on-disk bank of task vectors."""

from clmerge.files import atomic_path, write_bytes_atomic, write_json_atomic, write_text_atomic
from clmerge.weights.bank import BankVector, TaskVectorBank
from clmerge.weights.checksums import checksum
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
from clmerge.weights.tensor_files import load_metadata, load_tensors, save_tensors, save_torch

__all__ = [
    "BankVector",
    "CheckedVector",
    "LazyVector",
    "State",
    "TaskVector",
    "TaskVectorBank",
    "apply_task_vector",
    "atomic_path",
    "checksum",
    "fingerprint",
    "load_metadata",
    "load_tensors",
    "save_tensors",
    "save_torch",
    "select_parameters",
    "task_vector",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_text_atomic",
]
