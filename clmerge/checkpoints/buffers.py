"""The running statistics of a merged model: from the base, from the models, or estimated on training images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clmerge.checkpoints.formats import open_checkpoint
from clmerge.checkpoints.names import align_names
from clmerge.checkpoints.policy import Treatment, is_statistic
from clmerge.checkpoints.reader import Checkpoint
from clmerge.merging.checks import is_finite
from clmerge.weights.buffers import Buffers
from clmerge.weights.checksums import MANIFEST, verify_part
from clmerge.weights.task_vector import accumulator_dtype

_TREATMENTS = {
    "latest": ("taken", "running statistics of the last model"),
    "mean": ("averaged", "running statistics, over the models"),
    "re-estimated": ("measured", "running statistics, on training images"),
}


class MergedBuffers:
    """Compute the running statistics of a merge by one policy.

    The number of batches behind the statistics is an integer and is never averaged: if statistics are taken from the
    models, it is the last model's.

    Args:
        base: The base model.
        models: The models; those of a run's bank have statistics in the run's folder.
        policy: Source of the statistics; default the base, with a note if the models' statistics differ.
        is_wanted: Returns, by name, whether a tensor is to be merged; otherwise it stays the base's.

    Attributes:
        policy: Source of the statistics.
        treatments: Treatment of the statistics that are not the base's, by name.
        estimated: Names of statistics to estimate on images.
        files: Files that are read beside base and models.
        notes: Notes for the user, one per line.

    Raises:
        ValueError: If there are no statistics that the policy applies to.
    """

    def __init__(
        self,
        base: Checkpoint,
        models: Sequence[Checkpoint],
        policy: Buffers | None,
        is_wanted: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.policy: Buffers = policy or "base"
        self.treatments: dict[str, Treatment] = {}
        self.estimated: list[str] = []
        self.files: list[Checkpoint] = []
        self.notes: list[str] = []
        self._base = base
        self._sources: list[Checkpoint] = []
        names = [name for name in base.entries if is_statistic(name) and is_wanted(name)]
        if policy is None and (other := self._other_than_base(names, models)):
            self.notes.append(
                f"{other} has other running statistics than the base, whose are kept; --buffers latest, mean or "
                "re-estimated takes others, --buffers base says that these are meant"
            )
        if self.policy == "base":
            return
        if not any(self._is_float(name) for name in names):
            raise ValueError(
                f"expected running statistics of batch normalisation in {base.source} that are not left out, for "
                f"--buffers {policy}, got none; leave --buffers out"
            )
        self._sources = [_holder(model, base) for model in (models if self.policy == "mean" else models[-1:])]
        self.files = [source for source in self._sources if all(source is not model for model in models)]
        for name in names:
            if (treatment := self._treatment(name)) is not None:
                self.treatments[name] = treatment
        if self.policy == "re-estimated":
            self.estimated = [name for name in names if self._is_float(name)]
            return
        for source in self._sources:
            if not any(self._is_float(name) and _has(source, name, base) for name in names):
                raise ValueError(
                    f"expected running statistics of batch normalisation for --buffers {policy}, got none in "
                    f"{source.source}: a run folder has those of its task vectors; or choose --buffers base"
                )

    def takes(self, name: str) -> bool:
        """Return whether a statistic is taken from the models."""
        return name in self.treatments and not self.treatments[name][3] and name not in self.estimated

    def tensor(self, name: str) -> Tensor:
        """Return a statistic that is taken from the models; means are in float32 at least.

        Raises:
            ValueError: If the statistic of a model holds NaN or Inf.
        """
        if not self._is_float(name):
            return self._sources[-1].tensor(name)
        mean: Tensor | None = None
        for count, source in enumerate(self._sources, start=1):
            value = source.tensor(name)
            if not is_finite(value):
                raise ValueError(f"expected finite running statistics, got NaN or Inf in {name!r} of {source.source}")
            value = value.to(accumulator_dtype(value))
            mean = value if mean is None else mean + (value - mean) / count  # same bits as the average in fit
        assert mean is not None
        return mean

    def _is_float(self, name: str) -> bool:
        return self._base.entries[name].dtype.is_floating_point

    def _treatment(self, name: str) -> Treatment | None:
        if self._is_float(name) and self.policy == "re-estimated":
            return *_TREATMENTS[self.policy], "", False
        for source in self._sources if self._is_float(name) else self._sources[-1:]:
            if _has(source, name, self._base):
                continue
            if not self._is_float(name):
                return None
            found = source.entries.get(name)
            shape = f"{self._base.entries[name].shape} in the base, {found.shape} in" if found else "not in"
            return "copied", "running statistics that a model does not have", f"{shape} {source.source}", True
        kind = "taken" if not self._is_float(name) else _TREATMENTS[self.policy][0]
        reason = _TREATMENTS[self.policy][1] if self._is_float(name) else "number of batches of the last model"
        return kind, reason, "", False

    def _other_than_base(self, names: Sequence[str], models: Sequence[Checkpoint]) -> str | None:
        """Return the first model whose statistics differ from the base's, None if there is none."""
        floats = [name for name in names if self._is_float(name)]
        for holder in (_holder(model, self._base) for model in models) if floats else ():
            for name in floats:
                if _has(holder, name, self._base):
                    theirs = holder.tensor(name)
                    if not torch.equal(self._base.tensor(name).to(theirs.dtype), theirs):
                        return holder.source
        return None


def _holder(model: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a model's statistics: the model, or a file beside the bank that holds its vector."""
    file = model.files[0]
    run = file.parent.parent
    kept = run / "unmerged" / file.name
    if not (model.is_task_vector and file.parent.name == "bank" and (run / MANIFEST).is_file() and kept.is_file()):
        return model
    verify_part(run, f"unmerged/{file.name}")
    opened = open_checkpoint(kept)
    opened.rename(lambda name: name if is_statistic(name) else None)  # the other tensors are a head
    align_names(opened, base, base.source)
    return opened


def _has(source: Checkpoint, name: str, base: Checkpoint) -> bool:
    found, wanted = source.entries.get(name), base.entries[name]
    return (
        found is not None
        and not source.is_difference(name)
        and found.shape == wanted.shape
        and found.dtype.is_floating_point == wanted.dtype.is_floating_point
    )
