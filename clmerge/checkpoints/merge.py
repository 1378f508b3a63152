"""Merge checkpoints into one file, out of core; and merge them again to see whether the file is what it says."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from clmerge.checkpoints.formats import align_names, open_checkpoint, open_models
from clmerge.checkpoints.ledger import (
    Ledger,
    as_plain,
    configured_from,
    input_files,
    ledger_file,
    read_ledger,
    versions,
)
from clmerge.checkpoints.output import check_target, new_output
from clmerge.checkpoints.policy import Policy, decide, describe_rows
from clmerge.checkpoints.reader import Checkpoint
from clmerge.checkpoints.tied import same_bits
from clmerge.checkpoints.vectors import CheckpointVectors
from clmerge.checkpoints.writer import data_start, sha256_of
from clmerge.merging import Merger
from clmerge.merging.out_of_core import merge_out_of_core, passes_of, working_memory
from clmerge.weights.task_vector import apply_task_vector, fingerprint

OnBytes = Callable[[int], None]
_PASSES = {
    "entry": "one pass, a piece of one parameter at a time",
    "parameter": "one pass, one parameter at a time",
    "thresholds": "a pass for the thresholds of the model, then one parameter at a time",
    "model": "this rule needs the whole model: its state, one task vector and the result are in memory",
}


class CheckpointMerge:
    """A merge that is planned: inputs are open, the policy is decided, nothing has been computed.

    Args:
        base: The base model, a file or folder.
        models: Fine-tuned models, run folders, task-vector banks.
        merger: The rule.
        include: Glob patterns of what is merged. Default: everything.
        exclude: Glob patterns of what is copied from the base.
        strict: Refuse tensors that do not match.

    Raises:
        FileNotFoundError: If an input does not exist.
        ValueError: If an input cannot be read or does not fit the base.
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        *,
        models: Sequence[str | os.PathLike[str]],
        merger: Merger,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        strict: bool = False,
    ) -> None:
        self.merger = merger
        self.base = open_checkpoint(base)
        if self.base.is_task_vector:
            raise ValueError(f"expected the weights of a base model, got the task vector {self.base.source}")
        self.models = open_models(models)
        for model in self.models:
            align_names(model, self.base)
        self.policy: Policy = decide(self.base, self.models, include=include, exclude=exclude, strict=strict)
        self.ledger = Ledger(
            merger=as_plain(merger),
            base=str(Path(base).resolve()),
            models=[str(Path(model).resolve()) for model in models],
            files=input_files([self.base, *self.models]),
            include=list(include),
            exclude=list(exclude),
            strict=strict,
            threads=torch.get_num_threads(),
            versions=versions(),
        )

    @property
    def work(self) -> int:
        """Bytes that merging reads of the models, over all passes."""
        read = (model.entries.get(name) for model in self.models for name in self.policy.merged)
        once = sum(entry.nbytes for entry in read if entry is not None)
        return once * (2 if passes_of(self.merger) == "thresholds" else 1)

    def describe(self) -> str:
        """Return the plan as a short table: inputs, policy, memory."""
        sizes = [self.base.entries[name].numel for name in self.policy.merged]
        memory = working_memory(self.merger, sizes, len(self.models))
        lines = [f"merger  {self.merger!r}", f"base    {_described(self.base)}"]
        lines += [f"task {task:<3}{_described(model)}" for task, model in enumerate(self.models)]
        lines += ["", *describe_rows(self.policy.rows), ""]
        lines.append(f"merges  {sum(sizes):,} entries of {len(self.models)} models")
        lines.append(f"writes  {sum(entry.nbytes for entry in self.base.entries.values()) / 1e6:,.1f} MB, safetensors")
        lines.append(f"memory  {memory / 2**20:,.1f} MiB: {_PASSES[passes_of(self.merger)]}")
        return "\n".join(lines)

    def run(
        self,
        out: str | os.PathLike[str],
        *,
        hashes: bool = True,
        shard_bytes: int | None = None,
        on_bytes: OnBytes = lambda count: None,
    ) -> None:
        """Merge and write; ``out`` appears when everything is done, or not at all.

        Args:
            out: The safetensors file to write, or the folder.
            hashes: Whether the ledger says the SHA-256 of every input and of the result.
            shard_bytes: Write a folder in Hugging Face's layout, in files of at most so many bytes of tensors.
            on_bytes: Told of every piece that was read, in bytes.

        Raises:
            ValueError: If ``out`` is one of the inputs, the disk is too small, or a model is refused.
            RuntimeError: If the merged vector overflows.
        """
        out = Path(out)
        check_target(out, self.ledger, nbytes=self.base.nbytes, shard_bytes=shard_bytes)
        if not hashes:
            for file in self.ledger.files:
                file.sha256 = None
        self.ledger.result_sha256 = "0" * 64 if hashes else None
        self._check_base()
        with (
            _hashed_meanwhile([file.path for file in self.ledger.files] if hashes else []) as sums,
            new_output(out, self.base.entries, self.ledger, shard_bytes=shard_bytes) as output,
        ):
            for name, tensor in self.stream(on_bytes):
                output.put(name, tensor)
            if hashes:
                for file in self.ledger.files:
                    file.sha256 = sums[file.path].result()
            output.finish(self.ledger, hashes=hashes)

    def stream(self, on_bytes: OnBytes = lambda count: None) -> Iterator[tuple[str, Tensor]]:
        """Merge, and yield the tensors of the merged model; a later one of the same name takes the place of an earlier.

        Args:
            on_bytes: Told of every piece that was read, in bytes.
        """
        merged = {*self.policy.merged, *self.policy.tied}
        further: dict[str, list[str]] = {}
        for name, leader in self.policy.tied.items():
            further.setdefault(leader, []).append(name)
        for name in self.base.entries:
            if name not in merged:
                yield name, self.base.tensor(name)
        vectors = CheckpointVectors(self.base, self.models, self.policy.merged, on_bytes=on_bytes)
        try:
            for name, tau in merge_out_of_core(self.merger, vectors):
                theta = apply_task_vector({name: self.base.tensor(name)}, {name: tau})[name]
                for one in (name, *further.get(name, [])):
                    yield one, theta
        except ValueError as error:
            sources = "\n".join(f"  task {task}: {model.source}" for task, model in enumerate(self.models))
            raise ValueError(f"{error}\nThe tasks are:\n{sources}") from error

    def _check_base(self) -> None:
        """Refuse task vectors that were taken from another base model."""
        seen: dict[frozenset[str], set[str]] = {}
        for model in self.models:
            names = frozenset(model.entries)
            if model.base is None or not names <= self.base.keys():
                continue
            if names not in seen:
                tensors = {name: self.base.tensor(name) for name in names}
                # Training may have cast the weights it started from.
                seen[names] = {fingerprint(tensors), fingerprint({name: t.float() for name, t in tensors.items()})}
            if model.base not in seen[names]:
                raise ValueError(
                    f"expected task vectors of the base {self.base.source}, got {model.source} of base model "
                    f"{model.base[:12]}...; name the checkpoint that the run began with"
                )


def verify(path: str | os.PathLike[str], *, on_bytes: OnBytes = lambda count: None) -> tuple[list[str], Ledger]:
    """Replay the ledger of a merged file or folder and compare bit for bit.

    Args:
        path: What ``clmerge merge`` wrote.
        on_bytes: Told of every piece that was read, in bytes.

    Returns:
        What differs, nothing if the file is what it says, and the ledger.

    Raises:
        FileNotFoundError: If the file or an input is gone.
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
    job = CheckpointMerge(
        ledger.base,
        models=ledger.models,
        merger=configured_from(ledger.merger),
        include=ledger.include,
        exclude=ledger.exclude,
        strict=ledger.strict,
    )
    written = open_checkpoint(path)
    if written.entries.keys() != job.base.entries.keys():
        return [*found, f"{path} has other tensors than {ledger.base}"], ledger
    different: dict[str, None] = {}
    for name, tensor in job.stream(on_bytes):
        different.pop(name, None)
        if job.base.entries[name] != written.entries[name] or not same_bits(tensor, written.tensor(name)):
            different[name] = None
    return [*found, *(f"{name!r} differs from what the merge gives" for name in different)], ledger


def _described(checkpoint: Checkpoint) -> str:
    task = f", {checkpoint.task}" if checkpoint.task else ""
    prefix = f", without {checkpoint.prefix!r}" if checkpoint.prefix else ""
    size = f"{len(checkpoint)} tensors, {checkpoint.nbytes / 1e6:,.1f} MB"
    return f"{checkpoint.source} ({checkpoint.kind}{task}: {size}{prefix})"


@contextmanager
def _hashed_meanwhile(paths: Sequence[str]) -> Iterator[dict[str, Future[str]]]:
    """Compute the SHA-256 of files beside what the block does."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
    try:
        yield {path: pool.submit(sha256_of, path) for path in paths}
    finally:
        pool.shutdown(cancel_futures=True)
