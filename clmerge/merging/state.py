"""The state of a merger: accumulators by parameter, additional values, and identities of the merged task vectors."""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from clmerge.merging.accumulators import SlotDtypes, Slots, copied, device_of, float_dtype, slot_blocks, widen
from clmerge.merging.checks import Shapes, check_base, check_shapes, num_entries
from clmerge.merging.kept_beside import Join, added, duplicate
from clmerge.settings import Configured


class Accumulator(Configured, ABC):
    """The state of a merger, with its size, saving, loading, resetting, moving and joining.

    A rule declares the accumulators of a parameter with ``slots`` and any additional state with ``_keep``.

    Attributes:
        slots: Names of the accumulators of a parameter, tensors of its shape: float32, or float64 for float64 vectors.
        order_free: Whether the result is independent of the order of tasks; only then can accumulators be joined.
        base: Fingerprint of the base model, once known.
    """

    slots: tuple[str, ...] = ()
    order_free: bool = True

    def __init__(self) -> None:
        self.base: str | None = None
        self._device: torch.device | None = None
        self._identities: dict[int, str] = {}
        self._shapes: Shapes = {}
        self._slots: dict[str, Slots] = {}
        self._kept_beside: dict[str, tuple[Any, Join]] = {}

    def _slot_dtypes(self, num_tasks: int) -> SlotDtypes:
        """Return the dtypes of a parameter's accumulators after ``num_tasks`` tasks, by slot name."""
        return dict.fromkeys(self.slots)

    def _join_block(self, slots: Slots, other: Slots) -> None:
        """Join the accumulators of two streams; by default they are added."""
        for slot, accumulator in slots.items():
            accumulator.add_(other[slot])

    def _held(self) -> Mapping[str, Slots]:
        """Return the accumulators by parameter, for reading."""
        return self._slots

    def _keep(self, attribute: str, *, join: Join = None) -> None:
        """Declare additional state: an attribute that is saved, loaded, reset, moved and joined with the accumulators.

        Args:
            attribute: Name of the attribute; its current value is the one before the first update: a number, a tensor,
                or a dictionary of such with string keys.
            join: ``"sum"`` adds the values of two accumulators entrywise; a function returns the joined value;
                None if the rule cannot be joined.
        """
        self._kept_beside[attribute] = (duplicate(getattr(self, attribute)), join)

    def _extras(self) -> dict[str, Any]:
        """Return the additional state, as primitives and copies of tensors."""
        return {attribute.strip("_"): duplicate(getattr(self, attribute)) for attribute in self._kept_beside}

    def _load_extras(self, extras: dict[str, Any]) -> None:
        """Restore the additional state that ``_extras`` returned; ``{}`` is the state before the first update."""
        for attribute, (initial, _) in self._kept_beside.items():
            setattr(self, attribute, duplicate(extras.get(attribute.strip("_"), initial), self._device))

    def _join_extras(self, other: Self) -> None:
        """Join the additional state."""
        for attribute, (_, join) in self._kept_beside.items():
            ours, theirs = getattr(self, attribute), getattr(other, attribute)
            if join is not None:
                setattr(self, attribute, added(ours, theirs) if join == "sum" else join(ours, theirs))

    @property
    def tasks(self) -> tuple[int, ...]:
        """Indices of the merged tasks, in order of arrival."""
        return tuple(self._identities)

    @property
    def identities(self) -> dict[int, str]:
        """Hashes of what was merged, by task: of the vector and the statistics that the rule requires."""
        return dict(self._identities)

    @property
    def num_tasks(self) -> int:
        """Number of merged tasks."""
        return len(self._identities)

    def merge_state(self, other: "Accumulator") -> None:
        """Join another accumulator of the same rule, as if ``other``'s task vectors had been merged after these.

        Args:
            other: A merger of the same class and settings, over the same parameters; it is not changed.

        Raises:
            RuntimeError: If the rule depends on the order of tasks or the settings differ.
            TypeError: If ``other`` is another rule.
            ValueError: If base model, names or shapes differ, or both have merged a task with the same index.
        """
        if type(other) is not type(self):
            raise TypeError(f"expected another {type(self).__name__} to join, got {type(other).__name__}")
        if other.settings() != self.settings():
            raise RuntimeError(f"expected the same settings to join two mergers, got {self!r} and {other!r}")
        if not self.order_free:
            raise RuntimeError(
                f"expected a rule that does not depend on the order of tasks, got {self!r}; "
                "update one merger with the task vectors in order instead"
            )
        check_base(other.base, self.base, "a merger")
        if not other.num_tasks:
            return
        if both := sorted(self._identities.keys() & other._identities.keys()):
            raise ValueError(
                f"expected to join mergers of different tasks, got two that both hold {listed(both)}; give every task "
                "an index of its own: update(vector, task=...)"
            )
        if self.num_tasks:
            check_shapes(other._shapes, self._shapes, "a merger")
            self._check_dtypes(other._float_dtypes(), "a merger")
        with torch.inference_mode(False), torch.no_grad():
            self._join(other)
        self._shapes, self.base = dict(self._shapes or other._shapes), self.base or other.base
        self._identities = self._identities | other._identities

    def reset(self) -> None:
        """Remove all tasks; settings and the device set with ``to`` are kept."""
        self._identities, self.base = {}, None
        self._shapes, self._slots = {}, {}
        self._load_extras({})

    def to(self, device: torch.device | str) -> Self:
        """Keep the accumulators on this device from now on. Default: the device of the first task vector.

        Args:
            device: Device of the accumulators.
        """
        self._device = torch.device(device)
        self._slots = copied(self._slots, self._device)
        for attribute in self._kept_beside:
            setattr(self, attribute, duplicate(getattr(self, attribute), self._device))
        return self

    def state_size(self, shapes: Shapes, num_tasks: int) -> int:
        """Return the bytes of the accumulators for task vectors of float32 or lower precision.

        Args:
            shapes: Shapes of the merged parameters by name.
            num_tasks: Number of merged task vectors.

        Example:
            >>> from clmerge.merging import TIES
            >>> TIES().state_size({"w": (100, 10)}, num_tasks=8)
            10000
        """
        dtypes = self._slot_dtypes(num_tasks).values()
        return num_entries(shapes) * sum((dtype or torch.float32).itemsize for dtype in dtypes)

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state: primitives and copies of tensors, safe to load weights-only."""
        return {
            "class": type(self).__name__,
            "settings": self.settings(),
            "tasks": {str(task): identity for task, identity in self._identities.items()},
            "base": self.base,
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "slots": copied(self._slots),
            "extras": self._extras(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by ``state_dict``; further merging is bitwise the same as without interruption.

        Args:
            state: State from ``state_dict`` of a merger of the same class and settings.

        Raises:
            ValueError: If it belongs to another rule or other settings, or tensors are missing. The state is
                then unchanged.
        """
        for key, expected in (("class", type(self).__name__), ("settings", self.settings())):
            if state.get(key) != expected:
                raise ValueError(f"expected the state of {self!r}, got one with {key} {state.get(key)!r}")
        if "tasks" not in state:
            raise ValueError(
                f"expected the tasks merged in the state of {self!r}, got one of another version of clmerge"
            )
        identities = {int(task): str(identity) for task, identity in state["tasks"].items()}
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        wanted = set(self._slot_dtypes(len(identities)))
        for name, shape in shapes.items():
            found = {slot: tuple(tensor.shape) for slot, tensor in state["slots"].get(name, {}).items()}
            if found != dict.fromkeys(wanted, shape):
                raise ValueError(
                    f"expected accumulators {sorted(wanted)} of shape {shape} for {name!r} in the state of "
                    f"{self!r}, got {found}; the checkpoint is damaged or of another version"
                )
        with torch.inference_mode(False):
            slots = copied(state["slots"], self._device)
        self._load_extras(state["extras"])
        self._slots, self._shapes = slots, shapes
        self._identities, self.base = identities, state["base"]

    def _float_dtypes(self) -> dict[str, torch.dtype]:
        return {name: float_dtype(slots) for name, slots in self._slots.items()}

    def _check_dtypes(self, dtypes: dict[str, torch.dtype], source: str) -> None:
        """Raise a ValueError for a float64 tensor if its accumulator is float32: precision would be lost."""
        for name, dtype in self._float_dtypes().items():
            if dtypes[name] == torch.float64 != dtype:
                raise ValueError(
                    f"expected {name!r} in float32 or less as in the first task vector, got float64 in "
                    f"{source}; convert all task vectors to one dtype"
                )

    def _join(self, other: Self) -> None:
        if self.num_tasks:
            widen(self._slots, self._slot_dtypes(self.num_tasks + other.num_tasks))
            for name, slots in self._slots.items():
                order, dtype = list(slots), float_dtype(slots)
                theirs = [other._slots[name][slot].to(device_of(slots)) for slot in order]
                for block, pieces in slot_blocks(slots, *theirs):
                    cast = (piece.to(dtype) if piece.is_floating_point() else piece for piece in pieces)
                    self._join_block(block, dict(zip(order, cast, strict=True)))
            self._join_extras(other)
        else:
            self._slots = copied(other._slots, self._device)
            self._load_extras(other._extras())


def listed(tasks: Sequence[int]) -> str:
    """Format task indices for a message.

    Example:
        >>> listed([0, 2])
        'tasks 0, 2'
    """
    shown = ", ".join(map(str, tasks[:6])) + (f" and {len(tasks) - 6} more" if len(tasks) > 6 else "")
    return f"task{'s' if len(tasks) != 1 else ''} {shown}"
