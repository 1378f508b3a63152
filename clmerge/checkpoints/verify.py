"""Repeat the merge in a ledger, and compare the result with the file that holds the ledger."""

import os
from pathlib import Path

import torch

from clmerge.checkpoints.adapter import CONFIG
from clmerge.checkpoints.alignment import RecordedAlignment
from clmerge.checkpoints.formats import open_checkpoint
from clmerge.checkpoints.groups import Group
from clmerge.checkpoints.ledger import Ledger, built, configured_from, ledger_file, read_ledger
from clmerge.checkpoints.merge import CheckpointMerge, OnBytes
from clmerge.checkpoints.peft_adapter import read_config
from clmerge.checkpoints.reader import Checkpoint
from clmerge.checkpoints.safetensors_file import SafetensorsCheckpoint
from clmerge.checkpoints.tied import same_bits
from clmerge.checkpoints.writer import data_start, sha256_of


def verify(path: str | os.PathLike[str], *, on_bytes: OnBytes = lambda count: None) -> tuple[list[str], Ledger]:
    """Repeat the merge in the ledger of a merged file or folder and compare bit for bit.

    Running statistics that were estimated on images (``estimated`` in the ledger) are not computed again.

    Args:
        path: A result of ``clmerge merge``.
        on_bytes: Called with the bytes of every piece that was read.

    Returns:
        The differences, empty if the file matches its ledger, and the ledger.

    Raises:
        FileNotFoundError: If the file or an input is missing.
        ValueError: If the file has no ledger or an input cannot be read.
    """
    ledger = read_ledger(path)
    if ledger.threads != torch.get_num_threads():
        torch.set_num_threads(ledger.threads)
    found: list[str] = []
    for file in ledger.files:
        if not Path(file.path).is_file():
            raise FileNotFoundError(f"expected the inputs of {path}, got no {file.path}; put it back to verify")
        if file.sha256 is not None and sha256_of(file.path) != file.sha256:
            found.append(f"the input {file.path} has changed since the merge")
    holder = ledger_file(path)
    if ledger.result_sha256 is not None and sha256_of(holder, skip=data_start(holder)) != ledger.result_sha256:
        found.append(f"the tensors of {holder} have changed since the merge")
    for name, expected in ledger.shards.items():
        shard = holder.parent / name
        if expected is not None and shard.is_file() and sha256_of(shard) != expected:
            found.append(f"the shard {shard} has changed since the merge")
    try:
        job = _planned(path, ledger)
        for then, now in zip(ledger.files, job.ledger.files, strict=False):
            if (then.path, then.weights) != (now.path, now.weights):
                found.append(f"the merge read {then.weights!r} of {then.path}, which is now read as {now.weights!r}")
        if ledger.estimated != job.buffers.estimated:
            found.append(f"the ledger of {path} names other estimated tensors than its merge has")
        different = _differences(path, job, on_bytes)
    except (TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:  # from malformed settings
        raise ValueError(
            f"expected a ledger that can be replayed in {path}, got {type(error).__name__}: {error}"
        ) from error
    return [*found, *different], ledger


def _planned(path: str | os.PathLike[str], ledger: Ledger) -> CheckpointMerge:
    try:
        merger = None if ledger.merger is None else configured_from(ledger.merger)
        groups = [Group(**built(group)) for group in ledger.groups]
    except ValueError as error:
        raise ValueError(f"{error} (in the ledger of {path})") from error
    alignment = None
    if ledger.alignment is not None:
        alignment = RecordedAlignment(ledger.alignment, ledger.diagnostics["barriers"])
    return CheckpointMerge(
        ledger.base,
        models=ledger.models,
        merger=merger,
        groups=groups,
        origin=ledger.origin,
        dtype=ledger.dtype,
        include=ledger.include,
        exclude=ledger.exclude,
        strict=ledger.strict,
        without=ledger.without,
        weights=ledger.weights,
        buffers=ledger.buffers,
        heads=ledger.heads,
        lora_rank=ledger.lora_rank,
        alignment=alignment,
    )


def _differences(path: str | os.PathLike[str], job: CheckpointMerge, on_bytes: OnBytes) -> list[str]:
    written: Checkpoint
    if job.adapter is None:
        written = open_checkpoint(path)
    else:
        written = SafetensorsCheckpoint(Path(path), [ledger_file(path)])  # the factors themselves
        config = Path(path, CONFIG) if Path(path).is_dir() else Path(path).parent / CONFIG
        if read_config(config) != job.adapter.config():
            return [f"{config} is not what the merge gives"]
    if written.entries.keys() != job.entries.keys():
        return [f"{path} has other tensors than {job.base.source}"]
    different: dict[str, None] = {}
    estimated = set(job.buffers.estimated)
    for pack, flat in job.stream(on_bytes):
        for name, tensor in pack.parts(flat).items():
            different.pop(name, None)
            is_same = name in estimated or same_bits(tensor, written.tensor(name))
            if job.entries[name] != written.entries[name] or not is_same:
                different[name] = None
    return [f"{name!r} of {path} differs from what the merge gives" for name in different]
