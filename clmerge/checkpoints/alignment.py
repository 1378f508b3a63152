"""Carry models that did not start from the base's weights into the base's units, before they are merged."""

import base64
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from typing_extensions import override

from clmerge.alignment import (
    Aligner,
    Axis,
    Group,
    PermutationSpec,
    Reparametrization,
    barrier,
    correlations,
    identity,
    spec_of,
)
from clmerge.checkpoints.names import align_names
from clmerge.checkpoints.reader import Checkpoint, Entry, Stand, TorchCheckpoint
from clmerge.weights.parametrization import folded
from clmerge.weights.task_vector import accumulator_dtype

_MOST_BYTES = 1 << 26


class Alignment(ABC):
    """What carries models into the units of the base.

    Attributes:
        record: What was done, in JSON types, so that it can be done again: ``aligner``, ``images``, ``groups``, and
            ``maps`` (of every model, compressed).
        barriers: Path, barrier ``before`` and ``after`` (None without images), and share of the units that ``moved``,
            of every model.
    """

    record: dict[str, Any]
    barriers: list[dict[str, Any]]

    def prepare(self, base: Checkpoint, models: Sequence[Checkpoint]) -> list[str]:
        """Carry the models into the units of the base; their files stay as they are.

        Args:
            base: The base model.
            models: Weights by the base's names; changed in place.

        Returns:
            Lines about what was done.

        Raises:
            ValueError: If a model is no set of weights, or does not have the units.
        """
        for model in models:
            if model.is_task_vector:
                raise ValueError(
                    f"expected the weights of models to align, got the task vector {model.source}: it is of the base, "
                    "whose units it has; leave --align out"
                )
        maps, lines = self._maps(base, models)
        for model, found in zip(models, maps, strict=True):
            last: dict[str, Tensor] = {}
            for name in found.spec.moved_names:
                if name in model.entries:
                    model.put(name, _Moved(model.hold(name), name, found, last))
        return lines

    @abstractmethod
    def _maps(self, base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[list[Reparametrization], list[str]]:
        """Return the map of every model into the units of the base, and lines about them."""


class MatchedAlignment(Alignment):
    """Match every model's units to the base's.

    Features keep their order, unless all that a checkpoint has beside the network reads them, as a classifier does.

    Args:
        network: The architecture; its weights do not count.
        aligner: Finds the maps.
        images: Returns images in batches, on the network's device; None for none.
        what: Description of network and images.
        part: Path of the part of the network whose names the checkpoints have.

    Raises:
        ValueError: If the aligner compares activations, and there are no images.
    """

    def __init__(
        self,
        network: nn.Module,
        aligner: Aligner,
        images: Callable[[], Iterable[Tensor]] | None,
        what: str,
        *,
        part: str = "",
    ) -> None:
        if aligner.needs_correlations and images is None:
            raise ValueError(
                f"expected images for {type(aligner).__name__}, which compares activations, got none in {what}: name a "
                "configuration with a stream, or match by WeightMatching"
            )
        self._network, self._aligner, self._images, self._what = network, aligner, images, what
        self._prefix = f"{part}." if part else ""
        self.barriers = []

    @override
    def _maps(self, base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[list[Reparametrization], list[str]]:
        with folded(self._network) as network:
            stored = self._stored_names(network, base)
            spec, readers = _specification(network, stored, base, models)
            batches = [] if self._images is None else list(self._images())
            ours = self._weights(network, stored, base, readers)
            found = [self._match(network, spec, stored, readers, batches, base, ours, model) for model in models]
        names = {**stored, **{name: name for name in readers}}
        known = {axis.name for axis in spec.groups[spec.outputs].axes} if readers else set()
        more = tuple(Axis(name, 1, reads=True) for name in readers if name not in known)
        by_file = _renamed(spec.extended({spec.outputs: more}), names)
        maps = [Reparametrization(by_file, one.maps) for one in found]
        self.record = {
            "aligner": repr(self._aligner),
            "images": self._what if batches else None,
            "groups": {key: asdict(group) for key, group in by_file.groups.items()},
            "maps": [_packed(one) for one in maps],
        }
        lines = [f"aligns  by {self.record['aligner']}, {'barriers on' if batches else 'no images, of'} {self._what}"]
        for place, told in enumerate(self.barriers):
            moved = f"{100 * told['moved']:.1f} % of the units of model {place}"
            gain = "" if told["before"] is None else f", barrier {told['before']:.3f} before, {told['after']:.3f} after"
            lines.append(f"moves   {moved}{gain}")
        if spec.outputs == "" and not readers:
            lines.append("keeps   the order of the features")
        return maps, lines

    def _stored_names(self, network: nn.Module, base: Checkpoint) -> dict[str, str]:
        """Return the base's names of the network's tensors, by the names in the network."""
        own = network.get_submodule(self._prefix.rstrip(".")).state_dict()
        opened = TorchCheckpoint(Path(base.source), [], [base], base.kind)
        align_names(opened, own, f"the model of {self._what}")
        return {self._prefix + name: opened.stored(name) for name in opened.entries if name in own}

    def _match(
        self,
        network: nn.Module,
        spec: PermutationSpec,
        stored: Mapping[str, str],
        readers: Sequence[str],
        batches: Sequence[Tensor],
        base: Checkpoint,
        ours: Mapping[str, Tensor],
        model: Checkpoint,
    ) -> Reparametrization:
        """Return the map of one model, and tell its barriers."""
        theirs = self._weights(network, stored, model, readers)
        try:
            if model.identity == base.identity:
                found = identity(spec)
            else:
                given = None
                if self._aligner.needs_correlations:
                    given = correlations(_loaded(network, ours), _loaded(network, theirs), spec, batches)
                found = self._aligner.match(ours, theirs, spec, correlations=given)
        except ValueError as error:
            raise ValueError(f"cannot align {model.source} to {base.source}: {error}") from error
        before = after = None
        if batches:
            device = batches[0].device
            moved = found.apply({name: theirs[name] for name in spec.moved_names})
            mine, own, carried = (
                {name: tensor.to(device) for name, tensor in state.items() if name not in readers}
                for state in (ours, theirs, {**theirs, **moved})
            )
            before, after = (barrier(network, mine, state, batches) for state in (own, carried))
        sizes = {key: group.size for key, group in spec.groups.items()}
        share = sum(sizes[key] * part for key, part in found.moved().items()) / sum(sizes.values())
        self.barriers.append({"model": model.source, "before": before, "after": after, "moved": share})
        return found

    @staticmethod
    def _weights(
        network: nn.Module, stored: Mapping[str, str], checkpoint: Checkpoint, readers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return a checkpoint's tensors by the network's names, and those that read the features by their own."""
        names = {**stored, **{name: name for name in readers}}
        found = {name: checkpoint.tensor(held) for name, held in names.items() if held in checkpoint.entries}
        return {
            name: tensor.to(accumulator_dtype(tensor)) if tensor.is_floating_point() else tensor
            for name, tensor in found.items()
        }


class RecordedAlignment(Alignment):
    """Repeat an alignment from its record, without the network and the images.

    Args:
        record: ``Alignment.record``; may be from an untrusted file.
        barriers: ``Alignment.barriers``.
    """

    def __init__(self, record: Mapping[str, Any], barriers: Sequence[Mapping[str, Any]]) -> None:
        self.record, self.barriers = dict(record), [dict(told) for told in barriers]

    @override
    def _maps(self, base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[list[Reparametrization], list[str]]:
        groups = {
            key: Group(**{**group, "axes": tuple(Axis(**axis) for axis in group["axes"])})
            for key, group in self.record["groups"].items()
        }
        if bare := [key for key, group in groups.items() if not group.axes]:
            raise ValueError(f"expected groups of units with parameters in the ledger, got none for {bare[0]!r}")
        spec = PermutationSpec(groups)
        shapes = {name: base.entries[name].shape for name in spec.moved_names if name in base.entries}
        spec.check({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, whole=True)
        if len(self.record["maps"]) != len(models):
            raise ValueError(f"expected {len(models)} maps of units in the ledger, got {len(self.record['maps'])}")
        maps = [Reparametrization.from_state_dict(spec, _unpacked(packed)) for packed in self.record["maps"]]
        return maps, [f"aligns  as recorded, by {self.record['aligner']}"]


class _Moved(Stand):
    """A tensor of a model in the units of the base; of every model the last one that was read is kept."""

    def __init__(self, own: Stand, name: str, found: Reparametrization, last: dict[str, Tensor]) -> None:
        self.entry: Entry = own.entry
        self._own, self._name, self._found, self._last = own, name, found, last

    @override
    def read(self, piece: slice | None = None) -> Tensor:
        if self._name not in self._last:
            self._last.clear()
            self._last[self._name] = self._found.applied(self._name, self._own.read())
        moved = self._last[self._name]
        return moved if piece is None else moved.reshape(-1)[piece]


def _specification(
    network: nn.Module, stored: Mapping[str, str], base: Checkpoint, models: Sequence[Checkpoint]
) -> tuple[PermutationSpec, list[str]]:
    """Return the groups of units, and the tensors outside the network that follow the order of the features."""
    free = spec_of(network, readers=[])
    known = {*stored.values()}
    outside = {name: entry.shape for name, entry in base.entries.items() if name not in known}
    width = free.groups[free.outputs].size if free.outputs else 0
    readers = [name for name, shape in outside.items() if len(shape) == 2 and shape[1] == width]
    biases = {f"{name.removesuffix('weight')}bias" for name in readers}
    strange = [name for name, shape in outside.items() if name not in readers and name not in biases and shape]
    for model in models:
        strange += [name for name in readers if name in model and model.entries[name].shape[1:] != (width,)]
    if not readers or strange:
        return spec_of(network), []
    told = [name for name in readers if all(_shape(model, name) == outside[name] for model in models)]
    return free.extended({free.outputs: tuple(Axis(name, 1, reads=True) for name in told)}), readers


def _shape(model: Checkpoint, name: str) -> tuple[int, ...] | None:
    return model.entries[name].shape if name in model.entries else None


def _renamed(spec: PermutationSpec, names: Mapping[str, str]) -> PermutationSpec:
    """Return the groups by the names of a checkpoint."""
    groups = {
        key: Group(
            group.size,
            tuple(replace(axis, name=names[axis.name]) for axis in group.axes),
            group.heads,
            group.order,
            group.rigid,
        )
        for key, group in spec.groups.items()
    }
    return PermutationSpec(groups, (), spec.outputs)


def _loaded(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network with other weights."""
    copy = deepcopy(network)
    copy.load_state_dict(dict(state), strict=False)
    return copy


def _packed(found: Reparametrization) -> str:
    """Return a map as text."""
    state = {name: tensor.contiguous() for name, tensor in found.state_dict().items()}
    content = safetensors.torch.save(state)
    if len(content) > _MOST_BYTES:
        raise ValueError(
            f"expected a map of at most {_MOST_BYTES >> 20} MiB, to be kept in the result's header, got "
            f"{len(content) >> 20}: match with within_head='permutation'"
        )
    return base64.b64encode(zlib.compress(content)).decode()


def _unpacked(text: str) -> dict[str, Tensor]:
    """Return the state of a map from text, which may be of an untrusted file."""
    try:
        opened = zlib.decompressobj()
        content = opened.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
        if opened.unconsumed_tail:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MiB")
        return safetensors.torch.load(content)
    except (ValueError, zlib.error, safetensors.SafetensorError) as error:
        raise ValueError(f"expected a map of units in the ledger, got {error}") from error
