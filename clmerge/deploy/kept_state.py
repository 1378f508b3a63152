"""State of several named parts of a run, such as its calibrations or routings."""

from collections.abc import Mapping
from typing import Any, Protocol

from clmerge.distributed import of_rank_zero


class Restorable(Protocol):
    """What keeps something between tasks."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors and primitives."""

    def load_state_dict(self, state: Mapping[str, Any]) -> object:
        """Restore what ``state_dict`` returned."""


def take_of_rank_zero(part: Restorable) -> None:
    """Give a part on every process the state that it has on rank zero.

    All processes compute it of the same images; results may differ in their last bits nevertheless.

    Args:
        part: The part, in place.
    """
    part.load_state_dict(of_rank_zero(part.state_dict()))


def states_of(parts: Mapping[str, Restorable]) -> dict[str, Any]:
    """Return the state of every part by name: tensors and primitives."""
    return {name: part.state_dict() for name, part in parts.items()}


def load_states(parts: Mapping[str, Restorable], state: Mapping[str, Any], kind: str) -> None:
    """Restore a state returned by ``states_of``.

    Args:
        parts: The parts by name.
        state: Their states.
        kind: What the parts are called, for the message.

    Raises:
        RuntimeError: If the state belongs to other parts.
    """
    if set(state) != set(parts):
        raise RuntimeError(
            f"expected the state of {kind} {sorted(parts)}, got {sorted(state)}; resume with the {kind} of the "
            "interrupted run"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
