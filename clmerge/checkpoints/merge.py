"""Merge checkpoints on disk without loading whole models into memory."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.checkpoints.buffers import MergedBuffers
from clmerge.checkpoints.faults import explained
from clmerge.checkpoints.formats import open_checkpoint, open_models
from clmerge.checkpoints.groups import Group, assign
from clmerge.checkpoints.heads import Heads, settle_heads
from clmerge.checkpoints.ledger import UNKNOWN, Ledger, as_plain, input_files, versions
from clmerge.checkpoints.merged_adapter import MergedAdapter
from clmerge.checkpoints.names import align_names
from clmerge.checkpoints.output import check_target, new_output
from clmerge.checkpoints.policy import Policy, decide, describe_rows, is_left_out
from clmerge.checkpoints.positions import fit_positions
from clmerge.checkpoints.reader import Checkpoint, Entry, describe, float_dtype
from clmerge.checkpoints.remote import local_path
from clmerge.checkpoints.tied import untie
from clmerge.checkpoints.vectors import CheckpointVectors, Origin, check_statistics
from clmerge.checkpoints.writer import sha256_of
from clmerge.merging import Merger
from clmerge.merging.out_of_core import merge_out_of_core, working_memory
from clmerge.merging.vectors import Pack, packs
from clmerge.names import visible
from clmerge.weights.buffers import Buffers
from clmerge.weights.task_vector import LazyVector, accumulator_dtype, fingerprint

if TYPE_CHECKING:
    from clmerge.checkpoints.alignment import Alignment
    from clmerge.checkpoints.estimation import Estimation

OnBytes = Callable[[int], None]
_PASSES = {
    "entry": "one pass, a piece of one parameter at a time",
    "parameter": "one pass, one parameter at a time",
    "thresholds": "a pass for the thresholds of the model, then one parameter at a time",
    "model": "this rule needs the whole model: its state, one task vector and the result are in memory",
}


class CheckpointMerge:
    """A planned merge: inputs are open and the policy is decided, but nothing is computed yet.

    Args:
        base: The base model, a file or folder.
        models: Fine-tuned models, run folders, task-vector banks.
        merger: The rule for tensors in no group. Default: they stay the base's.
        groups: Rules for some of the tensors; each merges its own tensors as if there were no others.
        origin: ``"base"`` merges differences from the base, ``"zero"`` the weights themselves.
        dtype: Dtype of the written floating-point tensors, such as ``"bfloat16"``. Default: the base's.
        include: Glob patterns of tensors to merge. Default: all.
        exclude: Glob patterns of tensors to copy from the base.
        strict: Refuse tensors that do not match.
        without: Tasks that are left out, by name or index. The others keep their indices, which determine random masks
            and settings per task: the result is that of a run that never had these tasks.
        weights: Which set is read from files with several, as for ``open_checkpoint``.
        buffers: Source of the result's running statistics: the ``"latest"`` model, the ``"base"``, their ``"mean"``
            over the models, or ``"re-estimated"`` on images. Default: the base's, with a note if those of the models
            differ.
        estimation: Estimates statistics, for ``"re-estimated"``.
        heads: What becomes of class heads and vocabularies whose sizes differ: ``"union"`` of the rows by name, those
            of the ``"first"`` model, ``"drop"``, or the ``"base"``'s (default, with a note).
        lora_rank: Write a LoRA adapter of PEFT with products of this rank at most, in place of dense weights; all
            models must be adapters.
        alignment: Carries models that did not start from the base's weights into the base's units.

    Raises:
        FileNotFoundError: If an input does not exist.
        ValueError: If an input cannot be read or does not fit the base, or a rule's settings do not fit the models.
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        *,
        models: Sequence[str | os.PathLike[str]],
        merger: Merger | None = None,
        groups: Sequence[Group] = (),
        origin: Origin = "base",
        dtype: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        strict: bool = False,
        without: Sequence[str] = (),
        weights: str | None = None,
        buffers: Buffers | None = None,
        estimation: "Estimation | None" = None,
        heads: Heads | None = None,
        lora_rank: int | None = None,
        alignment: "Alignment | None" = None,
    ) -> None:
        others = {"origin": (origin, "base"), "buffers": (buffers, "base"), "heads": (heads, "base")}
        wrong = [f"--{key} {value}" for key, (value, usual) in others.items() if value not in (None, usual)]
        if lora_rank is not None and wrong:
            raise ValueError(
                "expected a merge of task vectors alone for --lora-rank, because an adapter is added to its base, got "
                f"{' and '.join(wrong)}; leave it out"
            )
        self.origin: Origin = origin
        base, models = local_path(base), [*map(local_path, models)]
        self.base = open_checkpoint(base, weights)
        if self.base.is_task_vector:
            raise ValueError(f"expected the weights of a base model, got the task vector {self.base.source}")
        self.models = open_models(models, weights)
        of_all = len(self.models)
        self.tasks = remaining_tasks([model.task for model in self.models], without)
        self.models = [self.models[task] for task in self.tasks]
        if weights is not None and all(one.weights != weights for one in (self.base, *self.models)):
            raise ValueError(f"expected a checkpoint that holds weights {weights!r}, got none; leave --weights out")
        for model in self.models:
            align_names(model, self.base, self.base.source)
            model.attach(self.base)
        untie(self.base, self.models)
        wanted = None if dtype is None else float_dtype(dtype)
        dtypes = {name: entry.dtype for name, entry in self.base.entries.items()}
        parts = assign(dict.fromkeys(chain(self.base.entries, *self.models)), groups, merger)
        left = {name for part in parts if part.merger is None for name in part.names}

        def is_wanted(name: str) -> bool:
            return name not in left and not is_left_out(name, include, exclude)

        self.notes = _twice(self.tasks, self.models)
        self.notes += fit_positions(self.base, self.models, is_wanted)
        if alignment is not None:
            self.notes += alignment.prepare(self.base, self.models)
        self.heads = settle_heads(self.base, self.models, heads, is_wanted)
        self.notes += self.heads.notes
        for part in parts:
            part.names = [name for name in part.names if name in self.base.entries]
        unused = [part.rule for part in parts if not part.names and (part.match or part.merger is not None)]
        self.buffers = MergedBuffers(self.base, self.models, buffers, is_wanted)
        self.notes += self.buffers.notes
        self.estimation = estimation
        if estimation is not None:
            estimation.prepare(self.base, self.buffers.estimated)
            self.notes.append(f"measures on {estimation.what}")
        self.entries = {
            name: Entry(entry.shape, wanted or dtypes.get(name, entry.dtype))
            if entry.dtype.is_floating_point
            else entry
            for name, entry in self.base.entries.items()
        }
        self.policy: Policy = decide(
            self.base,
            self.models,
            include=include,
            exclude=exclude,
            strict=strict,
            left=left,
            patterns=[pattern for part in parts for pattern in part.match],
            treatments=self.buffers.treatments | self.heads.treatments,
        )
        if strict and unused:
            raise ValueError(
                f"expected rules with tensors to merge (--strict), got {unused[0]} after groups that have all of its "
                "tensors; put it before them or leave it out"
            )
        self.notes += [f"unused  {rule}: the groups before it have all of its tensors" for rule in unused]
        merged = set(self.policy.merged)
        for part in parts:
            part.names = [name for name in part.names if name in merged]
        self.parts = [part for part in parts if part.names]
        self.notes += [
            f"{part.rule} merges to its one model for inputs of unknown task, without the views per task by which fit "
            "and compare evaluate it"
            for part in self.parts
            if part.merger is not None and part.merger.task_views
        ]
        for part in self.parts:
            if part.merger is not None:
                check_statistics(part.merger, self.models)
                part.merger.check_tasks(of_all, exact=True)
                part.merger.check_names({name: self.base.entries[name].shape for name in part.names})
        self.adapter: MergedAdapter | None = None
        if lora_rank is not None:
            self.adapter = MergedAdapter(self.base, self.models, self.policy.merged, lora_rank, wanted)
            self.entries = self.adapter.entries
        self.ledger = Ledger(
            merger=None if merger is None else as_plain(merger),
            groups=[as_plain(group) for group in groups],
            origin=origin,
            dtype=dtype,
            base=str(Path(base).absolute()),
            models=[str(Path(model).absolute()) for model in models],
            files=input_files([self.base, *self.models, *self.buffers.files]),
            include=list(include),
            exclude=list(exclude),
            strict=strict,
            without=list(without),
            weights=weights,
            buffers=self.buffers.policy,
            estimated=self.buffers.estimated,
            images=None if estimation is None else estimation.what,
            heads=heads or "base",
            classes=self.heads.classes,
            lora_rank=lora_rank,
            alignment=None if alignment is None else alignment.record,
            diagnostics={} if alignment is None else {"barriers": alignment.barriers},
            threads=torch.get_num_threads(),
            versions=versions(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the merged tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def work(self) -> int:
        """Bytes that merging reads from the models, over all passes."""
        total = 0
        for merger, names in self._work():
            read = (model.entries.get(name) for model in self.models for name in names)
            once = sum(entry.nbytes for entry in read if entry is not None)
            total += once * (2 if merger.scope == "thresholds" else 1)
        return total

    def describe(self) -> str:
        """Return the plan as a short table: inputs, policy, memory."""
        sizes = {name: entry.numel for name, entry in self.base.entries.items()}
        work = [(merger, {name: self.base.entries[name].shape for name in names}) for merger, names in self._work()]
        costs = {working_memory(merger, shapes, len(self.models)): merger.scope for merger, shapes in work}
        lines = [f"merger  {part}" for part in self.parts]
        lines.append(f"base    {describe(self.base)}")
        lines += [f"task {task:<3}{describe(model)}" for task, model in zip(self.tasks, self.models, strict=True)]
        lines += [*self.notes, *(line for model in (self.base, *self.models) for line in _left_out(model))]
        lines += ["", *describe_rows(self.policy.rows), ""]
        what = ", the weights themselves" if self.origin == "zero" else ""
        merged = sum(sizes[name] for name in self.policy.merged)
        lines.append(f"merges  {merged:,} entries of {len(self.models)} models{what}")
        for merger, shapes in work:
            lines += [f"matrix  {line}" for line in merger.matrices(shapes)]
        form = "safetensors" if self.adapter is None else "an adapter of PEFT"
        lines.append(f"writes  {self.nbytes / 1e6:,.1f} MB, {form}")
        held = 0 if self.estimation is None else self.nbytes
        if self.adapter is not None:
            held = 4 * torch.float64.itemsize * self.adapter.largest  # a matrix in float64, and its decomposition
        also = "" if self.estimation is None else ", and the merged model to measure on"
        also += "" if self.adapter is None else ", and the decomposition of a matrix"
        lines.append(f"memory  {(max(costs) + held) / 2**20:,.1f} MiB: {_PASSES[costs[max(costs)]]}{also}")
        return "\n".join(map(visible, lines))

    def run(
        self,
        out: str | os.PathLike[str],
        *,
        hashes: bool = True,
        shard_bytes: int | None = None,
        on_bytes: OnBytes = lambda count: None,
    ) -> None:
        """Merge and write ``out``; it is written completely or not at all.

        Args:
            out: The safetensors file to write, or the folder for shards or an adapter.
            hashes: Whether the ledger holds the SHA-256 of every input and of the result.
            shard_bytes: Largest number of tensor bytes per file; if given, write a folder in Hugging Face's layout.
            on_bytes: Called with the bytes of every piece that was read.

        Raises:
            ValueError: If ``out`` is one of the inputs, the disk is too small, a model is refused, or statistics are to
                be re-estimated without an ``estimation``.
            RuntimeError: If the merged vector overflows.
        """
        out = Path(out)
        if self.adapter is not None and shard_bytes is not None:
            raise ValueError("expected an adapter in one file, got a size of shards; leave --shard-size out")
        if self.buffers.estimated and self.estimation is None:
            raise ValueError("expected an estimation= for buffers='re-estimated', got none")
        config = None if self.adapter is None else self.adapter.config()
        is_folder = shard_bytes is not None or config is not None
        check_target(out, self.ledger, nbytes=self.nbytes, is_folder=is_folder)
        if not hashes:
            for file in self.ledger.files:
                file.sha256 = None
        self.ledger.result_sha256 = UNKNOWN if hashes else None
        self._check_base()
        with (
            _hashed_meanwhile([file.path for file in self.ledger.files] if hashes else []) as sums,
            new_output(out, self.entries, self.ledger, shard_bytes=shard_bytes, config=config) as output,
        ):
            held: dict[str, Tensor] = {}
            for pack, flat in self.stream(on_bytes):
                output.put(pack.names, flat)
                if self.estimation is not None:
                    held |= pack.parts(flat.clone())
                del flat  # otherwise it stays in memory while the next is merged
            if self.estimation is not None:
                found = self.estimation.run(held)
                for name in self.buffers.estimated:
                    output.put([name], found[name].to(self.entries[name].dtype))
            if hashes:
                for file in self.ledger.files:
                    file.sha256 = sums[file.path].result()
            output.finish(self.ledger, hashes=hashes)

    def stream(self, on_bytes: OnBytes = lambda count: None) -> Iterator[tuple[Pack, Tensor]]:
        """Merge, and yield the merged model's tensors, some at a time; a later tensor replaces an earlier one.

        Running statistics to be estimated are yielded with the base's values.

        Args:
            on_bytes: Called with the bytes of every piece that was read.
        """
        if self.adapter is not None:
            for pack, tau in self._merged(on_bytes):
                yield from self.adapter.tensors(pack, tau)
                del tau
            return
        merged = {*self.policy.merged, *self.policy.tied}
        further: dict[str, list[str]] = {}
        for name, leader in self.policy.tied.items():
            further.setdefault(leader, []).append(name)
        rest = {name: entry.shape for name, entry in self.base.entries.items() if name not in merged}
        taken = [name for name in rest if self.buffers.takes(name)]
        for name in taken:
            yield Pack({name: rest.pop(name)}), self.buffers.tensor(name).reshape(-1).to(self.entries[name].dtype)
        for pack in packs(rest, lambda name: self.base.entries[name].dtype):
            yield pack, self.base.joined(pack.names).to(self.entries[pack.names[0]].dtype)
        for pack, tau in self._merged(on_bytes):
            theta = self._applied(pack, tau)
            yield pack, theta
            for name in further.keys() & pack.shapes.keys():
                for other in further[name]:
                    yield Pack({other: pack.shapes[name]}), pack.parts(theta)[name].reshape(-1)
            del tau, theta  # otherwise they stay in memory while the next is merged

    def _merged(self, on_bytes: OnBytes) -> Iterator[tuple[Pack, Tensor]]:
        """Yield the merged vectors, some parameters at a time."""
        try:
            for merger, names in self._work():
                vectors = CheckpointVectors(
                    self.base,
                    self.models,
                    names,
                    needed=merger.requires,
                    origin=self.origin,
                    tasks=self.tasks,
                    on_bytes=on_bytes,
                )
                for pack, tau in merge_out_of_core(merger, vectors):
                    yield pack, tau
                    del tau  # otherwise it stays in memory while the next is merged
        except (ValueError, RuntimeError) as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(explained(error, self.base, self.models, self.policy.merged)) from error

    def _work(self) -> Iterator[tuple[Merger, list[str]]]:
        return ((part.merger, part.names) for part in self.parts if part.merger is not None)

    def _applied(self, pack: Pack, tau: Tensor) -> Tensor:
        """Return the tensor to write, rounded to the output's dtype once, at the end."""
        if self.origin == "base":
            start = self.base.joined(pack.names)
            dtype = accumulator_dtype(start, tau)
            tau = tau.to(dtype).add_(start.to(dtype))
        return tau.to(self.entries[pack.names[0]].dtype)

    def _check_base(self) -> None:
        """Refuse task vectors of another base model."""
        known: dict[tuple[str, ...], set[str]] = {}
        for model in self.models:
            if model.base is None or model.left_out or not model.entries.keys() <= self.base.keys():
                continue  # the fingerprint covers tensors that the base lacks
            stored = {model.stored(name): name for name in model.entries}
            prints = known.setdefault((*stored, *stored.values()), set())
            # Training may have cast the weights that it started from.
            for dtype in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
                if model.base in prints:
                    break
                prints.add(fingerprint(_Cast(self.base, stored, dtype)))
            if model.base not in prints:
                raise ValueError(
                    f"expected task vectors of the base {self.base.source}, got {model.source} of base model "
                    f"{model.base[:12]}...; name the checkpoint that the run began with"
                )


def remaining_tasks(names: Sequence[str], without: Sequence[str]) -> list[int]:
    """Return the indices of the remaining tasks.

    Args:
        names: Names of all tasks, empty if a file names none.
        without: Tasks to leave out, by name or index.

    Raises:
        ValueError: If there is no such task, several have the name, or no task remains.

    Example:
        >>> remaining_tasks(["cats", "dogs", "birds"], ["dogs", "0"])
        [2]
    """
    left = dict(enumerate(names))
    for wanted in without:
        found = [task for task, name in enumerate(names) if wanted == name] or [
            task for task in range(len(names)) if wanted == str(task)
        ]
        if len(found) != 1:
            known = ", ".join(f"{task} ({name})" if name else str(task) for task, name in enumerate(names))
            raise ValueError(f"expected one task {wanted!r} to leave out, got {len(found)} of the tasks {known}")
        left.pop(found[0], None)
    if not left:
        raise ValueError(f"expected a task that is left, got all {len(names)} to leave out")
    return list(left)


def _twice(tasks: Sequence[int], models: Sequence[Checkpoint]) -> list[str]:
    """Return lines about models that are merged already: runs that are joined may share tasks."""
    first: dict[str, int] = {}
    lines = []
    for task, model in zip(tasks, models, strict=True):
        if (other := first.setdefault(model.identity, task)) != task:
            lines.append(f"twice   task {task} is the same as task {other}: it counts twice, --without {task} drops it")
    return lines


class _Cast(LazyVector):
    """Tensors of a checkpoint under other names and in another dtype, one in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype | None) -> None:
        self._checkpoint, self._names, self._dtype = checkpoint, names, dtype

    @override
    def names(self) -> Iterable[str]:
        return self._names

    @override
    def __getitem__(self, name: str) -> Tensor:
        tensor = self._checkpoint.tensor(self._names[name])
        return tensor if self._dtype is None else tensor.to(self._dtype)


def _left_out(checkpoint: Checkpoint) -> list[str]:
    shown = ", ".join(checkpoint.ignored[:5])
    more = f" and {len(checkpoint.ignored) - 5} more" if len(checkpoint.ignored) > 5 else ""
    return [f"ignored objects of {shown}{more} in {checkpoint.source}"] if shown else []


@contextmanager
def _hashed_meanwhile(paths: Sequence[str]) -> Iterator[dict[str, Future[str]]]:
    """Compute the SHA-256 of files in parallel with the block."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
    try:
        yield {path: pool.submit(sha256_of, path) for path in paths}
    finally:
        pool.shutdown(cancel_futures=True)
